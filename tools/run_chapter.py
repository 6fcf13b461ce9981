"""Run one chapter from clean into _run/NAME.ipynb, and leave nbs/ as it is.

python tools/run_chapter.py annealing_kd
"""

import sys
import time

import nbformat
import refresh
from nbclient.exceptions import CellExecutionError


def main(name: str) -> int:  # exit code
    source = refresh.NBS / f"{name}.ipynb"
    target = refresh.ROOT / "_run" / f"{name}.ipynb"
    if not source.exists():
        known = ", ".join(path.stem for path in refresh.chapters())
        print(f"no chapter {name!r}; the chapters are: {known}", file=sys.stderr)
        return 2
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    nb, start = nbformat.read(source, 4), time.monotonic()
    try:
        refresh.execute(nb, name)
    except CellExecutionError as error:
        place = source.relative_to(refresh.ROOT)
        print(f"{place} failed:\n{refresh.explain(error)}", file=sys.stderr)
        return 1
    finally:  # after a failure too: it shows how far the run came
        nbformat.write(refresh.tidy(nb), target)
    seconds = f"{time.monotonic() - start:.0f} s"
    place = target.relative_to(refresh.ROOT)
    print(f"{name}: every cell ran, in {seconds}; see {place}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))

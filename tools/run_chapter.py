"""Run one chapter from clean into _run/NAME.ipynb, and leave nbs/ as it is: python tools/run_chapter.py annealing_kd"""

import sys
import time

import nbformat
import refresh
from nbclient.exceptions import CellExecutionError


def main(name):
    source, target = (
        refresh.NBS / f"{name}.ipynb",
        refresh.ROOT / "_run" / f"{name}.ipynb",
    )
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
        print(
            f"{source.relative_to(refresh.ROOT)} failed:\n{refresh.explain(error)}",
            file=sys.stderr,
        )
        return 1
    finally:
        nbformat.write(
            refresh.tidy(nb), target
        )  # after a failure too: it shows how far the run came
    print(
        f"{name}: every cell ran, in {time.monotonic() - start:.0f} s; see {target.relative_to(refresh.ROOT)}"
    )
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))

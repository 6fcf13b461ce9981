"""Take the race to a machine without network, and bring its lines back.

python tools/race_pack.py pack DIR        here: data and backbone in one file, < 30 MB
python tools/race_pack.py race DIR ...    there, in a checkout: what is missing
python tools/race_pack.py merge DIR       here: the lines from there

The backbone travels with the three layers that students have, in half precision; what
a teacher wrote is in results/teacher. Packages that are missing there can lie beside
the pack as wheels (pip download --no-deps -d DIR datasets dill multiprocess
platformdirs); `race` finds them. Interrupt and call it again at will.
"""

import argparse
import json
import os
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PACK, HOME, MOST = "race.zip", "KDBOOK_RACE_PACK", 30 * 2**20
WEIGHTS, LAYERS = "model.safetensors", 3


def halves(array: np.ndarray) -> bytes:
    "An array in half precision, high bytes first: they compress, and low ones do not."
    return array.astype(np.float16).view(np.uint8).reshape(-1, 2).T.tobytes()


def whole(packed: bytes, shape: list[int]) -> np.ndarray:
    "What `halves` packed, in single precision."
    pairs = np.frombuffer(packed, np.uint8).reshape(2, -1).T
    numbers = np.ascontiguousarray(pairs).view(np.float16).reshape(shape)
    return numbers.astype(np.float32)


def needed(name: str) -> bool:
    "Whether a weight of the backbone is in a student."
    parts = name.split(".")
    return "layer" not in parts or int(parts[parts.index("layer") + 1]) < LAYERS


def pack(folder: Path) -> Path:
    "Write the pack. Raises `ValueError` where it is larger than it may be."
    from safetensors.numpy import load_file

    from kdbook.archives import fetch

    folder.mkdir(parents=True, exist_ok=True)
    movies, minilm = fetch("movies"), fetch("minilm")
    shapes = {}
    draft = folder / f"{PACK}.part"
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_LZMA) as out:
        for file in [*movies.iterdir(), *minilm.iterdir()]:
            if file.name != WEIGHTS:
                out.write(file, f"{file.parent.name}/{file.name}")
        for name, array in load_file(minilm / WEIGHTS).items():
            if array.dtype.kind == "f":
                shapes[name] = list(array.shape)
                if needed(name):
                    out.writestr(f"weights/{name}", halves(array))
        out.writestr("shapes.json", json.dumps(shapes))
    if draft.stat().st_size > MOST:
        raise ValueError(f"{draft} has {draft.stat().st_size:,} bytes, over {MOST:,}")
    return draft.rename(folder / PACK)


def unpack(folder: Path, cache: Path) -> None:
    "Files in a cache as `fetch` leaves them, but for the backbone's rounded weights."
    from safetensors.numpy import save_file

    from kdbook.archives import ARCHIVES

    with zipfile.ZipFile(folder / PACK) as packed:
        shapes, tensors = json.loads(packed.read("shapes.json")), {}
        held = {*packed.namelist()}
        for name, shape in shapes.items():
            tensors[name] = np.zeros(shape, np.float32)
            if (inside := f"weights/{name}") in held:
                tensors[name] = whole(packed.read(inside), shape)
        for spec in (ARCHIVES["movies"], ARCHIVES["minilm"]):
            (cache / spec.folder).mkdir(parents=True, exist_ok=True)
            for name in spec.files:
                if name != WEIGHTS:
                    content = packed.read(f"{spec.folder}/{name}")
                    (cache / spec.folder / name).write_bytes(content)
    place = cache / ARCHIVES["minilm"].folder / WEIGHTS
    save_file(tensors, place.with_suffix(".part"))
    place.with_suffix(".part").rename(place)


def trust_rounded(cache: Path) -> None:
    "From here on the backbone's file is the one in `cache`, by its digest."
    from kdbook.archives import ARCHIVES
    from kdbook.files import sha256_of

    spec = ARCHIVES["minilm"]
    place = cache / spec.folder / WEIGHTS
    rounded = {WEIGHTS: (place.stat().st_size, sha256_of(place))}
    ARCHIVES["minilm"] = replace(spec, files=spec.files | rounded)


def race(args: argparse.Namespace) -> None:
    "Run what is missing, and copy the files with new lines to `--out`."
    from kdbook.files import results_dir
    from kdbook.lab.race import run_race
    from kdbook.records.race import COURSES, ENTRIES, FLOORS

    methods = tuple(args.method or (m for m in ENTRIES if m not in FLOORS))
    courses = tuple(args.course or COURSES)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        print(run_race(courses, methods, args.jobs, args.hours, args.device), "runs")
    finally:
        for file in (results_dir() / "race").glob("*.jsonl"):
            shutil.copy(file, args.out / file.name)


def merge(folder: Path) -> int:
    """Add the lines that are not here yet; how many there were.

    Raises `ValueError` for lines of a trial on a CPU, which has other weights here."""
    from kdbook.records.standings import knobs_text, race_file
    from kdbook.records.store import append_record, read_lines

    def key(record):
        return (
            record["method"],
            record["lr"],
            knobs_text(record["knobs"]),
            record["seed"],
        )

    added = 0
    for file in sorted(folder.glob("*.jsonl")):
        (_, header), *lines = read_lines(file)
        here = race_file(file.stem)
        have = {key(record) for _, record in read_lines(here)[1:]}
        about = {name: what for name, what in header.items() if name != "format"}
        for _, record in lines:
            if key(record) in have:
                continue
            if record.get("device", "cpu") == "cpu" and "recipe" in record:
                raise ValueError(f"{file} has students of a CPU: a trial, not a record")
            append_record(here, record, about)
            added += 1
    return added


# a process that trains imports this file anew
if home := os.environ.get(HOME):
    sys.path[:0] = map(str, sorted(Path(home).glob("*.whl")))
    if Path(os.environ["KDBOOK_CACHE"]).is_dir():
        trust_rounded(Path(os.environ["KDBOOK_CACHE"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("pack", "race", "merge"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("course", nargs="*", help="race: default all of them")
    parser.add_argument("--method", action="append", help="default: all but floors")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="cpu only to try it"
    )
    parser.add_argument("--jobs", type=int, default=8, help="runs at once")
    parser.add_argument("--hours", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, default=Path("race-lines"))
    args = parser.parse_args()
    if args.what == "pack":
        print(place := pack(args.folder), f"{place.stat().st_size / 2**20:.1f} MB")
    elif args.what == "merge":
        print(merge(args.folder), "lines added")
    else:
        home = args.folder.resolve()
        os.environ |= {HOME: str(home), "KDBOOK_CACHE": str(home / "cache")}
        sys.path[:0] = map(str, sorted(home.glob("*.whl")))
        unpack(home, home / "cache")
        trust_rounded(home / "cache")
        race(args)


if __name__ == "__main__":
    main()

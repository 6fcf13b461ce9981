"""Run the programs of this folder on one job: python tools/others/run.py [--store].

A teacher fine-tuned on 600 film sentences, a student of its first three layers. Each
program prints the share of 200 held-out sentences that its student gets right. Programs
whose library is not installed here are left out, and keep their line in the record.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from kdbook.commands import Job, ready_teacher, tables_of
from kdbook.data import load_task
from kdbook.files import results_dir, write_json
from kdbook.records.store import provenance

HERE = Path(__file__).resolve().parent
PROGRAMS = {  # program -> title, distribution
    "kdbook_fit": ("kdbook, fit", ""),
    "kdbook_trainer": ("kdbook, Trainer", ""),
    "bare_trainer": ("Transformers alone", "transformers"),
    "with_sentence_transformers": ("sentence-transformers", "sentence-transformers"),
    "with_textbrewer": ("TextBrewer", "textbrewer"),
    "with_torchdistill": ("torchdistill", "torchdistill"),
}


def lines_of(path: Path) -> int:
    "Lines that are not empty."
    return sum(bool(line.strip()) for line in path.read_text().splitlines())


def version_of(name: str, python: list[str]) -> str | None:
    "The installed version; None where there is none."
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([python[0], "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def make_job(folder: Path) -> list[str]:
    "The arguments of a program: a teacher's folder and two tables."
    task = load_task("movies")
    for split, count in (("train", 600), ("validation", 200)):
        rows = task[split].select(range(count)).select_columns(["text", "label"])
        rows.to_csv(folder / f"{split}.csv", index=False)
    tables = [str(folder / f"{split}.csv") for split in ("train", "validation")]
    job = Job(*tables[:1], str(folder / "job"), tables[1], teacher_epochs=3)
    ready_teacher(job, tables_of(job))
    return [str(folder / "job" / "work" / "teacher"), *tables]


def run(name: str, arguments: list[str], python: list[str]) -> float:
    "The share that a program prints last."
    with tempfile.TemporaryDirectory() as folder:
        command = [*python, str(HERE / f"{name}.py"), *arguments]
        env = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return round(float(done.stdout.split()[-1]), 3)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", action="store_true", help="keep the figures")
    parser.add_argument(
        "--python",
        type=shlex.split,
        default=[sys.executable],
        help="command that runs a program, where the libraries are in another place",
    )
    args = parser.parse_args()
    path = results_dir() / "others.json"
    known = json.loads(path.read_text()) if path.exists() else {"programs": {}}
    found = known["programs"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = make_job(Path(folder))
        for name, (title, library) in PROGRAMS.items():
            python = args.python if library else [sys.executable]
            version = version_of(library, python) if library else "this one"
            if version is None or not (HERE / f"{name}.py").exists():
                print(f"{title}: {library} is not installed here")
                continue
            try:
                right = run(name, arguments, python)
            except RuntimeError as e:  # a library that does not load here
                print(e)
                continue
            found[name] = {
                "title": title,
                "version": version,
                "lines": lines_of(HERE / f"{name}.py"),
                "right": right,
            }
            print(json.dumps(found[name]), flush=True)
    if args.store:
        write_json({"programs": found, "provenance": provenance()}, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Install kdbook as a user would, into an empty environment, and import it.

    python tools/check_install.py
    python tools/check_install.py --extra train --torch 'torch==2.13.0'

It takes packages from your own pip index: the torch that constraints.txt pins, or the
one you name, and the newest of everything else. One line a step; the exit code is 1
when a step fails, and its output is shown then.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "settings.ini",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
)


def copy_sources(folder):
    "What a package is built from, without builds and caches of the checkout."
    folder.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(ROOT / "kdbook", folder / "kdbook", ignore=ignore)
    return folder


def pinned_torch():
    "The requirement on torch in constraints.txt."
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.search(r"^torch==\S+", constraints, re.M).group()


def clean_environment(**variables):
    "This process's variables, without those that lead to this checkout or its caches."
    leads = ("KDBOOK_", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "IN_TEST")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(leads)}
    return kept | {"PYTHONNOUSERSITE": "1"} | variables


def empty_home(folder):
    "The same for a user who has just been made."
    places = {"HOME": str(folder), "USERPROFILE": str(folder)}
    variables = clean_environment(**places)
    return {k: v for k, v in variables.items() if not k.startswith(("XDG_", "HF_"))}


def step(name, command, **options):
    "Run one step and print its line; leave with 1 where it fails."
    start = time.perf_counter()
    run = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    seconds = time.perf_counter() - start
    print(
        f"{'FAILED' if run.returncode else 'ok'}  {seconds:5.0f} s  {name}", flush=True
    )
    if run.returncode:
        print(run.stdout)
        sys.exit(1)


def check(folder, torch, extra):
    "All steps, in an empty folder."
    source = copy_sources(folder / "kdbook-source")
    home = folder / "home"
    home.mkdir()
    constraints = folder / "constraints.txt"
    constraints.write_text(torch + "\n", encoding="utf-8")
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = str(folder / "venv" / scripts / "python")
    here = dict(cwd=folder, env=clean_environment())
    alone = dict(cwd=folder, env=empty_home(home))
    wanted = f"[{extra}]" if extra else ""
    pip = [python, "-m", "pip"]
    install = [*pip, "install", "-c", constraints, f"{source}{wanted}"]
    line = "from kdbook import annealing_kd"

    step("a new environment", [sys.executable, "-m", "venv", folder / "venv"], **here)
    step(f"pip install '.{wanted}', with {torch}", install, **here)
    step(f"python -c '{line}', with an empty home", [python, "-c", line], **alone)
    step("pip check", [*pip, "check"], **here)


def main():
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", default=pinned_torch(), help="default: %(default)s")
    parser.add_argument("--extra", default="", help="train, book, jupyter or dev")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), args.torch, args.extra)


if __name__ == "__main__":
    main()

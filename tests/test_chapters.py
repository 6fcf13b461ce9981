"""Every chapter runs, is exported, clean and fresh, and keeps to the sizes that the book sets itself."""

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import refresh

ROOT = refresh.ROOT
CHAPTERS = refresh.chapters()
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
FREE_TO_IMPORT = {
    "__init__",
    "__main__",
    "_modidx",
    "plots",
    "widgets",
    "kronecker_bert",
}
HERE = [
    str(p)
    for p in (ROOT, Path.home(), Path(tempfile.gettempdir()).resolve())
    if len(str(p)) > 3
]
PLACES = re.compile(
    "|".join(
        [
            *map(re.escape, HERE),
            r"/home/",
            r"/Users/",
            r"[A-Z]:\\Users",
            "site-packages",
            r"ipykernel_\d+",
            r"\bat 0x[0-9a-f]{6,}",
        ]
    )
)
HEAVY = "transformers datasets accelerate matplotlib ipywidgets IPython pandas sklearn scipy tensorly fastcore nbdev".split()


def cells(path, kind="code"):
    return [
        c
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == kind
    ]


def text(value):
    return "".join(value) if isinstance(value, list) else value


@each_chapter
def test_chapter_runs(path):
    "Run the chapter's own cells in this process, as nbdev_test does."
    from nbdev.test import test_nb

    ok, _ = test_nb(path, skip_flags=["slow"], basepath=ROOT)
    assert ok, "the traceback is in the captured stderr"


def test_exports_are_fresh(tmp_path):
    "The committed package is what nbdev_export writes from the chapters, no module more or less."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "kdbook").mkdir()
    shutil.copy(ROOT / "kdbook" / "__init__.py", tmp_path / "kdbook")
    env = {
        k: v for k, v in os.environ.items() if k != "IN_TEST"
    }  # with IN_TEST set, nbdev_export silently does nothing
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    names = {p.name for p in (ROOT / "kdbook").glob("*.py")} | {
        p.name for p in (tmp_path / "kdbook").glob("*.py")
    }
    _, differ, missing = filecmp.cmpfiles(
        ROOT / "kdbook", tmp_path / "kdbook", names, shallow=False
    )
    assert not differ and not missing, (
        f"run nbdev_export, and delete modules no chapter exports: {sorted(differ + missing)}"
    )


@each_chapter
def test_outputs_are_fresh(path):
    assert not refresh.stale(path), "run `make refresh`"


@each_chapter
def test_chapter_is_clean(path):
    from nbdev.clean import clean_nb

    nb = json.loads(path.read_text(encoding="utf-8"))
    before = json.dumps(nb, sort_keys=True)
    clean_nb(nb, allowed_metadata_keys=["kdbook"])
    assert json.dumps(nb, sort_keys=True) == before, "run nbdev_clean"


@each_chapter
def test_stored_outputs_are_presentable(path):
    "No errors, no path of the machine that made them, no addresses, no widget view where an HTML twin tells more."
    for n, cell in enumerate(cells(path), 1):
        for out in cell["outputs"]:
            assert out["output_type"] != "error", f"code cell {n} stored an error"
            data = out.get("data", {})
            assert not (refresh.VIEW in data and "text/html" in data), (
                f"code cell {n}: run `make refresh`"
            )
            shown = [text(v) for k, v in data.items() if k.startswith("text/")] + [
                text(out.get("text", ""))
            ]
            for part in shown:
                part = re.sub(r"[A-Za-z0-9+/=]{200,}", "", part)  # base64 pictures
                found = PLACES.search(part)
                assert not found, (
                    f"code cell {n} shows {part[max(0, found.start() - 40) : found.end() + 40]!r}"
                )


@each_chapter
def test_cells_are_short(path):
    "STYLE: no code cell over 30 lines, blank lines and directives not counted."
    for n, cell in enumerate(cells(path), 1):
        lines = [
            line
            for line in text(cell["source"]).splitlines()
            if line.strip() and not line.lstrip().startswith("#|")
        ]
        assert len(lines) <= 30, f"code cell {n} has {len(lines)} lines: {lines[0]}"


def test_files_are_short():
    files = [
        p
        for folder in ("kdbook", "tests")
        for p in (ROOT / folder).glob("*.py")
        if p.name != "_modidx.py"
    ]
    long = {
        p.name: n
        for p in files
        if (n := len(p.read_text(encoding="utf-8").splitlines())) > 600
    }
    assert not long, f"over 600 lines: {long}"


def test_every_chapter_is_in_the_reading_order():
    "_quarto.yml names each notebook once, and none that is missing."
    named = re.findall(
        r"^ *- (nbs/\w+\.ipynb)$",
        (ROOT / "_quarto.yml").read_text(encoding="utf-8").split("sidebar:")[1],
        re.M,
    )
    assert sorted(named) == sorted(f"nbs/{p.name}" for p in CHAPTERS)


IMPORT_ALL = """
import sys
import kdbook
assert "torch" not in sys.modules, "import kdbook alone should load nothing"
import torch
tops = lambda: {name.split(".")[0] for name in sys.modules}
known = tops()
for module in sys.argv[2].split():
    __import__("kdbook." + module)
    for name in sorted((tops() - known) & set(sys.argv[1].split())): print(f"kdbook.{module} imports {name}")
    known |= tops()
"""


def test_modules_import_nothing_heavier_than_torch():
    "Names that torch itself loads are not counted; plots and widgets are free to import what they draw with."
    names = sorted(
        p.stem for p in (ROOT / "kdbook").glob("*.py") if p.stem not in FREE_TO_IMPORT
    )
    names.sort(
        key=lambda name: name != "annealing_kd"
    )  # the module that people import first
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, " ".join(HEAVY), " ".join(names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert not run.stdout, run.stdout


def test_imports_point_the_right_way():
    "Who may import whom: techniques and what lies under them never import plots, widgets, benchmark or hf."
    upper = {
        "plots",
        "widgets",
        "benchmark",
        "studies",
        "compression",
        "hf",
        "__main__",
    }
    for path in (ROOT / "kdbook").glob("*.py"):
        if path.stem in upper | {"_modidx"}:
            continue
        found = (
            set(refresh.imports(path.read_text(encoding="utf-8"), relative=True))
            & upper
        )
        assert not found, f"{path.name} imports {sorted(found)}"

"""Every chapter runs, is exported, clean and fresh, and keeps to the book's sizes."""

import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import refresh
from folds import KEPT, hide
from fresh import IMPORTS, imported
from house import TECHNIQUES

ROOT = refresh.ROOT
BOOK = refresh.Book()
CHAPTERS = refresh.chapters()
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
TEMPORARY = Path(tempfile.gettempdir()).resolve()
HERE = [str(p) for p in (ROOT, Path.home(), TEMPORARY) if len(str(p)) > 3]
PLACES = re.compile(
    "|".join(map(re.escape, HERE))
    + r"|/home/|/Users/|[A-Z]:\\Users|site-packages|ipykernel_\d+|\bat 0x[0-9a-f]{6,}"
)
FREE_TO_IMPORT = {"kdbook.plots", "kdbook.widgets", "kdbook.kronecker_bert"}
FREE_TO_IMPORT |= {"kdbook.hf", "kdbook.figures"}
HEAVY = (
    "transformers datasets accelerate matplotlib ipywidgets IPython pandas sklearn "
    "scipy tensorly fastcore nbdev"
)


def cells(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in nb["cells"] if cell["cell_type"] == "code"]


def text(value):
    return "".join(value) if isinstance(value, list) else value


@each_chapter
def test_cells_are_folded(path):
    "JupyterLab and Colab collapse what the site folds."
    nb = json.loads(path.read_text(encoding="utf-8"))
    folded = hide(json.loads(json.dumps(nb)))
    found = [c["metadata"] for c in nb["cells"]]
    assert found == [c["metadata"] for c in folded["cells"]], "run make format"


@each_chapter
def test_chapter_runs(path):
    "Run the chapter's own cells in this process, as nbdev_test does."
    from nbdev.test import test_nb

    ok, _ = test_nb(path, skip_flags=["slow"], basepath=ROOT)
    assert ok, "the traceback is in the captured stderr"


def test_exports_are_fresh(tmp_path):
    "The committed package is what the chapters export, no module more or less."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "kdbook").mkdir()
    shutil.copy(ROOT / "kdbook" / "__init__.py", tmp_path / "kdbook")
    env = {
        k: v for k, v in os.environ.items() if k != "IN_TEST"
    }  # else nothing happens
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    libs = [ROOT / "kdbook", tmp_path / "kdbook"]
    names = {str(p.relative_to(lib)) for lib in libs for p in lib.rglob("*.py")}
    _, differ, missing = filecmp.cmpfiles(*libs, names, shallow=False)
    hint = "run nbdev_export, and delete modules no chapter exports"
    assert not differ and not missing, f"{hint}: {sorted(differ + missing)}"


@each_chapter
def test_outputs_are_fresh(path):
    verdict = BOOK.verdict(path)
    if verdict.kind == refresh.DEPENDENT:  # its cells run in these tests
        warnings.warn(f"{path.stem} is {verdict}; `make refresh` brings new outputs")
    assert verdict.kind != refresh.CHANGED, f"{verdict}; run `make refresh`"


@each_chapter
def test_chapter_is_clean(path):
    from nbdev.clean import clean_nb

    nb = json.loads(path.read_text(encoding="utf-8"))
    before = json.dumps(nb, sort_keys=True)
    clean_nb(nb, allowed_cell_metadata_keys=KEPT)
    assert json.dumps(nb, sort_keys=True) == before, "run nbdev_clean"


SCRIPT = re.compile(r'<script data-kdbook="(\w+)">(.*?)</script>', re.S)


@each_chapter
def test_stored_figures_have_todays_scripts(path):
    "An output carries its script, which no stamp knows."
    for cell in cells(path):
        for out in cell["outputs"]:
            page = text(out.get("data", {}).get("text/html", ""))
            for name, stored in SCRIPT.findall(page):
                script = ROOT / "kdbook" / "scripts" / f"{name}.js"
                hint = f"run tools/refresh.py nbs/{path.name}"
                assert stored == script.read_text(encoding="utf-8"), hint


@each_chapter
def test_stored_outputs_are_presentable(path):
    """No errors, no path of the machine that made them, no addresses, and no widget
    view where an HTML twin tells more."""
    for n, cell in enumerate(cells(path), 1):
        for out in cell["outputs"]:
            assert out["output_type"] != "error", f"code cell {n} stored an error"
            data = out.get("data", {})
            doubled = refresh.VIEW in data and "text/html" in data
            assert not doubled, f"code cell {n}: run `make refresh`"
            shown = [text(v) for k, v in data.items() if k.startswith("text/")]
            for part in [*shown, text(out.get("text", ""))]:
                part = re.sub(r"[A-Za-z0-9+/=]{200,}", "", part)  # base64 pictures
                if found := PLACES.search(part):
                    around = part[max(0, found.start() - 40) : found.end() + 40]
                    pytest.fail(f"code cell {n} shows {around!r}")


def is_import(node):
    return isinstance(node, IMPORTS)


@each_chapter
def test_cells_are_short(path):
    "At most 25 statements a code cell, without imports; one class may be longer."
    for n, cell in enumerate(cells(path), 1):
        tree = refresh.parsed(text(cell["source"]))
        top = [node for node in tree.body if not is_import(node)]
        statements = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.stmt) and not is_import(node)
        ]
        one_class = len(top) == 1 and isinstance(top[0], ast.ClassDef)
        count = len(statements)
        assert count <= 25 or one_class, f"code cell {n} has {count} statements"


def test_files_are_short():
    folders = ("kdbook", "tests", "tools")
    files = (p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for path in files
        if path.name != "_modidx.py"
    }
    long = {path: count for path, count in lines.items() if count > 900}
    assert not long, f"over 900 lines: {long}"


@pytest.mark.parametrize("command", ["check --output-format=concise", "format --check"])
def test_ruff_is_content(command):
    run = subprocess.run(
        [sys.executable, "-m", "ruff", *command.split(), "nbs", "tools", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = (run.stdout + run.stderr).splitlines()
    assert run.returncode == 0, "\n".join([f"ruff {command}", *lines[:20], *lines[-2:]])


def test_every_chapter_is_in_the_reading_order():
    "_quarto.yml names each notebook once, and none that is missing."
    sidebar = (ROOT / "_quarto.yml").read_text(encoding="utf-8").split("sidebar:")[1]
    named = re.findall(r"^ *- (nbs/\w+\.ipynb)$", sidebar, re.M)
    assert sorted(named) == sorted(f"nbs/{p.name}" for p in CHAPTERS)


IMPORT_ALL = """
import sys
import kdbook
assert "torch" not in sys.modules, "import kdbook alone should load nothing"
import torch
tops = lambda: {name.split(".")[0] for name in sys.modules}
known = tops()
for module in sys.argv[2].split():
    __import__(module)
    for name in sorted((tops() - known) & set(sys.argv[1].split())):
        print(f"{module} imports {name}")
    known |= tops()
"""


def test_modules_import_nothing_heavier_than_torch():
    "Names that torch itself loads are not counted."
    names = {name for name in BOOK.package.modules if not name.endswith("__main__")}
    first = "kdbook.annealing_kd"  # what people import first
    order = [first, *sorted(names - FREE_TO_IMPORT - {first})]
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, HEAVY, " ".join(order)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert not run.stdout, run.stdout


# Who may import whom. A floor's modules may import those of the floors named behind it,
# and the pairs below are allowed besides.
FLOORS = {
    "kdbook.checks kdbook.files kdbook.identity kdbook.archives": "files",
    "kdbook.losses kdbook.rows kdbook.checkpoints": "tools",
    "kdbook.data kdbook.models kdbook.words": "foundations",
    "kdbook.distillation kdbook.recipes kdbook.preflight": "foundations",
    "kdbook.training": "foundations",
    "kdbook.evaluation kdbook.attack kdbook.landscape": "measures",
    " ".join(f"kdbook.{name}" for name in TECHNIQUES): "techniques",
    "kdbook.plots kdbook.widgets kdbook.figures": "pictures",
    "kdbook.records.settings kdbook.records.store kdbook.records.ladder": "records",
    "kdbook.records.race kdbook.records.standings kdbook.records.claims": "records",
    "kdbook.own_data kdbook.tokens kdbook.deliver kdbook.hf": "own",
    "kdbook.commands kdbook.compare": "own",
    "kdbook.benchmark kdbook.__main__": "doors",
    "kdbook kdbook.records kdbook.lab": "folders",
}
FLOOR_OF = {name: floor for names, floor in FLOORS.items() for name in names.split()}
MAY_IMPORT = {
    "files": "folders",
    "tools": "folders files",
    "foundations": "folders files tools",
    "measures": "folders files tools",
    "techniques": "folders files tools",
    "pictures": "folders files",
    "records": "folders files records",
    "own": "folders files tools foundations measures techniques records own",
    "doors": "folders files tools records",
    "lab": "folders files tools foundations measures techniques pictures records lab",
    "folders": "",
}
PAIRS = {  # module -> what it may import besides
    "identity": "files",
    "figures": "records.store plots",
    "archives": "files",
    "preflight": "recipes",
    "training": "recipes preflight",
    "words": "training models",
    "attack": "words",
    **{name: "training" for name in TECHNIQUES},
    "reweighted_kd": "training recipes",
    "noisy_label_kd": "training recipes",
    "continuation_kd": "training annealing_kd",
    "progressive_kd": "training annealing_kd",
    "glitter": "training words",
    "combined_kd": "training words annealing_kd",
    "kronecker_bert": "training words kronecker",
    "records.ladder": "evaluation",
    "records.standings": "evaluation",
    "records.claims": "evaluation",
    "data": "archives",
    "models": "archives",
    "distillation": "recipes",  # `live` is an objective
    "__main__": "archives own evaluation",
}
INSIDE = {  # and what inside functions only
    **{name: "distillation" for name in TECHNIQUES},  # to write a column of its own
    "evaluation": "data",  # the out-of-domain sets of a task
    "training": "evaluation",  # scores by name
    "data": "own",  # tables with columns of any name
    "records.ladder": "plots",
    "records.standings": "plots",
    "benchmark": "lab",
    "__main__": "lab",
}


def floor_of(name):
    return "lab" if name.startswith("kdbook.lab.") else FLOOR_OF.get(name)


def edges(module):
    "Pairs of a module that this one imports and whether it does so inside a function."

    def visit(node, inside):
        for _, path in imported(node, module.package):
            home = BOOK.package.home(path)
            yield from [(home.name, inside)] if home else []
        inside = inside or isinstance(node, (ast.FunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return set(visit(module.tree, False))


def allowed(name, other, inside):
    short, other_short = (each.removeprefix("kdbook.") for each in (name, other))
    besides = f"{PAIRS.get(short, '')} {INSIDE.get(short, '') if inside else ''}"
    may = {*MAY_IMPORT[floor_of(name)].split(), *besides.split()}
    return bool({floor_of(other), other_short} & may)


def test_every_module_has_a_floor():
    homeless = [name for name in BOOK.package.modules if floor_of(name) is None]
    assert not homeless, f"the table of floors lacks {homeless}"


def test_imports_point_the_right_way():
    wrong = [
        f"{name} imports {other}{' inside a function' if inside else ''}"
        for name, module in BOOK.package.modules.items()
        if floor_of(name)
        for other, inside in sorted(edges(module))
        if not allowed(name, other, inside)
    ]
    assert not wrong, "\n".join(["imports that the table does not allow:", *wrong])

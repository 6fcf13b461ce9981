"""What makes a chapter stale and of which kind, and what a stored output leaves out."""

import json
import subprocess
import sys

import nbformat
import pytest
import refresh

LOW = """"Below."

import numpy as np

RATE = 0.5
REGISTRY = {}


def _halved(x):  # a private helper
    "Half of it."
    return np.multiply(x, RATE)


def scaled(
    x: float,  # a number
    by: int = 2,
) -> float:  # scaled
    "x, by times."
    return _halved(x) * by


def unused():
    return 0


REGISTRY["unused"] = unused
"""
MIDDLE = """from .low import REGISTRY, scaled
from . import low


class Model:
    "A model."

    rate: float = low.RATE

    def forward(self, x):
        return scaled(x) + self.rate


def named(name):
    return REGISTRY[name]()


def shadow(scaled):
    named = scaled + 1
    return [low for low in (named, scaled)]


def even(n):
    return n == 0 or odd(n - 1)


def odd(n):
    return n != 0 and even(n - 1)
"""
HIGH = """from ..low import scaled as times
from ..middle import Model


def run(x):
    from ..middle import even

    return Model().forward(x) if even(x) else times(x)
"""
OFFER = """from kdbook.low import lazy_names

__getattr__ = lazy_names(__name__, {"run": "kdbook.lab.high"})
"""
CHAPTERS = {  # name -> cells
    "runs": ["from kdbook.lab.high import run", "x = 1\nrun(x)"],
    "offered": ["from kdbook import offer", "offer.run(1)"],
    "named": ["from kdbook.middle import named as f", "# a comment\nf('unused')"],
    "shadows": ["import kdbook.middle", "kdbook.middle.shadow(1)"],
    "counts": ["from kdbook.middle import odd", "def g(even): return even\nodd(3)"],
    "low": [
        "#| default_exp low",
        "#| export\nimport numpy as np",
        "#| export\ndef _halved(x): ...",
        "_halved(1)",
        "#| eval: false\nscaled(1)",
    ],
    "reads": ["from kdbook.low import RATE", "%matplotlib inline\nprint(RATE)"],
}


def notebook(*code, text="Prose."):
    cells = [nbformat.v4.new_markdown_cell(text)]
    return nbformat.v4.new_notebook(
        cells=cells + [nbformat.v4.new_code_cell(source) for source in code]
    )


class Sandbox:
    "A little book, all of whose chapters are stamped."

    def __init__(self, root):
        self.root, self.lib = root, root / "kdbook"
        self.answers = {("a.jsonl", "hinton"): "1"}
        (self.lib / "lab").mkdir(parents=True)
        (root / "nbs").mkdir()
        for name, text in dict(low=LOW, middle=MIDDLE, offer=OFFER).items():
            (self.lib / f"{name}.py").write_text(text)
        (self.lib / "lab" / "high.py").write_text(HIGH)
        for folder in (self.lib, self.lib / "lab"):
            (folder / "__init__.py").write_text("")
        for name, cells in CHAPTERS.items():
            nbformat.write(notebook(*cells), self.chapter(name))
        book, stamps = self.book(), {}
        for path in refresh.chapters(book.nbs):
            reads = [["a.jsonl", "hinton"]] if path.stem == "reads" else []
            nb = nbformat.read(path, 4)
            stamps[path.stem] = book.stamp(nb, reads, list(book.package.statements))
        book.path.write_text(json.dumps(stamps))

    def chapter(self, name):
        return self.root / "nbs" / f"{name}.ipynb"

    def book(self):
        answer = lambda file, query: self.answers.get((file, query), "missing")
        return refresh.Book(self.root, answer)

    def replace(self, module, old, new):
        path = self.lib / f"{module}.py"
        text = path.read_text()
        assert text.count(old) >= 1, f"{old!r} is not in {path}"
        path.write_text(text.replace(old, new))

    def edit(self, name, old, new):
        nb = nbformat.read(self.chapter(name), 4)
        for cell in nb.cells:
            cell.source = cell.source.replace(old, new)
        nbformat.write(nb, self.chapter(name))

    def kinds(self):
        "kind -> names of the chapters that are not fresh."
        book, found = self.book(), {}
        for path in refresh.chapters(book.nbs):
            kind = book.verdict(path).kind
            if kind != "fresh":
                found.setdefault(kind, set()).add(path.stem)
        return found

    def dependent(self):
        kinds = self.kinds()
        assert kinds.keys() <= {"stale by dependence"}, kinds
        return kinds.get("stale by dependence", set())


@pytest.fixture
def sandbox(tmp_path):
    made = Sandbox(tmp_path)
    assert made.kinds() == {}
    return made


SAME = {  # what -> edits (module, old, new) that make nothing stale
    "comment": [
        ("low", "# a private helper", "# its rate is RATE"),
        ("low", "\n\n\n", "\n\n# more\n"),
    ],
    "docstring": [
        ("low", "Half of it.", "Half."),
        ("middle", '    "A model."\n\n', ""),
    ],
    "docment": [("low", "  # a number", "  # in metres"), ("low", "  # scaled", "")],
    "layout": [
        (
            "low",
            "_halved(x) * by",
            "(\n        _halved(\n            x,\n        ) * by\n    )",
        )
    ],
    "moved within its module": [
        ("low", "RATE = 0.5\n", ""),
        ("low", "def unused", "RATE = 0.5\n\n\ndef unused"),
    ],
    "moved to another module": [
        ("middle", "class Model:", "from .lab.high import Model\n\n\nclass Gone:"),
        (
            "lab/high",
            "from ..middle import Model\n",
            "from .. import low\n\n\nclass Model:\n    rate: float = low.RATE\n\n"
            "    def forward(self, x):\n        return times(x) + self.rate\n",
        ),
    ],
    "renamed alias": [("low", "as np", "as numpy"), ("low", "np.mul", "numpy.mul")],
    "from instead of import": [
        ("low", "import numpy as np", "from numpy import multiply"),
        ("low", "np.multiply", "multiply"),
    ],
    "order of imports": [
        ("middle", "from . import low\n", ""),
        ("middle", "from .low", "from . import low\nfrom .low"),
        ("middle", "REGISTRY, scaled", "scaled, REGISTRY"),
    ],
    "absolute import": [("lab/high", "..middle", "kdbook.middle")],
    "new definition": [
        ("low", "def unused", "def new():\n    return scaled(1)\n\n\ndef unused")
    ],
}


@pytest.mark.parametrize("edits", SAME.values(), ids=SAME)
def test_no_change(sandbox, edits):
    for edit in edits:
        sandbox.replace(*edit)
    assert sandbox.kinds() == {}


def test_a_renamed_name_is_no_change(sandbox):
    "Private or not, in the package and in the cells that use it."
    sandbox.replace("low", "_halved", "_half_of")
    sandbox.edit("low", "_halved", "_half_of")
    sandbox.replace("low", "def scaled", "def times")
    sandbox.replace("middle", "REGISTRY, scaled", "REGISTRY, times")
    sandbox.replace("middle", "scaled(x)", "times(x)")
    sandbox.replace("lab/high", "scaled as times", "times")
    assert sandbox.kinds() == {}


RUN = {"runs", "offered"}
OTHER = {  # what -> edit, the chapters that are stale by dependence
    "body": ("middle", "+ self.rate", "- self.rate", RUN),
    "default": ("low", "by: int = 2", "by: int = 3", RUN),
    "two modules below": ("low", "RATE)", "RATE + 0)", RUN | {"low"}),
    "constant": ("low", "RATE = 0.5", "RATE = 0.25", RUN | {"low", "reads"}),
    "member of a registry": ("low", "return 0", "return 1", {"named"}),
    "registry": ("low", '["unused"] = ', '["used"] = ', {"named"}),
    "entry by another module": (
        "middle",
        "def even",
        "low.REGISTRY['x'] = odd\n\n\ndef even",
        {"named"},
    ),
    "update by another module": (
        "middle",
        "def even",
        "REGISTRY |= {}\n\n\ndef even",
        {"named"},
    ),
    "behind a lazy name": ("lab/high", "else times(x)", "else -times(x)", RUN),
    "new method": (
        "middle",
        "def named",
        "    def close(self): ...\n\n\ndef named",
        RUN,
    ),
    "mutual recursion": (
        "middle",
        "n == 0 or odd(n - 1)",
        "n == 0 or odd(n - 3)",
        RUN | {"counts"},
    ),
    "the other of the two": ("middle", "n != 0", "n > 0", RUN | {"counts"}),
    "shadowing function": ("middle", "scaled + 1", "scaled + 2", {"shadows"}),
    "effect": (
        "middle",
        "def even",
        "print(odd)\n\n\ndef even",
        RUN | {"named", "shadows", "counts"},
    ),
}


@pytest.mark.parametrize("edit", OTHER.values(), ids=OTHER)
def test_stale_by_dependence(sandbox, edit):
    *change, stale = edit
    sandbox.replace(*change)
    assert sandbox.dependent() == stale


def test_swapped_definitions_are_noticed(sandbox):
    "Two that trade names are told apart, though the set of digests is the same."
    sandbox.replace("middle", "def even", "def swapped")
    sandbox.replace("middle", "def odd", "def even")
    sandbox.replace("middle", "def swapped", "def odd")
    assert sandbox.dependent() == RUN | {"counts"}


def test_the_definitions_behind_a_dependence_are_named(sandbox):
    sandbox.replace("low", "return 0", "return 1")
    verdict = sandbox.book().verdict(sandbox.chapter("named"))
    assert str(verdict) == "stale by dependence: middle.named"


def test_a_module_used_as_a_value_is_all_its_public_names(sandbox):
    nb = notebook("from kdbook import low", "vars(low)")
    names = {ref.id for ref in refresh.uses(nb, sandbox.book().package).refs}
    assert names == {"kdbook.low:*"}
    before = sandbox.book().package.digests["kdbook.low:*"]
    sandbox.replace("low", "_halved", "_half_of")
    assert sandbox.book().package.digests["kdbook.low:*"] == before
    sandbox.replace("low", "return 0", "return 1")
    assert sandbox.book().package.digests["kdbook.low:*"] != before


def test_records(sandbox):
    "Another answer makes its readers stale; an answer nobody asked for does not."
    sandbox.answers["a.jsonl", "annealing_kd"] = "2"
    assert sandbox.kinds() == {}
    sandbox.answers["a.jsonl", "hinton"] = "3"
    assert sandbox.kinds() == {"changed": {"reads"}}
    verdict = sandbox.book().verdict(sandbox.chapter("reads"))
    assert verdict.reasons == ("a.jsonl hinton",)
    sandbox.answers.clear()  # the file is gone
    assert sandbox.kinds() == {"changed": {"reads"}}


def test_whole_files_are_digested_here(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_RESULTS", str(tmp_path))
    (tmp_path / "a.json").write_text("1")
    one = refresh.answer("a.json", "")
    (tmp_path / "a.json").write_text("2")
    assert one != refresh.answer("a.json", "") != "missing"
    assert refresh.answer("b.json", "") == "missing"


@pytest.mark.parametrize(
    "name, old, new, kinds",
    [
        ("runs", "x = 1", "x = 2", {"changed": {"runs"}}),
        ("runs", "run(x)", "run(x);", {"changed": {"runs"}}),
        ("runs", "x = 1\nrun(x)", "x = 1  # one\nrun( x )", {}),
        ("runs", "Prose.", "Other prose.", {}),
        ("runs", "import run", "import run as go", {"changed": {"runs"}}),
        (
            "named",
            "import named as f",
            "import shadow as f",
            {"stale by dependence": {"named"}},
        ),
        ("low", "scaled(1)", "scaled(2)", {}),  # is not run
        ("low", "def _halved(x): ...", "def _halved(x): pass", {}),  # exports
        ("reads", "%matplotlib inline", "%matplotlib svg", {}),
    ],
)
def test_an_edited_cell(sandbox, name, old, new, kinds):
    sandbox.edit(name, old, new)
    assert sandbox.kinds() == kinds


def test_check_names_what_is_stale(sandbox, capsys):
    assert not refresh.main(["--check"], sandbox.book())
    assert capsys.readouterr().out == "all outputs are fresh\n"
    sandbox.edit("reads", "print(RATE)", "print(-RATE)")
    nbformat.write(notebook("1"), sandbox.chapter("new"))
    sandbox.replace("low", "return 0", "return 1")
    assert refresh.main(["--check"], sandbox.book())
    assert capsys.readouterr().out.splitlines() == [
        "named: stale by dependence: middle.named",
        "new: changed: no stamp",
        "reads: changed: its cells",
    ]


def test_refresh_runs_what_is_stale(sandbox, capsys):
    "New outputs are stored, equal ones leave the notebook alone; both are stamped."
    (sandbox.lib / "files.py").write_text(
        "def reads():\n    return {('b', 'c'), ('a', '')}\n"
    )
    nb = notebook("from kdbook import files", "1 + 1")
    nb.metadata["kdbook"] = {"ran": "long ago"}
    nbformat.write(nb, sandbox.chapter("counts"))
    assert not refresh.main([], sandbox.book())
    stored = nbformat.read(sandbox.chapter("counts"), 4)
    assert [c.source for c in stored.cells[1:]] == [c.source for c in nb.cells[1:]]
    assert stored.cells[2].outputs[0].data == {"text/plain": "2"}
    assert "kdbook" not in stored.metadata
    stamps = json.loads(sandbox.book().path.read_text())
    assert stamps["counts"]["records"] == [["a", "", "missing"], ["b", "c", "missing"]]
    assert sandbox.kinds() == {} and stamps.keys() == CHAPTERS.keys()
    assert "new outputs" in capsys.readouterr().out
    text, written = (
        sandbox.chapter("counts").read_bytes(),
        sandbox.chapter("counts").stat(),
    )
    sandbox.answers["b", "c"] = "1"
    assert not refresh.main([], sandbox.book())
    assert "outputs as before" in capsys.readouterr().out
    assert sandbox.chapter("counts").read_bytes() == text
    assert sandbox.chapter("counts").stat().st_mtime_ns == written.st_mtime_ns
    assert sandbox.kinds() == {}


def test_a_chapter_that_fails_keeps_its_outputs(sandbox, capsys):
    sandbox.edit("reads", "print(RATE)", "print(1 / 0)")
    text = sandbox.chapter("reads").read_text()
    assert refresh.main([], sandbox.book())
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert sandbox.chapter("reads").read_text() == text
    assert sandbox.kinds() == {"changed": {"reads"}}


def only(sandbox, *ran):
    "Stamp the chapter `runs` as if these functions alone had run."
    book = sandbox.book()
    book.stamps["runs"] = book.stamp(
        nbformat.read(sandbox.chapter("runs"), 4), [], [f"kdbook.{id}" for id in ran]
    )
    book.path.write_text(json.dumps(book.stamps))


RAN = ("lab.high:run", "middle:even", "middle:odd", "low:scaled", "low:_halved")


@pytest.mark.parametrize(
    "ran, module, old, new, kinds",
    [
        (RAN, "low", "return _halved(x) * by", "return _halved(x) + by", True),
        (RAN[:3], "low", "return _halved(x) * by", "return _halved(x) + by", False),
        (RAN[:3], "low", "_halved", "_half", False),
        (RAN, "low", "_halved", "_half", False),
        (RAN[:3], "low", "RATE = 0.5", "RATE = 0.6", True),  # a default of Model
        (RAN[:4], "low", "np.multiply(x, RATE)", "np.divide(x, RATE)", False),
        (RAN, "low", "np.multiply(x, RATE)", "np.divide(x, RATE)", True),
        (RAN, "lab/high", "else times(x)", "else times(x, 3)", True),
    ],
)
def test_a_function_that_did_not_run_made_no_difference(
    sandbox, ran, module, old, new, kinds
):
    only(sandbox, *ran)
    assert "runs" not in sandbox.kinds().get("stale by dependence", set())
    sandbox.replace(module, old, new)
    assert ("runs" in sandbox.kinds().get("stale by dependence", set())) == kinds


def test_what_a_chapter_exports_itself_always_counts(sandbox):
    book = sandbox.book()
    book.stamps["low"] = book.stamp(nbformat.read(sandbox.chapter("low"), 4), [], [])
    book.path.write_text(json.dumps(book.stamps))
    sandbox.replace("low", "np.multiply(x, RATE)", "np.divide(x, RATE)")
    assert "low" in sandbox.kinds()["stale by dependence"]


def test_what_runs_is_noted_and_nothing_else_is_changed(tmp_path):
    for name, text in dict(low=LOW, middle=MIDDLE).items():
        (tmp_path / "kdbook").mkdir(exist_ok=True)
        (tmp_path / "kdbook" / f"{name}.py").write_text(text)
    (tmp_path / "kdbook" / "__init__.py").write_text("")
    code = f"""
import inspect, sys
sys.path[:0] = [{str(refresh.ROOT / "tools")!r}, {str(tmp_path)!r}]
import traced
traced.install("kdbook")
from kdbook import middle
assert traced.ran() == []
middle.even(1)
print(*traced.ran())
assert middle.low.scaled.__doc__ == "x, by times."
assert "ran" not in inspect.getsource(middle.even)
try:
    middle.odd("x")
except TypeError as e:
    print(e.__traceback__.tb_next.tb_lineno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = MIDDLE.split("\n").index("    return n != 0 and even(n - 1)") + 1
    assert done.stdout.split() == ["kdbook.middle:even", "kdbook.middle:odd", str(line)]


def test_the_real_book_resolves():
    book = refresh.Book()
    for path in refresh.chapters():
        refresh.uses(json.loads(path.read_text("utf-8")), book.package)
    fit = book.package.reached(["kdbook.training:fit"])
    assert "kdbook.recipes:Stage" in fit and "kdbook.plots:style" not in fit
    known = {f"{name}:" for name in book.package.modules}
    assert all(id.partition(":")[0] + ":" in known for id in fit)


def test_tidy_drops_bars_and_widget_views():
    output = nbformat.v4.new_output
    nb = notebook("x")
    bars = "  0%|          | 0/9\r100%|##########| 9/9 [00:01]\n"
    mixed = "epoch 1\nstep: 50%|#####     | 1/2\nepoch 2\n"
    bar = {refresh.VIEW: {}, "text/plain": "  0%|          | 0/9 [00:00<?]"}
    twin = {refresh.VIEW: {}, "text/plain": "Explore()", "text/html": "<img>"}
    nb.cells[1].outputs = [
        output("stream", name="stderr", text=bars),
        output("stream", name="stdout", text=mixed),
        output("display_data", bar),
        output("display_data", twin),
    ]
    kept = refresh.tidy(nb).cells[1].outputs
    assert [out.output_type for out in kept] == ["stream", "display_data"]
    assert kept[0].text == "epoch 1\nepoch 2\n"
    assert set(kept[1].data) == {"text/plain", "text/html"}

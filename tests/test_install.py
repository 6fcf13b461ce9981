"""The wheel is whole and needs no more than it says, and every import is asked for."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import check_install
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kdbook.files import need

ROOT = check_install.ROOT
EXTRAS = ("train", "book", "jupyter", "dev")  # each holds those before it
# What may import more than NumPy and PyTorch at once, and the extra that brings it.
AT_IMPORT = {
    "plots": "book",
    "widgets": "book",
    "figures": "book",
    "kronecker_bert": "train",
    "hf": "train",
}
BRINGS = packages_distributions()  # import name -> distributions, as installed here
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")


@cache
def required(extra=""):
    "Names of the distributions that the core and, where given, an extra ask for."
    within = EXTRAS[: EXTRAS.index(extra) + 1] if extra else ()
    keys = ["requirements", *(f"{each}_requirements" for each in within)]
    lines = [line for key in keys for line in SETTINGS["DEFAULT"][key].split()]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def with_dependencies(names):
    "The distributions and all that those ask for, as they are installed here."
    todo, seen = list(names), set()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = requires(name) or ()
        except PackageNotFoundError:  # for another platform or Python
            continue
        asked = [Requirement(line) for line in lines]
        here = [r for r in asked if not r.marker or r.marker.evaluate({"extra": ""})]
        todo += [r.name for r in here]
    return seen


@cache
def distributions(top):
    "Who brings the import name `top`: scikit-learn for sklearn."
    return {canonicalize_name(name) for name in BRINGS.get(top, [top])}


def hidden_beside(names):
    "Import names that an environment of these distributions would lack."
    kept = with_dependencies(names) | {"kdbook"}
    return {top for top in BRINGS if not distributions(top) & kept}


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a source distribution, as a release is; the checkout stays clean."
    folder = tmp_path_factory.mktemp("wheel")
    source = check_install.copy_sources(folder / "source")
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", folder / "dist"]
    run = subprocess.run([*command, source], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "A folder that holds the package and nothing else."
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", folder, wheel], check=True)
    return folder


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_whole_package(wheel):
    "Every module, those of subpackages too, and the marker that types may be read."
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith("kdbook/")}
    modules = (ROOT / "kdbook").rglob("*.py")
    expected = {path.relative_to(ROOT).as_posix() for path in modules}
    scripts = {f"kdbook/scripts/{p.name}" for p in (ROOT / "kdbook/scripts").iterdir()}
    assert found == expected | scripts | {"kdbook/py.typed"}


def test_the_wheel_asks_for_two_packages_and_offers_the_extras(wheel):
    found = metadata(wheel)
    asked = [Requirement(line) for line in found.get_all("Requires-Dist")]
    assert {r.name for r in asked if r.marker is None} == {"torch", "numpy"}
    assert tuple(found.get_all("Provides-Extra")) == EXTRAS
    for extra in EXTRAS:
        names = {
            canonicalize_name(r.name)
            for r in asked
            if r.marker is None or r.marker.evaluate({"extra": extra})
        }
        assert names == required(extra), extra


def test_colab_keeps_its_front_end():
    "No JupyterLab in [book], and the versions that Colab has will do."
    assert not {"jupyterlab", "notebook", "jupyter-server"} & required("book")
    assert "ipywidgets>=7.7" in SETTINGS["DEFAULT"]["book_requirements"].split()
    assert "jupyterlab" in required("jupyter")


def test_the_caps_stay():
    "nbdev 3 refuses settings.ini, and nbdev 2 works with old fastcore and execnb only."
    dev = SETTINGS["DEFAULT"]["dev_requirements"].split()
    assert {"nbdev>=2.4.14,<3", "fastcore>=1.12.3,<2", "execnb>=0.1.12,<0.2"} <= {*dev}


HIDE = """
import sys

hidden = set(sys.argv[1].split())


class Without:
    "A finder that does not find what is hidden, as if it were not installed."

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        if name.partition(".")[0] in hidden:
            return None
        return self.finder.find_spec(name, *args)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import kdbook
assert kdbook.__file__.startswith(sys.argv[2]), kdbook.__file__
assert "torch" not in sys.modules, "import kdbook alone should load nothing"
"""


def run_hidden(code, hidden, installed, tmp_path):
    "Run code with the installed wheel, where some packages cannot be found."
    variables = {"PYTHONPATH": str(installed), "KDBOOK_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", HIDE + code, " ".join(sorted(hidden)), str(installed)],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def names_of(folder):
    "Import names of all modules, but for nbdev's index, which nothing imports."
    paths = sorted((folder / "kdbook").rglob("*.py"))
    parts = [path.relative_to(folder).with_suffix("").parts for path in paths]
    names = [".".join(part).removesuffix(".__init__") for part in parts]
    return [name for name in names if not name.endswith("._modidx")]


CORE = """
import importlib

for name in %r:
    importlib.import_module(name)
assert "kdbook._modidx" not in sys.modules

import torch
from kdbook import annealing_kd

student_logits = torch.zeros(4, 3, requires_grad=True)
loss = annealing_kd.annealing_loss(student_logits, torch.randn(4, 3), 0.5)
loss.backward()
assert loss.shape == () and student_logits.grad.abs().sum() > 0
"""


def test_numpy_and_torch_are_enough(installed, tmp_path):
    "Every module that says so is imported where nothing else is to be found."
    hidden = hidden_beside(required())
    assert {"transformers", "datasets", "matplotlib", "sklearn"} <= hidden
    assert not {"numpy", "torch", "sympy"} & hidden
    modules = names_of(installed)
    assert "kdbook.annealing_kd" in modules
    alone = [name for name in modules if name.split(".")[-1] not in AT_IMPORT]
    run_hidden(CORE % alone, hidden, installed, tmp_path)


@pytest.mark.parametrize("name", AT_IMPORT)
def test_what_imports_more_finds_it_in_its_extra(name, installed, tmp_path):
    hidden = hidden_beside(required(AT_IMPORT[name]))
    run_hidden(f"import kdbook.{name}", hidden, installed, tmp_path)


TRAIN = """
import torch
from datasets import Dataset

from kdbook import annealing_kd
from kdbook.distillation import annotate
from kdbook.models import image_net
from kdbook.training import fit

pixels = torch.rand(40, 64).tolist()
columns = dict(idx=list(range(40)), pixel_values=pixels, label=[0, 1] * 20)
rows = Dataset.from_dict(columns)
train = annotate(rows, image_net(8, seed=1))
recipe = annealing_kd.recipe(tau_max=1, epochs=(1, 1))
run = fit(image_net(4), recipe, train, rows)
assert len(run.history) == 2
"""


def test_train_is_enough_to_train(installed, tmp_path):
    "`annotate` with its cache and `fit` with its progress bar, with [train] alone."
    hidden = hidden_beside(required("train"))
    assert {"matplotlib", "sklearn", "scipy", "ipywidgets", "pytest"} <= hidden
    run_hidden(TRAIN, hidden, installed, tmp_path)
    assert list((tmp_path / "cache").rglob("*.safetensors"))


# --- what the code imports, against what settings.ini asks for


def called_imports(node):
    "Of `need(module, extra)` and `import_module(module)`: the module and the extra."
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    given |= dict(zip(("module", "extra"), node.args))
    values = {k: v.value for k, v in given.items() if isinstance(v, ast.Constant)}
    if name not in ("need", "import_module") or "module" not in values:
        return None, None
    default = inspect.signature(need).parameters["extra"].default
    return values["module"], values.get("extra", default) if name == "need" else None


def imports(tree, inside=False):
    "(top-level name, line, whether inside a function, extra that `need` names)."
    for node in ast.iter_child_nodes(tree):
        modules, extra = [], None
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        elif isinstance(node, ast.Call):
            module, extra = called_imports(node)
            modules = [module] if module else []
        for module in modules:
            yield module.split(".")[0], node.lineno, inside, extra
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imports(node, inside or function)


def complaints(source, where):
    "What a module imports and no requirement brings, one sentence each."
    at_once = AT_IMPORT.get(Path(where).stem, "")
    for top, line, inside, extra in imports(ast.parse(source)):
        if top in sys.stdlib_module_names or top == "kdbook":
            continue
        names = distributions(top)
        dist = " or ".join(sorted(names))
        if extra and not names & required(extra):
            yield (
                f"{where}:{line} says that [{extra}] brings {top}, and it does not: "
                f"add {dist} to {extra}_requirements in settings.ini, "
                "or name another extra"
            )
        if inside and not names & required("book"):
            yield (
                f"{where}:{line} imports {top} in a function, and neither [train] nor "
                f"[book] brings it: add {dist} to train_requirements or "
                "book_requirements in settings.ini"
            )
        if not inside and not names & required(at_once):
            key = f"{at_once}_requirements" if at_once else "requirements"
            yield (
                f"{where}:{line} imports {top} when it is imported, and {dist} is not "
                f"in {key} of settings.ini: import it in the function that needs it"
            )


def test_every_import_of_the_package_has_its_requirement():
    paths = sorted((ROOT / "kdbook").rglob("*.py"))
    found = [
        complaint
        for path in paths
        if path.name != "_modidx.py"
        for complaint in complaints(
            path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source, where, says",
    [
        ("import numpy, torch.nn, json\nfrom .rows import Rows", "kdbook/x.py", None),
        ("import pandas", "kdbook/x.py", "pandas is not in requirements of"),
        (
            "class A:\n    import scipy",
            "kdbook/x.py",
            "scipy is not in requirements of",
        ),
        ("import PIL, matplotlib", "kdbook/plots.py", None),
        ("import nbdev", "kdbook/plots.py", "nbdev is not in book_requirements"),
        ("import transformers", "kdbook/kronecker_bert.py", None),
        ("import matplotlib", "kdbook/kronecker_bert.py", "not in train_requirements"),
        ("def f():\n    from sklearn.svm import SVC", "kdbook/x.py", None),
        ("def f():\n    import nbdev", "kdbook/x.py", "neither [train] nor [book]"),
        ("def f():\n    need('tqdm.auto', 'train')", "kdbook/x.py", None),
        (
            "def f():\n    need('sklearn', 'train')",
            "kdbook/x.py",
            "add scikit-learn to t",
        ),
        ("def f():\n    files.need('sklearn')", "kdbook/x.py", None),
        (
            "def f():\n    need(module='nbdev')",
            "kdbook/x.py",
            "says that [book] brings",
        ),
        ("f = lambda: import_module('jax')", "kdbook/x.py", "add jax to train_require"),
    ],
)
def test_a_missing_requirement_is_named(source, where, says):
    found = "\n".join(complaints(source, where))
    assert says in found if says else not found


def test_chapters_need_no_more_than_the_book():
    "What their cells import is in [book]; IPython comes with every kernel."
    allowed = required("book") | {"ipython"}
    others = {"kdbook", "google", "a_package_nobody_has"}  # the last shows an error
    magic = re.compile(r"^\s*[%!].*$", re.M)
    for path in (ROOT / "nbs").glob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        code = [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"]
        for source in code:
            for top, *_ in imports(ast.parse(magic.sub("", "".join(source)))):
                known = top in sys.stdlib_module_names or top in others
                assert known or distributions(top) & allowed, (
                    f"{path.name} imports {top}: add it to book_requirements"
                )


def test_only_extras_that_exist_are_named():
    "In messages, chapters and pages: pip install 'kdbook[NAME]'."
    pages = [
        *(ROOT / "kdbook").rglob("*.py"),
        *(ROOT / "nbs").glob("*.ipynb"),
        *ROOT.glob("*.md"),
    ]
    for path in pages:
        named = re.findall(r"kdbook\[(\w+)\]", path.read_text(encoding="utf-8"))
        assert {*named} <= {*EXTRAS}, path.name


def test_the_development_versions_satisfy_every_bound():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = dict(re.findall(r"^([\w.-]+)==(\S+)$", pins, re.M))
    found = {canonicalize_name(name): version for name, version in found.items()}
    keys = ["requirements", *(f"{extra}_requirements" for extra in EXTRAS)]
    for line in (line for key in keys for line in SETTINGS["DEFAULT"][key].split()):
        asked = Requirement(line)
        pinned = found.get(canonicalize_name(asked.name), "missing")
        assert pinned != "missing" and asked.specifier.contains(pinned), (line, pinned)

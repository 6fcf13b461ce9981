"""Which cells a reader meets folded: python tools/folds.py writes it into the chapters.

Imports, cells that only check, and the code of pictures say nothing that the text
around them does not; a solution would say too much (its cells have the tag "solution").
On the site they fold under a word (build_site.py); JupyterLab
and Colab show them collapsed, by the metadata that this script writes.
"""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\|\s*(export|exports|exporti|include|default_exp)\b", re.M)
ECHO = re.compile(r"^#\|\s*echo:\s*false", re.M)
CHECKS = re.compile(r"^(test_\w+|expect_fail|assert_close|assert_equal|check_\w+)$")
DRAWS = re.compile(r"\b(plt|ax|axes|fig|left|right)\.\w+|\bstyle\(\)")
HIDDEN = {"jupyter": {"source_hidden": True}, "cellView": "form"}
UNSEEN = HIDDEN | {"jupyter": HIDDEN["jupyter"] | {"outputs_hidden": True}}
KEPT = [*HIDDEN, "tags"]  # metadata of a cell that nbdev_clean leaves
SPOILER = re.compile(r"\A<details><summary>.*?</summary>\n\n(.*)\n\n</details>\Z", re.S)


def solves(cell: dict[str, Any]) -> bool:
    "Whether a cell belongs to the solution of an exercise."
    return "solution" in cell["metadata"].get("tags", [])


def name_of(call: ast.AST) -> str:
    "The last name of what is called."
    called = getattr(call, "func", None)
    return getattr(called, "attr", None) or getattr(called, "id", "")


def checks(tree: ast.Module) -> int:
    "How many things a cell checks."
    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    named = sum(bool(CHECKS.match(name_of(call))) for call in calls)
    return named + sum(isinstance(node, ast.Assert) for node in nodes)


def pictures(cell: dict[str, Any]) -> bool:
    "Whether an output is a picture, or a figure that moves."
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        text = "".join(data.get("text/html", ""))
        if "image/png" in data or "kd-explore" in text or "kd-figure" in text:
            return True
    return False


def fold(
    cell: dict[str, Any],  # of a notebook
) -> str | None:  # the word to fold it under; None: it stays open
    "Whether a cell's code is folded, and under which word."
    source = "".join(cell["source"])
    if cell["cell_type"] != "code" or solves(cell) or DIRECTIVE.search(source):
        return None
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a magic
        return None
    if not tree.body:
        return None
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body):
        return "Imports"
    if pictures(cell):
        return "Code of the figure"
    if not cell.get("outputs"):
        if count := checks(tree):
            return f"Checks ({count})"
        defines = all(isinstance(node, ast.FunctionDef) for node in tree.body)
        if defines and DRAWS.search(source):
            return "Code of the figure"
    return None


def hide(nb: dict[str, Any]) -> dict[str, Any]:
    "The notebook, where folded cells are collapsed in JupyterLab and Colab."
    for cell in nb["cells"]:
        if cell["cell_type"] != "code":
            continue
        for key in HIDDEN:
            cell["metadata"].pop(key, None)
        if solves(cell):
            cell["metadata"].update(UNSEEN)
        elif fold(cell) or ECHO.search("".join(cell["source"])):
            cell["metadata"].update(HIDDEN)
    return nb


def main() -> None:
    from refresh import chapters, save

    for path in chapters():
        save(nbformat.from_dict(hide(nbformat.read(path, 4))), path)


if __name__ == "__main__":
    sys.exit(main())

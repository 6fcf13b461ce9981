"""Build the site into _docs/ without Quarto: python tools/build_site.py [--quarto]

nbdev's filter fills in the API docs on a copy of the chapters, cells that say little
are folded there (folds.py), smalldocs renders the copy as _quarto.yml says, and
pages.py makes the pages independent of other hosts. Exit code 1 means warnings. With
--quarto the same copy is rendered by an installed Quarto instead.
"""

import ast
import contextlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from folds import DIRECTIVE, SPOILER, fold, solves
from owner import PLACEHOLDER, owner
from pages import finish

ROOT = Path(__file__).resolve().parent.parent
# smalldocs says of each of these Quarto settings that it does not use it
EXPECTED = ("execute.enabled", "ipynb-filters", "html-math-method")
LOADED = re.compile(r"\w+: [\d,]+ read, [\d,]+ unclear and \d+ duplicates dropped")
IMPORTS = (ast.Import, ast.ImportFrom)
TO_INDEX = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>kdbook</title>
<meta http-equiv="refresh" content="0; url=nbs/index.html">
<a href="nbs/index.html">kdbook</a>
</html>
"""


def without_title(nb: dict[str, Any]) -> dict[str, Any]:
    """`nb` less its `# Title` and subtitle.

    JupyterLab needs them; the site has the front matter, and would print them twice."""
    front = "".join(nb["cells"][0]["source"]) if nb["cells"] else ""
    description = re.search(r'^description: *"?(.*?)"? *$', front, re.M)
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and re.match(r"\s*# ", source):
            source = re.sub(r"\A\s*# [^\n]*\n*", "", source)
            if description:
                words = re.escape(description.group(1))
                source = re.sub(rf"\A> *{words}\.? *(\n\n+|\Z)", "", source)
            cell["source"] = source
            break
    return nb


def without_owner(
    settings: str,  # of the site, YAML
) -> str:
    "The settings, without addresses while they lead nowhere."
    if owner() != PLACEHOLDER:
        return settings
    data = yaml.safe_load(settings)
    for key in ("site-url", "repo-url", "repo-actions"):
        data["website"].pop(key, None)
    data["website"]["navbar"].pop("right", None)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def folds(nb: dict[str, Any]) -> dict[str, str]:
    "The cells of a chapter that are folded: id -> the word shown instead."
    words = {cell.get("id"): fold(cell) for cell in nb["cells"]}
    return {id: word for id, word in words.items() if id and word}


def folded(
    nb: dict[str, Any],  # a chapter's copy
    words: dict[str, str],  # as `folds` gives them
) -> dict[str, Any]:
    "The copy with directives that fold cells, and without a badge that leads nowhere."
    if owner() == PLACEHOLDER:
        badge = lambda cell: "colab-badge" in "".join(cell["source"])
        nb["cells"] = [cell for cell in nb["cells"] if not badge(cell)]
    for cell in nb["cells"]:
        if word := words.get(cell.get("id")):
            source = "".join(cell["source"])
            how = f'#| code-fold: true\n#| code-summary: "{word}"\n'
            cell["source"] = how + source
    return nb


def quiet(
    nb: dict[str, Any],  # a chapter's copy
) -> dict[str, Any]:
    "The copy without what `load_task` says once in every process."
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                lines = "".join(output["text"]).splitlines(keepends=True)
                output["text"] = [line for line in lines if not LOADED.match(line)]
        if "outputs" in cell:
            said = lambda output: output.get("text", True)
            cell["outputs"] = [output for output in cell["outputs"] if said(output)]
    return nb


def solutions(
    nb: dict[str, Any],  # a chapter's copy
) -> dict[str, Any]:
    "The copy with each solution, text and code, in one block that opens."
    html = lambda source: {"cell_type": "markdown", "metadata": {}, "source": source}
    cells = []
    for solution, group in groupby(nb["cells"], solves):
        group = list(group)
        if solution:
            for cell in group:
                cell["source"] = SPOILER.sub(r"\1", "".join(cell["source"]))
            opening = '<details class="solution">\n<summary>Solution</summary>\n'
            group = [html(opening), *group, html("</details>")]
        cells += group
    nb["cells"] = cells
    return nb


def for_filter(
    nb: dict[str, Any],  # a chapter
) -> dict[str, Any]:
    """The chapter, in which programs are not run.

    The filter runs whatever imports something; signatures need no more than the cells
    that do nothing else, and those that are exported."""
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or DIRECTIVE.search(source):
            continue
        with contextlib.suppress(SyntaxError):  # a magic
            kinds = {isinstance(n, IMPORTS) for n in ast.parse(source).body}
            if kinds == {True, False}:
                cell["source"] = "#| eval: false\n" + source
    return nb


def lenient(signature: Callable[..., Any]) -> Callable[..., Any]:
    """`signature`, but an annotation in quotes may name what is not imported.

    It stays text then, as `datasets` does, which the package imports in functions."""

    def of(obj, *, eval_str=False, **kwargs):
        try:
            return signature(obj, eval_str=eval_str, **kwargs)
        except NameError:
            return signature(obj, **kwargs)

    return of


def prepare(nbs: Path, work: Path) -> None:
    "Make a copy of the chapters with their API docs filled in."
    import fastcore.docments
    from nbdev.cli import nbdev_filter

    # show_doc calls it, with eval_str
    fastcore.docments.signature = lenient(inspect.signature)
    shutil.rmtree(work, ignore_errors=True)
    ignored = shutil.ignore_patterns(".*", "__pycache__")
    shutil.copytree(nbs, work / "nbs", ignore=ignored)
    settings = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    (work / "_quarto.yml").write_text(without_owner(settings), encoding="utf-8")
    # the filter runs the chapters' import and export cells
    sys.path.insert(0, str(ROOT))
    for path in sorted((work / "nbs").glob("*.ipynb")):
        chapter = json.loads(path.read_text(encoding="utf-8"))
        words = folds(chapter)
        path.write_text(json.dumps(for_filter(chapter)), encoding="utf-8")
        with contextlib.chdir(nbs):
            filled = nbdev_filter.__wrapped__(fname=path, printit=False)
        nb = folded(without_title(json.loads(filled)), words)
        nb = solutions(nb if path.stem == "data" else quiet(nb))
        path.write_text(json.dumps(nb), encoding="utf-8")


def replace(out: Path, work: Path) -> None:
    "Put the rendered pages in place, and remove the copy of the chapters."
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(work / "_docs", out)
    shutil.rmtree(work)


def quarto(
    out: Path = ROOT / "_docs", work: Path = ROOT / "_proc", nbs: Path = ROOT / "nbs"
) -> None:
    """Render with Quarto.

    The copy's settings leave out the filter, which has run already, and leniently."""
    if not shutil.which("quarto"):
        sys.exit(
            "quarto is not on the PATH: install it from quarto.org, or leave --quarto "
            "out"
        )
    prepare(nbs, work)
    settings = work / "_quarto.yml"
    lines = settings.read_text(encoding="utf-8").splitlines(keepends=True)
    unfiltered = [line for line in lines if "ipynb-filters" not in line]
    settings.write_text("".join(unfiltered), encoding="utf-8")
    subprocess.run(["quarto", "render", str(work)], check=True)
    replace(out, work)


def main(
    out: Path = ROOT / "_docs", work: Path = ROOT / "_proc", nbs: Path = ROOT / "nbs"
) -> list[str]:  # warnings
    from smalldocs.site import build

    start = time.monotonic()
    os.environ.pop("IN_TEST", None)
    prepare(nbs, work)
    site = build(work, quiet=True)
    expected = lambda warning: any(known in warning for known in EXPECTED)
    warnings = [warning for warning in site.warnings if not expected(warning)]
    (work / "_docs" / "index.html").write_text(TO_INDEX, encoding="utf-8")
    warnings += finish(work / "_docs")
    replace(out, work)
    (out / ".nojekyll").touch()
    pages = len(list(out.rglob("*.html")))
    print(f"{out.name}/: {pages} pages in {time.monotonic() - start:.0f} s")
    print(*warnings, sep="\n")
    return warnings


if __name__ == "__main__":
    sys.exit(quarto() if "--quarto" in sys.argv else bool(main()))

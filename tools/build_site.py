"""Build the site into _docs/ without Quarto: python tools/build_site.py [--quarto]

nbdev's filter fills in the API docs on a copy of the chapters, smalldocs renders them
as _quarto.yml says, and formulas become MathML, which a browser shows without a
network; where there is one, KaTeX then draws them finer. Exit code 1 means warnings.
With --quarto the same copy is rendered by an installed Quarto instead.
"""

import contextlib
import html
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# smalldocs says of each of these Quarto settings that it does not use it
EXPECTED = ("execute.enabled", "ipynb-filters", "html-math-method")
MATH = re.compile(
    r'(<span class="math (inline|display)">)\\[(\[](.*?)\\[)\]](</span>)', re.S
)
DRAW_FINER = """<script>
addEventListener("DOMContentLoaded", function () {
  if (!window.katex) return;
  document.querySelectorAll("span.math").forEach(function (span) {
    const tex = span.querySelector("annotation");
    const display = span.classList.contains("display");
    const how = { displayMode: display, throwOnError: false };
    if (tex) katex.render(tex.textContent, span, how);
  });
});
</script>"""
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
    shutil.copy(ROOT / "_quarto.yml", work)
    # the filter runs the chapters' import and export cells
    sys.path.insert(0, str(ROOT))
    for path in sorted((work / "nbs").glob("*.ipynb")):
        with contextlib.chdir(nbs):
            filled = nbdev_filter.__wrapped__(fname=nbs / path.name, printit=False)
        path.write_text(json.dumps(without_title(json.loads(filled))), encoding="utf-8")


def known_to_latex2mathml(tex: str) -> str:
    "The formula in words that the converter reads, or reads aright."
    tex = re.sub(r"\\tag\{(.*?)\}", r"\\qquad \\text{(\1)}", tex)
    tex = re.sub(r"(\\(?:begin|end))\{aligned\}", r"\1{align*}", tex)
    tex = re.sub(r"(?<!\\)\\\|", "\u2016", tex)  # misread after \big and its kin
    return re.sub(r"\\arg(?![a-z])", r"\\operatorname{arg}", tex)


def mathml(
    match: re.Match[str],  # of MATH
    page: str,  # for messages
    problems: list[str],  # what goes wrong is added
) -> str:
    "The formula as MathML that keeps its TeX as an annotation."
    from latex2mathml.converter import convert

    opening, kind, escaped, closing = match.groups()
    tex = html.unescape(escaped).strip()
    display = "block" if kind == "display" else "inline"
    try:
        drawn = convert(known_to_latex2mathml(tex), display=display)
    except Exception as error:  # the converter has a class per kind of mistake
        problems.append(f"{page}: formula {tex!r}: {type(error).__name__} {error}")
        return match.group(0)
    unknown = re.search(r">(\\[^<]+)<", drawn)
    if unknown:
        problems.append(
            f"{page}: formula {tex!r}: latex2mathml does not know {unknown.group(1)!r}"
        )
    start = re.match(r"<math[^>]*>", drawn).group(0)
    inner = drawn.removeprefix(start).removesuffix("</math>")
    note = f'<annotation encoding="application/x-tex">{html.escape(tex)}</annotation>'
    return f"{opening}{start}<semantics>{inner}{note}</semantics></math>{closing}"


def offline_maths(out: Path) -> list[str]:
    "Turn the formulas of every page into MathML; what could not be turned."
    problems: list[str] = []
    for page in sorted(out.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        new, n = MATH.subn(lambda m: mathml(m, page.name, problems), text)
        if n:
            new = new.replace("</body>", DRAW_FINER + "</body>")
            page.write_text(new, encoding="utf-8")
    return problems


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
) -> bool:  # True where there were warnings
    from smalldocs.site import build

    start = time.monotonic()
    os.environ.pop("IN_TEST", None)
    prepare(nbs, work)
    site = build(work, quiet=True)
    expected = lambda warning: any(known in warning for known in EXPECTED)
    warnings = [warning for warning in site.warnings if not expected(warning)]
    warnings += offline_maths(work / "_docs")
    replace(out, work)
    (out / "index.html").write_text(TO_INDEX, encoding="utf-8")
    (out / ".nojekyll").touch()
    pages = len(list(out.rglob("*.html")))
    print(f"{out.name}/: {pages} pages in {time.monotonic() - start:.0f} s")
    print(*warnings, sep="\n")
    return bool(warnings)


if __name__ == "__main__":
    sys.exit(quarto() if "--quarto" in sys.argv else main())

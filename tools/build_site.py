"""Build the site into _docs/ without Quarto: python tools/build_site.py

nbdev's filter fills in the API docs on a copy of the chapters, smalldocs renders them as _quarto.yml says, and formulas
become MathML, which a browser shows without a network; where there is one, KaTeX then draws them finer.
Exit code 1 means warnings. With --quarto the same copy is rendered by an installed Quarto instead.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# smalldocs says of each of these Quarto settings that it does not use it
EXPECTED = ("execute.enabled", "ipynb-filters", "html-math-method")
MATH = re.compile(
    r'(<span class="math (inline|display)">)\\[(\[](.*?)\\[)\]](</span>)', re.S
)
DRAW_FINER = """<script>addEventListener("DOMContentLoaded",function(){if(window.katex)document.querySelectorAll("span.math").forEach(function(s){
var t=s.querySelector("annotation");if(t)katex.render(t.textContent,s,{displayMode:s.classList.contains("display"),throwOnError:false})})})</script>"""
TO_INDEX = '<!doctype html><html lang="en"><meta charset="utf-8"><title>kdbook</title><meta http-equiv="refresh" content="0; url=nbs/index.html"><a href="nbs/index.html">kdbook</a></html>\n'


def without_title(nb):
    "`nb` less the `# Title` and subtitle that JupyterLab needs and the site, which has the front matter, would print twice."
    front = "".join(nb["cells"][0]["source"]) if nb["cells"] else ""
    found = re.search(r'^description: *"?(.*?)"? *$', front, re.M)
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and re.match(r"\s*# ", source):
            source = re.sub(r"\A\s*# [^\n]*\n*", "", source)
            if found:
                source = re.sub(
                    r"\A> *" + re.escape(found.group(1)) + r"\.? *(\n\n+|\Z)",
                    "",
                    source,
                )
            cell["source"] = source
            break
    return nb


def lenient(signature):
    "`signature`, but an annotation in quotes stays text where its module is not imported, as `datasets` is not by the package."

    def of(obj, *, eval_str=False, **kwargs):
        try:
            return signature(obj, eval_str=eval_str, **kwargs)
        except NameError:
            return signature(obj, **kwargs)

    return of


def prepare(nbs, work):
    "A copy of the chapters with their API docs filled in."
    import fastcore.docments
    from nbdev.cli import nbdev_filter

    fastcore.docments.signature = lenient(
        inspect.signature
    )  # which show_doc calls, with eval_str
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(
        nbs, work / "nbs", ignore=shutil.ignore_patterns(".*", "__pycache__")
    )
    shutil.copy(ROOT / "_quarto.yml", work)
    sys.path.insert(
        0, str(ROOT)
    )  # the filter runs the chapters' import and export cells
    for path in sorted((work / "nbs").glob("*.ipynb")):
        with contextlib.chdir(nbs):
            filled = nbdev_filter.__wrapped__(fname=nbs / path.name, printit=False)
        path.write_text(json.dumps(without_title(json.loads(filled))), encoding="utf-8")


def mathml(match, page, problems):
    "The formula as MathML that keeps its TeX as an annotation."
    from latex2mathml.converter import convert

    opening, kind, escaped, closing = match.groups()
    tex = html.unescape(escaped).strip()
    known = re.sub(r"\\tag\{(.*?)\}", r"\\qquad \\text{(\1)}", tex)
    known = re.sub(r"(\\(?:begin|end))\{aligned\}", r"\1{align*}", known)
    known = re.sub(
        r"(?<!\\)\\\|", "\u2016", known
    )  # it misreads \| after \big and its kin
    known = re.sub(r"\\arg(?![a-z])", r"\\operatorname{arg}", known)
    try:
        drawn = convert(known, display="block" if kind == "display" else "inline")
    except (
        Exception
    ) as error:  # the converter has an exception class per kind of mistake
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


def offline_maths(out):
    "Turn the formulas of every page into MathML; return what could not be turned."
    problems = []
    for page in sorted(out.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        new, n = MATH.subn(lambda m: mathml(m, page.name, problems), text)
        if n:
            page.write_text(
                new.replace("</body>", DRAW_FINER + "</body>"), encoding="utf-8"
            )
    return problems


def quarto(out=ROOT / "_docs", work=ROOT / "_proc", nbs=ROOT / "nbs"):
    "Render with Quarto; the filter has run already, with the leniency it needs, so the copy's settings leave it out."
    if not shutil.which("quarto"):
        sys.exit(
            "quarto is not on the PATH: install it from quarto.org, or leave --quarto out"
        )
    prepare(nbs, work)
    settings = work / "_quarto.yml"
    settings.write_text(
        "".join(
            line
            for line in settings.read_text(encoding="utf-8").splitlines(True)
            if "ipynb-filters" not in line
        ),
        encoding="utf-8",
    )
    subprocess.run(["quarto", "render", str(work)], check=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(work / "_docs", out)
    shutil.rmtree(work)


def main(out=ROOT / "_docs", work=ROOT / "_proc", nbs=ROOT / "nbs"):
    from smalldocs.site import build

    start = time.monotonic()
    os.environ.pop("IN_TEST", None)
    prepare(nbs, work)
    site = build(work, quiet=True)
    bad = [
        warning
        for warning in site.warnings
        if not any(known in warning for known in EXPECTED)
    ]
    bad += offline_maths(work / "_docs")
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(work / "_docs", out)
    shutil.rmtree(work)
    (out / "index.html").write_text(TO_INDEX, encoding="utf-8")
    (out / ".nojekyll").touch()
    print(
        f"{out.name}/: {len(list(out.rglob('*.html')))} pages in {time.monotonic() - start:.0f} s",
        *bad,
        sep="\n",
    )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(quarto() if "--quarto" in sys.argv else main())

"""Re-run chapters in a fresh kernel each and store their outputs.

python tools/refresh.py                 the stale ones
python tools/refresh.py nbs/data.ipynb  the named ones, stale or not
python tools/refresh.py --check         only say which are stale (exit code 1 when there
                                        are any), and why

nbs/stamps.json says of every chapter what its stored outputs were made of: its own
cells, the definitions of kdbook that they use (see fresh.py), which functions ran (see
traced.py), and the answers of the records it read. Where cells or answers differ, a
chapter is "changed". Where only definitions differ, it is "stale by dependence": its
outputs may still be right. A new torch or matplotlib makes nothing stale.
"""

import argparse
import ast
import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import nbformat
from folds import KEPT, hide
from fresh import Canonical, Module, Package, Ref, bound, sha
from nbformat import NotebookNode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
VIEW = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"\d+%\|.*?\|")
EXPORTED = re.compile(r"^#\|\s*export[si]?\b", re.M)
NOT_RUN = re.compile(r"^#\|\s*eval:\s*false", re.M)
DEFAULT_EXP = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.M)
TRIPLE = re.compile(r'\[\s+("[^"]*"),\s+("[^"]*"),\s+("[^"]*")\s+\]')
MAGIC = re.compile(r"^([ \t]*)[%!].*$", re.M)
BEFORE = """import sys
sys.path.insert(0, {tools!r})
import traced
sys.path.pop(0)
traced.install("kdbook")"""
AFTER = """import json, sys
files = sys.modules.get("kdbook.files")
reads = sorted(files.reads()) if files else []
print(json.dumps([reads, sys.modules["traced"].ran()]))"""


def chapters(folder: Path = NBS) -> list[Path]:
    return sorted(folder.glob("*.ipynb"))


# What outputs are made of


@dataclass(frozen=True)
class Uses:
    "What decides a chapter's outputs, apart from the records it reads."

    cells: str  # digest of its own code, where definitions have numbers
    refs: list[Ref]  # the definitions that its cells name, by that number


def parsed(source: str) -> ast.Module:
    "The code of a cell, without its magics."
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.parse(MAGIC.sub(r"\1pass", source))


def sources(nb: NotebookNode) -> list[str]:
    return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]


def example_cells(nb: NotebookNode) -> list[tuple[str, ast.Module]]:
    "The cells that run and do not export: source and code."
    run = (s for s in sources(nb) if not EXPORTED.search(s) and not NOT_RUN.search(s))
    return [(source, parsed(source)) for source in run]


def module_of(nb: NotebookNode, package: Package) -> Module | None:
    "The module that a chapter exports."
    named = DEFAULT_EXP.search("\n".join(sources(nb)))
    return package.modules.get(f"{package.name}.{named[1]}") if named else None


def uses(nb: NotebookNode, package: Package) -> Uses:
    "What the cells of a chapter say, and what they name."
    cells, own = example_cells(nb), module_of(nb, package)
    names = bound([node for _, cell in cells for node in cell.body])
    look = lambda name: names.get(name) or (own and own.look(name))
    numbers: dict[Ref, int] = {}
    text: list[str] = []
    for source, cell in cells:
        canonical = Canonical(package.find, look)
        for node in cell.body:
            canonical.add(node)
        if canonical.tokens:  # a semicolon hides the value
            text.append("quiet" if source.rstrip().endswith(";") else "cell")
        for token in canonical.tokens:
            if isinstance(token, Ref):
                token = f"#{numbers.setdefault(token, len(numbers))}"
            text.append(token)
    return Uses(sha(text), list(numbers))


def answer(file: str, query: str) -> str:
    "The digest of what a file of results/ says; of all of it, where `query` is empty."
    from kdbook.records.store import digest

    return digest(file, query)


FRESH, CHANGED, DEPENDENT = "fresh", "changed", "stale by dependence"


@dataclass(frozen=True)
class Verdict:
    "Whether a chapter's stored outputs stand, and if not, why."

    kind: str = FRESH
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.kind, ", ".join(self.reasons)]))


class Book:
    "The chapters, the package, and the stamps of the stored outputs."

    def __init__(
        self,
        root: Path = ROOT,  # with nbs/, kdbook/ and results/
        answer: Callable[[str, str], str] = answer,  # file, query -> digest
    ):
        self.root, self.nbs, self.answer = root, root / "nbs", cache(answer)
        self.path = self.nbs / "stamps.json"
        self.stamps = self.stored()

    def stored(self) -> dict[str, Any]:
        "The stamps as they stand in the file."
        known = self.path.exists()
        return json.loads(self.path.read_text("utf-8")) if known else {}

    @cached_property
    def package(self) -> Package:
        return Package(self.root / "kdbook")

    def depends(self, refs: list[Ref], ran: Collection[str]) -> list[str]:
        digests = self.package.digests_of([ref.id for ref in refs], ran)
        return [f"{ref.name} {digests[ref.id][:8]}" for ref in refs]

    def stamp(
        self,
        nb: NotebookNode,
        reads: list[list[str]],  # file and query of the records that the run read
        ran: list[str],  # "module:function" of the functions that ran
    ) -> dict[str, Any]:
        "What the outputs of a run were made of."
        used, shapes = uses(nb, self.package), self.package.shapes
        answers = [[file, query, self.answer(file, query)] for file, query in reads]
        # what a chapter exports itself runs in its cells, where nobody notes it
        own = module_of(nb, self.package)
        ran = [*ran, *(id for id in shapes if own and id.startswith(f"{own.name}:"))]
        known = sorted({shapes[id] for id in ran if id in shapes})
        return {
            "cells": used.cells,
            "depends": self.depends(used.refs, known),
            "ran": " ".join(known),
            "records": answers,
        }

    def verdict(self, path: Path) -> Verdict:
        "Whether the stamp of a chapter is still true."
        stamp = self.stamps.get(path.stem)
        if not stamp:
            return Verdict(CHANGED, ("no stamp",))
        used = uses(json.loads(path.read_text("utf-8")), self.package)
        reasons = ["its cells"] if used.cells != stamp["cells"] else []
        for file, query, digest in stamp["records"]:
            if self.answer(file, query) != digest:
                reasons.append(f"{file} {query}".strip())
        if reasons:
            return Verdict(CHANGED, tuple(reasons))
        depends = self.depends(used.refs, stamp["ran"].split())
        pairs = zip(used.refs, depends, stamp["depends"])
        last = lambda text: text.split()[-1]
        other = [str(ref) for ref, now, then in pairs if last(now) != last(then)]
        return Verdict(DEPENDENT, tuple(other)) if other else Verdict()

    def refresh(self, path: Path) -> bool:
        "Run a chapter and stamp it; whether its notebook was written anew."
        nb = nbformat.read(path, 4)
        # of the code as it was before: what is edited meanwhile is stale afterwards
        self.package
        stamp = self.stamp(nb, *execute(nb, path.stem, self.root))
        written = save(tidy(nb), path)
        present = {each.stem for each in chapters(self.nbs)}
        # read again: another process may refresh other chapters at the same time
        self.stamps = {k: v for k, v in self.stored().items() if k in present}
        self.stamps[path.stem] = stamp
        text = json.dumps(self.stamps, indent=1, sort_keys=True)
        write_text(self.path, TRIPLE.sub(r"[\1, \2, \3]", text) + "\n")
        return written


# Running


def sections(nb: NotebookNode) -> list[str]:
    "For each cell, the last heading above it."
    heading, out = "", []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            found = re.findall(r"^#+ .*$", cell.source, re.M)
            heading = found[0].lstrip("# ") if found else heading
        out.append(heading)
    return out


def execute(
    nb: NotebookNode,  # gets the outputs
    name: str,  # for the progress bar
    root: Path = ROOT,  # with nbs/, where it runs, and kdbook/, which it imports
) -> tuple[list[list[str]], list[str]]:  # records it read; functions that ran
    """Run a notebook in a fresh kernel.

    A cell that fails raises nbclient's `CellExecutionError`."""
    from nbclient import NotebookClient

    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    headings = ["", *sections(nb), "what it read"]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    env = {"TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": path}
    env.pop("IN_TEST", None)  # nbdev would skip work
    tools = str(Path(__file__).resolve().parent)
    before, after = map(nbformat.v4.new_code_cell, (BEFORE.format(tools=tools), AFTER))
    nb.cells[:] = [before, *nb.cells, after]
    count = sum(cell.cell_type == "code" for cell in nb.cells)
    try:
        with tqdm(total=count, desc=name, unit="cell", disable=None) as bar:
            show = lambda cell_index, **_: bar.set_postfix_str(
                headings[cell_index][:32]
            )
            NotebookClient(
                nb,
                timeout=1800,
                kernel_name="python3",
                record_timing=False,
                coalesce_streams=True,
                resources={"metadata": {"path": str(root / "nbs")}},
                # each kernel would warn that it talks over local TCP
                extra_arguments=["--IPKernelApp.log_level=ERROR"],
                on_cell_start=show,
                on_cell_executed=lambda **_: bar.update(),
            ).execute(env=env)
    finally:
        nb.cells[:] = nb.cells[1:-1]
    reads, ran = json.loads(after.outputs[-1].text)
    return reads, ran


def without_bars(text: str) -> str:
    "`text` as a terminal would leave it, less the lines of progress bars."
    lines = text.replace("\r\n", "\n").rstrip("\r").split("\n")
    lines = [line.rsplit("\r", 1)[-1] for line in lines]
    return "\n".join(line for line in lines if not PROGRESS.search(line))


def tidied(output: NotebookNode) -> NotebookNode | None:
    "An output without what only a live kernel can show; None where nothing is left."
    data = output.get("data", {})
    if output.output_type == "stream":
        output.text = without_bars(output.text)
        return output if output.text.strip() else None
    if VIEW in data and "text/html" in data:
        data.pop(VIEW)  # Quarto prefers the widget view when both are there
    elif VIEW in data and PROGRESS.search(data.get("text/plain", "")):
        return None
    return output


def tidy(nb: NotebookNode) -> NotebookNode:
    "Leave out progress bars and widget views with an HTML twin; fold cells."
    for cell in nb.cells:
        if cell.cell_type == "code":
            outputs = map(tidied, cell.get("outputs", []))
            cell.outputs = [output for output in outputs if output]
    nb.metadata.pop("widgets", None)
    return hide(nb)


def write_text(path: Path, text: str) -> None:
    from kdbook.files import whole_file

    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def save(nb: NotebookNode, path: Path) -> bool:
    "Write a notebook as nbdev_clean leaves it, if that is not what is there."
    from nbdev.clean import clean_nb

    clean_nb(nb, allowed_cell_metadata_keys=KEPT)
    text = nbformat.writes(nbformat.from_dict(nb))
    if json.loads(text) == json.loads(path.read_text(encoding="utf-8")):
        return False
    write_text(path, text + "\n")
    return True


def explain(error: Exception) -> str:
    "A failed cell's traceback, without colours where no terminal shows them."
    text = str(error)
    return text if sys.stderr.isatty() else re.sub(r"\x1b\[[0-9;]*m", "", text)


def main(argv: list[str] | None = None, book: Book | None = None) -> bool:
    "Exit code: true where a chapter failed or, with --check, is stale."
    from nbclient.exceptions import CellExecutionError

    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="stale or not")
    parser.add_argument("--check", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    book = book or Book()
    named = [path.resolve() for path in args.notebooks]
    found = {path: book.verdict(path) for path in named or chapters(book.nbs)}
    stale = [path for path, verdict in found.items() if verdict.kind != FRESH]
    for path in stale:
        print(f"{path.stem}: {found[path]}")
    if not stale:
        print("all outputs are fresh")
    if args.check:
        return bool(stale)
    failed = []
    for path in named or stale:
        start = time.monotonic()
        try:
            written = book.refresh(path)
        except CellExecutionError as error:
            problem = f"{path.name} failed and keeps its old outputs."
            print(f"{problem}\n{explain(error)}", file=sys.stderr)
            failed.append(path.stem)
        else:
            outputs = "new outputs" if written else "outputs as before"
            print(
                f"{path.stem}: {time.monotonic() - start:.0f} s, {outputs}", flush=True
            )
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

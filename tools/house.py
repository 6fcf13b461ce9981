"""What the book wants of itself, measured: python tools/house.py [--verbose] [1 5 7].

One line a figure: what, now, wanted. Numbers pick some of them. The exit code is 1
where one is missed.
"""

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from fresh import (
    DEFINITIONS,
    FUNCTIONS,
    IMPORTS,
    Canonical,
    Module,
    Package,
    Ref,
    imported,
    is_constant,
)
from refresh import ROOT, Book, chapters, example_cells, sources, uses

WIDTH = 88


NO_TECHNIQUE = {"distillation", "hf", "landscape", "glossary"}


def techniques() -> tuple[str, ...]:
    "The technique chapters in reading order, as the sidebar lists them."
    settings = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    sections = settings["website"]["sidebar"]["contents"]
    learn = next(s for s in sections if isinstance(s, dict) and s["section"] == "Learn")
    names = [Path(notebook).stem for notebook in learn["contents"]]
    return tuple(name for name in names if name not in NO_TECHNIQUE)


TECHNIQUES = techniques()
NOT_FOR_A_TABLE = {f"kdbook.{name}" for name in (*TECHNIQUES, "data")}
NOT_FOR_A_TABLE |= {"datasets", "transformers"}
CONTROL = "a changed body"
SHOWS_A_TABLE = """
import json, sys, time
import torch

start = time.perf_counter()
from kdbook.records import ladder

ladder.ladder_table("same-rows", "annealing_kd")
print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
"""


@dataclass(frozen=True)
class Figure:
    "One line of the table."

    what: str
    now: str
    wanted: str
    met: bool
    more: tuple[str, ...] = ()  # shown with --verbose


@cache
def book() -> Book:
    return Book()


@cache
def notebooks() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text("utf-8")) for path in chapters()}


# 1. Chapters that go stale by a changed line


def code_lines(text: str) -> set[int]:
    "The numbers of the lines that are not blank, comment or docstring only."
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if is_constant(node):
            found -= set(range(node.lineno, node.end_lineno + 1))
    return found


def lines_of(node: ast.stmt) -> range:
    starts = [node, *getattr(node, "decorator_list", [])]
    return range(min(each.lineno for each in starts), node.end_lineno + 1)


def readers(
    package: Package,
    reached: dict[str, set[str]],  # chapter -> the definitions that it reaches
) -> dict[tuple[str, int], set[str]]:  # module and line -> chapters
    "Which chapters reach each line of code of the package's definitions."
    every = package.modules.items()
    code = {name: code_lines(module.path.read_text("utf-8")) for name, module in every}
    found: dict[tuple[str, int], set[str]] = defaultdict(set)
    for id, statements in package.statements.items():
        who = {chapter for chapter, ids in reached.items() if id in ids}
        for module, node in statements:
            inside = module.path.name == "__init__.py" or id.endswith(":__all__")
            for line in () if inside else code[module.name] & {*lines_of(node)}:
                found[module.name, line] |= who
    return found


def ran_in(chapter: str) -> set[str] | None:
    "The shapes of the functions that ran when a chapter's outputs were stored."
    stamp = book().stamps.get(chapter)
    return set(stamp["ran"].split()) if stamp else None


def staleness() -> Figure:
    package = book().package
    reached = {
        name: package.reached((r.id for r in uses(nb, package).refs), ran_in(name))
        for name, nb in notebooks().items()
    }
    found = readers(package, reached)
    of: dict[str, list[int]] = defaultdict(list)
    for (module, _), who in found.items():
        of[module].append(len(who))
    worst = sorted(of, key=lambda module: -sum(of[module]))
    row = "{:<26} {:>5} lines, {:>4.1f} chapters a line, {:>5.2f} of the mean"
    more = [
        row.format(
            module, len(of[module]), mean(of[module]), sum(of[module]) / len(found)
        )
        for module in worst
    ]
    now = mean(map(len, found.values()))
    what = f"chapters stale by a changed line, mean ({len(found)} lines)"
    return Figure(what, f"{now:.1f} of {len(reached)}", "<= 9", now <= 9, tuple(more))


# 2. Changes that change nothing


def outside(text: str, node: ast.stmt) -> tuple[str, str]:
    "A module without one of its statements, and that statement."
    lines, its = text.splitlines(keepends=True), lines_of(node)
    before, after = lines[: its.start - 1], lines[its.stop - 1 :]
    return "".join(before + after), "".join(lines[its.start - 1 : its.stop - 1])


def with_docstrings(text: str) -> str:
    "A module with other docstrings."
    lines = text.splitlines(keepends=True)
    defined = [n for n in ast.walk(ast.parse(text)) if isinstance(n, DEFINITIONS)]
    for node in sorted(defined, key=lambda node: -node.lineno):
        first = node.body[0]
        if is_constant(first):
            new = " " * first.col_offset + '"Something else."\n'
            lines[first.lineno - 1 : first.end_lineno] = [new]
    return "".join(lines)


def changes(module: Module) -> dict[str, dict[str, str]]:
    "What is changed in a module -> the files that are new then, by name."
    text, file = module.path.read_text("utf-8"), module.path.name
    function = next(n for n in module.tree.body if isinstance(n, FUNCTIONS))
    rest, moved = outside(text, function)
    imports = [ast.unparse(n) for n in module.tree.body if isinstance(n, IMPORTS)]
    others = ", ".join(sorted(module.own - {function.name, "__all__"}))
    elsewhere = [*imports, f"from .{file[:-3]} import {others}", moved]
    last = text.splitlines(keepends=True)
    last.insert(function.body[-1].lineno - 1, "    print()\n")
    return {
        "comments": {file: re.sub(r"(?m)^( +)return", r"\1# why\n\1return", text)},
        "docstrings": {file: with_docstrings(text)},
        "a definition moved down": {file: f"{rest}\n\n{moved}"},
        "a definition moved to another module": {
            file: f"from ._moved import {function.name}\n{rest}",
            "_moved.py": "\n".join(elsewhere),
        },
        CONTROL: {file: "".join(last)},
    }


def prints(package: Package, rename: Callable[[str], str] = str) -> dict[str, Any]:
    "What decides each chapter's freshness, records apart."
    found = {}
    for name, nb in notebooks().items():
        cells = [{**c, "source": rename("".join(c["source"]))} for c in nb["cells"]]
        used = uses({"cells": cells}, package)
        found[name] = (used.cells, [package.digests[ref.id] for ref in used.refs])
    return found


def stale_after(files: dict[str, str], rename: Callable[[str], str] = str) -> int:
    "How many chapters are stale when files of the package are replaced."
    with tempfile.TemporaryDirectory() as folder:
        lib = Path(folder) / "kdbook"
        for module in book().package.modules.values():
            path = lib / module.path.relative_to(ROOT / "kdbook")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rename(module.path.read_text("utf-8")), "utf-8")
        for name, text in files.items():
            (lib / name).write_text(text, "utf-8")
        now = prints(Package(lib), rename)
    was = prints(book().package)
    return sum(now[name] != was[name] for name in was)


def harmless_changes() -> Figure:
    "Chapters stale by changes that change nothing, and by one that does."
    package = book().package
    reach = [package.reached([id]) for id in package.tokens]
    users = lambda id: sum(id in ids for ids in reach)
    plain = [id for id in package.statements if re.fullmatch(r"\w+\.\w+:[a-z]\w*", id)]
    plain = [id for id in plain if f"{id.partition(':')[0]}:" not in package.statements]
    functions = [
        id for id in plain if isinstance(package.statements[id][0][1], FUNCTIONS)
    ]
    module = package.modules[max(functions, key=users).partition(":")[0]]
    stale = {what: stale_after(files) for what, files in changes(module).items()}
    private = [id for id in package.statements if re.search(r":_[a-z]", id)]
    old = max(private, key=users).partition(":")[2]
    new = lambda text: re.sub(rf"\b{old}\b", f"{old}_renamed", text)
    stale["a private name renamed"] = stale_after({}, new)
    control = stale.pop(CONTROL)
    what = "chapters stale by comments, docstrings, moved or renamed definitions"
    more = tuple(f"{what} ({module.name}): {count}" for what, count in stale.items())
    now = f"{sum(stale.values())} ({CONTROL}: {control})"
    return Figure(what, now, "0", not any(stale.values()) and control > 0, more)


# 3. and 4. What a stored table costs


def loaded_for_a_table() -> Figure:
    "What is imported to show a ladder, torch apart."
    what = "modules loaded, and seconds, to show a stored table"
    run = run_python("-c", SHOWS_A_TABLE)
    if run.returncode:
        return Figure(what, run.stderr.strip().splitlines()[-1], "none, < 1 s", False)
    seconds, modules = json.loads(run.stdout.splitlines()[-1])
    found = sorted(NOT_FOR_A_TABLE & {*modules})
    now = f"{', '.join(found) or 'none'}, {seconds:.1f} s"
    return Figure(what, now, "none, < 1 s", not found and seconds < 1)


NEW_FIELD = """
import json, sys
from dataclasses import dataclass, replace
from kdbook.lab import run
from kdbook.records.store import ladder_file, read_lines, settings_recorded
from kdbook.training import Stage


@dataclass(frozen=True)
class NewStage(Stage):
    shuffled: bool = True

    def settings(self):
        return {**super().settings(), "shuffled": self.shuffled}


worthless = total = 0
for name in settings_recorded():
    for _, record in read_lines(ladder_file(name))[1:]:
        recipe = run.recipe_of(name, record["method"], record["lr"])
        stages = tuple(NewStage(**vars(stage)) for stage in recipe.stages)
        changed = run.differences(record["recipe"], replace(recipe, stages=stages))
        worthless, total = worthless + bool(changed), total + 1
print(json.dumps([worthless, total]))
"""


def worthless_records() -> Figure:
    what = "records made worthless by a new defaulted field of Stage"
    run = run_python("-c", NEW_FIELD)
    if run.returncode:
        return Figure(what, f"failed: {run.stderr[-200:]}", "0", False)
    worthless, total = json.loads(run.stdout)
    return Figure(what, f"{worthless} of {total}", "0", worthless == 0 < total)


# 5. to 9. What is in the tree


def result_files() -> Figure:
    kinds = ("--cached", "--others", "--exclude-standard")
    command = ["git", "ls-files", *kinds, "results"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    count = sum((ROOT / line).exists() for line in {*run.stdout.splitlines()})
    return Figure("files in results/", str(count), "<= 120", count <= 120)


def private_names(
    tree: ast.Module,
    package: Package,
    home: str = "",  # the dotted name of the module; none for a chapter's cells
    parent: str = "",  # the package that its relative imports start from
) -> set[str]:  # "rows._x"
    "The private names of other modules that a piece of code imports or reads."
    imports = [pair for n in ast.walk(tree) for pair in imported(n, parent)]
    canonical = Canonical(package.find, dict(imports).get)
    found = [package.find(path) for _, path in imports]
    chains = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    found += filter(None, map(canonical.refers, chains))
    refs = {ref for ref, _ in found if isinstance(ref, Ref)}
    crossing = {ref for ref in refs if ref.id.partition(":")[0] != home}
    return {str(ref) for ref in crossing if re.match(r"_[^_]", ref.name)}


def crossing_names() -> Figure:
    package = book().package
    found = {
        f"{module.name}: {name}"
        for module in package.modules.values()
        for name in private_names(module.tree, package, module.name, module.package)
    }
    for stem, nb in notebooks().items():
        for _, tree in example_cells(nb):
            found |= {f"{stem}: {name}" for name in private_names(tree, package)}
    what = "private names that cross modules"
    return Figure(what, str(len(found)), "0", not found, tuple(sorted(found)))


def texts() -> Iterator[tuple[str, str]]:
    "All code: where it is, and its text."
    for stem, nb in notebooks().items():
        for n, source in enumerate(sources(nb), 1):
            yield f"nbs/{stem}, code cell {n}", source
    for folder in ("kdbook", "tools", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text("utf-8")
            if folder == "kdbook":  # the head is nbdev's own
                text = re.sub(r"(?s)\A.*?# %% auto #0\n.*?(?=# %%|\Z)", "", text)
            if path.name != "_modidx.py":
                yield str(path.relative_to(ROOT)), text


def is_wide(line: str) -> bool:
    return len(line) > WIDTH and not line.lstrip().startswith("#|")


def wide_lines() -> Figure:
    counts = {place: sum(map(is_wide, text.splitlines())) for place, text in texts()}
    more = [f"{place}: {count}" for place, count in counts.items() if count]
    count = sum(counts.values())
    return Figure(
        f"lines over {WIDTH} columns", str(count), "0", not count, tuple(more)
    )


def minutes_of_tests() -> Figure:
    path = ROOT / ".pytest_cache" / "kdbook_minutes"
    what = "minutes of the last test run"
    if not path.exists():
        return Figure(what, "not run", "<= 12", True)
    minutes = float(path.read_text())
    return Figure(what, f"{minutes:.1f}", "<= 12", minutes <= 12)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def installs() -> Figure:
    run = run_python("-m", "pytest", "-q", "tests/test_install.py")
    lines = run.stdout.strip().splitlines() or ["no tests"]
    good = run.returncode == 0
    return Figure("tests/test_install.py", lines[-1].strip("= "), "passes", good)


FIGURES = (
    *(staleness, harmless_changes, loaded_for_a_table, worthless_records),
    *(result_files, crossing_names, wide_lines, minutes_of_tests, installs),
)


def main(argv: list[str] | None = None) -> bool:  # exit code
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    numbers = range(1, len(FIGURES) + 1)
    parser.add_argument("figures", nargs="*", type=int, help="which; default: all")
    parser.add_argument("--verbose", action="store_true", help="what lies behind them")
    args = parser.parse_args(argv)
    missed = False
    print("    | what | now | wanted")
    for number in args.figures or numbers:
        figure = FIGURES[number - 1]()
        mark = " " if figure.met else "!"
        now = f"{figure.now} | {figure.wanted}"
        print(f"{mark} {number} | {figure.what} | {now}", flush=True)
        for line in figure.more if args.verbose else ():
            print(f"      {line}")
        missed |= not figure.met
    return missed


if __name__ == "__main__":
    sys.exit(main())

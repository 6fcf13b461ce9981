"""Re-run chapters in a fresh kernel each and store their outputs.

python tools/refresh.py                 the stale ones
python tools/refresh.py nbs/data.ipynb  the named ones, stale or not
python tools/refresh.py --check         only say which are stale (exit code 1 when there are any)

A chapter is stale when the hash in its metadata is not the hash of its code cells, of every kdbook module they reach
and, where a cell reads stored results, of the files in that folder of results/. A new torch or matplotlib does not make
it stale.
"""

import ast
import hashlib
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB, RESULTS = ROOT / "nbs", ROOT / "kdbook", ROOT / "results"
VIEW = "application/vnd.jupyter.widget-view+json"
READS = {  # folder under results/ -> what in a chapter's code says that it reads there
    "ladder": re.compile(
        r"\bread_records?\(|\brecorded\(|\breported\(|\bcorrect\(|\bladder(_table|_plot)?\(|results_dir\(\) / .ladder"
    ),
    "study": re.compile(r"\bstudy_(records|path)\(|results_dir\(\) / .study"),
    "teacher": re.compile(r"minilm-movies|\bladder(_table|_plot)?\("),
}
STUDY = re.compile(
    r"""\bstudy_(?:records|path)\(\s*(?:["'](\w+)["'])?|results_dir\(\) / .study.(?: / ["'](\w+)["'])?"""
)
CELL_MARK = re.compile(
    r"^# %% .*\n", re.M
)  # where nbdev says which cell a line is from: no behaviour
PROGRESS = re.compile(r"\d+%\|.*?\|")


def chapters():
    return sorted(NBS.glob("*.ipynb"))


def code_of(nb):
    return [cell.source for cell in nb.cells if cell.cell_type == "code"]


def imports(source, relative):
    "Names of the kdbook modules that `source` imports; relative imports count inside the package only."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level and relative:
                yield from (
                    [module.split(".")[0]]
                    if module
                    else [alias.name for alias in node.names]
                )
            elif module == "kdbook":
                yield from (alias.name for alias in node.names)
            elif module.startswith("kdbook."):
                yield module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("kdbook.")
            )


def modules_reached(code, lib=LIB):
    "Source of every kdbook module that a chapter's code reaches, by name."
    plain = "\n".join(
        line for line in code.splitlines() if not line.lstrip().startswith(("%", "!"))
    )
    seen, todo = {}, list(imports(plain, relative=False))
    while todo:
        name = todo.pop()
        path = lib / f"{name}.py"
        if name not in seen and path.exists():
            seen[name] = CELL_MARK.sub("", path.read_text(encoding="utf-8"))
            todo += imports(seen[name], relative=True)
    return seen


def results_hash(results=RESULTS):
    "One hash of the names and contents of all stored results."
    total = hashlib.sha256()
    for path in sorted(
        p for p in results.rglob("*") if p.is_file() and not p.name.startswith(".")
    ):
        total.update(
            path.relative_to(results).as_posix().encode()
            + b"\0"
            + hashlib.sha256(path.read_bytes()).digest()
        )
    return total.hexdigest()


def folders_read(code):
    "Folders under results/ that a chapter reads; of the studies only those it names, where it names all."
    found = [folder for folder, pattern in READS.items() if pattern.search(code)]
    named = {a or b for a, b in STUDY.findall(code)}
    if "study" not in found or "" in named:
        return found
    return [folder for folder in found if folder != "study"] + [
        f"study/{name}" for name in sorted(named)
    ]


def digest(nb, lib=LIB, results=RESULTS):
    "Hash of all that a chapter's outputs depend on, inside this repository."
    code = "\n".join(code_of(nb))
    seen = modules_reached(code, lib)
    parts = [code] + [f"{name}\n{seen[name]}" for name in sorted(seen)]
    acts = "\n".join(
        source for source in code_of(nb) if "#| eval: false" not in source
    )  # what Colab needs names results/ too
    parts += [results_hash(results / folder) for folder in folders_read(acts)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def stale(path):
    nb = nbformat.read(path, 4)
    return nb.metadata.get("kdbook", {}).get("ran") != digest(nb)


def sections(nb):
    "For each cell, the last heading above it."
    heading, out = "", []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            heading = next(
                (m.lstrip("# ") for m in re.findall(r"^#+ .*$", cell.source, re.M)),
                heading,
            )
        out.append(heading)
    return out


def execute(nb, name):
    "Run `nb` in a fresh kernel, in nbs/, with a bar over its cells; a failing cell raises nbclient's CellExecutionError."
    from nbclient import NotebookClient

    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    headings = sections(nb)
    # the kernel imports this checkout, whether or not the package is installed; IN_TEST would make nbdev skip work
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    os.environ.pop("IN_TEST", None)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tqdm(
        total=sum(cell.cell_type == "code" for cell in nb.cells),
        desc=name,
        unit="cell",
        disable=None,
    ) as bar:
        NotebookClient(
            nb,
            timeout=1800,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(NBS)}},
            extra_arguments=[
                "--IPKernelApp.log_level=ERROR"
            ],  # each kernel would warn that it talks over local TCP
            on_cell_start=lambda cell, cell_index: bar.set_postfix_str(
                headings[cell_index][:32]
            ),
            on_cell_executed=lambda **_: bar.update(),
        ).execute()
    return nb


def without_bars(text):
    "`text` as a terminal would leave it, less the lines of progress bars."
    lines = [
        line.rsplit("\r", 1)[-1]
        for line in text.replace("\r\n", "\n").rstrip("\r").split("\n")
    ]
    return "\n".join(line for line in lines if not PROGRESS.search(line))


def tidy(nb):
    "Leave out what only a live kernel can show: widget views that have an HTML twin, and progress bars."
    for cell in nb.cells:
        kept = []
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if out.output_type == "stream":
                out.text = without_bars(out.text)
                if not out.text.strip():
                    continue
            elif VIEW in data:
                if "text/html" not in data and PROGRESS.search(
                    data.get("text/plain", "")
                ):
                    continue
                if "text/html" in data:
                    data.pop(VIEW)  # Quarto prefers the widget view when both are there
            kept.append(out)
        if cell.cell_type == "code":
            cell.outputs = kept
    nb.metadata.pop("widgets", None)
    return nb


def save(nb, path):
    "Write `nb` as nbdev_clean leaves it, whole or not at all."
    from nbdev.clean import clean_nb

    clean_nb(nb, allowed_metadata_keys=["kdbook"])
    part = path.with_suffix(".partial")
    nbformat.write(nbformat.from_dict(nb), part)
    part.replace(path)


def refresh(path):
    nb = tidy(execute(nbformat.read(path, 4), path.stem))
    nb.metadata["kdbook"] = {"ran": digest(nb)}
    save(nb, path)


def explain(error):
    "A failed cell's traceback, without colours where no terminal shows them."
    return (
        str(error) if sys.stderr.isatty() else re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    )


def main(args):
    from nbclient.exceptions import CellExecutionError

    named = [Path(arg).resolve() for arg in args if not arg.startswith("--")]
    old = [path for path in named or chapters() if stale(path)]
    print("stale:", ", ".join(path.stem for path in old) or "none")
    if "--check" in args:
        return bool(old)
    failed = []
    for path in named or old:
        start = time.monotonic()
        try:
            refresh(path)
        except CellExecutionError as error:
            print(
                f"{path.name} failed and keeps its old outputs.\n{explain(error)}",
                file=sys.stderr,
            )
            failed.append(path.stem)
        else:
            print(f"{path.stem}: {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

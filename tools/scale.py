"""Measure what distilling on much text takes here: python tools/scale.py [--store].

Tokens a second of a teacher that annotates and of a student that trains, one thread
each; `annotate` beside a bare loop over the same batches; 1, 2 and 4 processes that
share the rows; memory of a stream. Ratios are taken side by side, in turns, and given
as medians with their range. Takes about six minutes on an idle machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset, IterableDataset, disable_progress_bars

from kdbook.data import load_task
from kdbook.distillation import annotate, annotate_stream
from kdbook.files import results_dir, write_json
from kdbook.models import student, student_from, teacher
from kdbook.records.store import provenance
from kdbook.rows import encoded_rows, forward, length_sorted
from kdbook.training import LogitMSE, fit, one_stage

ROUNDS = 5


def sentences(count: int) -> Dataset:
    rows = load_task("movies")["train"].select(range(count))
    return rows.select_columns(["text"])


def seconds(job: Callable) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def bare_loop(model: torch.nn.Module, rows: Dataset) -> list[torch.Tensor]:
    "What anybody would write: tokenise, sort by length, go through the batches."
    read = encoded_rows(rows, model)
    with torch.no_grad():
        batches = length_sorted(read.lengths, 64)
        return [forward(model, read.batch(index)) for index in batches]


def throughput() -> dict:
    "annotate against a bare loop, in turns."
    rows, model = sentences(640), teacher("minilm")
    tokens = sum(encoded_rows(rows, model).lengths)
    write = lambda: annotate(rows, model, cache=False, progress=False)
    write(), bare_loop(model, rows)
    pairs = [
        (seconds(lambda: bare_loop(model, rows)), seconds(write)) for _ in range(ROUNDS)
    ]
    ratios = sorted(bare / written for bare, written in pairs)
    return {
        "rows": len(rows),
        "tokens": tokens,
        "ratio": [ratios[0], median(ratios), ratios[-1]],
        "tokens_a_second": round(tokens / median(w for _, w in pairs)),
    }


def speeds() -> dict:
    "Tokens a second of teachers that annotate and of students that train."
    rows, found = sentences(256), {}
    for name in ("minilm", "mpnet"):
        model = teacher(name)
        tokens = sum(encoded_rows(rows, model).lengths)
        took = seconds(lambda: annotate(rows, model, cache=False, progress=False))
        found[f"{name} annotates"] = round(tokens / took)
    told = annotate(rows, teacher("minilm"), cache=False, progress=False)
    small = {"3 layers of minilm": student_from("minilm", 3), "2x128": student(2, 128)}
    for name, model in small.items():
        tokens = sum(encoded_rows(rows, model).lengths)
        recipe = one_stage(LogitMSE(), epochs=2, lr=1e-4)
        took = seconds(lambda: fit(model, recipe, told, progress=False))
        found[f"{name} trains"] = round(2 * tokens / took)
    return found


def share_of_rows() -> None:
    "One of several processes that annotate the same rows."
    torch.set_num_threads(1)
    rows, model = sentences(4096), teacher("minilm")  # in four shards
    annotate(rows.select(range(64)), model, cache=False, progress=False)
    took = seconds(lambda: annotate(rows, model, cache=False, progress=False))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"seconds": took}), flush=True)


def processes() -> dict:
    "Seconds of 1, 2 and 4 processes on the same rows."
    found = {}
    for count in (1, 2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(count), __file__, "--share"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        line = [x for x in done.stdout.splitlines() if x.startswith("{")][-1]
        found[str(count)] = json.loads(line)["seconds"]
    return found


def memory() -> dict:
    "Growth of memory, in MB, while a stream of so many rows is annotated."
    texts = sentences(1000)["text"][:]
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    used = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * page

    def many(count):
        for number in range(count):
            yield {"text": texts[number % 1000]}

    model, found = student(1, 32), {}
    for count in (8_000, 32_000):
        stream = IterableDataset.from_generator(many, gen_kwargs={"count": count})
        written, seen = annotate_stream(stream, model), []
        for number, _ in enumerate(written):
            if number % 2000 == 1999:
                seen.append(used())
        found[str(count)] = round(max(seen) - seen[0], 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", action="store_true", help="keep the figures")
    parser.add_argument("--share", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    disable_progress_bars()
    if args.share:
        share_of_rows()
        return 0
    torch.set_num_threads(1)
    parts = (memory, throughput, speeds, processes)
    record = {"cores": os.cpu_count()}
    for part in parts:
        record[part.__name__] = part()
        print(part.__name__, json.dumps(record[part.__name__]), flush=True)
    if args.store:
        path = Path(results_dir()) / "scale.json"
        write_json(record | {"provenance": provenance()}, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

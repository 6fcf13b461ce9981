"The programs that readers paste, each in a process of its own."

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

HEADING = "## Use it in your own training code"
NUMBERS = re.compile(r"(-?[\d.]+) -> (-?[\d.]+)")


def blocks():
    "The first code cell behind the heading, by chapter."
    found = {}
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = [("".join(c["source"]), c["cell_type"]) for c in cells]
        for number, (source, kind) in enumerate(sources):
            if kind == "markdown" and HEADING in source:
                found[path.stem] = sources[number + 1][0]
    return found


BLOCKS = blocks()
FENCED = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
README = FENCED.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def run(source, folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir()), "it leaves files behind"
    return done.stdout


def test_every_technique_has_one():
    techniques = {"distillation", "annealing_kd", "continuation_kd", "progressive_kd"}
    techniques |= {"universal_kd", "reweighted_kd", "noisy_label_kd", "glitter"}
    techniques |= {"combined_kd", "swa", "kronecker", "kronecker_bert"}
    assert techniques <= {*BLOCKS} and len(README) == 2


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs_and_something_moves(name, tmp_path):
    source = BLOCKS[name]
    lines = [line for line in source.splitlines() if line.strip()]
    assert len(lines) <= 20 and re.match(r"import |from ", lines[0])
    assert re.search(r"# (your|or a folder|.*your)", source)
    before, after = map(float, NUMBERS.findall(run(source, tmp_path))[-1])
    assert abs(after - before) > 0.25 * max(abs(before), abs(after))


@pytest.mark.parametrize("number", range(len(README)))
def test_readme_runs(number, tmp_path):
    printed = run(README[number], tmp_path)
    assert "accuracy" in printed or NUMBERS.search(printed)

"A few rounds of tools/torture.py; the long campaign is a command."

import os
import subprocess
import sys

import pytest
from helpers import ROOT

ROUNDS = {"kill": 10, "flip": 100, "bomb": 15, "full": 4, "twice": 4}
ROUNDS["twice_annotated"] = 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ROUNDS)
def test_nothing_breaks(kind):
    command = [sys.executable, ROOT / "tools" / "torture.py", "--only", kind]
    done = subprocess.run(
        [*command, "--rounds", str(ROUNDS[kind])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ROUNDS[kind]} rounds in" in done.stdout


def test_a_wrong_round_is_named(tmp_path):
    "Sabotage: a reader that believes everything."
    code = (
        "import sys, torture\n"
        "from safetensors.torch import load_file\n"
        "torture.load_tensors = load_file\n"
        "torture.FLIPS = (torture.flip_tensors,)\n"
        "sys.argv = ['torture', '--only', 'flip', '--rounds', '60']\n"
        "torture.main()\n"
    )
    path = os.pathsep.join([str(ROOT / "tools"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "again: --only flip --seed" in done.stderr

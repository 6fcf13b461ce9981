"Ray's workers train as one process does, where Ray is installed."

import os
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from tiny_text import bert, rows

from kdbook.files import load_tensors, save_tensors
from kdbook.recipes import Recipe, Stage
from kdbook.training import Hinton, fit

ray = pytest.importorskip("ray")


def distil(config):
    "What a worker does."
    student = trained()
    if os.environ.get("RANK", "0") == "0":
        save_tensors(dict(student.named_parameters()), Path(config["out"]))


def trained():
    stage = Stage(Hinton(), 2, 0.1, 16, optimizer=torch.optim.SGD)
    return fit(bert(), Recipe((stage,)), rows(64), progress=False).student


def test_two_workers_make_the_updates_of_one(tmp_path):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    variables = {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    ray.init(num_cpus=2, runtime_env={"env_vars": variables}, include_dashboard=False)
    try:
        TorchTrainer(
            distil,
            train_loop_config={"out": str(tmp_path / "two.safetensors")},
            scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
            run_config=RunConfig(storage_path=str(tmp_path / "ray"), name="distil"),
        ).fit()
    finally:
        ray.shutdown()
    both, alone = load_tensors(tmp_path / "two.safetensors"), trained().state_dict()
    assert max((both[n] - alone[n]).abs().max().item() for n in both) < 1e-5

"""Two processes make the updates of one, also with heads and held-out gradients."""

import json
import os
from pathlib import Path
from threading import Thread

import pytest
import torch
from helpers import forked, free_port, go, images, in_new_process, net
from test_training import preload

from kdbook.distillation import annotate
from kdbook.models import image_net
from kdbook.reweighted_kd import RWKD
from kdbook.swa import SWA
from kdbook.training import (
    Callback,
    CrossEntropy,
    Hinton,
    LogitMSE,
    Recipe,
    Stage,
)
from kdbook.universal_kd import PseudoClassifiers, UniversalKD, train_heads

NAMES = ("logit MSE", "few labels", "SWA", "RW-KD", "Universal-KD")
EXAMPLE = {"pixel_values": torch.zeros(1, 16)}


class Count(Callback):
    "Counts updates."

    def __init__(self):
        self.updates = 0

    def settings(self):
        return {}

    def after_step(self, run, progress):
        self.updates += 1


def with_heads(*hidden, seed=0):
    body = image_net(hidden, num_labels=4, pixels=16, seed=seed)
    return PseudoClassifiers(body, example=EXAMPLE)


def case(name):
    """Student, stages and rows; each makes twelve updates.

    Of 49 rows the last batch of an epoch has one, fewer than there are processes."""
    stage = lambda objective, epochs=3: Stage(objective, epochs, 5e-3, 16)
    rows = images(49)
    if name == "few labels":
        return net(), (stage(Hinton()),), images(49, labelled=7)
    if name in ("logit MSE", "SWA"):
        return net(), (stage(LogitMSE()),), rows
    if name == "RW-KD":
        return net(), (stage(RWKD(images(20, 7))),), rows
    teacher = train_heads(with_heads(8, 8, 8, seed=3), rows, progress=False)
    rows = annotate(rows, teacher, cache=False, progress=False)
    # in the second stage the heads are unused
    stages = (stage(UniversalKD("il"), 2), stage(CrossEntropy(), 1))
    return with_heads(8, 8), stages, rows


def recipe_of(name, stages):
    "A recipe and the callback that counts its updates."
    count = Count()
    others = (SWA(),) if name == "SWA" else ()
    return Recipe(stages, (count, *others)), count


def join(rank, port):
    "What `accelerate launch --cpu --num_processes 2` sets up."
    os.environ.update(
        RANK=rank,
        LOCAL_RANK=rank,
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)


def one_of_two(rank, folder, port, name):
    join(rank, port)
    student, stages, rows = case(name)
    recipe, count = recipe_of(name, stages)
    place = folder / "checkpoint"
    run = go(student, recipe, rows, images(32, 1), checkpoint=place)
    assert torch.distributed.get_world_size() == 2
    result = dict(
        weights=run.student.state_dict(), history=run.history, updates=count.updates
    )
    torch.save(result, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def pair(work, folder, name):
    "Forks two processes, each of which calls `work`; their exit codes."
    codes, port = {}, free_port()

    def process(rank):
        codes[rank] = forked(work, rank, folder, port, name)

    threads = [Thread(target=process, args=(rank,)) for rank in "01"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return codes


def all_pairs(folder):
    "Runs in a process of its own, which computes nothing and so can be forked safely."
    preload()
    for name in NAMES:
        place = Path(folder) / name
        place.mkdir()
        codes = pair(one_of_two, place, name)
        (place / "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    in_new_process("test_two_processes", "all_pairs", folder)
    return folder


@pytest.mark.skipif(
    not hasattr(os, "fork") or not torch.distributed.is_available(),
    reason="needs fork and torch.distributed",
)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_make_the_updates_of_one(pairs, name):
    assert json.loads((pairs / name / "codes.json").read_text()) == {"0": 0, "1": 0}
    student, stages, rows = case(name)
    recipe, count = recipe_of(name, stages)
    single = go(student, recipe, rows, images(32, 1))
    zero, one = (
        torch.load(pairs / name / f"rank{rank}.pt", weights_only=True) for rank in "01"
    )
    assert zero["weights"].keys() == one["weights"].keys()
    for key, value in zero["weights"].items():
        assert torch.equal(value, one["weights"][key]), key
    assert zero["updates"] == count.updates == 12
    for key, value in single.student.state_dict().items():
        if not key.startswith("heads."):  # unused in the second stage: only decay there
            torch.testing.assert_close(zero["weights"][key], value, atol=1e-4, rtol=0)
    losses = [row["loss"] for row in single.history]
    for rank in (zero, one):
        assert [row["loss"] for row in rank["history"]] == pytest.approx(
            losses, abs=1e-4
        )

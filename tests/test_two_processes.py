"""Two processes make the updates of one: plain objectives, heads on the student, and held-out gradients."""

import os
import socket
from pathlib import Path

import pytest
import torch
from test_training import forked, go, images, in_new_process, net

from kdbook.models import image_net
from kdbook.reweighted_kd import RWKD
from kdbook.swa import SWA
from kdbook.training import Callback, CrossEntropy, LogitMSE, Recipe, Stage
from kdbook.universal_kd import PseudoClassifiers, UniversalKD, train_heads


class Count(Callback):
    "Counts updates."

    updates = 0

    def after_step(self, run, progress):
        self.updates += 1


EXAMPLE = {"pixel_values": torch.zeros(1, 16)}


def annotated():
    "49 rows: the last batch of an epoch has one row, fewer than processes."
    from kdbook.distillation import annotate

    teacher = train_heads(
        PseudoClassifiers(
            image_net((8, 8, 8), num_labels=4, pixels=16, seed=3), example=EXAMPLE
        ),
        images(49),
        progress=False,
    )
    return annotate(images(49), teacher, cache=False, progress=False)


def case(name):
    "Student, stages and rows; each makes twelve updates."
    stage = lambda objective, epochs=3: Stage(objective, epochs, 5e-3, 16)
    if name in ("logit MSE", "SWA"):
        return net(), (stage(LogitMSE()),), images(49)
    if name == "RW-KD":
        return net(), (stage(RWKD(images(20, 7))),), images(49)
    student = PseudoClassifiers(
        image_net((8, 8), num_labels=4, pixels=16), example=EXAMPLE
    )
    return (
        student,
        (stage(UniversalKD("il"), 2), stage(CrossEntropy(), 1)),
        annotated(),
    )  # in the second stage the heads are unused


def extra(name):
    return (SWA(),) if name == "SWA" else ()


def one_of_two(rank, folder, port, name):
    os.environ.update(
        RANK=rank,
        LOCAL_RANK=rank,
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    student, stages, rows = case(name)
    watch = Count()
    run = go(
        student,
        Recipe(stages, (watch, *extra(name))),
        rows,
        images(32, 1),
        checkpoint=Path(folder) / "checkpoint",
    )
    assert torch.distributed.get_world_size() == 2
    torch.save(
        dict(
            weights=run.student.state_dict(), history=run.history, updates=watch.updates
        ),
        Path(folder) / f"rank{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def two_processes(folder, port, name, work=one_of_two):
    "What `accelerate launch --cpu --num_processes 2` does, without importing everything twice."
    from threading import Thread

    import accelerate  # noqa: F401
    import datasets

    codes = {}
    threads = [
        Thread(
            target=lambda r=r: codes.__setitem__(r, forked(work, r, folder, port, name))
        )
        for r in "01"
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert codes == {"0": 0, "1": 0}, codes


@pytest.mark.skipif(
    not hasattr(os, "fork") or not torch.distributed.is_available(),
    reason="needs fork and torch.distributed",
)
@pytest.mark.parametrize("name", ["logit MSE", "SWA", "RW-KD", "Universal-KD"])
def test_two_processes_make_the_updates_of_one(tmp_path, name):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    in_new_process("two_processes", tmp_path, port, name, module="test_two_processes")
    student, stages, rows = case(name)
    single = go(student, Recipe(stages, (Count(), *extra(name))), rows, images(32, 1))
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in "01"]
    kept = [
        k for k in ranks[0]["weights"] if not k.startswith("heads.")
    ]  # unused in the second stage, so only decay moves them there
    assert all(
        torch.equal(ranks[0]["weights"][k], ranks[1]["weights"][k])
        for k in ranks[0]["weights"]
    )
    assert ranks[0]["updates"] == single.recipe.callbacks[0].updates == 12
    for key in kept:
        torch.testing.assert_close(
            ranks[0]["weights"][key],
            single.student.state_dict()[key],
            atol=1e-4,
            rtol=0,
        )
    for r in ranks:
        assert [row["loss"] for row in r["history"]] == pytest.approx(
            [row["loss"] for row in single.history], abs=1e-4
        )

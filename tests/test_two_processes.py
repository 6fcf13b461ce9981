"""Two processes make the updates of one, also with heads and held-out gradients."""

import json
import os
import signal
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import tiny_text
import torch
from helpers import forked, free_port, go, images, in_new_process, net
from test_glitter import pooled
from test_training import preload

from kdbook import combined_kd, training
from kdbook.distillation import annotate
from kdbook.glitter import Glitter
from kdbook.models import Output, cnn_student, image_net, lstm_student
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
TEXTS = ("LSTM", "CNN", "Glitter", "Combined-KD", "pieces", "unused layer")
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


class Unused(torch.nn.Module):
    "A student with a layer that takes no part."

    def __init__(self):
        super().__init__()
        self.tokenizer, self.num_labels = None, 4
        torch.manual_seed(0)
        self.used, self.unused = torch.nn.Linear(16, 4), torch.nn.Linear(16, 4)

    def forward(self, pixel_values):
        return Output(self.used(pixel_values))


def text_case(name):
    "The like for texts, for a batch in pieces, and for a layer without a part."
    stage = lambda objective, epochs=3: Stage(objective, epochs, 5e-3, 16)
    if name == "unused layer":
        return Unused(), (stage(CrossEntropy()),), images(49)
    if name == "pieces":  # 13 rows: 7 and 6, in four pieces each
        return net(), (Stage(LogitMSE(), 3, 5e-3, 13),), images(49)
    if name == "Glitter":
        objective = Glitter(k1=4, k2=2, pick="worst", score_every=2)
        return tiny_text.bert(), (stage(objective),), pooled(49)
    if name == "Combined-KD":
        players = tiny_text.bert(seed=1), tiny_text.generator()
        combined = combined_kd.recipe(
            *players, tau_max=1, epochs=(2, 1), lr=5e-3, batch_size=16
        )
        return tiny_text.bert(), combined.stages, tiny_text.rows(49)
    make = lstm_student if name == "LSTM" else cnn_student
    small = make(8, width=8, dropout=0.0, teacher=tiny_text.bert())
    return small, (stage(Hinton()),), tiny_text.rows(49)


def case(name):
    """Student, stages and rows; each makes twelve updates.

    Of 49 rows the last batch of an epoch has one, fewer than there are processes."""
    if name in TEXTS:
        return text_case(name)
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


def held_out(name):
    texts = name in TEXTS and name not in ("pieces", "unused layer")
    return tiny_text.rows(32, 1) if texts else images(32, 1)


def more(name):
    return {"micro_batches": 4} if name == "pieces" else {}


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
    run = go(student, recipe, rows, held_out(name), checkpoint=place, **more(name))
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
    for name in (*NAMES, *TEXTS):
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
@pytest.mark.parametrize("name", [*NAMES, *TEXTS])
def test_two_processes_make_the_updates_of_one(pairs, name):
    assert json.loads((pairs / name / "codes.json").read_text()) == {"0": 0, "1": 0}
    student, stages, rows = case(name)
    recipe, count = recipe_of(name, stages)
    single = go(student, recipe, rows, held_out(name), **more(name))
    zero, one = (
        torch.load(pairs / name / f"rank{rank}.pt", weights_only=True) for rank in "01"
    )
    assert zero["weights"].keys() == one["weights"].keys()
    for key, value in zero["weights"].items():
        assert torch.equal(value, one["weights"][key]), key
    updates = 3 * -(-len(rows) // stages[0].batch_size)
    assert zero["updates"] == count.updates == updates
    # what is drawn for the generator is drawn in each process
    within = 0.05 if name == "Combined-KD" else 1e-4
    for key, value in single.student.state_dict().items():
        # heads are unused in the second stage, where they only decay; a key's bias has
        # no gradient but what rounding leaves
        if not key.startswith("heads.") and not key.endswith("key.bias"):
            torch.testing.assert_close(zero["weights"][key], value, atol=within, rtol=0)
    losses = [row["loss"] for row in single.history]
    for rank in (zero, one):
        assert [row["loss"] for row in rank["history"]] == pytest.approx(
            losses, abs=10 * within
        )


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 13, 65])
def test_pieces_are_as_many_in_every_process(size, micro_batches, processes):
    "And none is empty, and their shares are those of the rows."
    rows, counts, total = list(range(size)), set(), 0.0
    for rank in range(processes):
        place = SimpleNamespace(num_processes=processes, process_index=rank)
        place.device = torch.device("cpu")
        whole = SimpleNamespace(batch=lambda index: {"x": torch.tensor(index)})
        loop = SimpleNamespace(
            accelerator=place, rows=whole, micro_batches=micro_batches
        )
        batch, weight, count = training._own_part(loop, rows)
        pieces = training._pieces(loop, batch, weight, count)
        assert len(pieces) == count and all(len(piece["x"]) for piece, _ in pieces)
        counts.add(count)
        total += sum(share for _, share in pieces)
    assert len(counts) == 1 and total == pytest.approx(processes)


class Forwards(torch.nn.Module):
    "A teacher that counts the rows it is asked about."

    def __init__(self):
        super().__init__()
        self.net, self.tokenizer, self.seen = net(3), None, 0

    def forward(self, pixel_values):
        self.seen += len(pixel_values)
        return self.net(pixel_values)


def shared_out(rank, folder, port, name):
    join(rank, port)
    teacher = Forwards()
    teacher.seen = 0
    rows = annotate(images(300), teacher, 2, cache=False, progress=False)
    logits = torch.tensor(rows["teacher_logits"][:])
    torch.save({"logits": logits, "seen": teacher.seen}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def resumed(rank, folder, port, name):
    "Two processes go on with what one began."
    join(rank, port)
    student, stages, rows = case("logit MSE")
    recipe, _ = recipe_of("logit MSE", stages)
    run = go(student, recipe, rows, images(32, 1), checkpoint=folder / "checkpoint")
    torch.save(run.student.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def begun(folder, updates):
    "A run that is killed after so many updates."
    student, stages, rows = case("logit MSE")
    recipe, _ = recipe_of("logit MSE", stages)
    step, left = torch.optim.AdamW.step, iter(range(updates))

    def step_or_die(*arguments, **options):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments, **options)

    torch.optim.AdamW.step = step_or_die
    go(student, recipe, rows, images(32, 1), checkpoint=folder / "checkpoint")


def shares(folder):
    preload()
    for name, work in (("annotate", shared_out), ("resume", resumed)):
        place = Path(folder) / name
        place.mkdir()
        if name == "resume":
            forked(begun, place, 7)  # killed in the second epoch of three
        codes = pair(work, place, name)
        (place / "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    in_new_process("test_two_processes", "shares", folder)
    return folder


def test_annotate_shares_the_rows_out(shared):
    place = shared / "annotate"
    assert json.loads((place / "codes.json").read_text()) == {"0": 0, "1": 0}
    found = [torch.load(place / f"{rank}.pt", weights_only=True) for rank in "01"]
    alone = annotate(images(300), Forwards(), 2, cache=False, progress=False)
    wanted = torch.tensor(alone["teacher_logits"][:])
    for each in found:
        torch.testing.assert_close(each["logits"], wanted)
        assert 0 < each["seen"] < 300
    assert sum(each["seen"] for each in found) == 300


def test_a_run_goes_on_in_two_processes(shared):
    place = shared / "resume"
    assert json.loads((place / "codes.json").read_text()) == {"0": 0, "1": 0}
    zero, one = (torch.load(place / f"{r}.pt", weights_only=True) for r in "01")
    student, stages, rows = case("logit MSE")
    single = go(student, recipe_of("logit MSE", stages)[0], rows, images(32, 1))
    for key, value in single.student.state_dict().items():
        assert torch.equal(zero[key], one[key])
        torch.testing.assert_close(zero[key], value, atol=1e-4, rtol=0)

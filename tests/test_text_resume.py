"""Objectives with a memory, killed in the middle and called again, on one process and on two."""

import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from test_glitter import pooled
from test_swa import Kill
from test_training import forked, in_new_process, same
from test_two_processes import two_processes
from tiny_text import bert, generator, rows
from transformers import BertForMaskedLM, BertForSequenceClassification

from kdbook import combined_kd, glitter, kronecker_bert
from kdbook.kronecker import kroneckerize
from kdbook.training import Recipe, fit

SMALL = {
    "*.attention.self.*": (4, 8),
    "*.intermediate.dense": (8, 2),
    "*word_embeddings": (40, 4),
}


def case(name):
    "Student, recipe, rows; a memory that matters between the kills."
    if (
        name == "glitter"
    ):  # scored in the first and fourth epoch: the second and third live from what was chosen
        return (
            bert(dropout=0.1),
            glitter.recipe(k1=4, k2=1, epochs=5, lr=5e-3, batch_size=8, score_every=3),
            pooled(),
        )
    if name in ("task", "pre-training"):  # a live teacher, whose layers are followed
        kind, make = (
            (BertForSequenceClassification, kronecker_bert.recipe)
            if name == "task"
            else (BertForMaskedLM, kronecker_bert.pretraining_recipe)
        )
        return (
            kroneckerize(bert(seed=2, dropout=0.1, kind=kind), SMALL),
            make(bert(seed=1, kind=kind), 5, 5e-3, 8),
            rows(24),
        )
    adversary = dict(generator_steps=1, student_steps=2, generator_lr=1e-2)
    return (
        bert(seed=2, dropout=0.1),
        combined_kd.recipe(bert(seed=1), generator(), 2, (4, 1), 5e-3, 8, **adversary),
        rows(24),
    )


def text_process(name, folder, kill):
    student, recipe, data = case(name)
    run = fit(
        student,
        Recipe(recipe.stages, (*recipe.callbacks, Kill(kill or 10**6))),
        data,
        progress=False,
        checkpoint=folder / "checkpoint",
    )
    memory = recipe.callbacks[0].state_dict() if recipe.callbacks else {}
    torch.save(
        dict(weights=run.student.state_dict(), memory=memory.get("generator", memory)),
        folder / "run.pt",
    )


def text_killed(name, folder):
    import accelerate  # noqa: F401
    import datasets

    for kind, kills in (("whole", ()), ("killed", (4, 3))):
        (Path(folder) / kind).mkdir()
        codes = [
            forked(text_process, name, Path(folder) / kind, kill)
            for kill in (*kills, None)
        ]
        assert codes == [-signal.SIGKILL] * len(kills) + [0], codes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["glitter", "combined", "task", "pre-training"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, name):
    in_new_process("text_killed", name, tmp_path, module="test_text_resume")
    whole, killed = (
        torch.load(tmp_path / kind / "run.pt", weights_only=True)
        for kind in ("whole", "killed")
    )
    assert same(whole["weights"], killed["weights"]) and same(
        whole["memory"], killed["memory"]
    )


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
    student, recipe, data = case(name)
    run = fit(student, recipe, data, progress=False)
    memory = recipe.callbacks[0].state_dict() if recipe.callbacks else {}
    torch.save(
        dict(weights=run.student.state_dict(), memory=memory.get("generator", memory)),
        Path(folder) / f"rank{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def two_of_them(folder, port, name):
    two_processes(folder, port, name, one_of_two)


@pytest.mark.skipif(
    not hasattr(os, "fork") or not torch.distributed.is_available(),
    reason="needs fork and torch.distributed",
)
@pytest.mark.parametrize("name", ["glitter", "combined", "task", "pre-training"])
def test_two_processes_stay_together(tmp_path, name):
    "Students are one, and so are the generators, although each process draws words of its own."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    in_new_process("two_of_them", tmp_path, port, name, module="test_text_resume")
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in "01"]
    assert same(ranks[0]["weights"], ranks[1]["weights"])
    if name == "combined":
        assert same(ranks[0]["memory"], ranks[1]["memory"])
    first = case(name)[0].state_dict()
    assert not same(first, ranks[0]["weights"])

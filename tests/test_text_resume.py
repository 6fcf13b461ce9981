"""Objectives with a memory, killed and called again, on one process and on two."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import Kill, forked, in_new_process, same
from test_glitter import pooled
from test_training import preload
from test_two_processes import join, pair
from tiny_text import bert, generator, rows
from transformers import BertForMaskedLM, BertForSequenceClassification

from kdbook import combined_kd, glitter, kronecker_bert
from kdbook.kronecker import kroneckerize
from kdbook.training import Recipe, fit

NAMES = ("glitter", "combined", "task", "pre-training")
SMALL = {
    "*.attention.self.*": (4, 8),
    "*.intermediate.dense": (8, 2),
    "*word_embeddings": (40, 4),
}
KILLS = {"whole": (), "killed": (4, 3)}  # the update in which each process dies


def kronecker_case(kind, make):
    "A live teacher, whose layers are followed."
    student = kroneckerize(bert(seed=2, dropout=0.1, kind=kind), SMALL)
    return (
        student,
        make(bert(seed=1, kind=kind), epochs=5, lr=5e-3, batch_size=8),
        rows(24),
    )


def case(name):
    "Student, recipe, rows; a memory that matters between the kills."
    if name == "task":
        return kronecker_case(BertForSequenceClassification, kronecker_bert.recipe)
    if name == "pre-training":
        return kronecker_case(BertForMaskedLM, kronecker_bert.pretraining_recipe)
    if name == "glitter":
        # scored in the first and fourth epoch: those between live from what was chosen
        recipe = glitter.recipe(
            k1=4, k2=1, epochs=5, lr=5e-3, batch_size=8, score_every=3
        )
        return bert(dropout=0.1), recipe, pooled()
    adversary = dict(generator_steps=1, student_steps=2, generator_lr=1e-2)
    recipe = combined_kd.recipe(
        bert(seed=1),
        generator(),
        2,
        epochs=(4, 1),
        lr=5e-3,
        batch_size=8,
        **adversary,
    )
    return bert(seed=2, dropout=0.1), recipe, rows(24)


def result_of(run, recipe):
    objective = recipe.stages[0].objective
    memory = objective.state_dict() if hasattr(objective, "state_dict") else {}
    return dict(
        weights=run.student.state_dict(), memory=memory.get("generator", memory)
    )


def one_process(name, folder, kill):
    student, recipe, data = case(name)
    watched = Recipe(recipe.stages, (*recipe.callbacks, Kill(kill or 10**6)))
    run = fit(student, watched, data, progress=False, checkpoint=folder / "checkpoint")
    torch.save(result_of(run, recipe), folder / "run.pt")


def one_of_two(rank, folder, port, name):
    join(rank, port)
    student, recipe, data = case(name)
    run = fit(student, recipe, data, progress=False)
    torch.save(result_of(run, recipe), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def all_cases(folder):
    "Runs in a process of its own, which computes nothing and so can be forked safely."
    preload()
    for name in NAMES:
        codes = {}
        for kind, kills in KILLS.items():
            place = Path(folder) / name / kind
            place.mkdir(parents=True)
            codes[kind] = [forked(one_process, name, place, k) for k in (*kills, None)]
        codes["pair"] = pair(one_of_two, Path(folder) / name, name)
        (Path(folder) / name / "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    in_new_process("test_text_resume", "all_cases", folder)
    return folder


def codes_of(folder):
    return json.loads((folder / "codes.json").read_text())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on_bit_for_bit(cases, name):
    for kind, kills in KILLS.items():
        expected = [-signal.SIGKILL] * len(kills) + [0]
        assert codes_of(cases / name)[kind] == expected
    whole, killed = (
        torch.load(cases / name / kind / "run.pt", weights_only=True) for kind in KILLS
    )
    assert same(whole["weights"], killed["weights"])
    assert same(whole["memory"], killed["memory"])


@pytest.mark.skipif(
    not hasattr(os, "fork") or not torch.distributed.is_available(),
    reason="needs fork and torch.distributed",
)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_stay_together(cases, name):
    """Students are one, and so are the generators.

    Each process draws words of its own all the same."""
    assert codes_of(cases / name)["pair"] == {"0": 0, "1": 0}
    zero, one = (
        torch.load(cases / name / f"rank{rank}.pt", weights_only=True) for rank in "01"
    )
    assert same(zero["weights"], one["weights"])
    if name == "combined":
        assert same(zero["memory"], one["memory"])
    first = case(name)[0].state_dict()
    assert not same(first, zero["weights"])

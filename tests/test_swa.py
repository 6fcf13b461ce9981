"""SWA: the mean against a loop, no side effect, killed runs, what is kept."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import Kill, forked, go, images, in_new_process, net, same, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook import annealing_kd, swa
from kdbook.distillation import annotate
from kdbook.models import character_student, image_net
from kdbook.swa import SWA, snapshot_steps
from kdbook.training import Callback, CrossEntropy, Recipe, Stage


class Film(Callback):
    "Keeps the weights after every update, and of which stage they are."

    def __init__(self):
        self.frames = []

    def after_step(self, run, progress):
        self.frames.append((run.stage, weights(run.student)))


def constant(epochs=3, lr=5e-3):
    return Stage(CrossEntropy(), epochs, lr, 8, schedule="constant")


def mean_of(frames):
    return {k: torch.stack([f[k] for f in frames]).mean(0) for k in frames[0]}


def assert_weights_are(student, expected):
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.integers(1, 40))
def test_snapshots_against_a_loop(steps, start, every):
    first = max(1, int(start * steps + 1e-9))
    naive = [t for t in range(1, steps + 1) if t >= first and (t - first) % every == 0]
    assert list(snapshot_steps(steps, start, every)) == naive
    assert len(naive) == (steps - first) // every + 1


@pytest.mark.parametrize("start, every", [(0.0, 1), (0.5, 1), (0.5, 4), (1.0, 1)])
def test_the_mean_is_that_of_the_snapshots_and_training_does_not_notice(start, every):
    film, other = Film(), Film()
    plain = go(net(), Recipe((constant(),), (film,)), images())
    # without validation rows the mean is what is left
    run = go(net(), Recipe((constant(),), (SWA(start, every), other)), images())
    steps = len(film.frames)
    assert len(other.frames) == steps
    assert all(same(a, b) for (_, a), (_, b) in zip(film.frames, other.frames))
    taken = snapshot_steps(steps, start, every)
    assert_weights_are(run.student, mean_of([film.frames[t - 1][1] for t in taken]))
    if start == 1.0:  # one snapshot, bit for bit
        assert same(run.student, plain.student)


def test_validation_sees_the_mean_and_only_means_are_kept():
    film = Film()
    run = go(net(), Recipe((constant(6),), (SWA(), film)), images(), images(40, 1))
    assert run.best["replaced"] and run.best["epoch"] >= 3
    per_epoch, steps = len(film.frames) // 6, len(film.frames)
    taken = [t for t in snapshot_steps(steps) if t <= run.best["epoch"] * per_epoch]
    assert_weights_are(run.student, mean_of([film.frames[t - 1][1] for t in taken]))


def test_only_its_own_stage_is_averaged():
    teacher = image_net(8, num_labels=4, pixels=16, seed=3)
    rows = annotate(images(), teacher, cache=False, progress=False)
    film = Film()
    recipe = swa.averaged(annealing_kd.recipe(3, epochs=(3, 4), lr=5e-3, batch_size=8))
    run = go(net(), Recipe(recipe.stages, (*recipe.callbacks, film)), rows)
    last = [w for stage, w in film.frames if stage == 1]
    taken = snapshot_steps(len(last))
    assert_weights_are(run.student, mean_of([last[t - 1] for t in taken]))


def test_a_second_run_begins_anew():
    callback = SWA()
    first = go(net(), Recipe((constant(),), (callback,)), images())
    again = go(net(), Recipe((constant(),), (callback,)), images())
    assert same(first.student, again.student)


def swa_process(folder, kill):
    callback = SWA(0.25, 2)
    made = Recipe((constant(4),), (callback, Kill(kill)))
    checkpoint = folder / "checkpoint"
    run = go(net(), made, images(), images(40, 1), checkpoint=checkpoint)
    state, best = callback.state_dict(), json.dumps(run.best)
    done = dict(weights=run.student.state_dict(), state=state, best=best)
    torch.save(done, folder / "run.pt")


def swa_killed(folder):
    # loaded once here, and not in every child; the last by its optimiser
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import torch._dynamo  # noqa: F401

    for name, kills in (("whole", ()), ("killed", (7, 9))):
        place = Path(folder) / name
        place.mkdir()
        codes = [forked(swa_process, place, kill) for kill in (*kills, -1)]
        assert codes == [-signal.SIGKILL] * len(kills) + [0], codes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_ends_on_the_same_mean(tmp_path):
    in_new_process("test_swa", "swa_killed", tmp_path)
    whole, killed = (
        torch.load(tmp_path / name / "run.pt", weights_only=True)
        for name in ("whole", "killed")
    )
    assert same(whole["weights"], killed["weights"]) and whole["best"] == killed["best"]
    assert whole["state"].pop("names") == killed["state"].pop("names")
    assert same(whole["state"], killed["state"])
    assert int(whole["state"]["n_averaged"]) > 3


def test_the_mean_of_many_half_precision_weights_does_not_drift():
    "In bfloat16 a mean of a thousand numbers near 1 stops moving, in 32 bits not."
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    mean = SWA()
    for i in range(1000):
        with torch.no_grad():
            model.weight.fill_(1.0 + (i % 2) / 8)
        mean.add(model)
    assert abs(mean.state_dict()["module.0"].item() - 1.0625) < 1e-4


def test_frozen_weights_and_buffers_stay_the_students_own():
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)
    )
    model[0].requires_grad_(False)
    mean = SWA()
    mean.add(model)
    assert mean.state_dict()["names"] == ["1.weight", "1.bias", "2.weight", "2.bias"]


def test_an_earlier_stage_may_be_averaged_and_the_next_one_begins_from_its_mean():
    film = Film()
    made = Recipe((constant(4), constant(2)), (SWA(stage=0), film))
    run = go(net(), made, images(), images(40, 1))
    assert len(run.history) == 6 and film.frames[-1][0] == 1
    with pytest.raises(ValueError, match="the recipe has 1"):
        go(net(), Recipe((constant(),), (SWA(stage=1),)), images())


def test_tied_weights_stay_tied_after_a_run():
    from datasets import Dataset

    g = torch.Generator().manual_seed(0)
    text = torch.randint(0, 50, (24, 65), generator=g)
    rows = dict(input_ids=text[:, :-1].tolist(), label=text[:, 1:].tolist())
    rows = Dataset.from_dict(rows)
    writer = character_student(1, 32, seed=0)
    run = go(writer, swa.recipe(epochs=2, batch_size=8), rows, rows)
    output = run.student.get_output_embeddings()
    assert run.student.get_input_embeddings().weight is output.weight
    assert 0 <= run.best["score"] <= 1
    callback = SWA()
    made = Recipe((constant(2),), (callback,))
    last = go(writer, made, rows)  # nothing to validate on
    for name, value in callback.weights().items():
        averaged = last.student.get_parameter(name)
        torch.testing.assert_close(averaged, value, atol=1e-6, rtol=0)

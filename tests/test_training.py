"""`fit`: the same bits each time, after being killed too; what it keeps and refuses."""

import json
import math
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import forked, go, images, in_new_process, net, same, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdbook.rows import forward
from kdbook.training import (
    Callback,
    CrossEntropy,
    Hinton,
    LengthBuckets,
    LogitMSE,
    Loss,
    Progress,
    Recipe,
    Run,
    Stage,
    describe,
    lr_factor,
    mix_seed,
    score,
    stage_rows,
)

FAST = settings(max_examples=60, deadline=None)


class Plain(nn.Module):
    "Returns a tensor, as any module may, and draws random numbers while it trains."

    def __init__(self, outputs=4, dropout=0.3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Linear(16, 12)
            self.head = nn.Linear(12, outputs)
        self.drop = nn.Dropout(dropout)

    def forward(self, pixel_values):
        return self.head(self.drop(torch.relu(self.body(pixel_values))))


def one(
    objective=None,
    epochs=2,
    lr=5e-3,
    batch_size=16,
    callbacks=(),
    keep="all",
    **arguments,
):
    "A recipe of one stage."
    objective = objective or CrossEntropy()
    stage = Stage(objective, epochs, lr, batch_size, **arguments)
    return Recipe((stage,), tuple(callbacks), keep)


def score_of(student, data):
    logits = forward(student, {"pixel_values": torch.tensor(data["pixel_values"])})
    return score(logits, torch.tensor(data["label"]))


# the same bits


def test_one_seed_gives_the_same_bits_and_another_gives_others():
    first, again, other = (
        go(Plain(), one(), validation=images(32, 1), seed=seed) for seed in (3, 3, 4)
    )
    assert same(first.student, again.student)
    assert first.history == again.history
    assert first.best == again.best
    assert not same(first.student, other.student)


def test_what_is_passed_in_stays_as_it_was():
    model, data = Plain().train(), images()
    before = weights(model)
    columns, rows = data.column_names, data[:]
    generators = lambda: (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )
    was = generators()
    run = go(model, one(), data, data)
    assert same(before, model) and model.training
    assert all(p.grad is None for p in model.parameters())
    assert generators() == was
    assert data.column_names == columns and data[:] == rows
    assert run.student is not model and not run.student.training
    assert not same(before, run.student)


def test_global_generators_do_not_matter():
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        runs.append(go(Plain(), one()))
    assert same(runs[0].student, runs[1].student)


def test_a_small_bert_on_sentences():
    from kdbook.data import load_task
    from kdbook.models import student

    model, task = student(layers=1, width=32), load_task("movies")
    before = weights(model)
    rows = task["train"].select(range(96))
    held_out = task["validation"].select(range(32))
    recipe = one(epochs=2, lr=1e-3, batch_size=32)
    run, again = (go(model, recipe, rows, held_out) for _ in range(2))
    assert same(run.student, again.student) and same(before, model)
    assert run.student.tokenizer is model.tokenizer  # shared, not copied
    words = run.student.get_input_embeddings().weight
    assert not words.requires_grad  # what is frozen stays so
    assert torch.equal(words, model.get_input_embeddings().weight)
    columns = ["stage", "name", "epoch", "lr", "loss", "label_loss", "val_score"]
    assert list(run.table().columns) == columns


# killed and started again


class Watch(Callback):
    """Counts updates and sums up weights, as an averaging callback would.

    At the place `kill` it ends the process. `here` counts the updates of this process,
    and is in no checkpoint."""

    def __init__(self, kill=None):
        self.kill = kill
        self.here = 0
        self.updates = 0
        self.stages = 0
        self.sum = 0.0

    def settings(self):
        return {}

    def at(self, *place):
        if self.kill == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_step(self, run, progress):
        self.updates += 1
        self.here += 1
        self.sum = self.sum + run.student.head.weight.detach().clone()
        self.at("step", self.here)

    def after_epoch(self, run, progress):
        self.at("epoch", len(run.history))

    def after_stage(self, run, progress):
        self.stages += 1
        self.at("stage", self.stages)

    def state_dict(self):
        return {"updates": self.updates, "stages": self.stages, "sum": self.sum}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        self.stages = state["stages"]
        self.sum = state["sum"]


def two_stages(watch):
    "Three epochs of four updates, then two epochs of two."
    first = Stage(LogitMSE(), 3, 5e-3, 16)
    return Recipe((first, Stage(CrossEntropy(), 2, 5e-3, 16)), (watch,))


def kill_in(module, name, call, before=lambda *_: None):
    "Let the process die in its `call`-th call of `module.name`."
    real, calls = getattr(module, name), []

    def dying(*arguments, **kwargs):
        calls.append(1)
        if len(calls) == call:
            before(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **kwargs)

    setattr(module, name, dying)


# where the first process dies, the second, ...; the one after them runs to the end
SCENARIOS = {
    "uninterrupted": [],
    "in epochs": [("step", 2), ("step", 6), ("step", 7), ("step", 5), ("step", 1)],
    "between stages": [("epoch", 2), ("stage", 1), ("stage", 1), ("stage", 2)],
    "while writing": [("replace", 1), ("replace", 2), ("save", 2), ("replace", 3)],
}


def one_process(folder, kill):
    torch.set_num_threads(1)
    if kill and kill[0] == "replace":
        kill_in(os, "replace", kill[1])
    if kill and kill[0] == "save":
        kill_in(torch, "save", kill[1], lambda state, f: (f.write(b"half"), f.flush()))
    watch, data = Watch(kill), images(labelled=32)
    place = folder / "checkpoint"
    run = go(Plain(), two_stages(watch), data, images(32, 1), checkpoint=place)
    result = dict(
        weights=run.student.state_dict(),
        history=run.history,
        best=run.best,
        watch=watch.state_dict(),
        here=watch.here,
    )
    torch.save(result, folder / "run.pt")


def preload():
    "Imports once what every run needs, so that no forked process has to."
    import accelerate  # noqa: F401
    import datasets  # noqa: F401

    torch.optim.SGD([torch.zeros(1)])  # the first optimiser loads half of torch


def all_scenarios(folder):
    """Runs in a process of its own, which computes nothing.

    So it can be forked safely."""
    preload()
    for name, kills in SCENARIOS.items():
        place = Path(folder) / name
        place.mkdir()
        codes = [forked(one_process, place, kill) for kill in (*kills, None)]
        (place / "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    in_new_process("test_training", "all_scenarios", folder)
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", [n for n in SCENARIOS if n != "uninterrupted"])
def test_killed_runs_end_on_the_same_bits(killed, name):
    codes = json.loads((killed / name / "codes.json").read_text())
    assert codes == [-signal.SIGKILL] * len(SCENARIOS[name]) + [0]
    whole, run = (
        torch.load(killed / n / "run.pt", weights_only=True)
        for n in ("uninterrupted", name)
    )
    assert same(whole["weights"], run["weights"])
    assert run["history"] == whole["history"] and len(run["history"]) == 5
    assert run["best"] == whole["best"]
    # a callback's state goes on, bit for bit
    assert torch.equal(run["watch"]["sum"], whole["watch"]["sum"])
    assert run["watch"]["updates"] == whole["watch"]["updates"] == whole["here"] == 16
    assert run["watch"]["stages"] == 2
    assert run["here"] < 16  # the last process did only what was left
    left = {path.name for path in (killed / name / "checkpoint").iterdir()}
    assert left == {"last.pt", ".lock"}  # and nothing half-written


def test_a_finished_run_is_read_not_repeated(tmp_path):
    data, held_out = images(labelled=32), images(32, 1)
    first = go(Plain(), two_stages(Watch()), data, held_out, checkpoint=tmp_path)
    watch = Watch()
    second = go(Plain(), two_stages(watch), data, held_out, checkpoint=tmp_path)
    assert watch.here == 0
    assert same(first.student, second.student)
    assert first.history == second.history and first.best == second.best


def test_interrupted_in_a_notebook_and_run_again(tmp_path):
    "The same cell again, with the same callback, which has counted in the meantime."

    class Stop(Watch):
        def after_step(self, run, progress):
            super().after_step(run, progress)
            if self.here == 6:
                raise KeyboardInterrupt

    data = images(labelled=32)
    whole = go(Plain(), two_stages(Watch()), data)
    watch = Stop()
    with pytest.raises(KeyboardInterrupt):
        go(Plain(), two_stages(watch), data, checkpoint=tmp_path)
    again = go(Plain(), two_stages(watch), data, checkpoint=tmp_path)
    assert same(whole.student, again.student)
    assert whole.history == again.history
    assert watch.updates == 16


def test_a_function_among_the_settings_does_not_change_the_description():
    "Its address differs from process to process, and a resume would be refused."

    class Scaled(LogitMSE):
        def __init__(self, scale, schedule):
            self.scale = scale
            self.schedule = schedule

    text = lambda scale: describe(one(Scaled(scale, lambda t: t)))
    kept = [lambda: None for _ in range(100)]  # so the second has another address
    assert text(2.0) == text(2.0) != text(3.0) and kept


def first_run(data):
    "The arguments that make a checkpoint."
    return dict(
        model=net(),
        recipe=one(Hinton(), epochs=1),
        train=data,
        validation=images(32, 1),
        seed=0,
    )


def other_student():
    model = net()
    model.head.bias.data[0] += 1
    return model


@pytest.mark.parametrize(
    "other, words",
    [
        (lambda data: dict(seed=1), ["seed 0", "seed 1"]),
        (
            lambda data: dict(recipe=one(Hinton(), epochs=1, lr=6e-3)),
            ["lr=0.005", "lr=0.006"],
        ),
        (
            lambda data: dict(recipe=one(Hinton(3.0), 1)),
            ["temperature=2.0", "temperature=3.0"],
        ),
        (lambda data: dict(train=images(labelled=60)), ["in the training data: give"]),
        (lambda data: dict(train=data.select(range(63))), ["data"]),
        (lambda data: dict(validation=images(32, 2)), ["in the validation data: give"]),
        (lambda data: dict(model=other_student()), ["differs in the student: give"]),
    ],
    ids="seed recipe objective labels rows validation student".split(),
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, other, words):
    data = images()
    go(**first_run(data), checkpoint=tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError) as error:
        go(**{**first_run(data), **other(data)}, checkpoint=tmp_path)
    assert all(w in str(error.value) for w in (*words, str(tmp_path))), error.value
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_checkpoint_is_plain_data(tmp_path):
    "Also when the metric gives a numpy number, which pickles as code."
    data = images()
    metric = lambda logits, labels: np.float64(score(logits, labels))
    arguments = dict(checkpoint=tmp_path, metric=metric)
    run = go(net(), one(callbacks=[Watch()]), data, data, **arguments)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["history"] == run.history
    assert state["callbacks"][0]["updates"] == 8
    again = go(net(), one(callbacks=[Watch()]), data, data, **arguments)
    assert again.history == run.history


# one batch, cut up in several ways


class Spy(CrossEntropy):
    "Keeps the whole gradient of the first update, and the precisions it computed in."

    def __init__(self):
        self.gradients = {}
        self.precisions = set()
        self.calls = 0
        self.done = False

    def keep(self, name, gradient):
        if not self.done:
            self.gradients[name] = gradient.clone()

    def __call__(self, student, batch, progress):
        self.calls += 1
        first = next(m for m in student.modules() if isinstance(m, nn.Linear))
        note = lambda module, inputs, output: self.precisions.add(output.dtype)
        hook = first.register_forward_hook(note)
        if progress.step == 0:
            for name, p in student.named_parameters():
                p.register_post_accumulate_grad_hook(
                    lambda p, name=name: self.keep(name, p.grad)
                )
        self.done = progress.step > 0
        loss = super().__call__(student, batch, progress)
        hook.remove()
        return loss


def test_micro_batches_give_the_same_gradient_and_weights():
    whole, pieces = Spy(), Spy()
    runs = [
        go(net(), one(spy, batch_size=13, clip=0.0), images(65), micro_batches=count)
        for spy, count in ((whole, 1), (pieces, 4))  # of 13: pieces of 4, 4, 4 and 1
    ]
    assert pieces.calls == 4 * whole.calls == 40
    assert pieces.gradients.keys() == whole.gradients.keys()
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(
            pieces.gradients[name], gradient, atol=1e-6, rtol=1e-5
        )
    others = runs[1].student.state_dict()
    for name, value in runs[0].student.state_dict().items():
        torch.testing.assert_close(value, others[name], atol=1e-4, rtol=0)
    losses, other_losses = ([row["loss"] for row in run.history] for run in runs)
    assert other_losses == pytest.approx(losses, abs=1e-5)
    with pytest.raises(ValueError, match="micro_batches"):
        go(net(), one(), micro_batches=0)


def test_mixed_precision_is_used_and_can_change_within_a_process():
    precisions = []
    for precision in ("no", "bf16", "no"):
        spy = Spy()
        run = go(net(), one(spy), validation=images(), mixed_precision=precision)
        precisions.append(spy.precisions)
        assert {p.dtype for p in run.student.parameters()} == {torch.float32}
        logits = forward(run.student, {"pixel_values": torch.rand(2, 16)})
        assert logits.dtype == torch.float32
    assert precisions == [{torch.float32}, {torch.bfloat16}, {torch.float32}]


# schedules and order


def test_lr_factor_by_hand():
    rates = [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert [lr_factor(s, 10, 0.2) for s in range(10)] == pytest.approx(rates)
    assert [lr_factor(s, 4, 0.25, "constant") for s in range(4)] == [0.5, 1, 1, 1]
    assert [lr_factor(s, 4, 0.0) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert lr_factor(0, 1) == 0.5 and lr_factor(4, 4) == 0


@FAST
@given(st.integers(1, 300), st.floats(0, 0.95))
def test_lr_factor_against_transformers(steps, warmup):
    """After warm-up they agree.

    During it, transformers starts at zero and wastes an update; this one does not."""
    from transformers import get_linear_schedule_with_warmup

    rising = max(1, round(warmup * steps)) if warmup else 0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, rising, steps)
    expected = [schedule.lr_lambdas[0](s) for s in range(rising, steps + 1)]
    factors = [lr_factor(s, steps, warmup) for s in range(steps + 1)]
    assert factors[rising:] == pytest.approx(expected)
    assert all(0 < factor <= 1 for factor in factors[:-1])
    climb = factors[: min(rising + 1, steps)]
    assert climb == sorted(climb)


def test_the_optimiser_gets_the_schedule_and_no_decay_on_biases(monkeypatch):
    rates, decays = [], []

    class Watched(torch.optim.AdamW):
        def step(self, *arguments):
            rates.append({group["lr"] for group in self.param_groups})
            decays.append(
                [
                    (group["weight_decay"], {p.ndim for p in group["params"]})
                    for group in self.param_groups
                ]
            )
            return super().step(*arguments)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    recipe = one(epochs=2, lr=0.1, batch_size=16, warmup=0.25, weight_decay=0.3)
    run = go(net(), recipe)
    schedule = [0.1 * lr_factor(s, 8, 0.25) for s in range(8)]
    assert [rate for (rate,) in rates] == pytest.approx(schedule)
    assert [row["lr"] for row in run.history] == pytest.approx(schedule[::4])
    assert decays == [[(0.3, {2}), (0.0, {1})]] * 8


@FAST
@given(
    st.lists(st.integers(1, 60), max_size=80),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_every_row_once_an_epoch(lengths, batch_size, pool, epoch):
    sampler = LengthBuckets(lengths, batch_size, seed=1, pool=pool)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(sum(batches, [])) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    assert sum(len(b) != batch_size for b in batches) <= 1
    assert list(sampler) == batches


def test_buckets_waste_less_padding_and_change_with_the_epoch():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 60, (640,), generator=g).tolist()
    longest = lambda batch: max(lengths[i] for i in batch)

    def waste(pool):
        batches = LengthBuckets(lengths, 32, pool=pool)
        return sum(longest(b) * len(b) for b in batches) / sum(lengths) - 1

    assert waste(50) < 0.1 < 0.5 < waste(1)
    sampler, orders = LengthBuckets(lengths, 32), []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    # other batches, not only another order of them
    assert [set(b) for b in orders[0]] != [set(b) for b in orders[1]]
    order = [longest(b) for b in orders[0]]
    assert order != sorted(order) and order != sorted(order, reverse=True)
    assert list(LengthBuckets(lengths, 32, seed=1)) != orders[0]


def test_mixed_seeds_differ():
    parts = [("a", 1, 2), ("a", 2, 1), ("b", 1, 2), ("a", 12), ("a", 1, 2, 0)]
    seeds = [mix_seed(*each) for each in parts]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seed("a", 1, 2) == seeds[0]


def test_progress_goes_from_zero_to_one_in_every_stage():
    seen = []

    class See(CrossEntropy):
        def __call__(self, student, batch, progress):
            seen.append(("loss", progress))
            return super().__call__(student, batch, progress)

    class Follow(Callback):
        def after_step(self, run, progress):
            seen.append(("step", progress))

        def after_epoch(self, run, progress):
            seen.append(("epoch", progress))

        def after_stage(self, run, progress):
            seen.append(("stage", progress))

    stages = (Stage(See(), 2, batch_size=16), Stage(See(), 3, batch_size=20))
    go(net(), Recipe(stages, (Follow(),)), images(50))
    ends = [i + 1 for i, (what, _) in enumerate(seen) if what == "stage"]
    for start, end, epochs, steps in ((0, ends[0], 2, 8), (ends[0], ends[1], 3, 9)):
        part = seen[start:end]
        t = [progress.t for _, progress in part]
        assert t == sorted(t) and t[0] == 0 and t[-1] == 1
        at = lambda kind: [progress for what, progress in part if what == kind]
        assert [p.t for p in at("loss")] == [s / steps for s in range(steps)]
        assert [p.t for p in at("step")] == [(s + 1) / steps for s in range(steps)]
        assert [p.epoch for p in at("epoch")] == list(range(1, epochs + 1))
        assert {(p.epochs, p.steps) for _, p in part} == {(epochs, steps)}
    assert Progress(0, 0, 0, 0).t == 0


# which rows, which weights


def test_a_stage_on_labels_skips_unlabelled_rows():
    labels = {"labelled": [], "all": []}

    class See(CrossEntropy):
        def __init__(self, rows):
            self.rows = rows

        def __call__(self, student, batch, progress):
            labels[self.rows] += batch["labels"].tolist()
            return super().__call__(student, batch, progress)

    data = images(50, labelled=20)
    sizes = {"labelled": 8, "all": 25}
    stages = [Stage(See(rows), 1, batch_size=size) for rows, size in sizes.items()]
    go(net(), Recipe(tuple(stages)), data)
    assert sorted(labels["labelled"]) == sorted(data["label"][:20])
    assert sorted(labels["all"]) == sorted(data["label"])
    assert stage_rows(Stage(CrossEntropy(), 1), data) == list(range(20))


class Spoil(Callback):
    """Sets the last layer to zero after the epochs `rows` of the history.

    `after` holds the weights with which each epoch ended."""

    def __init__(self, *rows):
        self.rows = rows
        self.after = {}

    def settings(self):
        return {"rows": self.rows}

    def after_epoch(self, run, progress):
        row = len(run.history)
        if row in self.rows:
            run.student.head.weight.data.zero_()
            run.student.head.bias.data.zero_()
        self.after[row] = weights(run.student)


def test_the_best_weights_are_kept():
    spoil, data = Spoil(3), images()
    run = go(net(), one(epochs=4, lr=2e-2, callbacks=[spoil]), data, data)
    good, spoiled = (row["val_score"] for row in run.history[2:])
    assert spoiled < good
    assert run.best == dict(stage=0, epoch=3, row=2, score=good, replaced=False)
    assert same(run.student, spoil.after[2])
    assert score_of(run.student, data) == pytest.approx(run.best["score"])


def test_without_validation_the_last_weights_are_kept():
    spoil = Spoil(1)
    run = go(net(), one(epochs=2, callbacks=[spoil]))
    assert run.best is None
    assert same(run.student, spoil.after[1])
    assert [row["val_score"] for row in run.history] == [None, None]


@pytest.mark.parametrize("keep, stage, row", [("all", 0, 2), ("last", 1, 3)])
def test_keep_says_which_stages_count(keep, stage, row):
    spoil, data = Spoil(3, 4), images()
    stages = (Stage(CrossEntropy(), 3, 2e-2, 16), Stage(CrossEntropy(), 2, 1e-3, 16))
    run = go(net(), Recipe(stages, (spoil,), keep), data, data)
    assert run.best["stage"] == stage and run.best["row"] == row
    assert same(run.student, spoil.after[row])


@pytest.mark.parametrize("reload_best, row", [(True, 1), (False, 2)])
def test_a_stage_begins_where_the_one_before_ended(reload_best, row):
    starts = []

    class See(CrossEntropy):
        def __call__(self, student, batch, progress):
            if progress.step == 0:
                starts.append(weights(student))
            return super().__call__(student, batch, progress)

    spoil, data = Spoil(2), images()
    first = Stage(See(), 3, 2e-2, 16, reload_best=reload_best)
    go(net(), Recipe((first, Stage(See(), 1, 1e-3, 16)), (spoil,)), data, data)
    assert same(starts[1], spoil.after[row])


def test_validation_happens_when_asked_and_at_the_end():
    run = go(net(), one(epochs=5, validate_every=2), validation=images(32, 1))
    validated = [row["epoch"] for row in run.history if row["val_score"] is not None]
    assert validated == [2, 4, 5]


def test_regression():
    from datasets import Dataset

    g = torch.Generator().manual_seed(0)
    x = torch.rand(64, 16, generator=g)
    columns = dict(pixel_values=x.tolist(), label=(x.sum(-1) - 8).tolist())
    data = Dataset.from_dict(columns)
    run = go(Plain(1, 0.0), one(epochs=30, lr=1e-2), data, data)
    assert run.history[-1]["loss"] < 0.5 * run.history[0]["loss"]
    assert run.best["score"] == max(row["val_score"] for row in run.history)
    assert -0.5 < run.best["score"] < 0  # a constant reaches -1.3
    outputs = torch.tensor([[1.0], [2.0], [9.0]])
    labels = torch.tensor([1.5, 2.0, -100.0])
    assert score(outputs, labels) == pytest.approx(-0.125)


def test_score_counts_labelled_rows():
    logits = torch.tensor([[2.0, 1], [0, 1], [5, 0], [1, 0]])
    labels = torch.tensor([0, 1, 1, -100])
    assert score(logits, labels) == pytest.approx(2 / 3)


# what cannot work


@pytest.mark.parametrize(
    "setting, value",
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("schedule", "cosine"),
        ("validate_every", 0),
        ("clip", -1.0),
        ("weight_decay", -0.1),
        ("keep", "best"),
    ],
)
def test_impossible_settings_are_named(setting, value):
    with pytest.raises(ValueError) as error:
        go(net(), one(name="first", **{setting: value}))
    words = [setting, str(value)] + ["first"] * (setting != "keep")
    assert all(word in str(error.value) for word in words), error.value


def test_missing_columns_and_rows_are_named_before_training():
    data = images()
    bare = data.remove_columns("teacher_logits")
    # the second could not be trained at all: the data is checked first
    for model in (net(), nn.Identity()):
        with pytest.raises(ValueError, match="'LogitMSE'.*'teacher_logits'.*annotate"):
            go(model, one(LogitMSE()), bare)
    with pytest.raises(ValueError, match="'label'"):
        go(net(), one(), data.remove_columns("label"))
    with pytest.raises(ValueError, match="labelled rows.*64"):
        go(net(), one(), images(labelled=0))
    with pytest.raises(ValueError, match="no rows"):
        go(net(), one(), data.select([]))
    for held_out in (data.remove_columns("label"), images(labelled=0), data.select([])):
        with pytest.raises(ValueError, match="validation"):
            go(net(), one(), data, held_out)
    with pytest.raises(ValueError, match="no stages"):
        go(net(), Recipe(()))


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"accelerate.*kdbook\[train\]"):
        go(net(), one())


def test_a_frozen_student_is_named():
    model = Plain().requires_grad_(False)
    with pytest.raises(ValueError, match="Plain.*requires_grad"):
        go(model, one())


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    class Breaks(CrossEntropy):
        def __call__(self, student, batch, progress):
            loss = super().__call__(student, batch, progress)
            return Loss(loss.total * (float("nan") if progress.epoch == 1 else 1))

    with pytest.raises(FloatingPointError, match="Breaks.*epoch 2.*nan.*0.005"):
        go(net(), one(Breaks(), epochs=3), checkpoint=tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())


def test_training_works():
    "A run returns a student that learned something, and a table with a row an epoch."
    data = images(200)
    run = go(net(), one(Hinton(), epochs=10, lr=2e-2), data, images(100, 1))
    assert isinstance(run, Run)
    assert run.best["score"] > 0.6
    assert len(run.table()) == 10
    losses = [row["loss"] for row in run.history]
    assert losses[-1] < 0.7 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)

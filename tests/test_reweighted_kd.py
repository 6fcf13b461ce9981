"""RW-KD: three ways to one alignment, what stays undisturbed, who may be held out."""

import pytest
import torch
from helpers import changed, doubtful_images, same
from hypothesis import given, settings
from hypothesis import strategies as st
from test_annealing_kd import train
from torch import nn

from kdbook.lab.methods import PLANS
from kdbook.lab.teachers import training_rows
from kdbook.models import cnn_student, image_net
from kdbook.records.settings import SETTINGS
from kdbook.reweighted_kd import (
    RWKD,
    WeightedKD,
    alignment,
    check_meta,
    meta_gradient,
    meta_weights,
    per_sample_losses,
    recipe,
    reweighted_loss,
    weighted_loss,
    weights_of,
)
from kdbook.training import Callback, Hinton, Recipe, Stage, fit

FAST = settings(max_examples=25, deadline=None)


def batch(rows=7, classes=4, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return dict(
        pixel_values=torch.randn(rows, 16, generator=g, dtype=dtype),
        labels=torch.randint(0, max(2, classes), (rows,), generator=g),
        teacher_logits=2 * torch.randn(rows, classes, generator=g, dtype=dtype),
    )


class Noisy(nn.Module):
    "Dropout and batch norm: everything that two passes can disagree about."

    def __init__(self, classes=4):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Linear(16, 12)
            self.norm = nn.BatchNorm1d(12)
            self.drop = nn.Dropout(0.4)
            self.head = nn.Linear(12, classes)

    def forward(self, pixel_values):
        return self.head(self.drop(torch.tanh(self.norm(self.body(pixel_values)))))


@FAST
@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.floats(0.5, 5),
    st.sampled_from(["labels", "both"]),
    st.integers(0, 10**6),
)
def test_three_ways_one_value(classes, rows, temperature, meta_loss, seed):
    net = image_net((6, 5), num_labels=classes, pixels=16, seed=seed % 1000).double()
    own = batch(rows, classes, seed, torch.float64)
    held = batch(6, classes, seed + 1, torch.float64)
    losses = dict(meta_loss=meta_loss, temperature=temperature)
    exact = alignment(net, own, held, "double_backward", **losses)
    torch.testing.assert_close(alignment(net, own, held, "forward", **losses), exact)
    # a ReLU may have its kink within the step, so the difference is given a shorter one
    difference = alignment(net, own, held, step=1e-6, **losses)
    size = 1 + exact.abs().max().item()
    torch.testing.assert_close(difference, exact, atol=1e-5 * size, rtol=1e-4)


@pytest.mark.parametrize("how", ["finite_difference", "forward", "double_backward"])
def test_three_ways_with_dropout_and_batch_norm(how):
    "The same masks in all of them; nothing in the model or the generators moves."
    net = Noisy().train()
    own, held = batch(16), batch(16, seed=1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    exact = alignment(net, own, held, "double_backward", seed=3)
    same_masks = alignment(net, own, held, how, seed=3)
    torch.testing.assert_close(same_masks, exact, atol=2e-3, rtol=2e-2)
    other_masks = alignment(net, own, held, how, seed=4)
    assert not torch.allclose(other_masks, exact, atol=1e-2)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


def test_a_cnn_and_its_frozen_embeddings():
    net = cnn_student(filters=6).train()
    g = torch.Generator().manual_seed(0)
    text = lambda rows: dict(
        input_ids=torch.randint(1000, 9000, (rows, 9), generator=g),
        labels=torch.randint(0, 2, (rows,), generator=g),
        teacher_logits=torch.randn(rows, 2, generator=g),
    )
    own, held = text(6), text(8)
    assert not any("embeddings" in name for name in meta_gradient(net, held))
    exact = alignment(net, own, held, "double_backward")
    difference = alignment(net, own, held)
    torch.testing.assert_close(difference, exact, atol=2e-3, rtol=2e-2)


def test_scale_of_the_held_out_loss_does_not_matter():
    u = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).abs() + 0.01
    for factor in (1e-3, 1e3):
        torch.testing.assert_close(
            weights_of(u * factor), weights_of(u), atol=1e-4, rtol=1e-3
        )
    w = weights_of(torch.randn(500, 2, generator=torch.Generator().manual_seed(1)))
    assert w.min() >= 0 and w.max() <= 1


def test_the_shared_forward_pass_is_the_pass_of_the_update():
    "Loss and gradient are those of the weighted losses, under the update's own masks."
    net, own, held = Noisy().train(), batch(12), batch(16, seed=1)
    # the update's own pass may change running statistics; here it must not
    net.norm.momentum = 0.0
    torch.manual_seed(5)
    loss = reweighted_loss(net, own, held).total
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    weights = meta_weights(net, own, held, "double_backward", seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        logits = net(own["pixel_values"])
    losses = per_sample_losses(logits, own["teacher_logits"], own["labels"])
    expected = weighted_loss(losses, weights)
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-3)
    slope = lambda total: torch.autograd.grad(total, net.head.weight)[0]
    torch.testing.assert_close(slope(loss), slope(expected), atol=5e-3, rtol=5e-2)


def test_rows_without_labels_have_the_teacher():
    labels = [y if i < 24 else -100 for i, y in enumerate(doubtful_images()["label"])]
    data = changed(doubtful_images(), "label", labels)
    run = train(recipe(doubtful_images(20, 5), epochs=2, lr=5e-3, batch_size=16), data)
    assert run.history[-1]["teacher_weight"] > 0.5
    bare = dict(batch(4), labels=torch.full((4,), -100))
    net = image_net(8, num_labels=4, pixels=16)
    loss = reweighted_loss(net, bare, batch(8, seed=1))
    logits = net(bare["pixel_values"]).logits
    losses = per_sample_losses(logits, bare["teacher_logits"], bare["labels"])
    torch.testing.assert_close(loss.total, losses[:, 1].mean())
    assert all(v == v for v in loss.parts.values())


def test_forced_weights_are_plain_kd():
    data = doubtful_images()
    fixed = lambda objective: (
        train(Recipe((Stage(objective, 3, 5e-3, 16),)), data).student
    )
    a, b = fixed(WeightedKD(0.5)), fixed(Hinton())
    for x, y in zip(a.state_dict().values(), b.state_dict().values()):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


class Stop(Callback):
    "Breaks a run off after the epoch given, if any."

    def __init__(self, epoch=None):
        self.epoch = epoch

    def settings(self):
        return {}

    def after_epoch(self, run, progress):
        if progress.epoch == self.epoch:
            raise KeyboardInterrupt


def stoppable(held_out, stop, **kwargs):
    stage = Stage(RWKD(held_out, meta_batch_size=8), 4, 5e-3, 16)
    run = Recipe((stage,), (Stop(stop),))
    return fit(Noisy(), run, doubtful_images(), seed=0, progress=False, **kwargs)


def test_a_stopped_run_goes_on_with_the_same_held_out_rows(tmp_path):
    rows = doubtful_images(24, 5)
    whole = stoppable(rows, None)
    with pytest.raises(KeyboardInterrupt):
        stoppable(rows, 3, checkpoint=tmp_path)
    again = stoppable(rows, None, checkpoint=tmp_path)
    assert same(whole.student, again.student) and whole.history == again.history


def test_a_stopped_run_does_not_go_on_with_other_held_out_rows(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stoppable(doubtful_images(24, 5), 2, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="another checkpoint folder"):
        stoppable(doubtful_images(24, 6), None, checkpoint=tmp_path)


def test_mixed_precision_is_refused():
    with pytest.raises(ValueError, match='mixed_precision="no"'):
        train(
            recipe(doubtful_images(20, 5), epochs=1),
            doubtful_images(),
            mixed_precision="bf16",
        )


@pytest.mark.parametrize(
    "meta, words",
    [
        (lambda: None, "train_test_split"),
        (lambda: doubtful_images().select([0, 3]), "2 of 2 meta rows also train"),
        (lambda: doubtful_images(32, 1).select([4]), "1 of 1 meta rows also validate"),
        (
            lambda: doubtful_images(9, 5).remove_columns("label"),
            "lacks the column 'label'",
        ),
        (
            lambda: changed(doubtful_images(9, 5), "label", [-100] * 9),
            "9 of 9 meta rows have no label",
        ),
        (lambda: doubtful_images(9, 5).select([]), "0 of 0"),
    ],
)
def test_who_may_not_be_held_out(meta, words):
    with pytest.raises(ValueError, match=words):
        train(recipe(meta(), epochs=1), doubtful_images(), doubtful_images(32, 1))


def test_rows_are_known_by_what_a_model_sees():
    "Other columns and other row numbers do not make a row another row."
    from datasets import Dataset

    pair = Dataset.from_dict(
        {"text": ["a", "a"], "text_pair": ["b", "c"], "label": [0, 1]}
    )
    check_meta(pair.select([0]), pair.select([1]))
    with pytest.raises(ValueError, match="also train"):
        check_meta(pair.select([0]), changed(pair.select([0]), "label", [1]))
    first, second = RWKD(pair.select([0])), RWKD(pair.select([1]))
    assert first.meta != second.meta, "a checkpoint knows its meta set"


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", 0.0),
        ("meta_batch_size", 0),
        ("step", 0.0),
        ("meta_loss", "x"),
    ],
)
def test_impossible_arguments(name, value):
    with pytest.raises(ValueError, match=name):
        RWKD(**{name: value})


def test_the_ladder_holds_out_a_tenth_and_keeps_the_updates():
    from kdbook.data import load_task

    movies = load_task("movies")
    for name in ("same-rows", "few-labels"):
        rows = training_rows(movies["train"], SETTINGS[name], seed=1)
        _, kept, kwargs = PLANS["reweighted_kd"].prepare(SETTINGS[name], None, rows)
        assert len(kept) == SETTINGS[name].rows and len(kwargs["meta"]) == 200
        assert sum(y != -100 for y in kept["label"]) == SETTINGS[name].labelled
        check_meta(kwargs["meta"], kept, movies["validation"])


def test_missing_parts_of_a_batch_are_named():
    net, own, held = image_net(8, num_labels=4, pixels=16), batch(4), batch(5, seed=1)
    bare = {k: v for k, v in held.items() if k != "teacher_logits"}
    unlabelled = dict(held, labels=torch.tensor([-100, 0, 1, 2, 3]))
    # labels are enough for the held-out rows
    assert alignment(net, own, bare).shape == (4, 2)
    for how in ("finite_difference", "forward", "double_backward"):
        with pytest.raises(ValueError, match='"both" needs teacher_logits'):
            alignment(net, own, bare, how, meta_loss="both")
        with pytest.raises(ValueError, match="1 have -100"):
            alignment(net, own, unlabelled, how)
        with pytest.raises(ValueError, match="the batch needs teacher_logits"):
            alignment(net, bare, held, how)

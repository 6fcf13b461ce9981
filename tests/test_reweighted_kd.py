"""RW-KD: three ways to one alignment, what the passes must not disturb, and who may be held out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_annealing_kd import changed, images, same, train
from torch import nn

from kdbook.benchmark import METHODS, SETTINGS, training_rows
from kdbook.models import cnn_student, image_net
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
    shifted_losses,
    weighted_loss,
    weights_of,
)
from kdbook.training import Callback, Hinton, Progress, Recipe, Stage, fit

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
            self.body, self.norm, self.drop, self.head = (
                nn.Linear(16, 12),
                nn.BatchNorm1d(12),
                nn.Dropout(0.4),
                nn.Linear(12, classes),
            )

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
    mine, held = (
        batch(n, classes, s, torch.float64) for n, s in ((rows, seed), (6, seed + 1))
    )
    how = dict(meta_loss=meta_loss, temperature=temperature)
    exact = alignment(net, mine, held, "double_backward", **how)
    torch.testing.assert_close(alignment(net, mine, held, "forward", **how), exact)
    # a ReLU may have its kink within the step, so the difference is given a shorter one
    torch.testing.assert_close(
        alignment(net, mine, held, step=1e-6, **how),
        exact,
        atol=1e-5 * (1 + exact.abs().max().item()),
        rtol=1e-4,
    )


@pytest.mark.parametrize("how", ["finite_difference", "forward", "double_backward"])
def test_three_ways_with_dropout_and_batch_norm(how):
    "The same masks in all of them; nothing in the model or the generators moves."
    net = Noisy().train()
    before, state = (
        {k: v.clone() for k, v in net.state_dict().items()},
        torch.get_rng_state(),
    )
    exact = alignment(net, batch(16), batch(16, seed=1), "double_backward", seed=3)
    found = alignment(net, batch(16), batch(16, seed=1), how, seed=3)
    torch.testing.assert_close(found, exact, atol=2e-3, rtol=2e-2)
    assert not torch.allclose(
        alignment(net, batch(16), batch(16, seed=1), how, seed=4), exact, atol=1e-2
    )
    assert all(
        torch.equal(before[k], v) for k, v in net.state_dict().items()
    ) and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


def test_a_cnn_and_its_frozen_embeddings():
    net = cnn_student(filters=6).train()
    g = torch.Generator().manual_seed(0)
    text = lambda rows: dict(
        input_ids=torch.randint(1000, 9000, (rows, 9), generator=g),
        labels=torch.randint(0, 2, (rows,), generator=g),
        teacher_logits=torch.randn(rows, 2, generator=g),
    )
    mine, held = text(6), text(8)
    assert not any("embeddings" in name for name in meta_gradient(net, held))
    torch.testing.assert_close(
        alignment(net, mine, held),
        alignment(net, mine, held, "double_backward"),
        atol=2e-3,
        rtol=2e-2,
    )


def test_scale_of_the_held_out_loss_does_not_matter():
    u = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).abs() + 0.01
    for factor in (1e-3, 1e3):
        torch.testing.assert_close(
            weights_of(u * factor), weights_of(u), atol=1e-4, rtol=1e-3
        )
    w = weights_of(torch.randn(500, 2, generator=torch.Generator().manual_seed(1)))
    assert w.min() >= 0 and w.max() <= 1


def test_the_shared_forward_pass_is_the_pass_of_the_update():
    "The loss and its gradient are those of the weighted losses, under the masks that the update draws."
    net, mine, held = Noisy().train(), batch(12), batch(16, seed=1)
    net.norm.momentum = (
        0.0  # the update's own pass may change running statistics; here it must not
    )
    torch.manual_seed(5)
    found = reweighted_loss(net, mine, held)
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    weights = meta_weights(net, mine, held, "double_backward", seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        expected = weighted_loss(
            per_sample_losses(
                net(mine["pixel_values"]), mine["teacher_logits"], mine["labels"]
            ),
            weights,
        )
    torch.testing.assert_close(found.total, expected, atol=1e-3, rtol=1e-3)
    ours, theirs = (
        torch.autograd.grad(loss, net.head.weight)[0]
        for loss in (found.total, expected)
    )
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-2)


def test_rows_without_labels_have_the_teacher():
    data = changed(
        images(),
        "label",
        [y if i < 24 else -100 for i, y in enumerate(images()["label"])],
    )
    run = train(recipe(images(20, 5), epochs=2, lr=5e-3, batch_size=16), data)
    assert run.history[-1]["teacher_weight"] > 0.5
    mine = dict(batch(4), labels=torch.full((4,), -100))
    net = image_net(8, num_labels=4, pixels=16)
    loss = reweighted_loss(net, mine, batch(8, seed=1))
    torch.testing.assert_close(
        loss.total,
        per_sample_losses(
            net(mine["pixel_values"]).logits, mine["teacher_logits"], mine["labels"]
        )[:, 1].mean(),
    )
    assert all(v == v for v in loss.parts.values())


def test_forced_weights_are_plain_kd():
    data = images()
    fixed = lambda objective: (
        train(Recipe((Stage(objective, 3, 5e-3, 16),)), data).student
    )
    a, b = fixed(WeightedKD(0.5)), fixed(Hinton())
    for x, y in zip(a.state_dict().values(), b.state_dict().values()):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_a_stopped_run_goes_on_with_the_same_held_out_rows(tmp_path):
    class Stop(Callback):
        def after_epoch(self, run, progress):
            if progress.epoch == 3 and self._armed:
                raise KeyboardInterrupt

    net, data, rows = Noisy(), images(), images(24, 5)
    stages = lambda watch: Recipe(
        (Stage(RWKD(rows, meta_batch_size=8), 4, 5e-3, 16),), (watch,)
    )
    watch = Stop()
    watch._armed = False
    whole = fit(net, stages(watch), data, seed=0, progress=False)
    watch._armed = True
    with pytest.raises(KeyboardInterrupt):
        fit(net, stages(watch), data, seed=0, progress=False, checkpoint=tmp_path)
    watch._armed = False
    again = fit(net, stages(watch), data, seed=0, progress=False, checkpoint=tmp_path)
    assert same(whole.student, again.student) and whole.history == again.history


def test_mixed_precision_is_refused():
    with pytest.raises(ValueError, match='mixed_precision="no"'):
        train(recipe(images(20, 5), epochs=1), images(), mixed_precision="bf16")


@pytest.mark.parametrize(
    "meta, words",
    [
        (lambda: None, "train_test_split"),
        (lambda: images().select([0, 3]), "2 of 2 meta rows also train"),
        (lambda: images(32, 1).select([4]), "1 of 1 meta rows also validate"),
        (lambda: images(9, 5).remove_columns("label"), "lacks the column 'label'"),
        (
            lambda: changed(images(9, 5), "label", [-100] * 9),
            "9 of 9 meta rows have no label",
        ),
        (lambda: images(9, 5).select([]), "0 of 0"),
    ],
)
def test_who_may_not_be_held_out(meta, words):
    with pytest.raises(ValueError, match=words):
        train(recipe(meta(), epochs=1), images(), images(32, 1))


def test_rows_are_known_by_what_a_model_sees():
    "Other columns and other row numbers do not make a row another row."
    from datasets import Dataset

    pair = Dataset.from_dict(
        {"text": ["a", "a"], "text_pair": ["b", "c"], "label": [0, 1]}
    )
    check_meta(pair.select([0]), pair.select([1]))
    with pytest.raises(ValueError, match="also train"):
        check_meta(pair.select([0]), changed(pair.select([0]), "label", [1]))
    assert RWKD(pair.select([0])).meta != RWKD(pair.select([1])).meta, (
        "a checkpoint knows its meta set"
    )


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(temperature=0.0), "temperature"),
        (dict(meta_batch_size=0), "meta_batch_size"),
        (dict(step=0.0), "step"),
        (dict(meta_loss="x"), "meta_loss"),
    ],
)
def test_impossible_arguments(how, words):
    with pytest.raises(ValueError, match=words):
        RWKD(**how)


def test_the_ladder_holds_out_a_tenth_and_keeps_the_updates():
    from kdbook.data import load_task

    data = load_task("movies")["train"]
    for name in ("same-rows", "few-labels"):
        rows = training_rows(data, SETTINGS[name], seed=1)
        _, kept, more = METHODS["reweighted_kd"].setup(SETTINGS[name], None, rows)
        assert len(kept) == SETTINGS[name].rows and len(more["meta"]) == 200
        assert sum(y != -100 for y in kept["label"]) == SETTINGS[name].labelled
        check_meta(more["meta"], kept, load_task("movies")["validation"])


def test_missing_parts_of_a_batch_are_named():
    net, mine, held = image_net(8, num_labels=4, pixels=16), batch(4), batch(5, seed=1)
    bare = {k: v for k, v in held.items() if k != "teacher_logits"}
    assert alignment(net, mine, bare).shape == (
        4,
        2,
    )  # labels are enough for the held-out rows
    for how in ("finite_difference", "forward", "double_backward"):
        with pytest.raises(ValueError, match='"both" needs teacher_logits'):
            alignment(net, mine, bare, how, meta_loss="both")
        with pytest.raises(ValueError, match="1 have -100"):
            alignment(
                net, mine, dict(held, labels=torch.tensor([-100, 0, 1, 2, 3])), how
            )
        with pytest.raises(ValueError, match="the batch needs teacher_logits"):
            alignment(net, bare, held, how)

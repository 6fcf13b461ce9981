"""Continuation-KD's hinge, schedules and objective, against naive versions."""

import pytest
import torch
import torch.nn.functional as F
from helpers import doubtful_images, same
from hypothesis import given, settings
from hypothesis import strategies as st
from test_annealing_kd import logits, one_stage, train

from kdbook.annealing_kd import AnnealingKD, annealing_loss, phi
from kdbook.continuation_kd import (
    ContinuationKD,
    check_psi,
    hinge_loss,
    linear_psi,
    mixed_loss,
    paper_psi,
    recipe,
    step_psi,
)
from kdbook.data import hide_labels
from kdbook.training import CrossEntropy, Recipe, Stage

FAST = settings(max_examples=60, deadline=None)
SCALES, MARGINS, SEEDS = st.floats(0.05, 1), st.floats(0, 5), st.integers(0, 999)


def naive_hinge(student, teacher, scale, margin):
    "Row by row, class by class."
    out = []
    for s, t in zip(student.tolist(), teacher.tolist()):
        distance = sum((a - scale * b) ** 2 for a, b in zip(s, t)) / len(s)
        out.append(max(0.0, distance - margin * scale))
    return out


# the hinge


@FAST
@given(SCALES, MARGINS, SEEDS)
def test_hinge_is_its_formula(scale, margin, seed):
    a, b = logits(seed=seed), logits(seed=seed + 1)
    per_row = hinge_loss(a, b, scale, margin, reduction="none")
    assert per_row.tolist() == pytest.approx(naive_hinge(a, b, scale, margin))
    mean = per_row.mean().item()
    assert hinge_loss(a, b, scale, margin).item() == pytest.approx(mean)
    of_batch = hinge_loss(a, b, scale, margin, hinge="batch").item()
    assert of_batch <= mean + 1e-12


@FAST
@given(SCALES, MARGINS, SEEDS)
def test_gradient_is_all_or_nothing(scale, margin, seed):
    """Inside the margin zero, outside it that of the plain squared error.

    Never any for the teacher."""
    a = logits(seed=seed).requires_grad_()
    b = logits(seed=seed + 1).requires_grad_()
    hinge_loss(a, b, scale, margin, reduction="none").sum().backward()
    outside = annealing_loss(a, b, scale, "none") > margin * scale
    expected = outside[:, None] * 2 * (a - scale * b) / a.shape[1]
    torch.testing.assert_close(a.grad, expected.detach())
    assert b.grad is None


@FAST
@given(SCALES, SEEDS)
def test_no_margin_is_annealing_and_a_larger_one_never_costs_more(scale, seed):
    a, b = logits(seed=seed), logits(seed=seed + 1)
    assert torch.equal(
        hinge_loss(a, b, scale, 0.0, reduction="none"),
        annealing_loss(a, b, scale, "none"),
    )
    losses = [hinge_loss(a, b, scale, m).item() for m in (0.0, 0.1, 1.0, 1e9)]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0


def test_regression_has_one_column():
    loss = hinge_loss(torch.tensor([[3.0]]), torch.tensor([[2.0]]), 0.5, 1.0)
    assert loss.item() == pytest.approx(4 - 0.5)


# the schedules


@FAST
@given(st.integers(1, 120), st.data())
def test_every_psi_is_legal(epochs, data):
    start = data.draw(st.integers(0, epochs))
    end = data.draw(st.integers(start + 1, epochs + 20))
    for psi in (
        linear_psi(epochs, start, end),
        step_psi(epochs, start),
        paper_psi(epochs),
        paper_psi(epochs, "cifar"),
    ):
        check_psi(psi, epochs)
    assert step_psi(epochs, start) == [0.0] * start + [1.0] * (epochs - start)


def test_printed_schedules():
    assert paper_psi(30) == [i / 40 if i <= 20 else 1.0 for i in range(1, 31)]
    assert paper_psi(200, "cifar") == pytest.approx(
        [min(i / 150, 1) for i in range(1, 201)]
    )


@FAST
@given(st.integers(1, 10), st.integers(2, 90))
def test_schedule_reaches_the_whole_teacher_before_it_falls_silent(tau_max, epochs):
    psi = linear_psi(epochs)
    if epochs - 1 < tau_max:
        return
    rows = ContinuationKD(tau_max).schedule(epochs)
    heard = [scale for scale, weight in rows if weight < 1]
    assert len(rows) == epochs
    assert heard == sorted(heard)
    assert heard[0] == pytest.approx(1 / tau_max) and heard[-1] == 1
    assert [weight for _, weight in rows] == psi


def test_printed_annealing_is_clipped():
    rows = ContinuationKD(10, psi=paper_psi, anneal="all").schedule(30)
    assert max(scale for scale, _ in rows) == 1
    heard = [scale for scale, weight in rows if weight < 1]
    assert max(heard) == pytest.approx(phi(4, 10))
    for tau_max in range(1, 12):
        objective = ContinuationKD(tau_max, psi=paper_psi, anneal="all")
        for epochs in range(11, 40):
            assert all(0 < scale <= 1 for scale, _ in objective.schedule(epochs))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: hinge_loss(logits(), logits(), margin=-0.1), ["margin", "-0.1"]),
        (lambda: hinge_loss(logits(), logits(), phi=1.1), ["phi", "1.1"]),
        (lambda: hinge_loss(logits(), logits(classes=3)), ["(6, 4)", "(6, 3)"]),
        (lambda: ContinuationKD(tau_max=0), ["tau_max", "0"]),
        (lambda: ContinuationKD(margin=-2), ["margin", "-2"]),
        (lambda: ContinuationKD(anneal="none"), ["anneal", "none"]),
        (lambda: ContinuationKD(2, psi=[0, 1]).schedule(5), ["2 weights", "5 epochs"]),
        (
            lambda: ContinuationKD(2, psi=[0, 0.6, 0.5]).schedule(3),
            ["0.6", "0.5", "must not fall"],
        ),
        (
            lambda: ContinuationKD(2, psi=lambda n: [-0.5] * n).schedule(3),
            ["-0.5", "[0, 1]"],
        ),
        (lambda: linear_psi(9, 5, 5), ["start=5", "end=5"]),
        (lambda: step_psi(3, 4), ["after=4", "epochs=3"]),
        (lambda: ContinuationKD(hinge="row"), ["hinge", "row"]),
        (
            lambda: ContinuationKD(5, psi=paper_psi, anneal="all").schedule(4),
            ["4 epochs", "5 temperatures"],
        ),
        (
            lambda: mixed_loss(logits(), logits(), torch.zeros(6).long(), 0.5, 1.5),
            ["psi", "1.5"],
        ),
        (lambda: paper_psi(9, "squad"), ["squad"]),
        (lambda: recipe(tau_max=7, epochs=5), ["7", "4"]),
        (lambda: recipe(margin=-1), ["margin", "-1"]),
    ],
)
def test_bad_input_names_the_values(call, words):
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_fit_checks_the_schedule_before_it_starts():
    with pytest.raises(ValueError, match="3 weights for 2 epochs"):
        train(
            Recipe((Stage(ContinuationKD(1, psi=[0, 0.5, 1]), 2),)), doubtful_images()
        )
    with pytest.raises(ValueError, match="cannot hold 5 temperatures"):
        train(Recipe((Stage(AnnealingKD(5), 2),)), doubtful_images())


# the objective


@FAST
@given(SCALES, st.floats(0, 1), MARGINS, SEEDS)
def test_mixed_loss_is_the_weighted_sum(scale, psi, margin, seed):
    a, b = logits(seed=seed), logits(seed=seed + 1)
    y = torch.randint(0, 4, (6,), generator=torch.Generator().manual_seed(seed))
    expected = psi * F.cross_entropy(a, y) + (1 - psi) * hinge_loss(a, b, scale, margin)
    total = mixed_loss(a, b, y, scale, psi, margin).total
    assert total.item() == pytest.approx(expected.item())


def test_rows_without_labels():
    a, b, y = logits(), logits(seed=1), torch.tensor([0, -100, 2, -100, -100, 1])
    known = y != -100
    hard = F.cross_entropy(a[known], y[known])
    soft = 0.5 * hinge_loss(a, b, 0.5, 0.1)
    total = lambda per: mixed_loss(a, b, y, 0.5, 0.5, per=per).total.item()
    # half of the rows have a label
    assert total("row") == pytest.approx((0.25 * hard + soft).item())
    assert total("labelled") == pytest.approx((0.5 * hard + soft).item())
    unlabelled = torch.full((6,), -100)
    nothing = mixed_loss(a.requires_grad_(), b, unlabelled, 0.5, 1.0).total
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, a)[0].abs().max() == 0


def test_labels_do_not_matter_before_the_hand_over():
    data = doubtful_images()
    wrong = data.map(lambda label: {"label": (label + 1) % 4}, input_columns="label")
    only = one_stage(ContinuationKD(2, psi=step_psi(4, 4)), 4)
    assert same(train(only, data).student, train(only, wrong).student)


def test_micro_batches_give_the_same_student():
    "Up to the order of sums, since every row has its label."
    what = recipe(2, epochs=4, lr=1e-3, batch_size=16)
    whole = train(what, doubtful_images()).student.state_dict()
    pieces = train(what, doubtful_images(), micro_batches=4).student.state_dict()
    torch.testing.assert_close(whole, pieces, atol=1e-5, rtol=1e-3)


def test_resumes_to_the_same_bits(tmp_path):
    "Stopped by an error after three of six epochs, called again: it goes on."

    class Stop(ContinuationKD):
        broken = True

        def __call__(self, student, batch, progress):
            if self.broken and progress.epoch == 3:
                raise KeyboardInterrupt
            return super().__call__(student, batch, progress)

    Stop.__qualname__ = "ContinuationKD"
    what = one_stage(Stop(3), 6)
    with pytest.raises(KeyboardInterrupt):
        train(what, doubtful_images(), checkpoint=tmp_path / "c")
    Stop.broken = False
    resumed = train(what, doubtful_images(), checkpoint=tmp_path / "c")
    assert same(resumed.student, train(what, doubtful_images()).student)
    assert len(resumed.history) == 6


def test_few_labels_much_text_trains_on_all_rows():
    data = hide_labels(doubtful_images(rows=48), 12, seed=0)
    history = train(recipe(2, epochs=4, lr=5e-3, batch_size=16), data).history
    assert [("teacher_loss" in row, "label_loss" in row) for row in history] == [
        (True, False),
        (True, True),
        (True, True),
        (False, True),
    ]


def test_all_labels_is_plain_cross_entropy():
    "A hand-over before the first epoch is fine-tuning, to the bit."
    data = doubtful_images()
    labels_only = train(one_stage(ContinuationKD(1, psi=step_psi(3, 0)), 3), data)
    fine_tuned = train(one_stage(CrossEntropy(), 3), data)
    assert same(labels_only.student, fine_tuned.student)

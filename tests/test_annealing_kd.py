"""Annealing-KD's schedule, loss and stages, against what can be worked out on paper."""

import math

import pytest
import torch
from helpers import changed, doubtful_images, same
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook.annealing_kd import (
    AnnealingKD,
    annealing_loss,
    phi,
    recipe,
    temperature_schedule,
)
from kdbook.losses import soft_targets
from kdbook.models import image_net
from kdbook.training import (
    Callback,
    CrossEntropy,
    LogitMSE,
    Progress,
    Recipe,
    Stage,
    fit,
)

FAST = settings(max_examples=60, deadline=None)
PAIRS = st.integers(1, 30).flatmap(
    lambda tau_max: st.tuples(st.integers(tau_max, 200), st.just(tau_max))
)


def logits(rows=6, classes=4, seed=0, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(
        rows, classes, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def train(what, data, validation=None, **settings):
    net = image_net(hidden=8, num_labels=4, pixels=16)
    return fit(net, what, data, validation, progress=False, **settings)


def one_stage(objective, epochs):
    return Recipe((Stage(objective, epochs, 5e-3, 16),))


class Snapshots(Callback):
    "Keeps the weights at the end of each stage."

    def __init__(self):
        self.stages = []

    def settings(self):
        return {}

    def after_stage(self, run, progress):
        self.stages.append({k: v.clone() for k, v in run.student.state_dict().items()})


def with_snapshots(what):
    snapshots = Snapshots()
    return Recipe(what.stages, (snapshots,), what.keep), snapshots.stages


# the schedule


def test_fourteen_epochs_at_tau_max_seven():
    scales = [phi(t, 7) for t in temperature_schedule(14, 7)]
    assert scales == pytest.approx([k / 7 for k in range(1, 8) for _ in range(2)])


def test_ten_epochs_at_tau_max_seven_stay_at_one_after_the_last_step():
    "The released code would go up to 10/7 here."
    assert temperature_schedule(10, 7) == [7, 6, 5, 4, 3, 2, 1, 1, 1, 1]
    assert temperature_schedule(25, 10)[16:] == [2, 2] + [1] * 7


@FAST
@given(PAIRS)
def test_schedule_for_any_epochs_and_tau_max(pair):
    epochs, tau_max = pair
    temperatures = temperature_schedule(epochs, tau_max)
    scales = [phi(t, tau_max) for t in temperatures]
    assert len(temperatures) == epochs
    assert set(temperatures) == set(range(1, tau_max + 1))
    assert all(0 < s <= 1 for s in scales) and scales == sorted(scales)
    assert scales[0] == pytest.approx(1 / tau_max) and scales[-1] == 1.0
    counts = [temperatures.count(t) for t in range(tau_max, 0, -1)]
    each = epochs // tau_max
    assert counts == [each] * (tau_max - 1) + [epochs - (tau_max - 1) * each]


@FAST
@given(PAIRS)
def test_objective_follows_the_schedule_and_answers_at_every_progress(pair):
    epochs, tau_max = pair
    objective = AnnealingKD(tau_max)
    scales = [objective.phi(Progress(e, epochs, e, epochs)) for e in range(epochs)]
    assert scales == [phi(t, tau_max) for t in temperature_schedule(epochs, tau_max)]
    assert objective.phi(Progress(epochs, epochs, epochs, epochs)) == 1.0, (
        "after_epoch and after_stage see epoch == epochs"
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: phi(0, 7), ["0", "7"]),
        (lambda: phi(8, 7), ["8", "7"]),
        (lambda: phi(1, 0), ["tau_max", "got 0"]),
        (lambda: temperature_schedule(6, 7), ["6", "7"]),
        (lambda: temperature_schedule(5, 0), ["tau_max", "0"]),
        (lambda: AnnealingKD(0), ["tau_max", "0"]),
        (lambda: recipe(tau_max=7, epochs=(6, 2)), ["6", "7"]),
        (lambda: recipe(tau_max=0), ["tau_max", "0"]),
        (lambda: annealing_loss(logits(), logits(), 0.0), ["phi", "0"]),
        (lambda: annealing_loss(logits(), logits(), 10 / 7), ["phi", "1.4"]),
        (
            lambda: annealing_loss(logits(), logits(classes=3), 0.5),
            ["(6, 4)", "(6, 3)"],
        ),
        (lambda: annealing_loss(logits(), logits(), 0.5, "sum"), ["reduction", "sum"]),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


# the loss


@FAST
@given(st.integers(1, 12), st.data())
def test_phi_is_an_inverse_temperature(tau_max, data):
    temperature = data.draw(st.integers(1, tau_max))
    scale = phi(temperature, tau_max)
    torch.testing.assert_close(
        soft_targets(scale * logits()), soft_targets(logits(), 1 / scale)
    )


def test_true_temperatures_at_tau_max_ten():
    temperatures = [round(1 / phi(t, 10), 2) for t in range(10, 0, -1)]
    assert temperatures == [10, 5, 3.33, 2.5, 2, 1.67, 1.43, 1.25, 1.11, 1]


@FAST
@given(st.integers(1, 5), st.integers(1, 6), st.floats(0.05, 1.0))
def test_loss_and_gradient_against_the_formula(rows, classes, scale):
    s = logits(rows, classes, 1).requires_grad_()
    t = logits(rows, classes, 2).requires_grad_()
    loss = annealing_loss(s, t, scale)
    by_hand = 0.0
    for b in range(rows):
        for c in range(classes):
            by_hand += (s[b, c].item() - scale * t[b, c].item()) ** 2
    by_hand /= rows * classes
    assert loss.item() == pytest.approx(by_hand)
    per_row = annealing_loss(s, t, scale, "none")
    assert per_row.shape == (rows,) and per_row.mean().item() == pytest.approx(by_hand)
    loss.backward()
    torch.testing.assert_close(s.grad, 2 * (s - scale * t).detach() / (rows * classes))
    assert t.grad is None


def test_regression_shapes():
    s, t = logits(5, 1, 1), logits(5, 1, 2)
    by_hand = (s - 0.5 * t).pow(2).mean().item()
    assert annealing_loss(s, t, 0.5).item() == pytest.approx(by_hand)
    with pytest.raises(ValueError):  # B x 1 against B would spread to B x B
        annealing_loss(s, t.flatten(), 0.5)


@pytest.mark.parametrize("tau_max", [1, 4, 7])
def test_a_student_that_fits_one_step_is_one_step_away_from_the_next(tau_max):
    t = logits()
    for temperature in range(tau_max, 1, -1):
        fitted = phi(temperature, tau_max) * t
        per_row = annealing_loss(fitted, t, phi(temperature - 1, tau_max), "none")
        torch.testing.assert_close(per_row, t.pow(2).mean(-1) / tau_max**2)
        assert torch.equal(fitted.argmax(-1), t.argmax(-1)), "scaling keeps the answer"
    from_zero = annealing_loss(torch.zeros_like(t), t, 1.0, "none")
    torch.testing.assert_close(from_zero, t.pow(2).mean(-1))


def test_linear_student_moves_along_a_straight_line():
    x, t = logits(40, 5, 1), logits(40, 3, 2)
    best = torch.linalg.lstsq(x, t).solution
    for scale in (1 / 7, 0.5, 1.0):
        weights = (scale * best).requires_grad_()
        annealing_loss(x @ weights, t, scale).backward()
        assert weights.grad.abs().max() <= 1e-12
        off = (scale * best + 0.01).requires_grad_()
        annealing_loss(x @ off, t, scale).backward()
        assert off.grad.abs().max() > 1e-3


def test_the_mean_logit_counts_here_and_not_in_soft_targets():
    """This loss is not centred.

    As the temperature grows, temperature^2 KL tends to the centred squared distance
    over 2 C."""
    s, t = logits(seed=1), logits(seed=2)
    loss = annealing_loss(s, t, 1.0).item()
    assert annealing_loss(s + 5, t, 1.0).item() != pytest.approx(loss)
    torch.testing.assert_close(soft_targets(s + 5, 2.0), soft_targets(s, 2.0))


# the two stages


def test_tau_max_one_is_logit_mse_bit_for_bit():
    data = doubtful_images()
    run = lambda objective: train(one_stage(objective, 3), data, data, seed=3)
    plain, constant = run(LogitMSE()), run(AnnealingKD(1))
    assert same(constant.student, plain.student)
    assert [r["loss"] for r in constant.history] == [r["loss"] for r in plain.history]
    assert not same(run(AnnealingKD(3)).student, plain.student)


def test_history_shows_the_scale_of_each_epoch():
    run = train(
        recipe(2, epochs=(5, 1), lr=5e-3, batch_size=16),
        doubtful_images(),
        doubtful_images(seed=1),
    )
    assert [r.get("phi") for r in run.history] == [0.5, 0.5, 1.0, 1.0, 1.0, None]
    assert [r["name"] for r in run.history] == ["annealed logits"] * 5 + ["labels"]


def test_stage_one_never_sees_the_labels():
    data, both = doubtful_images(), recipe(3, epochs=(3, 2), lr=5e-3, batch_size=16)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    shuffled = changed(data, "label", torch.tensor(data["label"])[order].tolist())
    hidden = changed(data, "label", [-100] * len(data))

    def watched(what, rows):
        what, stages = with_snapshots(what)
        history = train(what, rows).history
        return stages, [row["loss"] for row in history]

    stages, losses = watched(both, data)
    other_stages, other_losses = watched(both, shuffled)
    hidden_stages, hidden_losses = watched(Recipe(both.stages[:1]), hidden)
    for name, weight in stages[0].items():
        assert torch.equal(weight, other_stages[0][name]), "stage I, bit for bit"
        assert torch.equal(weight, hidden_stages[0][name]), "stage I, bit for bit"
    assert losses[:3] == other_losses[:3] == hidden_losses
    assert any(not torch.equal(w, other_stages[1][n]) for n, w in stages[1].items()), (
        "stage II does learn from labels"
    )


def test_stage_two_never_sees_the_teacher():
    data = doubtful_images()
    stage_two = Recipe(recipe(3, epochs=(3, 2), lr=5e-3, batch_size=16).stages[1:])
    other_logits = logits(len(data), dtype=torch.float32).tolist()
    student = train(stage_two, data).student
    for rows in (
        changed(data, "teacher_logits", other_logits),
        data.remove_columns("teacher_logits"),
    ):
        assert same(student, train(stage_two, rows).student)


def test_recipe_is_two_stages_with_the_best_reloaded():
    first, second = recipe(
        4, epochs=(8, 3), lr=1e-3, batch_size=24, label_validate_every=2
    ).stages
    assert isinstance(first.objective, AnnealingKD)
    assert first.objective.tau_max == 4
    assert isinstance(second.objective, CrossEntropy)
    assert (first.epochs, second.epochs) == (8, 3)
    assert first.lr == second.lr == 1e-3
    assert first.batch_size == second.batch_size == 24
    assert first.reload_best and second.validate_every == 2
    assert first.objective.requires == ("teacher_logits",)


def test_missing_teacher_logits_are_named_before_training():
    with pytest.raises(ValueError, match="teacher_logits.*annotate"):
        train(
            recipe(2, epochs=(2, 1)), doubtful_images().remove_columns("teacher_logits")
        )


def test_stage_one_follows_the_teacher():
    "Trained long enough, the student fits the unscaled logits: the scale is one."
    data = doubtful_images(rows=32)
    stage_one = Recipe(recipe(5, epochs=(40, 1), lr=1e-2, batch_size=16).stages[:1])
    net = image_net(hidden=64, num_labels=4, pixels=16)
    run = fit(net, stage_one, data, progress=False)
    first, last = run.history[0], run.history[-1]
    assert first["phi"] == pytest.approx(0.2) and last["phi"] == 1.0
    size = torch.tensor(data["teacher_logits"]).pow(2).mean().item()
    assert last["loss"] < 0.1 * size and math.isfinite(last["loss"])

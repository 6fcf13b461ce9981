"""Annealing-KD's schedule, loss and stages, against what can be worked out on paper."""

import math

import pytest
import torch
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


def images(rows=48, seed=0):
    "Pixels with labels and the logits of a linear teacher that gets some of them wrong."
    from datasets import Dataset

    g = torch.Generator().manual_seed(seed)
    x, teacher = torch.rand(rows, 16, generator=g), torch.randn(16, 4, generator=g)
    scores = (x - 0.5) @ teacher
    labels = (scores + 0.5 * torch.randn(rows, 4, generator=g)).argmax(-1)
    return Dataset.from_dict(
        dict(
            pixel_values=x.tolist(),
            label=labels.tolist(),
            teacher_logits=scores.tolist(),
        )
    )


def changed(data, name, values):
    return data.remove_columns(name).add_column(name, values)


def train(what, data, validation=None, **settings):
    return fit(
        image_net(hidden=8, num_labels=4, pixels=16),
        what,
        data,
        validation,
        progress=False,
        **settings,
    )


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a)


class Snapshots(Callback):
    "Keeps the weights at the end of each stage."

    def __init__(self):
        self._stages = []

    def after_stage(self, run, progress):
        self._stages.append({k: v.clone() for k, v in run.student.state_dict().items()})


def with_snapshots(what):
    watch = Snapshots()
    return Recipe(what.stages, (watch,), what.keep), watch._stages


# the schedule


def test_fourteen_epochs_at_tau_max_seven():
    found = [phi(t, 7) for t in temperature_schedule(14, 7)]
    assert found == pytest.approx([k / 7 for k in range(1, 8) for _ in range(2)])


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
    assert len(temperatures) == epochs and set(temperatures) == set(
        range(1, tau_max + 1)
    )
    assert all(0 < s <= 1 for s in scales) and scales == sorted(scales)
    assert scales[0] == pytest.approx(1 / tau_max) and scales[-1] == 1.0
    each = [temperatures.count(t) for t in range(tau_max, 0, -1)]
    assert set(each[:-1]) <= {epochs // tau_max} and each[-1] == epochs - (
        tau_max - 1
    ) * (epochs // tau_max)
    if epochs % tau_max == 0:
        assert each == [epochs // tau_max] * tau_max


@FAST
@given(PAIRS)
def test_objective_follows_the_schedule_and_answers_at_every_progress(pair):
    epochs, tau_max = pair
    objective, expected = (
        AnnealingKD(tau_max),
        [phi(t, tau_max) for t in temperature_schedule(epochs, tau_max)],
    )
    assert [
        objective.phi(Progress(e, epochs, e, epochs)) for e in range(epochs)
    ] == expected
    assert objective.phi(Progress(epochs, epochs, epochs, epochs)) == 1.0, (
        "after_epoch and after_stage see epoch == epochs"
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: phi(0, 7), ["0", "7"]),
        (lambda: phi(8, 7), ["8", "7"]),
        (lambda: phi(1, 0), ["tau_max=0"]),
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
    found = [round(1 / phi(t, 10), 2) for t in range(10, 0, -1)]
    assert found == [10, 5, 3.33, 2.5, 2, 1.67, 1.43, 1.25, 1.11, 1]


@FAST
@given(st.integers(1, 5), st.integers(1, 6), st.floats(0.05, 1.0))
def test_loss_and_gradient_against_the_formula(rows, classes, scale):
    s, t = (
        logits(rows, classes, 1).requires_grad_(),
        logits(rows, classes, 2).requires_grad_(),
    )
    loss = annealing_loss(s, t, scale)
    by_hand = sum(
        (s[b, c].item() - scale * t[b, c].item()) ** 2
        for b in range(rows)
        for c in range(classes)
    ) / (rows * classes)
    assert loss.item() == pytest.approx(by_hand)
    each = annealing_loss(s, t, scale, "none")
    assert each.shape == (rows,) and each.mean().item() == pytest.approx(by_hand)
    loss.backward()
    torch.testing.assert_close(s.grad, 2 * (s - scale * t).detach() / (rows * classes))
    assert t.grad is None


def test_regression_shapes():
    s, t = logits(5, 1, 1), logits(5, 1, 2)
    assert annealing_loss(s, t, 0.5).item() == pytest.approx(
        (s - 0.5 * t).pow(2).mean().item()
    )
    with pytest.raises(ValueError):  # B x 1 against B would spread to B x B
        annealing_loss(s, t.flatten(), 0.5)


@pytest.mark.parametrize("tau_max", [1, 4, 7])
def test_a_student_that_fits_one_step_is_one_step_away_from_the_next(tau_max):
    t = logits()
    for temperature in range(tau_max, 1, -1):
        fitted = phi(temperature, tau_max) * t
        found = annealing_loss(fitted, t, phi(temperature - 1, tau_max), "none")
        torch.testing.assert_close(found, t.pow(2).mean(-1) / tau_max**2)
        assert torch.equal(fitted.argmax(-1), t.argmax(-1)), "scaling keeps the answer"
    torch.testing.assert_close(
        annealing_loss(torch.zeros_like(t), t, 1.0, "none"), t.pow(2).mean(-1)
    )


def test_linear_student_moves_along_a_straight_line():
    x, t = logits(40, 5, 1), logits(40, 3, 2)
    best = torch.linalg.lstsq(x, t).solution
    for scale in (1 / 7, 0.5, 1.0):
        weights = (scale * best).requires_grad_()
        annealing_loss(x @ weights, t, scale).backward()
        torch.testing.assert_close(
            weights.grad, torch.zeros_like(weights), atol=1e-12, rtol=0
        )
        off = (scale * best + 0.01).requires_grad_()
        annealing_loss(x @ off, t, scale).backward()
        assert off.grad.abs().max() > 1e-3


def test_the_mean_logit_counts_here_and_not_in_soft_targets():
    "As the temperature grows, temperature^2 KL tends to the centred squared distance over 2 C; this loss is not centred."
    s, t = logits(seed=1), logits(seed=2)
    assert annealing_loss(s + 5, t, 1.0).item() != pytest.approx(
        annealing_loss(s, t, 1.0).item()
    )
    torch.testing.assert_close(soft_targets(s + 5, 2.0), soft_targets(s, 2.0))


# the two stages


def test_tau_max_one_is_logit_mse_bit_for_bit():
    data = images()
    runs = [
        train(Recipe((Stage(o, 3, 5e-3, 16),)), data, data, seed=3)
        for o in (AnnealingKD(1), LogitMSE())
    ]
    assert same(runs[0].student, runs[1].student)
    assert [r["loss"] for r in runs[0].history] == [r["loss"] for r in runs[1].history]
    other = train(Recipe((Stage(AnnealingKD(3), 3, 5e-3, 16),)), data, data, seed=3)
    assert not same(other.student, runs[1].student)


def test_history_shows_the_scale_of_each_epoch():
    run = train(recipe(2, (5, 1), 5e-3, 16), images(), images(seed=1))
    assert [r.get("phi") for r in run.history] == [0.5, 0.5, 1.0, 1.0, 1.0, None]
    assert [r["name"] for r in run.history] == ["annealed logits"] * 5 + ["labels"]


def test_stage_one_never_sees_the_labels():
    data = images()
    g = torch.Generator().manual_seed(1)
    shuffled = changed(
        data,
        "label",
        torch.tensor(data["label"])[torch.randperm(len(data), generator=g)].tolist(),
    )
    hidden = changed(data, "label", [-100] * len(data))
    watched = []
    for rows in (data, shuffled, hidden):
        what, stages = with_snapshots(
            Recipe(
                recipe(3, (3, 2), 5e-3, 16).stages[:1]
                if rows is hidden
                else recipe(3, (3, 2), 5e-3, 16).stages
            )
        )
        run = train(what, rows)
        watched.append((stages, [r["loss"] for r in run.history]))
    (a, losses), (b, others), (c, alone) = watched
    assert all(
        torch.equal(a[0][k], b[0][k]) and torch.equal(a[0][k], c[0][k]) for k in a[0]
    ), "stage I, bit for bit"
    assert losses[:3] == others[:3] == alone
    assert any(not torch.equal(a[1][k], b[1][k]) for k in a[1]), (
        "stage II does learn from labels"
    )


def test_stage_two_never_sees_the_teacher():
    data = images()
    stage_two = Recipe(recipe(3, (3, 2), 5e-3, 16).stages[1:])
    other = changed(
        data, "teacher_logits", logits(len(data), dtype=torch.float32).tolist()
    )
    runs = [
        train(stage_two, rows)
        for rows in (data, other, data.remove_columns("teacher_logits"))
    ]
    assert same(runs[0].student, runs[1].student) and same(
        runs[0].student, runs[2].student
    )


def test_recipe_is_two_stages_with_the_best_reloaded():
    first, second = recipe(4, (8, 3), 1e-3, 24, 2).stages
    assert (
        isinstance(first.objective, AnnealingKD)
        and first.objective.tau_max == 4
        and isinstance(second.objective, CrossEntropy)
    )
    assert (
        (first.epochs, second.epochs) == (8, 3)
        and first.lr == second.lr == 1e-3
        and first.batch_size == second.batch_size == 24
    )
    assert first.reload_best and second.validate_every == 2
    assert (
        first.objective.requires == ("teacher_logits",)
        and "label" not in first.objective.requires
    )


def test_missing_teacher_logits_are_named_before_training():
    with pytest.raises(ValueError, match="teacher_logits.*annotate"):
        train(recipe(2, (2, 1)), images().remove_columns("teacher_logits"))


def test_stage_one_follows_the_teacher():
    "Trained long enough, the student fits the unscaled logits: the scale has reached one."
    data = images(rows=32)
    run = fit(
        image_net(hidden=64, num_labels=4, pixels=16),
        Recipe(recipe(5, (40, 1), 1e-2, 16).stages[:1]),
        data,
        progress=False,
    )
    first, last = run.history[0], run.history[-1]
    assert first["phi"] == pytest.approx(0.2) and last["phi"] == 1.0
    size = torch.tensor(data["teacher_logits"]).pow(2).mean().item()
    assert last["loss"] < 0.1 * size and math.isfinite(last["loss"])

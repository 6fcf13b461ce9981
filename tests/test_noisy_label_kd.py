"""Label noise: matrices, draws, votes, gates and losses, against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import go, images, net, same
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook.data import load_task
from kdbook.distillation import annotate
from kdbook.models import image_net
from kdbook.noisy_label_kd import (
    Memorisation,
    SelectiveKD,
    SmallLossKD,
    SoftRelabelling,
    bootstrap_targets,
    corrupt,
    gated_loss,
    human_label,
    memorised,
    out_of_fold,
    small_losses,
    support_of,
    transition_matrix,
)
from kdbook.rows import predict_logits, with_column
from kdbook.training import CrossEntropy, Progress, Recipe, Stage, fit

FAST = settings(max_examples=60, deadline=None)


def labelled(labels):
    return Dataset.from_dict({"label": list(labels)})


@FAST
@given(st.sampled_from(["symmetric", "pair"]), st.floats(0, 1), st.integers(2, 12))
def test_matrices_are_noise(kind, rate, classes):
    Q = transition_matrix(kind, rate, classes)
    torch.testing.assert_close(Q.sum(1), torch.ones(classes))
    torch.testing.assert_close(
        Q.diagonal(), torch.full((classes,), 1 - rate), atol=1e-6, rtol=0
    )
    off = Q[~torch.eye(classes, dtype=torch.bool)].reshape(classes, -1)
    assert ((off > 0).sum(1) <= (1 if kind == "pair" else classes - 1)).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_any_matrix_is_drawn_from(classes, seed):
    "Observed frequencies lie within five standard errors of every entry."
    g = torch.Generator().manual_seed(seed)
    Q = torch.rand(classes, classes, generator=g)
    Q /= Q.sum(1, keepdim=True)
    truth = torch.arange(classes).repeat_interleave(800)
    rows = corrupt(labelled(truth.tolist()), matrix=Q, seed=seed)
    observed = torch.tensor(rows["label"][:])
    seen = torch.bincount(classes * truth + observed, minlength=classes**2) / 800
    off = (seen.reshape(classes, classes) - Q).abs()
    assert (off < 5 * (Q * (1 - Q) / 800).sqrt() + 1e-3).all()


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["symmetric", "pair"]),
    st.integers(0, 10**6),
)
def test_rates_are_nested_and_unlabelled_rows_stay(a, b, kind, seed):
    labels = [0, 1, 2, -100, 3, 4] * 20
    clean = labelled(labels)
    low, high = (
        corrupt(clean, kind, rate, seed, num_labels=5) for rate in sorted((a, b))
    )
    assert all(h for l, h in zip(low["corrupted"], high["corrupted"]) if l)
    for rows in (low, high):
        assert rows["true_label"] == labels
        pairs = list(zip(rows["label"], labels))
        assert all(label == -100 for label, true in pairs if true == -100)
        assert [label != true for label, true in pairs] == rows["corrupted"][:]
    assert not any(corrupt(clean, kind, 0.0, seed)["corrupted"])


def test_votes():
    train = load_task("movies")["train"].select(range(400))
    for row, label in zip(train["ratings"], human_label(train, None)["label"]):
        votes = sum((r > 0) - (r < 0) for r in row)
        assert votes == 0 or label == (votes > 0)
    single = human_label(train, 1, seed=3)
    assert single["label"] == human_label(train, 1, seed=3)["label"]
    assert single["label"] != human_label(train, 1, seed=4)["label"]
    assert single["true_label"] == train["label"]
    for k in (0, 30):
        with pytest.raises(ValueError, match=f"got {k}"):
            human_label(train, k)


@FAST
@given(
    st.integers(1, 9),
    st.integers(2, 5),
    st.floats(0, 1),
    st.floats(0.5, 5),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_losses_against_a_loop(batch, classes, beta, temperature, alpha, seed):
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(batch, classes, generator=g, dtype=torch.float64)
    t = torch.randn(batch, classes, generator=g, dtype=torch.float64)
    y = torch.randint(0, classes, (batch,), generator=g)
    gate = torch.rand(batch, generator=g) < 0.5
    targets = bootstrap_targets(y, t, beta, temperature)
    total = 0.0
    for i in range(batch):
        p = F.softmax(t[i] / temperature, -1)
        log_q = F.log_softmax(s[i] / temperature, -1)
        total += alpha * temperature**2 * (p * (p.log() - log_q)).sum()
        if gate[i]:
            total -= (1 - alpha) * F.log_softmax(s[i], -1)[y[i]]
        mixed = (1 - beta) * F.one_hot(y[i], classes) + beta * p
        torch.testing.assert_close(targets[i], mixed)
    loss = gated_loss(s, t, y, gate, temperature, alpha)
    torch.testing.assert_close(loss, total / batch)


@FAST
@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=20),
    st.floats(0.01, 1),
    st.integers(0, 10**6),
)
def test_small_losses_against_a_sort(losses, keep, seed):
    losses = torch.tensor(losses)
    g = torch.Generator().manual_seed(seed)
    known = torch.rand(len(losses), generator=g) >= 0.3
    kept = small_losses(losses, keep, torch.where(known, 1, -100))
    assert int(kept.sum()) == math.ceil(keep * int(known.sum()))
    assert not kept[~known].any()
    left_out = ~kept & known
    if kept.any() and left_out.any():
        assert losses[kept].max() <= losses[left_out].min()


def taught(seed=3):
    teacher = image_net(8, num_labels=4, pixels=16, seed=seed)
    rows = annotate(images(labelled=32), teacher, cache=False, progress=False)
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), 4, generator=g)
    return with_column(rows, "teacher_oof_logits", logits)


@pytest.mark.parametrize(
    "objective",
    [SoftRelabelling(), SelectiveKD(), SmallLossKD()],
    ids=lambda o: type(o).__name__,
)
def test_objectives_train_and_leave_the_teacher_alone(objective):
    rows, held_out = taught(), images(40, 1)
    recipe = Recipe((Stage(objective, 3, 5e-3, 8),))
    run = go(net(), recipe, rows, held_out)
    again = go(net(), recipe, rows, held_out)
    assert same(run.student.state_dict(), again.student.state_dict())
    assert all(math.isfinite(row["loss"]) for row in run.history)
    batch = dict(
        pixel_values=torch.rand(4, 16),
        labels=torch.tensor([0, 1, -100, 3]),
        teacher_logits=torch.randn(4, 4, requires_grad=True),
        teacher_oof_logits=torch.randn(4, 4, requires_grad=True),
    )
    objective(net(), batch, Progress(step=1, steps=2)).total.backward()
    assert batch["teacher_logits"].grad is None
    assert batch["teacher_oof_logits"].grad is None


def constant(bias):
    "A net with a bias of its own, by which it is known."
    model = image_net(4, num_labels=4, pixels=16)
    with torch.no_grad():
        model.head.bias.fill_(bias)
    return model


@pytest.mark.parametrize("folds", [2, 5, 24])
def test_every_row_is_written_on_by_a_stranger(folds):
    seen = []

    def train(rows):
        seen.append(set(rows["idx"]))
        return constant(len(seen))

    rows = with_column(images(24), "idx", list(range(24)))
    pixels = torch.tensor(rows["pixel_values"])
    written = out_of_fold(rows, train, folds, progress=False)["teacher_oof_logits"]
    for fold, known in enumerate(seen, 1):
        strange = [i for i in rows["idx"] if i not in known]
        with torch.no_grad():
            expected = constant(fold)(pixels[strange]).logits
        torch.testing.assert_close(torch.tensor(written)[strange], expected)
    assert sum(len(rows) - len(known) for known in seen) == len(rows)


def test_watching_does_not_disturb_and_survives_a_checkpoint(tmp_path):
    rows, held_out = corrupt(images(), rate=0.4, num_labels=4), images(40, 1)
    stage = Stage(CrossEntropy(), 3, 5e-3, 8)
    plain = go(net(), Recipe((stage,)), rows, held_out)
    watch, again = Memorisation(rows), Memorisation(rows)
    run = go(net(), Recipe((stage,), (watch,)), rows, held_out, checkpoint=tmp_path)
    assert same(plain.student.state_dict(), run.student.state_dict())
    assert len(watch.epochs_seen) == 3
    go(net(), Recipe((stage,), (again,)), rows, held_out, checkpoint=tmp_path)
    assert again.epochs_seen == watch.epochs_seen


def test_shares_of_nothing_are_none():
    rows = corrupt(images(), rate=0.0, num_labels=4)
    assert memorised(rows, torch.randn(len(rows), 4))["recovered"] is None


def test_support_is_cleanlabs_self_confidence():
    quality = pytest.importorskip("cleanlab.rank").get_label_quality_scores
    g = torch.Generator().manual_seed(0)
    z = torch.randn(200, 5, generator=g, dtype=torch.float64)
    y = torch.randint(0, 5, (200,), generator=g)
    scores = quality(y.numpy(), F.softmax(z, -1).numpy(), method="self_confidence")
    torch.testing.assert_close(support_of(y, z), torch.tensor(scores))


def test_selection_recovers_what_noise_takes():
    "With four labels in ten wrong, the gate out of fold lets less noise through."
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(200) % 4
    patterns = F.one_hot(truth, 4).repeat_interleave(4, 1).float()
    pixels = patterns + 0.4 * torch.randn(200, 16, generator=g)
    clean = dict(pixel_values=pixels.tolist(), label=truth.tolist())
    rows = corrupt(Dataset.from_dict(clean), rate=0.4, seed=1)

    def train(rows):
        recipe = Recipe((Stage(CrossEntropy(), 60, 1e-2, 25),))
        model = image_net(64, num_labels=4, pixels=16)
        return fit(model, recipe, rows, progress=False).student

    spoilt = torch.tensor(rows["corrupted"])
    label = torch.tensor(rows["label"])

    def let_through(logits):
        return (support_of(label, logits) >= 0.5)[spoilt].float().mean().item()

    inside = predict_logits(train(rows), rows, progress=False)
    outside = out_of_fold(rows, train, 3, progress=False)["teacher_oof_logits"]
    assert let_through(inside) > let_through(torch.tensor(outside)) + 0.2


def test_bad_input_is_refused():
    for labels, message in (
        ([-1, 0], "classes from 0"),
        ([0.5, 1.0], "classes from 0"),
        ([-100, -100], "some must be there"),
    ):
        with pytest.raises(ValueError, match=message):
            corrupt(labelled(labels))
    with pytest.raises(ValueError, match="before"):
        corrupt(corrupt(labelled([0, 1, 1])))
    with pytest.raises(ValueError, match="rows of probabilities"):
        corrupt(labelled([0, 1]), matrix=torch.ones(2))
    z, y = torch.zeros(3, 2), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="one entry per row"):
        gated_loss(z, z, y, torch.ones(3, 1))
    with pytest.raises(ValueError, match="alpha"):
        gated_loss(z, z, y, torch.ones(3), alpha=2.0)
    one_output = image_net(4, num_labels=1, pixels=16)
    batch = dict(
        pixel_values=torch.rand(3, 16),
        labels=torch.zeros(3),
        teacher_logits=torch.zeros(3, 1),
    )
    for objective in (
        SoftRelabelling(),
        SelectiveKD(support="teacher_logits"),
        SmallLossKD(),
    ):
        with pytest.raises(ValueError, match="at least 2 classes"):
            objective(one_output, batch, Progress())

"""Label noise: matrices, draws, votes, gates and losses, against loops and what must not matter."""

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import go, images, net, same

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
from kdbook.rows import with_column
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
    seen = (
        torch.zeros(classes, classes).index_put(
            (truth, torch.tensor(rows["label"])),
            torch.ones(len(truth)),
            accumulate=True,
        )
        / 800
    )
    assert ((seen - Q).abs() < 5 * (Q * (1 - Q) / 800).sqrt() + 1e-3).all()


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["symmetric", "pair"]),
    st.integers(0, 10**6),
)
def test_rates_are_nested_and_unlabelled_rows_stay(a, b, kind, seed):
    low, high = sorted((a, b))
    labels = [0, 1, 2, -100, 3, 4] * 20
    less, more = (
        corrupt(labelled(labels), kind, rate, seed, num_labels=5)
        for rate in (low, high)
    )
    assert all(m for l, m in zip(less["corrupted"], more["corrupted"]) if l)
    for rows in (less, more):
        assert rows["true_label"] == labels and all(
            l == -100 for l, t in zip(rows["label"], labels) if t == -100
        )
        assert [l != t for l, t in zip(rows["label"], labels)] == rows["corrupted"][:]
    assert not any(corrupt(labelled(labels), kind, 0.0, seed)["corrupted"])


def test_votes():
    train = load_task("movies")["train"].select(range(400))
    for row, label in zip(train["ratings"], human_label(train, None)["label"]):
        votes = sum((r > 0) - (r < 0) for r in row)
        assert votes == 0 or label == (votes > 0)
    single = human_label(train, 1, seed=3)
    assert (
        single["label"]
        == human_label(train, 1, seed=3)["label"]
        != human_label(train, 1, seed=4)["label"]
    )
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
    s, t = (
        torch.randn(batch, classes, generator=g, dtype=torch.float64) for _ in range(2)
    )
    y, gate = (
        torch.randint(0, classes, (batch,), generator=g),
        torch.rand(batch, generator=g) < 0.5,
    )
    total = 0.0
    for i in range(batch):
        p, q = F.softmax(t[i] / temperature, -1), F.log_softmax(s[i] / temperature, -1)
        total += (
            alpha * temperature**2 * (p * (p.log() - q)).sum()
            - (1 - alpha) * bool(gate[i]) * F.log_softmax(s[i], -1)[y[i]]
        )
    torch.testing.assert_close(
        gated_loss(s, t, y, gate, temperature, alpha), total / batch
    )
    for i, row in enumerate(bootstrap_targets(y, t, beta, temperature)):
        torch.testing.assert_close(
            row,
            (1 - beta) * F.one_hot(y[i], classes)
            + beta * F.softmax(t[i] / temperature, -1),
        )


@FAST
@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=20),
    st.floats(0.01, 1),
    st.integers(0, 10**6),
)
def test_small_losses_against_a_sort(losses, keep, seed):
    labels = torch.where(
        torch.rand(len(losses), generator=torch.Generator().manual_seed(seed)) < 0.3,
        -100,
        1,
    )
    kept = small_losses(torch.tensor(losses), keep, labels)
    known = [v for v, y in zip(losses, labels) if y != -100]
    assert (
        int(kept.sum()) == math.ceil(keep * len(known))
        and not kept[labels == -100].any()
    )
    if kept.any() and not kept.all():
        out = (~kept) & (labels != -100)
        if out.any():
            assert torch.tensor(losses)[kept].max() <= torch.tensor(losses)[out].min()


def taught(seed=3):
    rows = annotate(
        images(labelled=32),
        image_net(8, num_labels=4, pixels=16, seed=seed),
        cache=False,
        progress=False,
    )
    return with_column(
        rows,
        "teacher_oof_logits",
        torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(seed)),
    )


@pytest.mark.parametrize(
    "objective",
    [SoftRelabelling(), SelectiveKD(), SmallLossKD()],
    ids=lambda o: type(o).__name__,
)
def test_objectives_train_and_leave_the_teacher_alone(objective):
    rows = taught()
    run = go(net(), Recipe((Stage(objective, 3, 5e-3, 8),)), rows, images(40, 1))
    again = go(net(), Recipe((Stage(objective, 3, 5e-3, 8),)), rows, images(40, 1))
    assert same(run.student.state_dict(), again.student.state_dict()) and all(
        math.isfinite(row["loss"]) for row in run.history
    )
    batch = dict(
        pixel_values=torch.rand(4, 16),
        labels=torch.tensor([0, 1, -100, 3]),
        teacher_logits=torch.randn(4, 4, requires_grad=True),
        teacher_oof_logits=torch.randn(4, 4, requires_grad=True),
    )
    objective(net(), batch, Progress(step=1, steps=2)).total.backward()
    assert (
        batch["teacher_logits"].grad is None
        and batch["teacher_oof_logits"].grad is None
    )


@pytest.mark.parametrize("folds", [2, 5, 24])
def test_every_row_is_written_on_by_a_stranger(folds):
    seen = []

    def train(rows):
        seen.append(set(rows["idx"]))
        model = image_net(4, num_labels=4, pixels=16)
        with torch.no_grad():
            model.head.bias.fill_(len(seen))
        return model

    rows = images(24)
    if "idx" not in rows.column_names:
        rows = with_column(rows, "idx", list(range(24)))
    logits = torch.tensor(
        out_of_fold(rows, train, folds, progress=False)["teacher_oof_logits"]
    )
    for fold, known in enumerate(seen, 1):
        own = image_net(4, num_labels=4, pixels=16)
        with torch.no_grad():
            own.head.bias.fill_(fold)
            expected = own(torch.tensor(rows["pixel_values"])).logits
        mine = [n for n, i in enumerate(rows["idx"]) if i not in known]
        torch.testing.assert_close(logits[mine], expected[mine])
    assert sum(len(rows) - len(known) for known in seen) == len(rows)


def test_watching_does_not_disturb_and_survives_a_checkpoint(tmp_path):
    rows = corrupt(images(), rate=0.4, num_labels=4)
    plain = go(net(), Recipe((Stage(CrossEntropy(), 3, 5e-3, 8),)), rows, images(40, 1))
    watch = Memorisation(rows)
    run = go(
        net(),
        Recipe((Stage(CrossEntropy(), 3, 5e-3, 8),), (watch,)),
        rows,
        images(40, 1),
        checkpoint=tmp_path,
    )
    assert (
        same(plain.student.state_dict(), run.student.state_dict())
        and len(watch.epochs_seen) == 3
    )
    again = Memorisation(rows)
    go(
        net(),
        Recipe((Stage(CrossEntropy(), 3, 5e-3, 8),), (again,)),
        rows,
        images(40, 1),
        checkpoint=tmp_path,
    )
    assert again.epochs_seen == watch.epochs_seen


def test_shares_of_nothing_are_none():
    rows = corrupt(images(), rate=0.0, num_labels=4)
    assert memorised(rows, torch.randn(len(rows), 4))["recovered"] is None


def test_support_is_cleanlabs_self_confidence():
    quality = pytest.importorskip("cleanlab.rank").get_label_quality_scores
    g = torch.Generator().manual_seed(0)
    z, y = (
        torch.randn(200, 5, generator=g, dtype=torch.float64),
        torch.randint(0, 5, (200,), generator=g),
    )
    theirs = quality(y.numpy(), F.softmax(z, -1).numpy(), method="self_confidence")
    torch.testing.assert_close(support_of(y, z), torch.tensor(theirs))


def test_selection_recovers_what_noise_takes():
    "On an easy problem with four labels in ten wrong: the gate out of fold lets less noise through than the one in sample."
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(200) % 4
    pixels = F.one_hot(truth, 4).repeat_interleave(4, 1).float() + 0.4 * torch.randn(
        200, 16, generator=g
    )
    rows = corrupt(
        Dataset.from_dict(dict(pixel_values=pixels.tolist(), label=truth.tolist())),
        rate=0.4,
        seed=1,
    )
    train = lambda rows: (
        fit(
            image_net(64, num_labels=4, pixels=16),
            Recipe((Stage(CrossEntropy(), 150, 1e-2, 25),)),
            rows,
            progress=False,
        ).student
    )
    from kdbook.rows import predict_logits

    inside = predict_logits(train(rows), rows, progress=False)
    outside = torch.tensor(
        out_of_fold(rows, train, progress=False)["teacher_oof_logits"]
    )
    spoilt, label = torch.tensor(rows["corrupted"]), torch.tensor(rows["label"])
    through = [
        (support_of(label, z) >= 0.5)[spoilt].float().mean().item()
        for z in (inside, outside)
    ]
    assert through[0] > through[1] + 0.2, through


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
    for objective in (
        SoftRelabelling(),
        SelectiveKD(support="teacher_logits"),
        SmallLossKD(),
    ):
        batch = dict(
            pixel_values=torch.rand(3, 16),
            labels=torch.zeros(3),
            teacher_logits=torch.zeros(3, 1),
        )
        with pytest.raises(ValueError, match="at least 2 classes"):
            objective(image_net(4, num_labels=1, pixels=16), batch, Progress())

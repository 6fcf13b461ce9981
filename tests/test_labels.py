"Labels of other kinds: several at once, weighted classes, scores by name."

import pytest
import torch
from datasets import Dataset
from helpers import go, net
from sklearn.metrics import f1_score

from kdbook import evaluation, reweighted_kd
from kdbook.evaluation import METRICS, metric_of
from kdbook.losses import label_loss
from kdbook.rows import predict_logits
from kdbook.training import CrossEntropy, Hinton, LogitMSE, one_stage

RATE = dict(epochs=15, lr=5e-2, batch_size=16)


def topics(count=64, seed=0, labelled=None):
    "Sixteen pixels; each of four classes holds or not, by a linear teacher."
    g = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 16, generator=g)
    weights = torch.randn(16, 4, generator=torch.Generator().manual_seed(9))
    logits = 4 * (pixels - 0.5) @ weights
    labels = (logits > 0).float()
    if labelled is not None:
        labels[labelled:] = -100.0
    return Dataset.from_dict(
        dict(
            pixel_values=pixels.tolist(),
            label=labels.tolist(),
            teacher_logits=logits.tolist(),
        )
    )


@pytest.mark.parametrize(
    "objective", [CrossEntropy(), Hinton(), LogitMSE()], ids=lambda o: type(o).__name__
)
def test_several_classes_at_once_are_learned(objective):
    held_out = topics(200, 1)
    recipe = one_stage(objective, **RATE)
    run = go(net(), recipe, topics(256), held_out, metric="f1_micro")
    logits = predict_logits(run.student, held_out, progress=False)
    right = f1_score(held_out["label"][:], logits > 0, average="micro")
    assert run.best["score"] == pytest.approx(right) and right > 0.8
    assert (
        evaluation.metric_of("f1_micro")(
            predict_logits(net(), held_out, progress=False),
            torch.tensor(held_out["label"][:]),
        )
        < right
    )


def test_rows_without_topics_are_left_out():
    few, all_rows = topics(64, labelled=32), topics(64).select(range(32))
    recipe = one_stage(CrossEntropy(), **RATE)
    one, other = (go(net(), recipe, rows).student for rows in (few, all_rows))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize(
    "label, message",
    [
        ([1.0, 0.0], "2 answers, but the model has 4 outputs"),
        ([0.5, 0.0, 0.0, 1.0], "0.5 is neither"),
        ([1, 0, 0, 1], "floats of 0 and 1"),
    ],
)
def test_odd_topics_are_refused(label, message):
    rows = topics(8).remove_columns("label").add_column("label", [label] * 8)
    with pytest.raises(ValueError, match=message):
        go(net(), one_stage(CrossEntropy(), **RATE), rows)


def test_methods_of_one_class_a_row_say_so():
    recipe = reweighted_kd.recipe(topics(12, 5), epochs=1)
    with pytest.raises(ValueError, match="one class a row"):
        go(net(), recipe, topics())


def test_a_weight_of_two_is_a_row_that_stands_twice():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(6, 3, generator=g), torch.tensor([0, 1, 2, 0, 1, 2])
    twice = torch.cat([z, z[y == 1]]), torch.cat([y, y[y == 1]])
    weighed = label_loss(z, y, class_weights=torch.tensor([1.0, 2.0, 1.0]))
    assert weighed * 6 == pytest.approx(label_loss(*twice).item() * 8)


def test_smoothed_labels_end_less_certain():
    from helpers import images

    recipe = lambda s: one_stage(CrossEntropy(label_smoothing=s), **RATE)
    sure, smooth = (go(net(), recipe(s)).student for s in (0.0, 0.3))
    top = lambda m: predict_logits(m, images(), progress=False).softmax(-1).amax(-1)
    assert top(smooth).mean() < top(sure).mean() - 0.05


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_highest_for_the_right_answer(name):
    g = torch.Generator().manual_seed(0)
    if name in ("spearman", "pearson", "neg_mse", "r2"):
        labels = torch.randn(30, generator=g)
        right = labels[:, None]
        wrong = torch.randn(30, 1, generator=g)
    else:
        labels = torch.randint(0, 2, (30,), generator=g)
        right = torch.nn.functional.one_hot(labels, 2).float()
        wrong = torch.randn(30, 2, generator=g)
    metric = metric_of(name)
    best = 0.0 if name == "neg_mse" else 1.0
    assert metric(right, labels) == pytest.approx(best, abs=1e-6)
    assert metric(wrong, labels) < best - 0.05
    unlabelled = torch.cat([labels, torch.full((5,), -100).to(labels)])
    padded = torch.cat([right, wrong[:5]])
    assert metric(padded, unlabelled) == pytest.approx(best, abs=1e-6)


def test_unknown_metrics_and_no_labels():
    with pytest.raises(ValueError, match='metric must be "accuracy".*got .F1.'):
        metric_of("F1")
    with pytest.raises(ValueError, match="all are -100"):
        metric_of("mcc")(torch.zeros(2, 2), torch.tensor([-100, -100]))
    with pytest.raises(ValueError, match="all are -100"):
        metric_of("pearson")(torch.zeros(2, 1), torch.tensor([-100, -100]))

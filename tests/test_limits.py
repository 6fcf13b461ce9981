"""Numbers of NumPy, schedules, what is not finite, and losses of nothing."""

import math

import datasets
import numpy as np
import pytest
import torch
from helpers import go, images, net, same

from kdbook.checkpoints import save_checkpoint
from kdbook.combined_kd import gap
from kdbook.continuation_kd import hinge_loss, mixed_loss
from kdbook.distillation import annotate
from kdbook.evaluation import accuracy, agreement, nll
from kdbook.losses import label_loss
from kdbook.noisy_label_kd import gated_loss
from kdbook.reweighted_kd import weighted_loss, weights_of
from kdbook.training import Callback, CrossEntropy, Recipe, Stage
from kdbook.universal_kd import il_loss

# numbers of NumPy, schedules, what is not finite


def test_numbers_of_numpy_are_python_s(tmp_path):
    plain = Stage(CrossEntropy(), 2, 1e-2, 16, warmup=0.0, schedule=lambda p: 1.0)
    numpy = Stage(
        CrossEntropy(),
        np.int64(2),
        np.float64(1e-2),
        np.int32(16),
        warmup=np.float32(0),
        schedule=lambda p: np.float64(1.0),
    )
    one = go(net(), Recipe((plain,)), images())
    for _ in range(2):  # run, and read from its checkpoint
        other = go(net(), Recipe((numpy,)), images(), checkpoint=tmp_path)
        assert same(one.student, other.student)
    assert type(numpy.epochs) is int and type(numpy.lr) is float


@pytest.mark.parametrize("factor", [-1.0, math.nan, math.inf, "1"])
def test_a_schedule_says_a_number(factor):
    stage = Stage(CrossEntropy(), 1, 1e-2, 16, schedule=lambda p: factor)
    with pytest.raises(ValueError, match="after . updates, schedule must be"):
        go(net(), Recipe((stage,)), images())


def test_a_schedule_is_asked_about_no_update_that_is_not_there():
    asked, rates = [], [1.0] * 8
    schedule = lambda progress: asked.append(progress) or rates[progress.step]
    stage = Stage(CrossEntropy(), 2, 1e-2, 16, warmup=0.0, schedule=schedule)
    go(net(), Recipe((stage,)), images())
    assert max(p.step for p in asked) == 7 and max(p.epoch for p in asked) == 1


def test_weights_and_answers_are_finite():
    stage = Stage(CrossEntropy(), 1, 1e-2, 64)

    class Spoils(Callback):
        def after_step(self, run, progress):
            next(run.student.parameters()).data.fill_(math.inf)

    with pytest.raises(FloatingPointError, match="the weight .* is no longer finite"):
        go(net(), Recipe((stage,), (Spoils(),)), images())


def test_a_score_of_nan_answers_is_none():
    logits = torch.tensor([[0.0, 1.0], [math.nan, 1.0]])
    for scored in (accuracy, nll):
        with pytest.raises(ValueError, match="row 1 of the logits holds NaN"):
            scored(logits, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="row 1 of the logits holds NaN"):
        agreement(torch.zeros(2, 2), logits)
    assert accuracy(torch.tensor([[-math.inf, 1.0]]), torch.tensor([1])) == 1
    with pytest.raises(ValueError, match="label 0.5, but"):
        accuracy(torch.zeros(1, 2), torch.tensor([0.5]))


def test_classes_are_whole_numbers_in_one_order():
    rows = images()
    halves = rows.cast_column("label", datasets.Value("float32"))
    stage = Stage(CrossEntropy(), 1, 1e-2, 64)
    with pytest.raises(ValueError, match="label .* in row 0 .* no whole number.*cast"):
        go(net(), Recipe((stage,)), halves)
    names = list("abcd")
    train = rows.cast_column("label", datasets.ClassLabel(names=names))
    held = images(32, 1).cast_column("label", datasets.ClassLabel(names=names[::-1]))
    with pytest.raises(ValueError, match="classes are .* in validation"):
        go(net(), Recipe((stage,)), train, held)


def test_a_checkpoint_holds_what_can_be_read_again(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(ValueError, match=r"state\['a'\]\[1\] is a numpy.float64"):
        save_checkpoint({"a": [1, np.float64(2)]}, path)
    assert not path.exists()


# limits of losses

LIMITS = {
    "labels": lambda x: label_loss(x, torch.full((len(x),), -100)),
    "mixed": lambda x: mixed_loss(x, x, torch.full((len(x),), -100), 1.0, 1.0).total,
}


@pytest.mark.parametrize("name", LIMITS)
def test_without_labels_the_loss_is_zero_whatever_the_logits(name):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits = torch.tensor([[1.0, -math.inf], [6e4, 6e4]], dtype=dtype)
        logits.requires_grad_()
        loss = LIMITS[name](logits)
        loss.backward()
        assert loss == 0 and (logits.grad == 0).all()


NONE = torch.zeros(0, 3)
EMPTY = {
    "mse": lambda: gap(NONE, NONE),
    "kl": lambda: gap(NONE, NONE, "kl"),
    "cross-entropy": lambda: gap(NONE, NONE, "cross_entropy"),
    "hinge": lambda: hinge_loss(NONE, NONE, hinge="batch"),
    "gated": lambda: gated_loss(NONE, NONE, NONE[:, 0].long(), NONE[:, 0].bool()),
    "weighted": lambda: weighted_loss(NONE[:, :2], NONE[:, 0]),
    "layers": lambda: il_loss(torch.zeros(0, 2, 3), torch.zeros(0, 4, 3)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_the_loss_of_no_rows_is_zero(name):
    assert EMPTY[name]() == 0


def test_the_cross_entropy_counts_no_class_that_is_ruled_out():
    ruled_out = torch.tensor([[0.0, 0.0, -math.inf]])
    value = gap(ruled_out, ruled_out, "cross_entropy")
    assert torch.isclose(value, torch.tensor(math.log(2)))


def test_weights_in_half_precision_are_those_in_full():
    alignment = torch.tensor([[-1.0, -1.0], [1e-3, 3e-3]])
    half = weights_of(alignment.half())
    assert torch.allclose(half, weights_of(alignment), atol=1e-3) and half[0] == 0.5


# what is read


@pytest.mark.parametrize("inputs, words", [("pixel_values", "tuple"), (("x",), "'x'")])
def test_inputs_are_columns_that_are_there(inputs, words):
    stage = Stage(CrossEntropy(), 1, 1e-2, 64)
    with pytest.raises(ValueError, match=words):
        go(net(), Recipe((stage,)), images(), inputs=inputs)


class Tagger(torch.nn.Module):
    "Answers for every token."

    def __init__(self):
        super().__init__()
        self.calls, self.words = 0, torch.nn.Embedding(50, 3)

    def forward(self, input_ids, attention_mask):
        self.calls += 1
        return self.words(input_ids)


def test_shards_are_read_as_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path))
    single = [[i % 50] for i in range(40)]  # one token: a row, or a row of tokens?
    data = datasets.Dataset.from_dict(
        {"input_ids": single, "attention_mask": [[1]] * len(single)}
    )
    annotated, answers = Tagger(), []
    for _ in range(2):
        answers.append(annotate(data, annotated, batch_size=1, progress=False))
    assert answers[0]["teacher_logits"][:] == answers[1]["teacher_logits"][:]
    calls = annotated.calls
    first, second = sorted(tmp_path.rglob("*.safetensors"))[:2]
    first.write_bytes(second.read_bytes())  # whole, but of other rows
    again = annotate(data, annotated, batch_size=1, progress=False)
    assert again["teacher_logits"][:] == answers[0]["teacher_logits"][:]
    assert annotated.calls == calls + 16

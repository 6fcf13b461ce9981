"What belongs to the caller is as it was afterwards, and what is held stays held."

import accelerate
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from helpers import go, images, net
from torch import nn

from kdbook import swa
from kdbook.distillation import annotate, predict_logits
from kdbook.evaluation import evaluate
from kdbook.glitter import Chooser, annotate_pool, make_pool
from kdbook.models import Output, image_net
from kdbook.noisy_label_kd import corrupt, out_of_fold
from kdbook.training import CrossEntropy, Progress, Recipe, Stage, one_stage

SHORT = one_stage(CrossEntropy(), epochs=2, batch_size=16)


class Normed(nn.Module):
    "A body with a batch norm, and a head."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokenizer, self.num_labels = None, 4
        self.body = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values):
        return Output(self.head(self.body(pixel_values)))


def held():
    "A student that trains on a body that does not."
    student = Normed().train()
    student.body.requires_grad_(False).eval()
    return student


ASK = {
    "predict_logits": lambda m: predict_logits(m, images(8), progress=False),
    "annotate": lambda m: annotate(images(8), m, cache=False, progress=False),
    "evaluate": lambda m: evaluate(m, images(8)),
    "fit": lambda m: go(m, SHORT),
}


@pytest.mark.parametrize("act", ASK)
def test_every_part_keeps_its_mode(act):
    student = held()
    before = {name: part.training for name, part in student.named_modules()}
    ASK[act](student)
    assert {n: part.training for n, part in student.named_modules()} == before


def test_a_held_batch_norm_does_not_move_and_a_free_one_does():
    for student, moves in ((held(), False), (Normed().train(), True)):
        norm = go(student, SHORT).student.body[1]
        assert torch.equal(norm.running_mean, torch.zeros(8)) != moves


def test_a_mean_of_weights_has_statistics_of_its_own():
    "They are those that a pass over the rows gives, dropout and all."
    run = go(Normed(), swa.recipe(epochs=8, lr=0.1, batch_size=16), images(64))
    mean = run.student
    found = mean.body[1].running_mean.clone()
    pixels = torch.tensor(images(64)["pixel_values"][:])
    torch.testing.assert_close(found, mean.body[0](pixels).mean(0), atol=1e-3, rtol=0)


def test_the_callers_accelerator_is_left_alone():
    mine = accelerate.Accelerator(
        cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4
    )
    layer = mine.prepare(nn.Linear(4, 2))
    go(net(), SHORT)
    assert mine.mixed_precision == "bf16" and mine.gradient_accumulation_steps == 4
    mine.backward(layer(torch.ones(1, 4)).sum())
    accelerate.state.AcceleratorState._reset_state()
    accelerate.state.GradientState._reset_state()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_half_precision_without_a_gpu_is_refused_and_forgotten():
    with pytest.raises(ValueError, match="mixed_precision='fp16' needs a GPU"):
        go(net(), SHORT, mixed_precision="fp16")
    go(net(), SHORT)  # the next one runs


# classes that some rows lack


def test_noise_knows_the_classes_that_have_a_name():
    names = Features(label=ClassLabel(names=["a", "b", "c"]))
    rows = Dataset.from_dict({"label": [0, 1] * 150}, features=names)
    assert {*corrupt(rows, rate=0.9)["label"][:]} == {0, 1, 2}
    assert {*corrupt(rows.with_format("arrow"), rate=0.9)["label"][:]} == {0, 1, 2}


def test_a_fold_without_a_class_gets_a_column_for_it():
    features = Features(pixel_values=Sequence(Value("float32")), label=Value("int64"))
    pixels = torch.rand(6, 4).tolist()
    rows = Dataset.from_dict(
        dict(pixel_values=pixels, label=[0, 1, 0, 1, 0, 2]), features=features
    )
    train = lambda part: image_net(4, int(max(part["label"][:])) + 1, pixels=4)
    logits = torch.tensor(
        out_of_fold(rows, train, 3, progress=False)["teacher_oof_logits"][:]
    )
    assert logits.shape == (6, 3) and logits.isfinite().all()
    strange = logits[5]  # by a model that has not met class 2
    assert float(strange[2]) == pytest.approx(float(strange[:2].min()) - 9.21, abs=0.01)


# rows that share a number, pictures with two sides


def test_glitter_remembers_rows_and_not_their_numbers():
    chooser = Chooser(k1=4, k2=1, pick="random", score_every=2)
    lengths = torch.ones(6, 4)
    rows = dict(idx=torch.zeros(6, dtype=torch.long), row=torch.arange(6))
    rows["pool_length"] = lengths
    torch.manual_seed(0)
    first = chooser.choose(None, rows, Progress(0, 2, 0, 2))
    again = chooser.choose(None, rows, Progress(1, 2, 1, 2))
    assert torch.equal(first, again) and len(first.unique()) > 1
    restored = Chooser(k1=4, k2=1, pick="random", score_every=2)
    restored.load_state_dict(chooser.state_dict())
    assert torch.equal(restored.remembered(rows), first)


def test_a_row_number_may_be_a_hash():
    chooser = Chooser(k1=4, k2=2, pick="random", score_every=2)
    rows = dict(idx=torch.tensor([10**12]), pool_length=torch.ones(1, 4))
    assert chooser.choose(None, rows, Progress(0, 2, 0, 2)).shape == (1, 2)


def test_a_pool_of_square_pictures():
    rows = Dataset.from_dict(dict(pixel_values=torch.rand(3, 2, 2).tolist()))
    noisy = lambda xs, rng: [(torch.tensor(x) + rng.random()).tolist() for x in xs]
    pool = make_pool(rows, (noisy,), k=2, progress=False)
    reader = image_net(4, 2, pixels=4)
    written = annotate_pool(pool, reader, cache=False, progress=False)
    assert torch.tensor(written["pool_teacher_logits"][:]).shape == (3, 2, 2)


def test_stages_may_be_a_list():
    assert Recipe([Stage(CrossEntropy(), 1)]).stages[0].epochs == 1

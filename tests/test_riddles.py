"""Wrong calls, and what they are told: the value, and the way out, before any training.

Each entry is a call that somebody has made, or will, and words of the answer."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas
import pytest
import tiny_text
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from helpers import images, net
from torch import nn

from kdbook import annealing_kd, continuation_kd, reweighted_kd, swa, universal_kd
from kdbook.attack import attack
from kdbook.data import hide_labels, load_task, one_rater
from kdbook.distillation import annotate, predict_logits
from kdbook.evaluation import evaluate
from kdbook.glitter import annotate_pool, make_pool
from kdbook.kronecker import kroneckerize
from kdbook.models import Output, student, student_from, teacher
from kdbook.noisy_label_kd import corrupt, out_of_fold
from kdbook.training import (
    CrossEntropy,
    EarlyStopping,
    Hinton,
    LogitMSE,
    Recipe,
    Stage,
    fit,
)

ROWS = images(16)
ONE = Recipe((Stage(CrossEntropy(), 1, batch_size=8),))
WORDS = tiny_text.rows(8)
TASK = DatasetDict(train=ROWS, test=ROWS)
quiet = dict(progress=False)


def without(*columns):
    return ROWS.remove_columns(list(columns))


def labelled(labels):
    return ROWS.remove_columns("label").add_column("label", labels)


def stage(objective=None, **arguments):
    return Recipe((Stage(objective or CrossEntropy(), **{"epochs": 1, **arguments}),))


def train(recipe=ONE, rows=ROWS, validation=None, model=None, **arguments):
    return fit(model or net(), recipe, rows, validation, **quiet, **arguments)


class Returns:
    "An objective that returns what it is told to."

    requires, rows = (), "all"

    def __init__(self, value):
        self.value = value

    def settings(self):
        return {}

    def __call__(self, student, batch, progress):
        return self.value


class Torch(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return {"text": "a", "label": 0}


class NoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, other):
        return Output(self.linear(other))


NOT_ROWS = {  # what is given in the place of rows -> words of the answer
    "splits": (TASK, r"splits \(train, test\): pick one, such as data\['train'\]"),
    "dict of splits": ({"a": ROWS}, r"splits \(a\): pick one"),
    "stream": (ROWS.to_iterable_dataset(), "is a stream .*Dataset.from_list"),
    "torch": (Torch(), r"must be a datasets.Dataset, got .*Torch: Dataset.from_list"),
    "name": ("movies", r"load_task\('movies'\)"),
    "number": (3, "must be a datasets.Dataset, got builtins.int"),
    "nothing": (None, "must be a datasets.Dataset, got builtins.NoneType"),
    "uneven columns": ({"label": [0, 1], "pixel_values": [1]}, "cannot be read as col"),
    "transform": (ROWS.with_transform(dict), "has a transform.*dataset.map"),
}
TAKES_ROWS = {
    "fit": lambda rows: fit(net(), ONE, rows, **quiet),
    "fit, validation": lambda rows: train(validation=rows),
    "annotate": lambda rows: annotate(rows, net(), cache=False, **quiet),
    "predict_logits": lambda rows: predict_logits(net(), rows, **quiet),
    "corrupt": lambda rows: corrupt(rows),
    "out_of_fold": lambda rows: out_of_fold(rows, lambda _: net(), 2, **quiet),
    "hide_labels": lambda rows: hide_labels(rows, 2),
    "make_pool": lambda rows: make_pool(rows, (lambda x, _: x,), **quiet),
}
# what means something else for one of them
FINE = {("fit, validation", "nothing"), ("fit, validation", "transform")}


@pytest.mark.parametrize("kind", NOT_ROWS)
@pytest.mark.parametrize("entry", TAKES_ROWS)
def test_what_is_no_rows_gets_a_reason(entry, kind):
    if (entry, kind) in FINE:
        pytest.skip("has a meaning there")
    rows, words = NOT_ROWS[kind]
    with pytest.raises(ValueError, match=words):
        TAKES_ROWS[entry](rows)


FORMS = {
    "data set": ROWS,
    "list": ROWS.to_list(),
    "dict": ROWS.to_dict(),
    "pandas": pandas.DataFrame(ROWS.to_list()),
    **{kind: ROWS.with_format(kind) for kind in ("torch", "numpy", "pandas", "arrow")},
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_every_form_are_the_same_rows(form):
    rows = FORMS[form]
    wanted = predict_logits(net(), ROWS, **quiet)
    assert torch.equal(predict_logits(net(), rows, **quiet), wanted)
    written = annotate(rows, net(1), cache=False, **quiet)
    plain = written.with_format(None)["teacher_logits"][:]
    assert np.allclose(plain, predict_logits(net(1), ROWS, **quiet))
    run = fit(net(), stage(Hinton()), rows, rows, **quiet)
    same = fit(net(), stage(Hinton()), ROWS, ROWS, **quiet)
    assert run.history == same.history
    assert evaluate(net(), rows).loc["rows", "rows"] == 16


FIT = {
    "swapped": (lambda: fit(net(), ROWS, ONE), "order is fit\\(student, recipe, train"),
    "a stage": (lambda: train(ONE.stages[0]), r"Recipe\(\(stage,\)\)"),
    "stages": (lambda: train(list(ONE.stages)), r"Recipe\(\(stage,\)\)"),
    "objective": (lambda: train(CrossEntropy()), "makes one of an objective"),
    "recipe not called": (lambda: train(annealing_kd.recipe), "call it"),
    "module": (lambda: train(annealing_kd), "order is fit"),
    "no recipe": (lambda: train(None), "recipe must be a Recipe, got None"),
    "class of student": (lambda: train(model=nn.Linear), "student must be.*build it"),
    "name of student": (lambda: train(model="minilm"), r"models.teacher\('minilm'\)"),
    "no label": (lambda: train(rows=without("label")), "reads the column 'label'"),
    "labels": (
        lambda: train(rows=ROWS.rename_column("label", "labels")),
        r"rename_column\('labels', 'label'\)",
    ),
    "no teacher": (
        lambda: train(stage(Hinton()), without("teacher_logits")),
        r"annotate\(train, teacher\)",
    ),
    "label None": (lambda: train(rows=labelled([0, None] * 8)), "mark what has no lab"),
    "words": (lambda: train(rows=labelled(["a", "b"] * 8)), "class_encode_column"),
    "floats": (lambda: train(rows=labelled([0.5, 1.0] * 8)), "is no whole number"),
    "from 1": (lambda: train(rows=labelled([1, 2, 3, 4] * 4)), "count from 0"),
    "multi-hot": (lambda: train(rows=labelled([[0, 1, 0, 1]] * 16)), "label"),
    "no labels": (lambda: train(rows=labelled([-100] * 16)), "all 16 labels are -100"),
    "no rows": (lambda: train(rows=ROWS.select([])), "has no rows"),
    "no labels in validation": (
        lambda: train(validation=labelled([-100] * 16)),
        "no labelled rows",
    ),
    "metric by name": (
        lambda: train(validation=ROWS, metric="f1"),
        "metric 'f1' is of two classes.*take 'f1_macro'",
    ),
    "metric of many": (
        lambda: train(validation=ROWS, metric=lambda *_: {"f1": 1.0}),
        "must return one number, got {'f1': 1.0}",
    ),
    "metric of none": (
        lambda: train(validation=ROWS, metric=lambda *_: None),
        "must return one number, got None",
    ),
    "seed": (lambda: train(seed=-1), "seed must be >= 0, got -1"),
    "seed in words": (lambda: train(seed="0"), "seed must be a whole number"),
    "pieces": (lambda: train(micro_batches=0), "micro_batches must be >= 1, got 0"),
    "precision": (
        lambda: train(mixed_precision="fp32"),
        'mixed_precision must be "no"',
    ),
    "inputs": (lambda: train(inputs="pixel_values"), r"\('pixel_values',\)"),
    "other inputs": (lambda: train(inputs=("image",)), "inputs name"),
    "no input": (lambda: train(model=NoInputs()), "other"),
    "objective's tensor": (
        lambda: train(stage(Returns(torch.ones(())))),
        r"returned a Tensor; return Loss\(total",
    ),
    "objective's none": (lambda: train(stage(Returns(None))), "returned a NoneType"),
    "needs a closure": (
        lambda: train(stage(optimizer=torch.optim.LBFGS)),
        "LBFGS asks for the loss several times",
    ),
    "classes": (
        lambda: train(
            rows=ROWS.cast_column("label", ClassLabel(names=list("abcd"))),
            validation=ROWS.cast_column("label", ClassLabel(names=list("abdc"))),
        ),
        "classes are",
    ),
    "frozen": (
        lambda: train(model=net().requires_grad_(False)),
        "no parameter with requires_grad",
    ),
    "length 0": (
        lambda: train(rows=WORDS, model=tiny_text.bert(), max_length=0),
        "max_length must be >= 3, got 0",
    ),
    "length 2": (
        lambda: train(rows=WORDS, model=tiny_text.bert(), max_length=2),
        "max_length must be >= 3, got 2",
    ),
    "too long": (
        lambda: train(rows=WORDS, model=tiny_text.bert(), max_length=99),
        "max_length=99.*16 positions",
    ),
    "callback's class": (
        lambda: train(Recipe(ONE.stages, (EarlyStopping,))),
        r"callback.*EarlyStopping\(\)",
    ),
    "a callback alone": (
        lambda: train(Recipe(ONE.stages, EarlyStopping())),
        "callbacks",
    ),
}


@pytest.mark.parametrize("call", FIT)
def test_fit_is_told_before_it_trains(call, tmp_path, monkeypatch):
    "No update is made, and nothing half-written is left."
    monkeypatch.chdir(tmp_path)
    wrong, words = FIT[call]
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: steps.append(1))
    with pytest.raises(ValueError, match=words):
        wrong()
    assert not steps and not list(tmp_path.iterdir())


def test_a_checkpoint_must_have_a_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for wrong, words in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "in", "cannot be made"),
        ("", "must be a folder"),
        (3, "must be a folder, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            train(checkpoint=wrong)
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    train(checkpoint="~/x")
    assert (tmp_path / "x" / "last.pt").exists() and not Path("~").exists()


MADE = {
    "no epochs": (lambda: Stage(CrossEntropy(), 0), "epochs must be >= 1, got 0"),
    "part of an epoch": (lambda: Stage(CrossEntropy(), 1.5), "whole number.*got 1.5"),
    "rate in words": (lambda: Stage(CrossEntropy(), 1, lr="1e-4"), "lr must be a num"),
    "no rate": (lambda: Stage(CrossEntropy(), 1, lr=0), "lr must be > 0, got 0"),
    "class": (lambda: Stage(CrossEntropy, 1), "make an instance"),
    "name": (lambda: Stage("hinton", 1), "objective must be called"),
    "batch": (lambda: Stage(CrossEntropy(), 1, batch_size=0), "batch_size must be"),
    "warm-up": (
        lambda: Stage(CrossEntropy(), 1, warmup=1),
        r"warmup must be in \[0, 1",
    ),
    "schedule": (lambda: Stage(CrossEntropy(), 1, schedule="cos"), "schedule must be"),
    "optimizer": (lambda: Stage(CrossEntropy(), 1, optimizer="sgd"), "torch.optim.SGD"),
    "yes or no": (
        lambda: Stage(CrossEntropy(), 1, reload_best="no"),
        "reload_best must be True or False, got 'no'",
    ),
    "one stage": (lambda: Recipe(ONE.stages[0]), r"\(stage,\)"),
    "no stage": (lambda: Recipe(()), "has no stages"),
    "objectives": (lambda: Recipe((CrossEntropy(),)), "made of stages"),
    "keep": (lambda: Recipe(ONE.stages, keep="best"), 'keep must be "all" or "last"'),
    "pair": (lambda: annealing_kd.recipe(7, epochs=14), "epochs must be a pair"),
    "three": (lambda: annealing_kd.recipe(7, epochs=(7, 2, 1)), "must be a pair"),
    "short": (lambda: annealing_kd.recipe(7, epochs=(3, 1)), "cannot hold 7 temper"),
    "one, not two": (lambda: continuation_kd.recipe(epochs=(7, 2)), "epochs must be"),
    "temperature": (lambda: Hinton(temperature=0), "temperature must be > 0, got 0"),
    "alpha": (lambda: Hinton(alpha=2), r"alpha must be in \[0, 1\], got 2"),
    "scale": (lambda: LogitMSE(scale=-1), "scale must be > 0, got -1"),
    "patience": (lambda: EarlyStopping(0), "patience must be >= 1, got 0"),
    "start": (lambda: swa.SWA(start=2), r"start must be in \[0, 1\], got 2"),
    "mode": (lambda: universal_kd.UniversalKD(mode="IL"), "mode must be"),
    "no meta rows": (lambda: train(reweighted_kd.recipe(epochs=1)), "meta"),
}


@pytest.mark.parametrize("call", MADE)
def test_parts_are_refused_where_they_are_made(call):
    wrong, words = MADE[call]
    with pytest.raises(ValueError, match=words):
        wrong()


def text_rows(texts, **columns):
    return Dataset.from_dict({"text": texts, **columns})


class Words:
    "A tokenizer that is a function."

    pad_token_id = 0

    def __call__(self, *texts, **_):
        return {"input_ids": [[1, 5, 2] for _ in texts[0]]}


def reader():
    model = tiny_text.bert()
    model.tokenizer = Words()
    return model


ANSWERS = {
    "name": (lambda: annotate(ROWS, "no-such-record"), "no teacher record"),
    "class": (lambda: annotate(ROWS, nn.Linear, cache=False), "teacher must be a PyT"),
    "none": (lambda: annotate(ROWS, None, cache=False), "teacher must be a PyTorch"),
    "no text": (
        lambda: annotate(text_rows(["a", None]), reader(), cache=False),
        "text.*row 1|row 1.*text",
    ),
    "no input": (
        lambda: annotate(Dataset.from_dict({"sentence": ["a"]}), reader(), cache=False),
        "no input column among",
    ),
    "no tokenizer": (
        lambda: annotate(text_rows(["a"]), net(), cache=False),
        "has no .tokenizer",
    ),
    "batch": (lambda: annotate(ROWS, net(), batch_size=0, cache=False), "batch_size"),
    "length": (
        lambda: annotate(WORDS, tiny_text.bert(), max_length=0, cache=False),
        "max_length must be >= 3",
    ),
    "too long": (
        lambda: annotate(WORDS, tiny_text.bert(), max_length=64, cache=False),
        "max_length=64.*16 positions",
    ),
    "no rows": (lambda: annotate(ROWS.select([]), net(), cache=False), "has no rows"),
    "predict: class": (lambda: predict_logits(nn.Linear, ROWS), "model must be a PyT"),
    "predict: swapped": (
        lambda: predict_logits(ROWS, net()),
        "model must be a PyTorch",
    ),
    "predict: batch": (lambda: predict_logits(net(), ROWS, 0), "batch_size must be"),
    "predict: no rows": (lambda: predict_logits(net(), ROWS.select([])), "has no rows"),
    "evaluate: no task": (
        lambda: evaluate(net(), 3),
        "task must be a datasets.Dataset",
    ),
    "evaluate: only train": (
        lambda: evaluate(net(), {"train": ROWS}),
        "only a split tr",
    ),
    "evaluate: swapped": (lambda: evaluate(ROWS, net()), "student must be a PyTorch"),
    "evaluate: name": (lambda: evaluate(net(), "movies"), r"load_task\('movies'\)"),
    "evaluate: no labels": (
        lambda: evaluate(net(), {"test": labelled([-100] * 16)}),
        "label",
    ),
    "evaluate: no label": (lambda: evaluate(net(), without("label")), "label"),
    "evaluate: scores": (
        lambda: evaluate(tiny_text.bert(kind=partial(one_output)), {"test": WORDS}),
        "at least 2 classes, got 1 output",
    ),
    "evaluate: words": (
        lambda: evaluate(net(), {"test": labelled(["a", "b"] * 8)}),
        "class_encode_column",
    ),
    "evaluate: more classes": (
        lambda: evaluate(net(), {"test": labelled([7] * 16)}),
        "label 7",
    ),
    "evaluate: batch": (lambda: evaluate(net(), TASK, 0), "batch_size must be"),
    "evaluate: a stream": (
        lambda: evaluate(net(), {"test": ROWS.to_iterable_dataset()}),
        "split 'test' is a stream",
    ),
}


def one_output(config):
    config.num_labels = 1
    return tiny_text.CLASSIFIER(config)


@pytest.mark.parametrize("call", ANSWERS)
def test_what_asks_a_model_is_told(call):
    wrong, words = ANSWERS[call]
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        wrong()


def folder_with(tmp_path, columns, name="own"):
    (tmp_path / name).mkdir()
    Dataset.from_dict(columns).to_parquet(tmp_path / name / "train.parquet")
    return tmp_path


def test_a_file_with_other_columns_is_named(tmp_path):
    folder = folder_with(tmp_path, {"review": ["a"], "stars": [1]})
    with pytest.raises(ValueError, match=r"train.parquet.*review.*stars"):
        load_task("own", folder)


def test_a_folder_in_the_place_of_a_name(tmp_path):
    folder = folder_with(tmp_path, {"text": ["a"], "label": [1]})
    with pytest.raises(ValueError, match=r"load_task\('own', data_dir="):
        load_task(str(folder / "own"))


MODELS = {
    "width": (lambda: student(width=100), "multiple of 32"),
    "layers": (lambda: student(layers=0), "layers must be >= 1, got 0"),
    "dropout": (lambda: student(dropout=1.0), r"dropout must be in \[0, 1\)"),
    "heads": (lambda: student(heads=3), "heads=3 does not divide"),
    "words": (lambda: student(embeddings="glove"), 'embeddings must be "pca"'),
    "labels": (lambda: student(num_labels=0), "num_labels must be >= 1"),
    "teacher's labels": (lambda: teacher(num_labels=0), "num_labels must be >= 1"),
    "no name": (lambda: teacher(""), "name of a model"),
    "too many layers": (
        lambda: student_from(tiny_text.bert(layers=2), 3),
        "layers must be 1 to 2",
    ),
    "twice a layer": (lambda: student_from(tiny_text.bert(layers=2), (0, 0)), "layers"),
    "no such layer": (lambda: student_from(tiny_text.bert(layers=2), (5,)), "got .5"),
    "no layers": (lambda: student_from(net(), 1), "Transformers|ImageNet"),
    "no pattern": (lambda: kroneckerize(net(), {"*.foo": (2, 2)}), "means no Linear"),
    "shape": (lambda: kroneckerize(net(), {"head": (3, 3)}), "head"),
    "empty spec": (lambda: kroneckerize(net(), {}), "the spec is empty"),
    "spec in words": (lambda: kroneckerize(net(), "x8"), "give a spec"),
}


@pytest.mark.parametrize("call", MODELS)
def test_what_makes_a_model_is_told(call):
    wrong, words = MODELS[call]
    with pytest.raises(ValueError, match=words):
        wrong()


OTHERS = {
    "rate": (lambda: corrupt(ROWS, rate=1.5), "rate must be"),
    "kind": (lambda: corrupt(ROWS, "uniform"), "kind must be|uniform"),
    "twice": (lambda: corrupt(corrupt(ROWS)), "corrupted before"),
    "folds": (lambda: out_of_fold(ROWS, lambda _: net(), 1), "folds must be in 2..16"),
    "more labels than rows": (
        lambda: hide_labels(ROWS, 17),
        "labelled must be in 0..16",
    ),
    "way": (lambda: make_pool(text_rows(["a b"]), ("spin",)), "no way 'spin'"),
    "variants": (lambda: make_pool(ROWS, (lambda x, _: x,), k=0), "k must be >= 1"),
    "no pool": (lambda: annotate_pool(ROWS, net()), r"make_pool\(dataset\)"),
    "attack: no text": (lambda: attack(net(), ROWS), "needs the column 'text'"),
    "attack: no rows": (
        lambda: attack(reader(), text_rows([], label=[])),
        "no rows to attack",
    ),
    "attack: budget": (
        lambda: attack(reader(), text_rows(["a"], label=[0]), max_queries=0),
        "max_queries must be >= 1",
    ),
    "no raters": (lambda: one_rater(ROWS), "ratings"),
}


@pytest.mark.parametrize("call", OTHERS)
def test_everything_else_is_told(call):
    wrong, words = OTHERS[call]
    with pytest.raises(ValueError, match=words):
        wrong()


def test_there_are_at_least_eighty():
    tables = (FIT, MADE, ANSWERS, MODELS, OTHERS)
    assert sum(map(len, tables)) >= 80 and len(FIT) >= 10 and len(ANSWERS) >= 10


def test_integer_pixels_are_numbers():
    rows = Dataset.from_dict(dict(pixel_values=[[0] * 16, [1] * 16], label=[0, 1]))
    assert predict_logits(net(), rows, **quiet).shape == (2, 4)

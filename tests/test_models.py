"""Models: what is too long, too many-cased or too violent for a cell of the chapter."""

import inspect
import pickle
import sys
from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from kdbook import models
from kdbook.models import (
    cnn_student,
    image_net,
    load_tokenizer,
    lstm_student,
    num_parameters,
    pca_embeddings,
    student,
    teacher,
)

TEXTS = [
    "A good film.",
    "No",
    "It tries, and half of it is unwatchable, however long one looks.",
    "",
]
TEXT_MODELS = {
    "teacher": teacher,
    "student": student,
    "cnn": cnn_student,
    "lstm": lstm_student,
}


@pytest.fixture(scope="module")
def built():
    return {name: make() for name, make in TEXT_MODELS.items()}


@pytest.fixture(scope="module")
def batch():
    return load_tokenizer()(TEXTS, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def saved(built, tmp_path_factory):
    "A student with its head, and its encoder alone."
    whole, bare = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("bare")
    small = built["student"]
    small.save_pretrained(whole)
    small.bert.save_pretrained(bare)
    for folder in (whole, bare):
        small.tokenizer.save_pretrained(folder)
    return whole, bare


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_text_alone_and_in_a_batch(name, built, batch):
    "Texts shorter than every filter, an empty text and a long one: the company does not matter."
    model = built[name]
    together = logits(model, **batch)
    for i, text in enumerate(TEXTS):
        alone = logits(model, **model.tokenizer([text], return_tensors="pt"))
        assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_what_is_under_the_padding_changes_nothing(name, built, batch):
    model, mask = built[name], batch["attention_mask"]
    ids = torch.where(mask.bool(), batch["input_ids"], torch.full_like(mask, 2003))
    assert_close(
        logits(model, input_ids=ids, attention_mask=mask),
        logits(model, **batch),
        atol=1e-6,
        rtol=1e-5,
    )


def test_cnn_takes_padding_on_either_side(built, batch):
    cnn = built["cnn"]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    n = mask.sum(1)
    left = torch.stack([row.roll(int(ids.shape[1] - k)) for row, k in zip(ids, n)])
    left_mask = torch.stack(
        [row.roll(int(ids.shape[1] - k)) for row, k in zip(mask, n)]
    )
    assert_close(
        logits(cnn, input_ids=left, attention_mask=left_mask),
        logits(cnn, **batch),
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_gradients_are_finite_and_miss_frozen_words(name, batch):
    model = TEXT_MODELS[name]().train()
    model(**batch).logits.square().sum().backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    assert all(torch.isfinite(g).all() for g in grads.values() if g is not None)
    missing = [key for key, g in grads.items() if g is None]
    assert missing == (
        []
        if name == "teacher"
        else [
            key
            for key in grads
            if "word_embeddings" in key or key == "embeddings.weight"
        ]
    )


@pytest.mark.parametrize(
    "make", [*TEXT_MODELS.values(), image_net], ids=[*TEXT_MODELS, "image_net"]
)
def test_building_leaves_the_generator_alone_and_the_seed_decides(make):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    a = make(seed=3)
    torch.randn(5)
    b, c = make(seed=3), make(seed=4)
    torch.set_rng_state(before)
    expected = torch.randn(3)
    torch.set_rng_state(before)
    make(seed=5)
    assert_close(torch.randn(3), expected, rtol=0, atol=0)
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values())
    )
    assert any(
        not torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), c.state_dict().values())
    )
    assert not a.training


def test_default_device_and_dtype_of_the_caller_do_not_change_weights(built):
    expected = built["student"].classifier.weight
    with torch.device("meta"):
        assert_close(student().classifier.weight, expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [student, cnn_student, lstm_student])
def test_random_embeddings(make):
    a, b = make(embeddings="random", seed=0), make(embeddings="random", seed=1)
    assert not torch.equal(
        a.get_input_embeddings().weight, b.get_input_embeddings().weight
    )
    assert not a.get_input_embeddings().weight.requires_grad
    assert num_parameters(
        make(freeze_embeddings=False), trainable=True
    ) == num_parameters(a)


def test_any_width_with_random_embeddings():
    assert (
        student(width=512, embeddings="random", layers=1).config.num_attention_heads
        == 8
    )
    assert student(width=96, layers=1).config.num_attention_heads == 3
    assert student(width=100, heads=5, layers=1).config.num_attention_heads == 5


@pytest.mark.parametrize("width", [1, 7, 128, 384])
def test_pca_against_svd(width):
    rows = torch.randn(
        500, 384, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ) * torch.linspace(3, 0.5, 384)
    ours = pca_embeddings(rows, width, std=1.0).double()
    u, s, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    theirs = (u * s)[:, :width]
    assert_close(ours.abs(), (theirs / theirs.std()).abs(), atol=2e-3, rtol=1e-3)
    assert_close(ours.std(), torch.tensor(1.0, dtype=torch.float64), atol=1e-5, rtol=0)
    assert_close(
        pca_embeddings(rows, width), pca_embeddings(rows, width), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: student(layers=0), "layers must be"),
        (lambda: student(width=0), "width must be"),
        (lambda: student(width=-64), "got -64"),
        (lambda: student(layers=2.0), "got 2.0"),
        (lambda: student(layers=True), "got True"),
        (lambda: student(num_labels=0), "num_labels must be"),
        (lambda: student(dropout=1), "dropout must be"),
        (lambda: student(dropout=-0.1), "-0.1"),
        (lambda: student(width=100), "multiple of 32"),
        (lambda: student(heads=3), "heads=3 does not divide width=128"),
        (lambda: student(heads=0), "heads must be"),
        (lambda: student(width=416), "width <= 384"),
        (lambda: cnn_student(width=400), "width=400"),
        (lambda: student(embeddings="glove"), "'glove'"),
        (lambda: student(attn_implementation="fast"), "attn_implementation"),
        (lambda: cnn_student(filters=0), "filters must be"),
        (lambda: cnn_student(kernel_sizes=()), "kernel_sizes"),
        (lambda: cnn_student(kernel_sizes=(3, 0)), "kernel_sizes must be"),
        (lambda: lstm_student(hidden=0), "hidden must be"),
        (lambda: lstm_student(layers=0), "layers must be"),
        (lambda: image_net(hidden=()), "at least one layer"),
        (lambda: image_net(hidden=(16, 0)), "hidden must be"),
        (lambda: image_net(num_labels=0), "num_labels must be"),
        (lambda: teacher(num_labels=0), "num_labels must be"),
        (lambda: teacher(""), "got ''"),
        (lambda: teacher(None), "got None"),
        (lambda: load_tokenizer(None), "got None"),
        (lambda: pca_embeddings(torch.ones(3, 2), 3), "width=3"),
    ],
)
def test_wrong_values_are_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: teacher("mini lm"),
        lambda: teacher("./no/such/folder"),
        lambda: load_tokenizer("mini lm"),
    ],
)
def test_no_such_model(call):
    with pytest.raises(OSError, match="no model"):
        call()


def test_misspelt_arguments_are_refused():
    for make in (teacher, student, cnn_student, lstm_student, image_net):
        assert not [
            p
            for p in inspect.signature(make).parameters.values()
            if p.kind is p.VAR_KEYWORD
        ]


def test_saved_student_comes_back_as_a_teacher(saved, built, batch):
    back = teacher(saved[0])
    assert_close(
        logits(back, **batch), logits(built["student"], **batch), atol=1e-6, rtol=1e-5
    )
    assert back.tokenizer(TEXTS[0]) == built["student"].tokenizer(TEXTS[0])


def test_a_new_head_on_a_saved_encoder_is_seeded(saved):
    before = torch.get_rng_state()
    a, b, c = (
        teacher(saved[1], num_labels=4, seed=1),
        teacher(str(saved[1]), num_labels=4, seed=1),
        teacher(saved[1], num_labels=4, seed=2),
    )
    assert torch.equal(before, torch.get_rng_state())
    assert_close(a.classifier.weight, b.classifier.weight, rtol=0, atol=0)
    assert not torch.equal(a.classifier.weight, c.classifier.weight)


def test_a_head_of_another_size_is_refused(saved):
    with pytest.raises(ValueError, match="head for 2 labels, not for num_labels=3"):
        teacher(saved[0], num_labels=3)


def test_students_of_a_student(saved, batch):
    "The words of any model with a tokenizer can be taken, also where they are narrower than MiniLM's."
    middle = teacher(saved[0])
    for make in (student, cnn_student, lstm_student):
        assert logits(make(width=64, teacher=middle), **batch).shape == (len(TEXTS), 2)
    with pytest.raises(ValueError, match="width <= 128"):
        student(width=192, teacher=middle)


def test_no_two_models_share_a_config():
    a, b = student(), student(layers=1, num_labels=3, attn_implementation="eager")
    first, second = teacher(), teacher(num_labels=3, attn_implementation="eager")
    for x, y in ((a, b), (first, second)):
        assert (
            x.config is not y.config
            and x.config.num_labels == 2
            and x.config._attn_implementation == "sdpa"
        )
        assert y.config.num_labels == 3 and y.config._attn_implementation == "eager"
        y.set_attn_implementation("sdpa")
        y.config.problem_type = "regression"
        assert x.config.problem_type is None


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_copies_and_pickles(name, built, batch):
    model = built[name]
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(logits(copy, **batch), logits(model, **batch))
        assert copy.tokenizer(TEXTS[0]) == model.tokenizer(TEXTS[0])


def test_second_gradients_through_eager_attention(batch):
    model = student(attn_implementation="eager", dropout=0.0)
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    (first,) = torch.autograd.grad(
        model(**batch).logits.square().sum(), weight, create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert torch.isfinite(second).all() and second.abs().max() > 0


def test_without_transformers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (load_tokenizer, teacher, student, cnn_student):
        with pytest.raises(ImportError, match=r"pip install 'kdbook\[book\]'"):
            call()
    assert logits(image_net(), pixel_values=torch.rand(2, 64)).shape == (2, 10)


def test_image_net_shapes_and_layers():
    for hidden, sizes in ((16, (64, 16)), ((32, 8), (64, 32, 8)), ([5], (64, 5))):
        out = image_net(hidden=hidden)(pixel_values=torch.rand(3, 8, 8))
        assert [h.shape for h in out.hidden_states] == [(3, n) for n in sizes]
    assert image_net(pixels=9, num_labels=2)(torch.rand(1, 9)).logits.shape == (1, 2)


def test_all_models_say_their_number_of_labels():
    for make in (*TEXT_MODELS.values(), image_net):
        assert make(num_labels=3).num_labels == 3
    assert set(models.__all__) >= {
        "load_tokenizer",
        "teacher",
        "student",
        "cnn_student",
        "lstm_student",
        "image_net",
        "num_parameters",
    }

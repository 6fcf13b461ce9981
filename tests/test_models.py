"""Models: what is too long, too many-cased or too violent for a cell of the chapter."""

import inspect
import pickle
import sys
from copy import deepcopy

import pytest
import torch
import transformers
from helpers import same
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
    student_from,
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
    whole = tmp_path_factory.mktemp("whole")
    bare = tmp_path_factory.mktemp("bare")
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
    "Texts shorter than every filter, an empty text and a long one."
    model = built[name]
    together = logits(model, **batch)
    for i, text in enumerate(TEXTS):
        alone = logits(model, **model.tokenizer([text], return_tensors="pt"))
        assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_what_is_under_the_padding_changes_nothing(name, built, batch):
    model, mask = built[name], batch["attention_mask"]
    ids = torch.where(mask.bool(), batch["input_ids"], torch.full_like(mask, 2003))
    other = logits(model, input_ids=ids, attention_mask=mask)
    assert_close(other, logits(model, **batch), atol=1e-6, rtol=1e-5)


def test_cnn_takes_padding_on_either_side(built, batch):
    cnn = built["cnn"]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    pads = ids.shape[1] - mask.sum(1)
    rolled = lambda rows: torch.stack([row.roll(int(k)) for row, k in zip(rows, pads)])
    other = logits(cnn, input_ids=rolled(ids), attention_mask=rolled(mask))
    assert_close(other, logits(cnn, **batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_gradients_are_finite_and_miss_frozen_words(name, batch):
    model = TEXT_MODELS[name]().train()
    model(**batch).logits.square().sum().backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    missing = [key for key, grad in grads.items() if grad is None]
    assert all(torch.isfinite(grads[key]).all() for key in grads.keys() - missing)
    frozen = dict(
        teacher=[],
        student=["bert.embeddings.word_embeddings.weight"],
        cnn=["embeddings.weight"],
        lstm=["embeddings.weight"],
    )
    assert missing == frozen[name]


MODELS = TEXT_MODELS | {"image_net": image_net}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
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
    assert same(a, b) and not same(a, c)
    assert not a.training


def test_default_device_and_dtype_of_the_caller_do_not_change_weights(built):
    expected = built["student"].classifier.weight
    with torch.device("meta"):
        assert_close(student().classifier.weight, expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [student, cnn_student, lstm_student])
def test_random_embeddings(make):
    first, second = [make(embeddings="random", seed=seed) for seed in (0, 1)]
    a, b = [model.get_input_embeddings().weight for model in (first, second)]
    assert not torch.equal(a, b)
    assert not a.requires_grad
    trained = make(freeze_embeddings=False)
    assert num_parameters(trained, trainable=True) == num_parameters(first)


@pytest.mark.parametrize(
    "settings, heads",
    [
        (dict(width=512, embeddings="random"), 8),
        (dict(width=96), 3),
        (dict(width=100, heads=5), 5),
    ],
)
def test_any_width(settings, heads):
    assert student(layers=1, **settings).config.num_attention_heads == heads


@pytest.mark.parametrize("width", [1, 7, 128, 384])
def test_pca_against_svd(width):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 384, generator=g, dtype=torch.float64)
    rows = rows * torch.linspace(3, 0.5, 384)
    by_eigh = pca_embeddings(rows, width, std=1.0).double()
    u, s, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    by_svd = (u * s)[:, :width]
    assert_close(by_eigh.abs(), (by_svd / by_svd.std()).abs(), atol=2e-3, rtol=1e-3)
    one = torch.tensor(1.0, dtype=torch.float64)
    assert_close(by_eigh.std(), one, atol=1e-5, rtol=0)
    again = pca_embeddings(rows, width)
    assert_close(again, pca_embeddings(rows, width), rtol=0, atol=0)


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
    for make in MODELS.values():
        parameters = inspect.signature(make).parameters.values()
        assert not [p for p in parameters if p.kind is p.VAR_KEYWORD]


def test_saved_student_comes_back_as_a_teacher(saved, built, batch):
    back, small = teacher(saved[0]), built["student"]
    other = logits(back, **batch)
    assert_close(other, logits(small, **batch), atol=1e-6, rtol=1e-5)
    assert back.tokenizer(TEXTS[0]) == small.tokenizer(TEXTS[0])


def test_a_new_head_on_a_saved_encoder_is_seeded(saved):
    before = torch.get_rng_state()
    a = teacher(saved[1], num_labels=4, seed=1)
    b = teacher(str(saved[1]), num_labels=4, seed=1)
    c = teacher(saved[1], num_labels=4, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert_close(a.classifier.weight, b.classifier.weight, rtol=0, atol=0)
    assert not torch.equal(a.classifier.weight, c.classifier.weight)


def test_a_head_of_another_size_is_refused(saved):
    with pytest.raises(ValueError, match="head for 2 labels, not for num_labels=3"):
        teacher(saved[0], num_labels=3)


def test_students_of_a_student(saved, batch):
    "Any model with a tokenizer lends its words, also narrower ones than MiniLM's."
    middle = teacher(saved[0])
    for make in (student, cnn_student, lstm_student):
        assert logits(make(width=64, teacher=middle), **batch).shape == (len(TEXTS), 2)
    with pytest.raises(ValueError, match="width <= 128"):
        student(width=192, teacher=middle)


def test_no_two_models_share_a_config():
    for make in (student, teacher):
        first = make()
        second = make(num_labels=3, attn_implementation="eager")
        assert first.config is not second.config
        # transformers has no other name for it
        attention = [m.config._attn_implementation for m in (first, second)]
        assert attention == ["sdpa", "eager"]
        assert [m.config.num_labels for m in (first, second)] == [2, 3]
        second.set_attn_implementation("sdpa")
        second.config.problem_type = "regression"
        assert first.config.problem_type is None


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_copies_and_pickles(name, built, batch):
    model = built[name]
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(logits(copy, **batch), logits(model, **batch))
        assert copy.tokenizer(TEXTS[0]) == model.tokenizer(TEXTS[0])


def test_second_gradients_through_eager_attention(batch):
    model = student(attn_implementation="eager", dropout=0.0)
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    loss = model(**batch).logits.square().sum()
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert torch.isfinite(second).all() and second.abs().max() > 0


def test_without_transformers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (load_tokenizer, teacher, student, cnn_student):
        with pytest.raises(ImportError, match=r"pip install 'kdbook\[train\]'"):
            call()
    assert logits(image_net(), pixel_values=torch.rand(2, 64)).shape == (2, 10)


def test_image_net_shapes_and_layers():
    for hidden, sizes in ((16, (64, 16)), ((32, 8), (64, 32, 8)), ([5], (64, 5))):
        out = image_net(hidden=hidden)(pixel_values=torch.rand(3, 8, 8))
        assert [h.shape for h in out.hidden_states] == [(3, n) for n in sizes]
    assert image_net(pixels=9, num_labels=2)(torch.rand(1, 9)).logits.shape == (1, 2)


def test_all_models_say_their_number_of_labels():
    for make in MODELS.values():
        assert make(num_labels=3).num_labels == 3
    assert {*models.__all__} >= {make.__name__ for make in MODELS.values()}
    assert {*models.__all__} >= {"load_tokenizer", "num_parameters"}


SMALL = dict(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=32,
    num_labels=3,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=2,
)
FAMILIES = {
    "Bert": SMALL,
    "Roberta": SMALL,
    "Electra": {**SMALL, "embedding_size": 8},
    "MPNet": SMALL,
    "DistilBert": dict(
        vocab_size=60, dim=16, n_layers=4, n_heads=2, hidden_dim=32, num_labels=3
    ),
    "ModernBert": {**SMALL, "cls_token_id": 2, "sep_token_id": 3},
    "GPT2": dict(
        vocab_size=60, n_embd=16, n_layer=4, n_head=2, num_labels=3, pad_token_id=1
    ),
}


@pytest.mark.parametrize(
    "head", ["ForSequenceClassification", "ForTokenClassification"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_a_family_with_its_head(family, head):
    hf = transformers
    torch.manual_seed(0)
    kind = getattr(hf, family + head)
    whole = kind(
        getattr(hf, f"{family}Config")(**FAMILIES[family], initializer_range=0.3)
    ).eval()
    ids = torch.tensor([[2, 5, 9, 11, 2], [2, 7, 6, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    with torch.no_grad():
        wanted = whole(**batch).logits
        same = student_from(whole, layers=4)(**batch).logits
        torch.testing.assert_close(same, wanted, rtol=0, atol=1e-6)
        two = student_from(whole, layers=(0, 2))
        assert type(two) is kind and two.config.num_hidden_layers == 2
        assert not torch.allclose(two(**batch).logits, wanted, atol=1e-4)
        new = student_from(whole, layers=1, num_labels=5)
        assert new(**batch).logits.shape == (2, 5)
    mine, all_of_them = (dict(m.named_parameters()) for m in (two, whole))
    assert mine.keys() < all_of_them.keys()


def test_layers_of_a_language_model_with_its_output():
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=3, n_head=2, bos_token_id=2, eos_token_id=2
    )
    torch.manual_seed(0)
    whole = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.tensor([[2, 5, 9]])
    with torch.no_grad():
        same, wanted = (
            m(input_ids=ids).logits for m in (student_from(whole, 3), whole)
        )
    torch.testing.assert_close(same, wanted, rtol=0, atol=1e-6)
    two = student_from(whole, layers=2)
    assert two.lm_head.weight is two.transformer.wte.weight

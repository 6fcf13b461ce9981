"""What would change a result without a word: labels, logits, bytes, inputs, lengths."""

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from helpers import changed, go, images, net, same
from tiny_text import bert, generator
from tiny_text import rows as words
from torch import nn

from kdbook import combined_kd, glitter, noisy_label_kd, universal_kd
from kdbook.attack import _outcome
from kdbook.combined_kd import gap, sample_words
from kdbook.continuation_kd import hinge_loss
from kdbook.distillation import annotate
from kdbook.evaluation import accuracy, ece, evaluate, nll, reliability
from kdbook.files import Damaged, load_tensors, save_tensors, write_json
from kdbook.identity import digest
from kdbook.losses import (
    hinton_loss,
    kl_divergence,
    label_loss,
    logit_mse,
    soft_target_loss,
    teacher_loss,
)
from kdbook.models import image_net
from kdbook.noisy_label_kd import small_losses
from kdbook.progressive_kd import Trail
from kdbook.reweighted_kd import alignment, weights_of
from kdbook.rows import (
    encode,
    encoded_rows,
    joined,
    length_of,
    load_trained,
    pad_id_of,
    predict_logits,
    trained_parameters,
)
from kdbook.training import (
    Callback,
    CrossEntropy,
    Hinton,
    LogitMSE,
    Recipe,
    Stage,
    check_labels,
    fit,
    one_stage,
)

short = one_stage(CrossEntropy(), epochs=2, lr=1e-2, batch_size=16)
SCORES = [[math.nan, 0.2, 0.1], [math.nan] * 3, [0.1, math.nan, 0.2]]
NAMES = [(["no", "yes"], True), (["YES", "No"], False)]


def small_bert(kind, seed=0, **config):
    "A BERT of one layer and forty words, without dropout."
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(intermediate_size=32, max_position_embeddings=64, vocab_size=40)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return kind(hf.BertConfig(**sizes, **quiet, **config)).eval()


# labels and scores


def half_labelled():
    "A net, and rows of which the labelled half is answered right."
    model, data = net(), images(24)
    answers = predict_logits(model, data, progress=False).argmax(-1)
    answers[12:] = -100
    return model, changed(data, "label", answers.tolist())


def test_rows_without_a_label_are_not_scored():
    model, data = half_labelled()
    row = evaluate(model, DatasetDict(test=data)).loc["test"]
    known = evaluate(model, DatasetDict(test=data.select(range(12)))).loc["test"]
    assert row["accuracy"] == 1 and row["rows"] == 12
    assert row.tolist() == known.tolist()
    logits = predict_logits(model, data, progress=False)
    labels = torch.tensor(data["label"][:])
    for score in (accuracy, nll, ece):
        assert score(logits, labels) == score(logits[:12], labels[:12])
    assert reliability(logits, labels)[:, 0].sum() == 12


@pytest.mark.parametrize("label, words", [(-1, "label -1"), (4, "label 4, but")])
def test_a_label_that_is_no_class_is_not_scored(label, words):
    logits, labels = torch.randn(3, 4), torch.tensor([0, label, 1])
    for score in (accuracy, nll, ece):
        with pytest.raises(ValueError, match=words):
            score(logits, labels)


def test_what_cannot_be_scored_says_so():
    with pytest.raises(ValueError, match="no row has a label"):
        accuracy(torch.zeros(2, 3), torch.full((2,), -100))
    with pytest.raises(ValueError, match="got 1 output"):
        evaluate(net_of(1), DatasetDict(test=images(8)))


def net_of(outputs):
    return image_net(8, outputs, pixels=16)


WRONG = {
    "missing": (None, "label None in row 3 of .*-100"),
    "a word": ("cat", "label 'cat' in row 3.*class_encode_column"),
    "one too many": (4, "label 4 in row 3 .*the model has 4 outputs.*count from 0"),
    "far out": (17, "label 17 in row 3"),
    "negative": (-1, "label -1 in row 3"),
}


@pytest.mark.parametrize("where", ["training", "validation"])
@pytest.mark.parametrize("name", WRONG)
def test_a_label_that_the_model_cannot_have_is_named_first(name, where, monkeypatch):
    label, words = WRONG[name]
    labels = images(16)["label"][:]
    labels = [str(x) for x in labels] if isinstance(label, str) else list(labels)
    labels[3] = label
    if isinstance(label, str):
        words = r"label '\d' in row 0"
    bad = changed(images(16), "label", labels)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("trained"))
    train, held_out = (bad, images(16)) if where == "training" else (images(16), bad)
    with pytest.raises(ValueError, match=words) as error:
        go(net(), short, train, held_out)
    assert where in str(error.value)


def test_regression_takes_any_finite_number():
    check_labels([0.5, -3, 7.25, -100], 1)
    with pytest.raises(ValueError, match="label nan in row 0"):
        check_labels([math.nan], 1)


@pytest.mark.parametrize("scores", SCORES)
def test_a_score_that_is_no_number_never_wins(scores):
    left = iter([0.5, *scores])  # `fit` asks once before it begins
    three = one_stage(CrossEntropy(), epochs=3)
    metric = lambda *_: next(left)
    run = go(net(), three, images(), images(16), metric=metric)
    numbers = [s for s in scores if s == s]
    if numbers:
        assert run.best["score"] == max(numbers)
    else:
        assert math.isnan(run.best["score"]) and run.best["epoch"] == 3


def named(names, rows=8):
    return words(rows).cast_column("label", ClassLabel(names=names))


def test_class_names_go_with_the_student():
    student = fit(bert(), short, named(["bad", "good"]), progress=False).student
    assert student.config.id2label == {0: "bad", 1: "good"}
    assert student.config.label2id == {"bad": 0, "good": 1}
    own = bert()
    own.config.id2label = {0: "no", 1: "yes"}
    assert fit(
        own, short, named(["bad", "good"]), progress=False
    ).student.config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("act", ["fit", "evaluate"])
@pytest.mark.parametrize("names, warned", NAMES)
def test_classes_in_another_order_are_told(act, names, warned):
    model, data = bert(), named(names)
    model.config.id2label = {0: "yes", 1: "no"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if act == "fit":
            fit(model, short, data, progress=False)
        else:
            evaluate(model, DatasetDict(test=data))
    assert any("another order" in str(w.message) for w in seen) == warned


# logits


TEACHER = torch.tensor([[2.0, 0.0, -torch.inf], [0.0, 1.0, 0.5]])
DIVERGENCES = {
    "soft_target_loss": lambda s, t: soft_target_loss(s, t),
    "at a temperature": lambda s, t: soft_target_loss(s, t, 4.0),
    "hinton_loss": lambda s, t: hinton_loss(s, t, torch.tensor([0, 1])),
    "teacher_loss": lambda s, t: teacher_loss(s, t),
    "Universal-KD's": lambda s, t: universal_kd._match(s, t).mean(),
    "the generator's gap": lambda s, t: gap(t, s, "kl"),
    "noisy labels'": lambda s, t: noisy_label_kd.gated_loss(
        s, t, torch.tensor([0, 1]), torch.tensor([True, False])
    ),
    "Glitter's": lambda s, t: glitter.pool_losses(s[:, None], t[:, None]).mean(),
    "Glitter's, consistent": lambda s, t: glitter.pool_losses(
        s[:, None], t[:, None], setup="consistency"
    ).mean(),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_class_that_the_teacher_rules_out_counts_for_nothing(name):
    student = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    values = []
    for low in (-torch.inf, -300.0):  # as good as ruled out
        s = student.clone().requires_grad_()
        value = DIVERGENCES[name](s, TEACHER.clamp(min=low))
        value.backward()
        assert value.isfinite() and s.grad.isfinite().all()
        values.append((value.item(), s.grad))
    assert values[0][0] == pytest.approx(values[1][0], abs=1e-5)
    torch.testing.assert_close(values[0][1], values[1][1], atol=1e-5, rtol=0)


def test_both_may_rule_out_a_class():
    log_p = torch.tensor([[0.0, -torch.inf]]).log_softmax(-1)
    assert kl_divergence(log_p, log_p).item() == 0
    certain = torch.tensor([[-torch.inf, 0.0]]).log_softmax(-1)
    assert kl_divergence(log_p, certain).item() == math.inf  # it rules out the truth


HALF = {
    "soft_target_loss": lambda s, t, y: soft_target_loss(s, t, 8.0),
    "logit_mse": lambda s, t, y: logit_mse(s, t),
    "label_loss": lambda s, t, y: label_loss(s, y),
    "hinton_loss": lambda s, t, y: hinton_loss(s, t, y),
    "hinge_loss": lambda s, t, y: hinge_loss(s, t, 0.5),
    "universal": lambda s, t, y: universal_kd._match(s, t).mean(),
    "gap": lambda s, t, y: gap(t, s),
    "bootstrap": lambda s, t, y: noisy_label_kd.bootstrap_targets(y, t).sum(),
}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_computed_in_full(name, kind):
    g = torch.Generator().manual_seed(0)
    s, t = (90 * torch.randn(2, 64, 10, generator=g)).to(kind)
    y = torch.randint(0, 10, (64,), generator=g)
    value = HALF[name](s, t, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, HALF[name](s.float(), t.float(), y))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_teacher_s_column_that_is_no_number_is_named(bad):
    logits = images(16)["teacher_logits"][:]
    logits[5] = [bad, 0.0, 0.0, 0.0]
    rows = changed(images(16), "teacher_logits", logits)
    for objective in (Hinton(), LogitMSE()):
        with pytest.raises(ValueError, match="'teacher_logits' is not finite in row 5"):
            go(net(), one_stage(objective, epochs=1), rows)


@pytest.mark.parametrize("cache", [True, False])
def test_a_teacher_that_answers_no_numbers_writes_nothing(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path))
    teacher = net()
    teacher.head.bias.data[1] = math.nan
    with pytest.raises(ValueError, match="teacher_logits is not finite in row 0"):
        annotate(images(), teacher, cache=cache, progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_where_teacher_and_student_agree_rounding_decides_nothing():
    student = net()
    columns = ("label", "teacher_logits")
    batch = encoded_rows(images(64), student, columns).batch(range(64))
    held_out = encoded_rows(images(32, 5), student, ("label",)).batch(range(32))
    batch["teacher_logits"] = predict_logits(student, images(64), progress=False)
    exact, estimate = (
        weights_of(alignment(student, batch, held_out, how))
        for how in ("double_backward", "finite_difference")
    )
    u = alignment(student, batch, held_out, "double_backward")[:, 0]
    wanted = torch.where(u > 1e-4, 0.0, 0.5)  # the teacher has nothing to say
    assert ((estimate - wanted).abs() < 0.01).float().mean() > 0.95
    assert ((exact - wanted).abs() < 0.25).float().mean() > 0.9


def test_heads_of_a_single_row_are_numbers():
    for labels in ([1], [1, 1], [0, -100, -100]):
        heads = universal_kd.PseudoClassifiers(
            image_net((6, 6, 6), 2, pixels=4),
            example={"pixel_values": torch.zeros(1, 4)},
        )
        rows = Dataset.from_dict(
            dict(pixel_values=torch.rand(len(labels), 4).tolist(), label=labels)
        )
        universal_kd.train_heads(heads, rows, progress=False)
        assert all(p.isfinite().all() for p in heads.heads.parameters())


@pytest.mark.parametrize("share", [k / 100 for k in range(1, 101)])
def test_a_share_of_a_hundred_is_that_many(share):
    assert small_losses(torch.arange(100.0), share).sum() == round(100 * share)


def test_on_the_margin_there_is_no_pull():
    student = torch.tensor([[2.0, 0.0]], requires_grad=True)
    # the distance is (2² + 0²) / 2, exactly the margin
    loss = hinge_loss(student, torch.zeros(1, 2), 1.0, margin=2.0)
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()


def test_a_word_of_probability_zero_is_never_drawn():
    logits = torch.full((20_000, 8), -torch.inf)
    logits[:, [2, 5]] = 0.0
    torch.manual_seed(0)
    drawn = sample_words(logits)
    assert {*drawn.tolist()} == {2, 5}
    assert abs((drawn == 2).float().mean() - 0.5) < 0.02


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_nor_at_the_ends_of_the_dice(edge, monkeypatch):
    dice = lambda *size, device=None: torch.full(size, edge)
    monkeypatch.setattr(torch, "rand", dice)
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert sample_words(logits).item() in (1, 2)


def test_no_rows_are_no_loss():
    none, labels = torch.zeros(0, 3, requires_grad=True), torch.zeros(0).long()
    for loss in (
        soft_target_loss(none, none),
        logit_mse(none, none),
        label_loss(none, labels),
        hinton_loss(none, none, labels),
        hinge_loss(none, none),
    ):
        assert loss.item() == 0
        loss.backward()


# bytes


def flips(path, step):
    "The file with one bit flipped, at many places."
    good = path.read_bytes()
    for place in range(0, len(good), step):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(bad))
        yield place
    path.write_bytes(good)


def test_no_flipped_bit_of_a_file_of_tensors_gets_through(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.randn(5, 3), "b": torch.arange(7)}
    save_tensors(tensors, path)
    through = 0
    for _ in flips(path, 1):
        try:
            found = load_tensors(path)
        except Damaged as e:
            assert str(path) in str(e) and "delete it" in str(e)
        else:  # in the header's spaces, or the name of a key that nobody reads
            assert same(found, tensors)
            through += 1
    assert through < 0.3 * path.stat().st_size


def test_no_flipped_bit_of_a_checkpoint_changes_a_run(tmp_path):
    class Stop(Callback):
        def after_epoch(self, run, progress):
            if self._now:
                raise KeyboardInterrupt

    watch, data = Stop(), images(32)
    made = Recipe((Stage(CrossEntropy(), 2, 1e-2, 16),), (watch,))
    watch._now = False
    whole = go(net(), made, data)
    go(net(), made, data, checkpoint=tmp_path)
    path = tmp_path / "last.pt"
    told = 0
    for _ in flips(path, 211):
        try:
            run = go(net(), made, data, checkpoint=tmp_path)
        except ValueError as e:
            told += 1
            assert "last.pt is damaged: delete it to start again" in str(e)
        else:
            assert same(run.student, whole.student) and run.history == whole.history
    assert told > 10


def test_a_damaged_shard_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path))
    teacher, data = net(), images()
    logits = annotate(data, teacher, progress=False)["teacher_logits"][:]
    (path,) = tmp_path.rglob("*.safetensors")
    for _ in flips(path, 97):
        again = annotate(data, teacher, progress=False)["teacher_logits"][:]
        assert again == logits


def test_a_damaged_checkpoint_of_a_trail_is_named(tmp_path):
    trail, model = Trail((1,), tmp_path), net()
    trail.keep(model, 1)
    path = trail.path(1)
    bad = bytearray(path.read_bytes())
    bad[-3] ^= 4
    path.write_bytes(bytes(bad))
    with pytest.raises(Damaged, match="step-00001.safetensors is damaged"):
        trail.load(net(1), 1)


def test_a_trail_of_tied_weights(tmp_path):
    from kdbook.models import character_student

    trail, model = Trail((1,), tmp_path), character_student(1, 32)
    trail.keep(model, 1)
    other = trail.load(character_student(1, 32, seed=1), 1)
    assert same(other, model)
    assert other.lm_head.weight is other.transformer.wte.weight


def test_an_outcome_of_an_attack_that_was_changed_is_not_read(tmp_path):
    path, rows = tmp_path / "a.json", [{"queries": 3, "text": "a film"}]
    write_json({"rows": rows, "sha256": digest(rows)}, path)
    assert _outcome(path) == rows
    for old, new in (("3", "4"), ("film", "fillm"), ('"rows"', '"row"'), ("{", "[")):
        path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
        assert _outcome(path) is None
        write_json({"rows": rows, "sha256": digest(rows)}, path)
    assert _outcome(tmp_path / "none.json") is None
    assert json.loads(path.read_text("utf-8"))["rows"] == rows


def test_weights_of_another_model_are_not_loaded():
    model, weights = net(), dict(trained_parameters(net(1)))
    load_trained(model, weights)
    assert same(model, net(1))
    for odd in (
        {},
        {f"module.{n}": w for n, w in weights.items()},
        {n: w for n, w in weights.items() if "bias" not in n},
        weights | {"extra": torch.zeros(1)},
        weights | {"head.bias": torch.zeros(1)},
    ):
        with pytest.raises(ValueError, match="another model|in the model, not"):
            load_trained(net(), odd)


def test_other_threads_are_other_bits(tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        go(net(), short, images(), checkpoint=tmp_path)
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="threads = 1, and this process has 2"):
            go(net(), short, images(), checkpoint=tmp_path)
    finally:
        torch.set_num_threads(before)


# inputs


def gpt2(pad=39):
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=40,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=2,
        pad_token_id=pad,
        initializer_range=0.3,
    )
    return hf.GPT2ForSequenceClassification(config).eval()


IDS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [3, 4]]


@pytest.mark.parametrize("pad", ["no tokenizer", None, 39])
def test_padding_is_the_model_s_own(pad):
    model, data = gpt2(), Dataset.from_dict(dict(input_ids=IDS, label=[0, 1, 0]))
    if pad != "no tokenizer":
        model.tokenizer = SimpleNamespace(pad_token_id=pad)
    assert pad_id_of(model) == 39
    one, three = (predict_logits(model, data, n, progress=False) for n in (1, 3))
    torch.testing.assert_close(one, three, atol=1e-4, rtol=0)
    first = encoded_rows(data.select([0]), model).batch([0])
    second = encoded_rows(data.select([1]), model).batch([0])
    both = joined(first, second, pad_id_of(model))
    assert both["input_ids"][0, 3:].tolist() == [39, 39, 39]
    assert not both["attention_mask"][0, 3:].any()


def test_a_pad_token_of_zero_is_a_pad_token():
    model = gpt2()
    model.tokenizer = SimpleNamespace(pad_token_id=0)
    assert pad_id_of(model) == 0
    assert pad_id_of(nn.Linear(1, 1)) == 0


class Answers(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.model, self.shape = net(), shape

    def forward(self, pixel_values):
        return self.shape(self.model(pixel_values).logits)


SHAPES = {
    "tensor": lambda z: z,
    "dict": lambda z: {"logits": z, "loss": None},
    "tuple": lambda z: (z, None),
    "object": lambda z: SimpleNamespace(logits=z),
    "output": lambda z: hf.modeling_outputs.SequenceClassifierOutput(logits=z),
}


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_found_in_any_output(name):
    wanted = predict_logits(net(), images(8), progress=False)
    found = predict_logits(Answers(SHAPES[name]), images(8), progress=False)
    assert torch.equal(found, wanted)
    assert go(Answers(SHAPES[name]), short, images(16)).history


@pytest.mark.parametrize("odd", [{"scores": 1}, (), None], ids=repr)
def test_an_output_without_logits_says_so(odd):
    with pytest.raises(ValueError, match="without logits"):
        predict_logits(Answers(lambda z: odd), images(8), progress=False)


def test_columns_of_other_names():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 2)

        def forward(self, features, extra):
            return self.head(torch.cat([features, extra], -1))

    g = torch.Generator().manual_seed(0)
    x = torch.rand(24, 6, generator=g)
    columns = dict(features=x[:, :4].tolist(), extra=x[:, 4:].tolist())
    data = Dataset.from_dict(columns | dict(label=(x[:, 0] > 0.5).long().tolist()))
    run = fit(Two(), short, data, data, inputs=("features", "extra"), progress=False)
    assert run.student.inputs == ("features", "extra")
    logits = predict_logits(
        run.student, data, progress=False
    )  # nothing to be said again
    with torch.no_grad():
        assert torch.equal(logits, run.student(x[:, :4], x[:, 4:]))
    written = annotate(data, run.student, cache=False, progress=False)
    assert "teacher_logits" in written.column_names
    assert evaluate(run.student, DatasetDict(test=data)).loc["test", "rows"] == 24


def test_a_model_that_writes_text_needs_a_beginning():
    sizes = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config = hf.T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)
    model = hf.T5ForConditionalGeneration(config).eval()
    data = Dataset.from_dict(dict(input_ids=IDS))
    with pytest.raises(ValueError, match="decoder_input_ids"):
        predict_logits(model, data, progress=False)
    begun = data.add_column("decoder_input_ids", [[0, 5], [0, 5], [0, 5]])
    read = lambda output: output.logits
    ask = lambda rows: predict_logits(model, rows, progress=False, read=read)
    alone, both = torch.cat([ask(begun.select([i])) for i in range(3)]), ask(begun)
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=0)


class Letters:
    "A tokenizer of letters: a is 4, b is 5, ..."

    model_input_names = ("input_ids", "token_type_ids")
    pad_token_id = 0

    def __init__(self, first=4):
        self.first = first

    def __call__(self, texts, max_length=64, **_):
        single = isinstance(texts, str)
        number = lambda letter: self.first + ord(letter) - 97
        ids = [[1, *map(number, t)] for t in ([texts] if single else texts)]
        ids = [row[: max_length - 1] + [2] for row in ids]
        return {"input_ids": ids[0] if single else ids}


def test_tokens_of_another_tokenizer_are_refused():
    model = bert()
    model.tokenizer = Letters()
    data = encode(Dataset.from_dict(dict(text=["abc", "de"])), model)
    assert encode(data, model)["input_ids"][:] == data["input_ids"][:]
    model.tokenizer = Letters(first=9)
    with pytest.raises(ValueError, match="this tokenizer does not write"):
        encode(data, model)


@pytest.mark.parametrize("text", [None, 3, math.nan])
def test_a_row_without_text_is_named(text):
    model = bert()
    model.tokenizer = Letters()
    column = ["abc", text] if not isinstance(text, (int, float)) else [1, 2]
    words_ = "row 1 has no text" if column[0] == "abc" else "row 0 has no text"
    with pytest.raises(ValueError, match=words_):
        encode(Dataset.from_dict(dict(text=column)), model)


# length


def long_rows(length=20, rows=12):
    g = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 107, (rows, length), generator=g).tolist()
    texts = ["".join(map(chr, row)) for row in letters]
    labels = [int(text[-1] > "e") for text in texts]  # only the end tells
    return Dataset.from_dict(dict(text=texts, label=labels))


def reader():
    model = small_bert(hf.BertForSequenceClassification)
    model.tokenizer = Letters()
    return model


def test_the_length_is_kept_with_the_student(tmp_path):
    data = long_rows()
    run = fit(reader(), short, data, data, max_length=12, progress=False)
    student = run.student
    assert student.max_length == length_of(student) == 12
    assert len(encode(data, student)["input_ids"][0]) == 12
    for ask in (
        lambda: predict_logits(student, data, progress=False, max_length=64),
        lambda: annotate(data, student, cache=False, progress=False, max_length=64),
        lambda: fit(student, short, data, max_length=64, progress=False),
    ):
        with pytest.raises(ValueError, match="reads 12 tokens"):
            ask()
    student.save_pretrained(tmp_path)
    again = hf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert length_of(again) == 12
    assert length_of(reader()) == 64


def test_held_out_rows_follow_the_student(monkeypatch):
    from kdbook.reweighted_kd import RWKD

    data = long_rows(rows=24)
    data = data.add_column("teacher_logits", [[0.0, 1.0]] * 24)
    objective = RWKD(data.select(range(8)), meta_batch_size=4)
    stage = Stage(objective, 1, 1e-3, 8)
    model = reader()
    model.tokenizer = None
    known = dict(tokenizer=Letters(), max_length=9, progress=False)
    fit(model, Recipe((stage,)), data.select(range(8, 24)), **known)
    assert {*objective._rows.lengths} == {9}


def test_a_teacher_with_heads_reads_as_far_as_the_teacher():
    teacher = reader()
    teacher.max_length = 7
    heads = universal_kd.PseudoClassifiers(teacher, layers=(0,))
    for model in (heads, glitter._Representation(teacher)):
        assert length_of(model) == 7 and model.tokenizer is teacher.tokenizer
        assert pad_id_of(model) == pad_id_of(teacher)
        assert {*encoded_rows(long_rows(), model).lengths} == {7}


def test_rows_that_are_cut_are_counted():
    from kdbook.models import student

    data = Dataset.from_dict(dict(text=["a film"] * 30 + ["a film " * 60] * 3))
    with pytest.warns(UserWarning, match="3 of 33 rows are longer than max_length=64"):
        encode(data, student(1, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = ["a film"] * 99 + ["a film " * 60]
        encode(Dataset.from_dict(dict(text=few)), student(1, 32))


# tokens


def tagger(seed=0):
    return small_bert(hf.BertForTokenClassification, seed, num_labels=3)


def tagged(rows=20, padded=False):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (rows,), generator=g).tolist()
    word = lambda n: torch.randint(4, 40, (n,), generator=g).tolist()
    ids = [[1, *word(n - 2), 2] for n in lengths]
    labels = [[-100, *(i % 3 for i in row[1:-1]), -100] for row in ids]
    if not padded:
        return Dataset.from_dict(dict(input_ids=ids, label=labels))
    fill = lambda rows_, value: [row + [value] * (9 - len(row)) for row in rows_]
    columns = dict(attention_mask=fill([[1] * n for n in lengths], 0))
    columns |= dict(input_ids=fill(ids, 0), label=fill(labels, -100))
    return Dataset.from_dict(columns)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_token_level_teacher_writes_every_token(batch_size, tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path))
    teacher, data = tagger(), tagged()
    for cache in (False, True, True):
        found = annotate(data, teacher, batch_size, cache=cache, progress=False)
        for row in found:
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                wanted = teacher(input_ids=ids).logits[0]
            found_ = torch.tensor(row["teacher_logits"])
            torch.testing.assert_close(found_, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [CrossEntropy, Hinton, LogitMSE])
def test_padding_changes_no_token_task(kind):
    "Ragged, padded, whole or in pieces: the same losses, scores and weights."
    ragged = annotate(tagged(), tagger(seed=1), cache=False, progress=False)
    padded = tagged(padded=True)
    filled = lambda row: row + [[9.0, 9.0, 9.0]] * (9 - len(row))
    logits = list(map(filled, ragged["teacher_logits"][:]))
    padded = padded.add_column("teacher_logits", logits)
    one = one_stage(kind(), epochs=3, lr=1e-2, batch_size=8)
    runs = [
        fit(tagger(), one, data, data, micro_batches=m, progress=False)
        for data, m in ((ragged, 1), (padded, 1), (ragged, 3))
    ]
    first = [(row["loss"], row["val_score"]) for row in runs[0].history]
    for run in runs[1:]:
        others = [(row["loss"], row["val_score"]) for row in run.history]
        assert torch.tensor(others).sub(torch.tensor(first)).abs().max() < 1e-4
    assert runs[0].history[-1]["loss"] < runs[0].history[0]["loss"]


def test_tokens_are_scored_one_by_one():
    model, data = tagger(), tagged()
    row = evaluate(model, DatasetDict(test=data)).loc["test"]
    ask = lambda ids: model(input_ids=torch.tensor([ids])).logits[0]
    logits = torch.cat([ask(ids) for ids in data["input_ids"]])
    labels = torch.cat([torch.tensor(row) for row in data["label"]])
    assert row["rows"] == (labels != -100).sum()
    assert row["accuracy"] == pytest.approx(accuracy(logits.detach(), labels))
    assert row["nll"] == pytest.approx(nll(logits.detach(), labels), abs=1e-5)


def test_objectives_of_whole_texts_refuse_tokens():
    data = annotate(tagged(), tagger(seed=1), cache=False, progress=False)
    data = data.add_column("teacher_oof_logits", data["teacher_logits"][:])
    for objective in (
        noisy_label_kd.SelectiveKD(),
        noisy_label_kd.SmallLossKD(),
        noisy_label_kd.SoftRelabelling(),
        combined_kd.MateKD(combined_kd.AdversarialStep(bert(), generator())),
    ):
        with pytest.raises(ValueError, match="learns from whole texts"):
            fit(tagger(), one_stage(objective, epochs=1), data, progress=False)


def test_a_row_must_have_a_label_for_each_token():
    data = tagged(4)
    labels = data["label"][:]
    labels[2] = labels[2][:-1]
    odd = data.remove_columns("label").add_column("label", labels)
    with pytest.raises(ValueError, match="row 2 has .* tokens and .* in 'labels'"):
        fit(tagger(), short, odd, progress=False)


def test_named_tokens_keep_their_names():
    named_ = Sequence(ClassLabel(names=["a", "b", "c"]))
    features = Features(input_ids=Sequence(Value("int64")), label=named_)
    columns = {k: tagged()[k][:] for k in ("input_ids", "label")}
    data = Dataset.from_dict(columns, features=features)
    assert fit(tagger(), short, data, progress=False).history

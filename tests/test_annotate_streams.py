"Streams, columns of other names, classes in another order; many rows, little memory."

import datasets
import pytest
import torch
from helpers import in_new_process, net
from tiny_text import bert, rows

from kdbook.distillation import annotate, annotate_stream
from kdbook.evaluation import evaluate
from kdbook.rows import copied, predict_logits
from kdbook.training import Hinton, fit, one_stage


class Words:
    "A tokenizer: a word is a number."

    pad_token_id, model_input_names = 0, ("input_ids", "attention_mask")

    def __call__(self, texts, pairs=None, truncation=True, max_length=16, **rest):
        one = isinstance(texts, str)
        columns = [[c] if one else c for c in (texts, pairs) if c is not None]
        ids = [
            [1, *(4 + int(w) for text in row for w in text.split()), 2][:max_length]
            for row in zip(*columns)
        ]
        return {"input_ids": ids[0] if one else ids}


def reader():
    model = bert()
    model.tokenizer = Words()
    return model


def table(count=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    sentence = lambda: " ".join(
        str(int(n)) for n in torch.randint(0, 30, (4,), generator=g)
    )
    return datasets.Dataset.from_dict(
        {
            "review": [sentence() for _ in range(count)],
            "text": ["not this one"] * count,
            "reply": [sentence() for _ in range(count)],
            "label": torch.randint(0, 2, (count,), generator=g).tolist(),
        }
    )


def quiet(data, model, **others):
    return annotate(data, model, cache=False, progress=False, **others)


def streamed(data, model, **others):
    return annotate_stream(data.to_iterable_dataset(), model, **others)


def test_a_stream_says_what_rows_say():
    model, data = reader(), table(50)
    whole = quiet(data, model, text="review")
    stream = streamed(data, model, text="review", batch_size=2)
    found = list(stream)
    assert [row["review"] for row in found] == data["review"][:]
    assert [row["label"] for row in found] == data["label"][:]
    torch.testing.assert_close(
        torch.tensor([row["teacher_logits"] for row in found]),
        torch.tensor(whole["teacher_logits"]),
    )
    assert list(stream)[3] == found[3]  # it can be read again


def test_a_stream_that_is_not_a_number_is_refused():
    model = reader()
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="teacher_logits is not finite in row 0"):
        list(streamed(table(), model, text="review"))


def test_texts_of_any_name():
    model, data = reader(), table()
    usual = data.remove_columns("text").rename_columns(
        {"review": "text", "reply": "text_pair"}
    )
    pair = ("review", "reply")
    wanted = quiet(usual, model)["teacher_logits"][:]
    told = quiet(data, model, text=pair)
    assert told["teacher_logits"][:] == wanted
    assert told.column_names == [*data.column_names, "teacher_logits"]
    assert predict_logits(model, data, text=pair, progress=False).tolist() == wanted
    scores = evaluate(model, data, text=pair)
    assert scores["accuracy"].item() == evaluate(model, usual)["accuracy"].item()
    recipe = one_stage(Hinton(), epochs=1, batch_size=10)
    by_name = fit(model, recipe, told, told, text=pair, progress=False)
    usual = quiet(usual, model)
    plain = fit(model, recipe, usual, usual, progress=False)
    assert by_name.history == plain.history


@pytest.mark.parametrize(
    "text, message",
    [
        ("title", "names the column 'title', but there are review, text"),
        (("review", "reply", "text"), "one column, or two"),
        (("review", "review"), "one column, or two"),
        ((), "one column, or two"),
    ],
)
def test_texts_that_are_not_there(text, message):
    with pytest.raises(ValueError, match=message):
        quiet(table(), reader(), text=text)


def test_classes_by_name_in_another_order():
    model = bert()
    model.config.id2label = {0: "good", 1: "bad"}
    names = datasets.ClassLabel(names=["Bad", "Good"])
    data = rows(20).cast_column("label", names)
    wanted = quiet(rows(20), model)["teacher_logits"]
    told = quiet(data, model)["teacher_logits"]
    assert [row[::-1] for row in told] == wanted[:]
    stream = streamed(data, model)
    torch.testing.assert_close(
        torch.tensor([row["teacher_logits"] for row in stream]), torch.tensor(told)
    )


def test_half_precision_has_a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path))
    model, data = bert(), rows(20)
    full = annotate(data, model, progress=False)["teacher_logits"][:]
    half = annotate(data, model, mixed_precision="bf16", progress=False)
    assert half["teacher_logits"][:] != full
    assert annotate(data, model, progress=False)["teacher_logits"][:] == full
    torch.testing.assert_close(
        torch.tensor(half["teacher_logits"]), torch.tensor(full), rtol=0.05, atol=0.05
    )


def test_the_teacher_goes_back_to_its_device():
    model = copied(net())
    told = quiet(
        datasets.Dataset.from_dict({"pixel_values": torch.rand(4, 16).tolist()}),
        model,
        device="cpu",
    )
    assert told["teacher_logits"] and next(model.parameters()).device.type == "cpu"
    with pytest.raises(ValueError, match="mixed_precision must be"):
        quiet(rows(4), bert(), mixed_precision="half")


def growth_of_a_stream(count, most):
    "Memory, in MB, at the end of a stream above what there was at its start."
    import resource

    count = int(count)

    def many():
        for number in range(count):
            yield {"pixel_values": [float(number % 7)] * 16}

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    stream = datasets.IterableDataset.from_generator(many)
    stream, seen = annotate_stream(stream, net(), batch_size=16), 0
    for row in stream:
        seen += 1
        if seen == 2000:
            before = peak()
    assert seen == count
    assert peak() - before < float(most), peak() - before


def test_memory_does_not_grow_with_the_rows():
    in_new_process("test_annotate_streams", "growth_of_a_stream", 30_000, 15)

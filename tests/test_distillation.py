"""The losses against naive loops; what a teacher writes, keeps of it, and costs."""

import math
import os
import statistics
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from kdbook.distillation import annotate
from kdbook.files import save_tensors
from kdbook.losses import (
    hinton_loss,
    logit_mse,
    reduce_loss,
    soft_target_loss,
    soft_targets,
)
from kdbook.rows import (
    Rows,
    encode,
    forward,
    length_sorted,
    predict_logits,
    with_column,
)
from kdbook.training import Callback

FAST = settings(max_examples=60, deadline=None)
SHAPES = st.tuples(st.integers(1, 4), st.integers(2, 5))
TEMPERATURES = st.floats(0.25, 20)
SEEDS = st.integers(0, 10_000)


def logits(*shape, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=g, dtype=torch.float64)


# the losses


def naive_softmax(row, temperature):
    powers = [math.exp((v - max(row)) / temperature) for v in row]
    return [p / sum(powers) for p in powers]


def naive_kl(student, teacher, temperature):
    p, q = naive_softmax(teacher, temperature), naive_softmax(student, temperature)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q))


@FAST
@given(SHAPES, TEMPERATURES, SEEDS)
def test_soft_targets_against_a_loop(shape, temperature, seed):
    z = logits(*shape, seed=seed)
    expected = torch.tensor(
        [naive_softmax(row, temperature) for row in z.tolist()], dtype=z.dtype
    )
    torch.testing.assert_close(soft_targets(z, temperature), expected)


@FAST
@given(SHAPES, TEMPERATURES, st.floats(0, 1), SEEDS)
def test_hinton_loss_against_a_loop(shape, temperature, alpha, seed):
    s, t = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, shape[1], shape[:1], generator=g)
    labels[labels == -1] = -100
    soft = [naive_kl(a, b, temperature) for a, b in zip(s.tolist(), t.tolist())]
    hard = [
        0.0 if y == -100 else -math.log(naive_softmax(row, 1)[y])
        for row, y in zip(s.tolist(), labels.tolist())
    ]
    both = [alpha * a + (1 - alpha) * b for a, b in zip(soft, hard)]
    each = hinton_loss(s, t, labels, temperature, alpha, "none")
    torch.testing.assert_close(each, torch.tensor(both, dtype=s.dtype))
    labelled = max(1, sum(labels != -100).item())
    for per, count in (("row", len(hard)), ("labelled", labelled)):
        mean = alpha * sum(soft) / len(soft) + (1 - alpha) * sum(hard) / count
        loss = hinton_loss(s, t, labels, temperature, alpha, per=per)
        assert loss.item() == pytest.approx(mean, abs=1e-9)
    each = soft_target_loss(s, t, temperature, "none")
    torch.testing.assert_close(each, torch.tensor(soft, dtype=s.dtype))


@FAST
@given(st.integers(1, 4), st.integers(1, 5), SEEDS)
def test_logit_mse_against_a_loop(rows, classes, seed):
    s, t = logits(rows, classes, seed=seed), logits(rows, classes, seed=seed + 1)
    each = [
        sum((a - b) ** 2 for a, b in zip(x, y)) / classes
        for x, y in zip(s.tolist(), t.tolist())
    ]
    expected = torch.tensor(each, dtype=s.dtype)
    torch.testing.assert_close(logit_mse(s, t, "none"), expected)
    assert logit_mse(s, t).item() == pytest.approx(sum(each) / rows)


def test_ends_of_alpha():
    s, t = logits(5, 3, seed=1), logits(5, 3, seed=2)
    labels = torch.tensor([0, 2, 1, 1, 0])
    soft, hard = soft_target_loss(s, t, 3.0), nn.functional.cross_entropy(s, labels)
    torch.testing.assert_close(hinton_loss(s, t, labels, 3.0, alpha=0.0), hard)
    torch.testing.assert_close(hinton_loss(s, t, labels, 3.0, alpha=1.0), soft)
    unlabelled = hinton_loss(s, t, torch.full((5,), -100), 3.0, alpha=0.3)
    torch.testing.assert_close(unlabelled, 0.3 * soft)


@FAST
@given(SHAPES, SEEDS)
def test_a_high_temperature_is_centred_logit_matching(shape, seed):
    s, t = logits(*shape, seed=seed), logits(*shape, seed=seed + 1)
    centred = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    torch.testing.assert_close(
        soft_target_loss(s, t, 1e4, "none"),
        centred.pow(2).sum(-1) / (2 * shape[1]),
        rtol=5e-3,
        atol=1e-6,
    )


def test_gradient_reaches_the_student_only():
    labels = torch.tensor([0, -100, 2, 1])
    for loss in (
        lambda s, t: hinton_loss(s, t, labels),
        logit_mse,
        lambda s, t: soft_target_loss(s, t, 4.0),
    ):
        s = logits(4, 3, seed=1).requires_grad_()
        t = logits(4, 3, seed=2).requires_grad_()
        loss(s, t).backward()
        assert t.grad is None and s.grad.abs().sum() > 0


@FAST
@given(
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=3),
    SEEDS,
)
def test_a_mask_is_the_same_as_taking_tokens_out(mask, seed):
    mask = torch.tensor(mask)
    s = logits(*mask.shape, 5, seed=seed).requires_grad_()
    t = logits(*mask.shape, 5, seed=seed + 1)
    masked = soft_target_loss(s, t, 2.0, mask=mask)
    expected = torch.zeros((), dtype=s.dtype)
    if mask.any():
        expected = soft_target_loss(s[mask], t[mask], 2.0)
    torch.testing.assert_close(masked, expected)
    masked.backward()
    assert (s.grad[~mask] == 0).all()
    assert bool((s.grad != 0).any()) == bool(mask.any())
    each = soft_target_loss(s, t, 2.0, "none", mask.long())
    assert each.shape == mask.shape
    assert (each[~mask] == 0).all()


def masked_loss(mask):
    return soft_target_loss(logits(2, 3), logits(2, 3), mask=mask)


def loss_at(alpha):
    return hinton_loss(logits(2, 3), logits(2, 3), torch.tensor([0, 1]), alpha=alpha)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: soft_targets(logits(2, 3), 0), "temperature|0"),
        (lambda: soft_target_loss(logits(2, 3), logits(2, 3), -1), "temperature|-1"),
        (lambda: soft_target_loss(logits(2, 3), logits(2, 4)), "(2, 3)|(2, 4)"),
        (lambda: soft_target_loss(logits(2, 1), logits(2, 1)), "logit_mse"),
        (lambda: masked_loss(torch.ones(3)), "(3,)|(2,)"),
        (lambda: logit_mse(logits(2, 1), logits(2)), "(2, 1)|(2,)"),
        (lambda: loss_at(alpha=1.5), "alpha|1.5"),
        (lambda: reduce_loss(logits(3), "sum"), "reduction|sum"),
        (lambda: length_sorted([3, 2], 0), "batch_size|0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words.split("|")), error.value


# models on rows


class Counting(nn.Module):
    """A plain model that returns a tensor and counts its calls.

    At the call of the environment's STOPS it ends, as Ctrl-C would."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.words = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, input_ids, attention_mask):
        assert not torch.is_grad_enabled()
        # not an attribute: a cache would take it for another model
        if str(self.calls) == os.environ.get("STOPS"):
            raise KeyboardInterrupt
        self.calls += 1
        mask = attention_mask[..., None].float()
        mean = (self.words(input_ids) * mask).sum(1) / mask.sum(1)
        return self.head(self.dropout(mean))


def tokens(rows=80, seed=0):
    from datasets import Dataset

    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (rows,), generator=g).tolist()
    ids = [torch.randint(1, 50, (n,), generator=g).tolist() for n in lengths]
    labels = [i % 3 for i in range(rows)]
    return Dataset.from_dict(dict(idx=list(range(rows)), input_ids=ids, label=labels))


@torch.no_grad()
def bare_loop(model, data):
    "One row at a time, so nothing is padded."
    model.eval()
    rows = []
    for ids in data["input_ids"]:
        tokens = torch.tensor([ids])
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        rows.append(forward(model, batch))
    return torch.cat(rows)


def assert_written(data, model):
    "The logits in `data` are those of a bare loop."
    written = torch.tensor(data["teacher_logits"])
    torch.testing.assert_close(written, bare_loop(model, data))


@pytest.fixture
def cache(own_cache):
    return own_cache / "annotations"


@pytest.fixture(scope="module")
def sentences():
    "A hundred movie sentences and a small BERT, dropout and all."
    from kdbook.data import load_task
    from kdbook.models import student

    model = student(layers=1, width=32)
    return encode(load_task("movies")["train"].select(range(100)), model), model


def test_padding_changes_nothing(sentences):
    data, model = sentences
    alone = predict_logits(model, data, batch_size=1, progress=False)
    batched = predict_logits(model, data, batch_size=64, progress=False)
    torch.testing.assert_close(batched, alone, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(bare_loop(model, data), alone, atol=2e-6, rtol=1e-5)
    assert alone.std() > 1e-4, "or this test could not fail"


def test_rows_that_come_padded_lose_their_padding(sentences):
    data, model = sentences
    data = data.select(range(20))
    wide = max(map(len, data["input_ids"])) + 3
    padded = [ids + [0] * (wide - len(ids)) for ids in data["input_ids"]]
    masks = [[1] * len(ids) + [0] * (wide - len(ids)) for ids in data["input_ids"]]
    other = with_column(data, "input_ids", padded)
    other = with_column(other, "attention_mask", masks)
    expected = predict_logits(model, data, progress=False)
    unpadded = predict_logits(model, other, progress=False)
    torch.testing.assert_close(unpadded, expected, atol=2e-6, rtol=1e-5)


def test_predict_logits_leaves_the_model_as_it_was(monkeypatch):
    model, data = Counting(), tokens()
    model.train()
    first, second = (predict_logits(model, data, 7, progress=False) for _ in range(2))
    assert torch.equal(first, second)  # evaluation mode inside
    assert model.training  # and training mode after
    torch.testing.assert_close(first, bare_loop(model, data))
    model.train()
    model.calls = 0
    monkeypatch.setenv("STOPS", "2")
    with pytest.raises(KeyboardInterrupt):
        predict_logits(model, data, 7, progress=False)
    assert model.training


@FAST
@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 9))
def test_length_sorted_batches(lengths, batch_size):
    batches = length_sorted(lengths, batch_size)
    order = sum(batches, [])
    assert sorted(order) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)


def test_rows_are_padded_to_the_longest_of_the_batch():
    data = tokens(6)
    batch = Rows(data, ("label",), pad_id=9).batch([4, 1, 3])
    wanted = [data["input_ids"][i] for i in (4, 1, 3)]
    wide = max(map(len, wanted))
    padded = [ids + [9] * (wide - len(ids)) for ids in wanted]
    masks = [[1] * len(ids) + [0] * (wide - len(ids)) for ids in wanted]
    assert batch["input_ids"].tolist() == padded
    assert batch["attention_mask"].tolist() == masks
    assert batch["labels"].tolist() == [1, 1, 0]


def test_no_input_and_no_tokenizer_are_named():
    from datasets import Dataset

    with pytest.raises(ValueError, match="tokenizer"):
        encode(Dataset.from_dict({"text": ["a"]}), Counting())
    with pytest.raises(ValueError, match="no rows"):
        predict_logits(Counting(), tokens().select([]), progress=False)
    model = Counting()
    model.tokenizer = object()
    with pytest.raises(ValueError, match="sentence"):
        encode(Dataset.from_dict({"sentence": ["a"]}), model)


# annotate


def test_annotate_writes_what_a_bare_loop_finds(cache):
    model, data = Counting(), tokens()
    for keep in (True, False):
        written = annotate(data, model, batch_size=4, cache=keep, progress=False)
        assert_written(written, model)
        assert written["idx"] == data["idx"] and written["label"] == data["label"]
    again = annotate(written, model, batch_size=4, progress=False)
    assert again.column_names == written.column_names
    assert again["teacher_logits"] == written["teacher_logits"]


def test_a_second_call_does_not_run_the_teacher(cache):
    model, data = Counting(), tokens()
    quick = dict(batch_size=2, progress=False)
    first = annotate(data, model, **quick)
    assert model.calls == 40 and len(list(cache.iterdir())) == 1
    second = annotate(data, model, **quick)
    same_inputs = annotate(data.remove_columns("label"), Counting(), **quick)
    assert model.calls == 40
    assert second["teacher_logits"] == first["teacher_logits"]
    assert same_inputs["teacher_logits"] == first["teacher_logits"]
    annotate(data, model, cache=False, **quick)
    assert model.calls == 80


def test_other_weights_rows_or_batches_are_another_entry(cache):
    data = tokens()
    nudged = Counting()
    nudged.head.bias.data[0] += 1e-6
    calls = [
        (data, Counting(), 4),
        (data, nudged, 4),
        (data.select(range(79)), Counting(), 4),
        (data, Counting(), 5),
        (data.select([1, 0, *range(2, 80)]), Counting(), 4),
    ]
    for n, (rows, model, size) in enumerate(calls, 1):
        written = annotate(rows, model, batch_size=size, progress=False)
        assert model.calls > 0 and len(list(cache.iterdir())) == n
        assert_written(written, model)


def test_interrupted_annotate_goes_on_from_its_shards(cache, monkeypatch):
    model, data = Counting(), tokens()
    monkeypatch.setenv("STOPS", "37")  # two shards of 16 batches are written
    with pytest.raises(KeyboardInterrupt):
        annotate(data, model, batch_size=2, progress=False)
    model.calls = 0
    monkeypatch.delenv("STOPS")
    resumed = annotate(data, model, batch_size=2, progress=False)
    assert model.calls == 8
    whole = annotate(data, Counting(), batch_size=2, cache=False, progress=False)
    assert resumed["teacher_logits"] == whole["teacher_logits"]


def test_killed_before_the_rename_leaves_no_shard(cache, monkeypatch):
    model, data = Counting(), tokens()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        annotate(data, model, batch_size=2, progress=False)
    assert model.calls == 16 and not list(cache.rglob("[0-9]*.safetensors"))
    written = annotate(data, model, batch_size=2, progress=False)
    assert model.calls == 56
    assert_written(written, model)


DAMAGE = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[:-5],
    "garbage": lambda whole: b"\xff" * len(whole),
    "other rows": lambda whole: save({"logits": torch.zeros(3, 3)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_computed_again(cache, damage):
    model, data = Counting(), tokens()
    first = annotate(data, model, batch_size=2, progress=False)
    shard = sorted(cache.rglob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(DAMAGE[damage](whole))
    model.calls = 0
    again = annotate(data, model, batch_size=2, progress=False)
    assert again["teacher_logits"] == first["teacher_logits"]
    assert model.calls == 16 and shard.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_only_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path / "file" / "cache"))
    model, data = Counting(), tokens()
    with pytest.warns(UserWarning, match="cannot be written"):
        written = annotate(data, model, batch_size=2, progress=False)
    assert_written(written, model)


def test_a_full_cache_is_read_without_writing(cache, monkeypatch):
    model, data = Counting(), tokens()
    first = annotate(data, model, batch_size=2, progress=False)

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    again = annotate(data, model, batch_size=2, progress=False)
    assert again["teacher_logits"] == first["teacher_logits"]


# records


@pytest.fixture
def trail(tmp_path, monkeypatch):
    "Of the rows 7, 3, 9 and 1, at two checkpoints and for three classes."
    trail = torch.arange(4 * 2 * 3).reshape(4, 2, 3).half()
    record = dict(
        idx=torch.tensor([7, 3, 9, 1]),
        teacher_trail=trail,
        teacher_logits=trail[:, -1].contiguous(),
        trail_steps=torch.tensor([5, 10]),
    )
    save_tensors(record, tmp_path / "teacher" / "old.safetensors")
    monkeypatch.setenv("KDBOOK_RESULTS", str(tmp_path))
    return trail.float()


def test_a_record_is_read_by_row_number(trail):
    from datasets import Dataset

    written = annotate(Dataset.from_dict(dict(idx=[1, 7, 3])), "old")
    assert written.column_names == ["idx", "teacher_logits", "teacher_trail"]
    assert written["teacher_trail"] == trail[[3, 0, 1]].tolist()
    assert written["teacher_logits"] == trail[[3, 0, 1], -1].tolist()


def test_unknown_records_and_rows_are_named(trail):
    from datasets import Dataset

    with pytest.raises(FileNotFoundError, match="new.*'old'"):
        annotate(Dataset.from_dict(dict(idx=[1])), "new")
    with pytest.raises(KeyError, match="1 of 2 rows, first idx 4"):
        annotate(Dataset.from_dict(dict(idx=[1, 4])), "old")


# what it costs


def cpu_seconds(work):
    "CPU time of one call; unlike wall time, it leaves other programs out."
    started = time.process_time()
    work()
    return time.process_time() - started


@pytest.mark.slow
def test_annotate_keeps_nine_tenths_of_the_bare_speed(
    tmp_path, monkeypatch, one_thread
):
    """The whole call, with fingerprint and cache files.

    It is held against the forward passes alone on the same batches."""
    from kdbook.data import load_task
    from kdbook.models import student

    model = student(layers=4, width=256)
    data = encode(load_task("movies")["train"].select(range(512)), model)
    rows = Rows(data)
    batches = [rows.batch(index) for index in length_sorted(rows.lengths, 64)]

    @torch.no_grad()
    def bare():
        for batch in batches:
            forward(model, batch)

    annotate(data.select(range(64)), model, cache=False, progress=False)  # warms up
    ratios = []
    for n in range(7):
        monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path / str(n)))
        alone = cpu_seconds(bare)
        ratios.append(
            alone / cpu_seconds(lambda: annotate(data, model, progress=False))
        )
        if n >= 2 and statistics.median(ratios) >= 0.9:
            break
    print(f"annotate runs at {statistics.median(ratios):.3f} of the bare speed")
    assert statistics.median(ratios) >= 0.9, ratios


class StepTimes(Callback):
    "Notes the CPU time between updates."

    def __init__(self):
        self.at = []

    def settings(self):
        return {}

    def after_step(self, run, progress):
        self.at.append(time.process_time())

    def steps(self):
        return [b - a for a, b in zip(self.at, self.at[1:])]


@pytest.mark.slow
def test_a_step_on_cached_logits_costs_what_fine_tuning_costs(one_thread):
    "Near 1.00; 1.15 leaves room for a busy machine, and none for a teacher alongside."
    from kdbook.annealing_kd import AnnealingKD
    from kdbook.data import load_task
    from kdbook.models import student
    from kdbook.training import CrossEntropy, Hinton, LogitMSE, Recipe, Stage, fit

    model = student(layers=1, width=128)
    objectives = [CrossEntropy(), Hinton(), LogitMSE(), AnnealingKD(1)]
    data = load_task("movies")["train"].select(range(192))
    data = encode(with_column(data, "teacher_logits", logits(192, 2)), model)

    def steps(objective):  # one seed: the same batches in the same order
        times = StepTimes()
        fit(model, Recipe((Stage(objective, 1),), (times,)), data, progress=False)
        return times.steps()

    ratios = {type(objective).__name__: [] for objective in objectives[1:]}
    for n in range(8):
        order = objectives[n % 4 :] + objectives[: n % 4]
        times = {type(objective).__name__: steps(objective) for objective in order}
        plain = times.pop("CrossEntropy")
        if not n:  # the first round warms up
            continue
        for name, seconds in times.items():
            ratios[name] += [b / a for a, b in zip(plain, seconds)]
        medians = {name: statistics.median(values) for name, values in ratios.items()}
        if n >= 4 and max(medians.values()) <= 1.05:
            break
    print(f"a step costs, in fine-tuning steps: {medians}")
    assert max(medians.values()) <= 1.15, medians

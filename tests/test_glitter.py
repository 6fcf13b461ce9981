"""Glitter: selection against a sort, the loss against a loop, pools of every shape."""

import re

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import same
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import bert, rows

from kdbook import glitter as gl
from kdbook.losses import hinton_loss, soft_target_loss
from kdbook.rows import Rows, forward, with_column
from kdbook.training import Progress, fit

COLUMNS = (
    "idx",
    "label",
    "teacher_logits",
    "pool_length",
    "pool_input_ids",
    "pool_teacher_logits",
)


def pooled(n=24, k=4, seed=0, missing=False):
    """Rows with a pool of random texts and random answers.

    With `missing`, some rows have fewer variants, one has none."""
    data, g = rows(n, seed), torch.Generator().manual_seed(seed + 1)
    length = torch.randint(4, 9, (n, k), generator=g)
    if missing:
        length[torch.rand(n, k, generator=g) < 0.3] = 0
        length[0] = 0
    ids = torch.randint(4, 40, (n, k, 8), generator=g)
    ids *= torch.arange(8) < length[..., None]
    data = with_column(data, "pool_length", length)
    data = with_column(data, "pool_input_ids", ids)
    logits = torch.randn(n, k, 2, generator=g)
    return with_column(data, "pool_teacher_logits", logits)


def batch_of(data):
    return Rows(data, COLUMNS).batch(list(range(len(data))))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10_000), st.data())
def test_selection_against_a_sort(n, k1, seed, data):
    k2 = data.draw(st.integers(1, k1))
    g = torch.Generator().manual_seed(seed)
    losses = torch.rand(n, k1, generator=g)
    present = torch.rand(n, k1, generator=g) < 0.7
    chosen = gl.select_worst(losses, k2, present)
    for row, real, picked in zip(losses.tolist(), present.tolist(), chosen.tolist()):
        places = [j for j in range(k1) if real[j]]
        worst = sorted(places, key=lambda j: -row[j])[:k2]
        assert picked[: len(worst)] == worst and len(set(picked)) == k2


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, 4),
    st.sampled_from(["kd", "consistency"]),
    st.floats(0.5, 5),
    st.booleans(),
)
def test_the_loss_against_a_loop(seed, k2, setup, temperature, missing):
    "Row by row and variant by variant, with unpadded inputs."
    data, net = pooled(6, seed=seed, missing=missing), bert()
    batch = batch_of(data)
    scoring = dict(temperature=temperature, setup=setup)
    objective = gl.Glitter(setup, 4, k2, temperature)
    chosen = objective.choose(net, batch, Progress(), **scoring)
    loss = gl.glitter_loss(net, batch, chosen, setup, temperature, 0.5, 0.5)
    on_rows, on_variants = [], []
    for i, row in enumerate(data):
        own = net(torch.tensor([row["input_ids"]])).logits
        label = torch.tensor([row["label"]])
        if setup == "kd":
            answer = torch.tensor([row["teacher_logits"]])
            on_rows.append(hinton_loss(own, answer, label, temperature, 0.5))
        else:
            on_rows.append(F.cross_entropy(own, label))
        for j in chosen[i].tolist():
            if (length := row["pool_length"][j]) == 0:
                continue
            logits = net(torch.tensor([row["pool_input_ids"][j][:length]])).logits
            if setup == "kd":
                answer = torch.tensor([row["pool_teacher_logits"][j]])
                on_variants.append(soft_target_loss(logits, answer, temperature))
            else:
                on_variants.append(soft_target_loss(logits / temperature, own))
    expected = sum(on_rows) / len(on_rows)
    if on_variants:
        expected = expected + 0.5 * sum(on_variants) / len(on_variants)
    torch.testing.assert_close(loss.total, expected, atol=1e-4, rtol=1e-4)


def test_padding_more_changes_nothing():
    batch, net = batch_of(pooled()), bert()
    wide = batch | {"pool_input_ids": F.pad(batch["pool_input_ids"], (0, 7))}
    torch.testing.assert_close(gl.score_pool(net, batch), gl.score_pool(net, wide))


def test_scores_leave_mode_and_gradients_alone():
    batch, net = batch_of(pooled(missing=True)), bert(dropout=0.5).train()
    first, second = gl.score_pool(net, batch), gl.score_pool(net, batch)
    assert net.training and torch.equal(first, second) and not first.requires_grad
    assert torch.equal(first == -torch.inf, batch["pool_length"] == 0)


def test_the_worst_are_worse_than_any_other_choice():
    batch, net = batch_of(pooled(40, k=6)), bert()
    scores = gl.score_pool(net, batch)
    worst = scores.gather(1, gl.select_worst(scores, 2)).mean()
    assert worst >= max(scores[:, torch.randperm(6)[:2]].mean() for _ in range(50))


@pytest.mark.parametrize("setup", ["kd", "self"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_variants(setup):
    net, batch = bert(), batch_of(pooled(8))
    variants, _ = gl.pool_inputs(batch, torch.arange(4).expand(8, -1))
    with torch.no_grad():
        batch["teacher_logits"] = forward(net, batch)
        batch["pool_teacher_logits"] = forward(net, variants).view(8, 4, 2)
    loss = gl.Glitter(setup, 4, 2, alpha=1.0)(net, batch, Progress()).total
    assert loss.abs() < 1e-5
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    assert all(g.abs().max() < 1e-4 for g in grads if g is not None)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(0, 50),
    st.lists(st.sampled_from(["delete", "swap"]), min_size=1, max_size=3),
)
def test_pools_hold_different_variants_and_are_the_same_again(k, seed, ways):
    texts = ["A slow, sweet film.", "Dull!", "one two three four five six seven", ""]
    data = Dataset.from_dict({"text": texts})
    first = gl.make_pool(data, tuple(ways), k, seed, progress=False)
    again = gl.make_pool(data, tuple(ways), k, seed, progress=False)
    assert first[:] == again[:] and first["idx"][:] == [0, 1, 2, 3]
    plain_words = lambda text: tuple(re.findall("[a-z]+", text.lower()))
    for row in first:
        pool = zip(row["pool_text"], row["pool_way"])
        made = [text for text, way in pool if way >= 0]
        assert len(row["pool_text"]) == k
        assert len({plain_words(t) for t in [row["text"], *made]}) == len(made) + 1
    assert first[1]["pool_way"] == [-1] * k == first[3]["pool_way"]


def test_a_second_text_stays_as_it_is():
    from kdbook.models import student

    pairs = dict(
        text=["a man walks his dog", "it rains"],
        text_pair=["somebody is outside", "the sun is out"],
        label=[0, 1],
    )
    net = student(1, 32)
    pool = gl.make_pool(Dataset.from_dict(pairs), ("delete", "swap"), 2, progress=False)
    pool = gl.annotate_pool(pool, net, cache=False, progress=False)
    assert "pool_token_type_ids" in pool.column_names
    assert torch.tensor(pool["pool_teacher_logits"]).shape == (2, 2, 2)
    row = pool[0]
    tokens = net.tokenizer(row["pool_text"][0], row["text_pair"], return_tensors="pt")
    with torch.no_grad():
        alone = net(**tokens).logits[0]
    written = torch.tensor(row["pool_teacher_logits"][0])
    torch.testing.assert_close(written, alone, atol=1e-4, rtol=1e-4)
    assert row["pool_length"][0] == tokens.input_ids.shape[1]


def test_the_filter_drops_copies_and_keeps_the_nearest():
    from kdbook.models import image_net

    origin = [1.0, 0.0, 0.0, 0.0]
    data = Dataset.from_dict(dict(idx=[0], pixel_values=[origin], label=[0]))
    net = image_net((6,), 2, pixels=4)
    same_again = [1.0, 1e-6, 0.0, 0.0]  # new and yet the same
    variants = [[0.0, 0.0, 1.0, 1.0], same_again, [0.5, 0.5, 0.0, 0.0]]
    ways = tuple(lambda x, rng, v=v: [v] for v in variants)
    pool = gl.make_pool(data, ways, k=3, progress=False)
    kept = gl.keep_closest(pool, net, k=2, progress=False)
    states = lambda x: net(torch.tensor(x)[None]).hidden_states[-1]

    def distances(row):
        own = states(origin)
        return [
            gl.angular_distance(states(x), own).item() for x in row["pool_pixel_values"]
        ]

    different = [a for a in distances(pool[0]) if a >= 1e-3]
    assert distances(kept[0]) == sorted(distances(kept[0])) == sorted(different)[:2]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: gl.Glitter(k1=4, k2=5), "k2 must be in 1..4, got 5"),
        (lambda: gl.Glitter(pick="best"), "best"),
        (lambda: gl.Glitter(temperature=0), "temperature must be > 0, got 0"),
        (lambda: gl.Glitter(alpha=2), "alpha must be"),
        (lambda: gl.make_pool(rows(3), k=0), "k must be"),
        (lambda: gl.encode_pool(rows(3)), "make_pool"),
        (lambda: fit(bert(), gl.recipe(epochs=1), rows(8)), "pool_length"),
        (lambda: fit(bert(), gl.recipe(epochs=1, k1=8), pooled(8, k=4)), "k1=8"),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_recipe_can_be_run_twice():
    made = gl.recipe(k1=4, k2=1, epochs=3, lr=5e-3, batch_size=8, score_every=2)
    data = pooled()
    first, second = (fit(bert(), made, data, progress=False) for _ in range(2))
    assert first.history == second.history
    assert same(first.student.state_dict(), second.student.state_dict())

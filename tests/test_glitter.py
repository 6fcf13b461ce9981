"""Glitter: selection against a sort, the loss against a loop, pools of every shape."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import same
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
    "Rows with a pool of random texts and random answers; with `missing`, some rows have fewer variants, one has none."
    data, g = rows(n, seed), torch.Generator().manual_seed(seed + 1)
    length = torch.randint(4, 9, (n, k), generator=g)
    if missing:
        length[torch.rand(n, k, generator=g) < 0.3] = 0
        length[0] = 0
    ids = torch.randint(4, 40, (n, k, 8), generator=g) * (
        torch.arange(8) < length[..., None]
    )
    for name, value in dict(
        pool_length=length,
        pool_input_ids=ids,
        pool_teacher_logits=torch.randn(n, k, 2, generator=g),
    ).items():
        data = with_column(data, name, value)
    return data


def batch_of(data):
    return Rows(data, COLUMNS).batch(list(range(len(data))))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10_000), st.data())
def test_selection_against_a_sort(n, k1, seed, data):
    k2 = data.draw(st.integers(1, k1))
    g = torch.Generator().manual_seed(seed)
    losses, there = torch.rand(n, k1, generator=g), torch.rand(n, k1, generator=g) < 0.7
    chosen = gl.select_worst(losses, k2, there)
    for row, ok, picked in zip(losses.tolist(), there.tolist(), chosen.tolist()):
        real = sorted((j for j in range(k1) if ok[j]), key=lambda j: -row[j])[:k2]
        assert picked[: len(real)] == real and len(set(picked)) == k2


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
    objective = gl.Glitter(setup, 4, k2, temperature)
    chosen = objective.choose(
        net, batch, Progress(), temperature=temperature, setup=setup
    )
    found, total, terms = (
        gl.glitter_loss(net, batch, chosen, setup, temperature, 0.5, 0.5),
        [],
        [],
    )
    for i, row in enumerate(data):
        own = net(torch.tensor([row["input_ids"]])).logits
        if setup == "kd":
            total.append(
                hinton_loss(
                    own,
                    torch.tensor([row["teacher_logits"]]),
                    torch.tensor([row["label"]]),
                    temperature,
                    0.5,
                )
            )
        else:
            total.append(
                torch.nn.functional.cross_entropy(own, torch.tensor([row["label"]]))
            )
        for j in chosen[i].tolist():
            if (length := row["pool_length"][j]) == 0:
                continue
            theirs = net(torch.tensor([row["pool_input_ids"][j][:length]])).logits
            terms.append(
                soft_target_loss(
                    theirs, torch.tensor([row["pool_teacher_logits"][j]]), temperature
                )
                if setup == "kd"
                else soft_target_loss(theirs / temperature, own)
            )
    expected = sum(total) / len(total) + 0.5 * (
        sum(terms) / len(terms) if terms else 0.0
    )
    torch.testing.assert_close(found.total, expected, atol=1e-4, rtol=1e-4)


def test_padding_more_changes_nothing():
    batch, net = batch_of(pooled()), bert()
    wide = batch | {
        "pool_input_ids": torch.nn.functional.pad(batch["pool_input_ids"], (0, 7))
    }
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
    flat, _ = gl.pool_inputs(batch, torch.arange(4).expand(8, -1))
    with torch.no_grad():
        batch |= {
            "teacher_logits": forward(net, batch),
            "pool_teacher_logits": forward(net, flat).view(8, 4, 2),
        }
    loss = gl.Glitter(setup, 4, 2, alpha=1.0)(net, batch, Progress()).total
    assert loss.abs() < 1e-5
    assert all(
        g.abs().max() < 1e-4
        for g in torch.autograd.grad(
            loss, [p for p in net.parameters()], allow_unused=True
        )
        if g is not None
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(0, 50),
    st.lists(st.sampled_from(["delete", "swap"]), min_size=1, max_size=3),
)
def test_pools_hold_different_variants_and_are_the_same_again(k, seed, ways):
    data = Dataset.from_dict(
        dict(
            text=[
                "A slow, sweet film.",
                "Dull!",
                "one two three four five six seven",
                "",
            ]
        )
    )
    first, again = (
        gl.make_pool(data, tuple(ways), k, seed, progress=False) for _ in range(2)
    )
    assert first[:] == again[:] and first["idx"][:] == [0, 1, 2, 3]
    for row in first:
        made = [
            text for text, way in zip(row["pool_text"], row["pool_way"]) if way >= 0
        ]
        assert (
            len(row["pool_text"]) == k
            and len({gl._key(t) for t in [row["text"], *made]}) == len(made) + 1
        )
    assert first[1]["pool_way"] == [-1] * k == first[3]["pool_way"]


def test_a_second_text_stays_as_it_is():
    from kdbook.models import student

    data = Dataset.from_dict(
        dict(
            text=["a man walks his dog", "it rains"],
            text_pair=["somebody is outside", "the sun is out"],
            label=[0, 1],
        )
    )
    net = student(1, 32)
    pool = gl.annotate_pool(
        gl.make_pool(data, ("delete", "swap"), 2, progress=False),
        net,
        cache=False,
        progress=False,
    )
    assert "pool_token_type_ids" in pool.column_names and torch.tensor(
        pool["pool_teacher_logits"]
    ).shape == (2, 2, 2)
    row = pool[0]
    tokens = net.tokenizer(row["pool_text"][0], row["text_pair"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(row["pool_teacher_logits"][0]),
            net(**tokens).logits[0],
            atol=1e-4,
            rtol=1e-4,
        )
    assert row["pool_length"][0] == tokens.input_ids.shape[1]


def test_the_filter_drops_copies_and_keeps_the_nearest():
    data = Dataset.from_dict(
        dict(idx=[0], pixel_values=[[1.0, 0.0, 0.0, 0.0]], label=[0])
    )
    from kdbook.models import image_net

    net = image_net((6,), 2, pixels=4)
    variants = [
        [1.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 1.0],
        [1.0, 1e-6, 0.0, 0.0],
        [0.5, 0.5, 0.0, 0.0],
    ]  # the third is new and yet the same
    pool = gl.make_pool(
        data, tuple(lambda x, rng, v=v: [v] for v in variants[1:]), k=3, progress=False
    )
    kept = gl.keep_closest(pool, net, k=2, progress=False)
    states = lambda x: net(torch.tensor(x)[None]).hidden_states[-1]
    away = [
        gl.angular_distance(states(x), states([1.0, 0.0, 0.0, 0.0])).item()
        for x in kept[0]["pool_pixel_values"]
    ]
    others = [
        gl.angular_distance(states(x), states([1.0, 0.0, 0.0, 0.0])).item()
        for x in pool[0]["pool_pixel_values"]
    ]
    assert away == sorted(away) == sorted(a for a in others if a >= 1e-3)[:2]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: gl.Glitter(k1=4, k2=5), "k2=5, k1=4"),
        (lambda: gl.Glitter(pick="best"), "best"),
        (lambda: gl.Glitter(temperature=0), "temperature=0"),
        (lambda: gl.Glitter(alpha=2), "alpha=2"),
        (lambda: gl.make_pool(rows(3), k=0), "k must be"),
        (lambda: gl.encode_pool(rows(3)), "make_pool"),
        (
            lambda: fit(bert(), gl.recipe(epochs=1), rows(8), progress=False),
            "pool_length",
        ),
        (
            lambda: fit(
                bert(), gl.recipe(epochs=1, k1=8), pooled(8, k=4), progress=False
            ),
            "k1=8",
        ),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_recipe_can_be_run_twice():
    made, data = (
        gl.recipe(k1=4, k2=1, epochs=3, lr=5e-3, batch_size=8, score_every=2),
        pooled(),
    )
    first, second = (fit(bert(), made, data, progress=False) for _ in range(2))
    assert first.history == second.history and same(
        first.student.state_dict(), second.student.state_dict()
    )

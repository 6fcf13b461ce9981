"""Scores and intervals: properties, naive references, and the promise of an interval.

Out-of-domain sets have their labels in order."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t
from torch import nn

from kdbook.data import load_task
from kdbook.evaluation import (
    OUT_OF_DOMAIN,
    Difference,
    accuracy,
    agreement,
    ece,
    evaluate,
    mcnemar,
    nll,
    out_of_domain,
    paired_difference,
    rater_gap,
    reliability,
    wilson_interval,
)
from kdbook.models import image_net, load_tokenizer
from kdbook.rows import predict_logits

quick = settings(max_examples=60, deadline=None)
shapes = st.tuples(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 30))


def answers(seed, seeds, rows, p=(0.7, 0.75)):
    "Two random (seeds, rows) arrays of right and wrong answers."
    rng = np.random.default_rng(seed)
    return (rng.random((seeds, rows)) < p[1]), (rng.random((seeds, rows)) < p[0])


def ends(d):
    return np.array([d.mean, d.low, d.high])


def right_or_wrong(ours, theirs):
    "On how many rows ours alone is right, and on how many theirs alone."
    return int((ours & ~theirs).sum()), int((theirs & ~ours).sum())


def naive_difference(ours, theirs, level=0.95):
    "The same interval, by plain loops over seeds and rows."
    seeds, rows = len(ours), len(ours[0])
    d = [
        [float(ours[s][r]) - float(theirs[s][r]) for r in range(rows)]
        for s in range(seeds)
    ]
    mean = sum(map(sum, d)) / (seeds * rows)
    by_seed = [sum(d[s]) / rows for s in range(seeds)]
    by_row = [sum(d[s][r] for s in range(seeds)) / seeds for r in range(rows)]
    v_seed = sum((m - mean) ** 2 for m in by_seed) / (seeds - 1) / seeds
    v_row = sum((m - mean) ** 2 for m in by_row) / (rows - 1) / rows
    rest = 0.0
    for s in range(seeds):
        for r in range(rows):
            rest += (d[s][r] - by_seed[s] - by_row[r] + mean) ** 2
    rest /= (seeds - 1) * (rows - 1) * seeds * rows
    variance = max(v_seed + v_row - rest, v_seed, v_row)
    if variance == 0:
        return mean, mean, mean
    freedom = max(1, variance**2 / (v_seed**2 / (seeds - 1) + v_row**2 / (rows - 1)))
    half = t.ppf(0.5 + level / 2, freedom) * math.sqrt(variance)
    return mean, mean - half, mean + half


@quick
@given(shapes)
def test_swapping_the_two_turns_the_interval_around(case):
    ours, theirs = answers(*case)
    forth = paired_difference(ours, theirs)
    back = paired_difference(theirs, ours)
    np.testing.assert_allclose(
        [forth.mean, forth.low, forth.high],
        [-back.mean, -back.high, -back.low],
        atol=1e-12,
    )
    assert forth.clear == back.clear


@quick
@given(shapes)
def test_order_of_rows_and_seeds_does_not_matter(case):
    ours, theirs = answers(*case)
    rng = np.random.default_rng(case[0] + 1)
    seeds, rows = rng.permutation(case[1]), rng.permutation(case[2])
    np.testing.assert_allclose(
        ends(paired_difference(ours[seeds][:, rows], theirs[seeds][:, rows])),
        ends(paired_difference(ours, theirs)),
        atol=1e-10,
    )


@quick
@given(shapes, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_agrees_with_plain_loops(case, level):
    ours, theirs = answers(*case)
    np.testing.assert_allclose(
        ends(paired_difference(ours, theirs, level)),
        naive_difference(ours, theirs, level),
        atol=1e-9,
    )


@quick
@given(shapes)
def test_a_higher_level_is_wider_and_the_middle_is_the_plain_gain(case):
    ours, theirs = answers(*case)
    narrow = paired_difference(ours, theirs, 0.8)
    wide = paired_difference(ours, theirs, 0.99)
    assert wide.low <= narrow.low <= narrow.mean <= narrow.high <= wide.high
    assert narrow.mean == pytest.approx(ours.mean() - theirs.mean())
    assert type(narrow.mean) is type(narrow.low) is type(narrow.high) is float


def test_the_same_answers_are_no_difference():
    ours, _ = answers(0, 5, 100)
    same = paired_difference(ours, ours)
    assert ends(same).tolist() == [0, 0, 0] and not same.clear
    assert not Difference(0.01, 0.0, 0.02).clear


@pytest.mark.parametrize(
    "shape, other",
    [
        ((5, 9), (4, 9)),
        ((1, 9), (1, 9)),
        ((5, 1), (5, 1)),
        ((9,), (9,)),
        ((2, 2, 2), (2, 2, 2)),
    ],
)
def test_wrong_shapes_are_named(shape, other):
    with pytest.raises(ValueError, match="at least 2 x 2"):
        paired_difference(np.zeros(shape), np.zeros(other))


def simulate(seeds, rows, parts, times, rng):
    """Shares of experiments whose interval holds the true mean, 0.01.

    Three intervals: ours, seeds only, rows only; `parts` are the standard deviations
    of a variance-components model."""
    hits = np.zeros(3)
    of_seed, of_row, of_rest = parts
    for _ in range(times):
        d = (
            0.01
            + of_seed * rng.standard_normal((seeds, 1))
            + of_row * rng.standard_normal((1, rows))
            + of_rest * rng.standard_normal((seeds, rows))
        )
        ours = paired_difference(d, np.zeros_like(d))
        off = abs(d.mean() - 0.01)
        hits += [
            ours.low <= 0.01 <= ours.high,
            off <= t.ppf(0.975, seeds - 1) * d.mean(1).std(ddof=1) / seeds**0.5,
            off <= t.ppf(0.975, rows - 1) * d.mean(0).std(ddof=1) / rows**0.5,
        ]
    return hits / times


# standard deviations of seeds, rows and the rest, and which one-sided intervals must
# then be too narrow
@pytest.mark.parametrize(
    "parts, narrow",
    [
        ((0.0, 0.0, 0.5), ()),  # only noise
        ((0.002, 0.4, 0.2), ("seeds",)),  # rows dominate
        ((0.05, 0.1, 0.2), ("rows",)),  # seeds dominate
        ((0.04, 0.25, 0.3), ("seeds", "rows")),  # of one size
    ],
    ids=["noise", "rows", "seeds", "mixed"],
)
def test_covers_what_it_promises(parts, narrow):
    """Bounds are wide: 500 experiments have a standard error of one point.

    And Satterthwaite's rule is an approximation."""
    both, seeds, rows = simulate(5, 200, parts, 500, np.random.default_rng(0))
    assert both >= 0.915
    if "seeds" in narrow:
        assert seeds < 0.93 and seeds < both
    if "rows" in narrow:
        assert rows < 0.93 and rows < both


def test_covers_with_real_answers_of_zero_and_one():
    "Margins above zero, as in the chapter; equal methods, so the truth is 0."
    rng = np.random.default_rng(1)
    hits, times = 0, 300
    for _ in range(times):
        row = rng.standard_normal((1, 300)) + 0.8
        side = lambda: (
            row
            + 0.4 * rng.standard_normal((1, 300))
            + 0.06 * rng.standard_normal((5, 1))
            + 0.5 * rng.standard_normal((5, 300))
            > 0
        )
        hits += not paired_difference(side(), side()).clear
    assert 0.91 <= hits / times <= 1


@quick
@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson(right, rows):
    right = min(right, rows)
    low, high = wilson_interval(right, rows)
    assert 0 <= low <= right / rows + 1e-12 and right / rows - 1e-12 <= high <= 1
    np.testing.assert_allclose(
        wilson_interval(rows - right, rows), (1 - high, 1 - low), atol=1e-9
    )
    for p in (low, high):
        assert (right / rows - p) ** 2 == pytest.approx(
            1.959963985**2 * p * (1 - p) / rows, abs=1e-8
        )


@quick
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 5), st.integers(1, 15))
def test_ece_against_a_loop(seed, rows, classes, bins):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=g)
    labels = torch.randint(classes, (rows,), generator=g)
    gaps = [0.0] * bins  # right answers less confidence, summed over the rows of a bin
    for p, label in zip(logits.softmax(-1), labels):
        bin_of = min(int(p.max() * bins), bins - 1)
        gaps[bin_of] += float(p.argmax() == label) - float(p.max())
    total = sum(abs(gap) for gap in gaps)
    assert ece(logits, labels, bins) == pytest.approx(total / rows, abs=1e-5)
    order = torch.randperm(rows, generator=g)
    assert ece(logits[order], labels[order], bins) == pytest.approx(
        ece(logits, labels, bins), abs=1e-5
    )


def test_scores_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    labels = torch.tensor([0, 0, 0])
    assert accuracy(logits, labels) == pytest.approx(2 / 3)
    assert nll(torch.zeros(4, 8), torch.arange(4)) == pytest.approx(
        math.log(8), abs=1e-6
    )
    assert agreement(logits, -logits) == 0
    with pytest.raises(ValueError, match="2 labels"):
        accuracy(logits, labels[:2])
    with pytest.raises(ValueError, match="bins"):
        ece(logits, labels, 0)


def test_evaluate_scores_every_split_but_train():
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    split = lambda n: datasets.Dataset.from_dict(
        dict(
            pixel_values=rng.random((n, 64)).tolist(),
            label=rng.integers(0, 10, n).tolist(),
        )
    )
    task = datasets.DatasetDict(train=split(4), validation=split(30), test=split(50))
    net = image_net(hidden=4, seed=0)
    table = evaluate(net, task)
    assert list(table.index) == ["validation", "test"]
    assert list(table.rows) == [30, 50]
    labels = torch.tensor(task["test"]["label"])
    guess = predict_logits(net, task["test"], progress=False).argmax(-1)
    right = int((guess == labels).sum())
    assert table.loc["test", "accuracy"] == pytest.approx(right / 50)
    assert (table.loc["test", "low"], table.loc["test", "high"]) == pytest.approx(
        wilson_interval(right, 50)
    )


# -- two students that are given -------------------------------------------------------


@quick
@given(st.integers(0, 10**6), st.integers(1, 200))
def test_mcnemar_against_coins_counted(seed, rows):
    "The p-value is the chance that a fair coin is at least as one-sided."
    (ours,), (theirs,) = (a[:1] for a in answers(seed, 2, rows))
    won, lost = right_or_wrong(ours, theirs)
    n = won + lost
    one_sided = lambda k: abs(k - n / 2) >= abs(won - n / 2)
    naive = sum(math.comb(n, k) for k in range(n + 1) if one_sided(k)) / 2**n
    assert mcnemar(ours, theirs) == pytest.approx(naive) == mcnemar(theirs, ours)


@quick
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 12))
def test_reliability_against_a_loop(seed, rows, bins):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 3, generator=g) * 3
    labels = torch.randint(0, 3, (rows,), generator=g)
    naive = [[] for _ in range(bins)]
    for z, y in zip(logits, labels):
        p = z.softmax(-1)
        naive[min(bins - 1, int(p.max() * bins))].append(
            (p.max().item(), float(p.argmax() == y))
        )
    table = reliability(logits, labels, bins).tolist()
    for (n, confidence, right), members in zip(table, naive):
        assert n == len(members)
        if members:
            mean_confidence = sum(c for c, _ in members) / n
            assert confidence == pytest.approx(mean_confidence, abs=1e-5)
            assert right == pytest.approx(sum(r for _, r in members) / n)
    gaps = sum(abs(sum(c - r for c, r in members)) for members in naive) / rows
    assert ece(logits, labels, bins) == pytest.approx(gaps, abs=1e-5)


def test_the_raters_gap_against_a_loop():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 2, generator=g)
    shares = torch.rand(20, 3, generator=g).softmax(-1)
    shares[0] = torch.tensor([0.0, 0.0, 1.0])
    naive = 0.0
    for z, (low, zero, high) in zip(logits, shares.tolist()):
        people = (low + zero / 2, high + zero / 2)
        model = z.softmax(-1).tolist()
        naive += sum(p * math.log(p / q) for p, q in zip(people, model) if p > 0)
    assert rater_gap(logits, shares) == pytest.approx(naive / 20, abs=1e-4)
    assert rater_gap(logits, shares) >= 0


# -- other domains ---------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("task", OUT_OF_DOMAIN)
def test_out_of_domain_sets_ask_the_same_question(task):
    "The same classes in the same order, under whatever name; and rows with text."
    alike = {
        "neg": "negative",
        "pos": "positive",
        "not_equivalent": "no",
        "not_duplicate": "no",
        "not_paraphrase": "no",
        "equivalent": "yes",
        "duplicate": "yes",
        "paraphrase": "yes",
    }
    names = lambda rows: [alike.get(n, n) for n in rows.features["label"].names]
    home = names(load_task(task)["validation"])
    others = out_of_domain(task)
    assert tuple(others) == OUT_OF_DOMAIN[task]
    for name, rows in others.items():
        assert names(rows) == home, name
        assert len(rows) > 50
        assert set(rows["label"]) <= set(range(len(home)))
        assert "text" in rows.column_names


class Bag(nn.Module):
    "Adds up random weights of words."

    def __init__(self):
        super().__init__()
        self.tokenizer = load_tokenizer()
        g = torch.Generator().manual_seed(0)
        weights = torch.randn(len(self.tokenizer.get_vocab()), generator=g)
        self.weight = nn.Parameter(weights, requires_grad=False)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        score = (self.weight[input_ids] * attention_mask).sum(1)
        return torch.stack([-score, score], 1)


@pytest.mark.data
def test_a_model_that_reads_only_the_label_words_scores_everywhere():
    "`evaluate` takes what `out_of_domain` gives."
    scores = evaluate(Bag(), out_of_domain("mrpc"))
    assert (
        list(scores.index) == list(OUT_OF_DOMAIN["mrpc"])
        and (scores.accuracy > 0).all()
    )

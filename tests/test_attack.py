"""The attack: what it may do, what it counts, and victims whose weak word is known. Out-of-domain sets have their labels in order."""

import os

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdbook import evaluation as ev
from kdbook.models import load_tokenizer
from kdbook.words import Leaning, nearest_words, pieces_of, same_kind, sentence_vectors

TOKENIZER = load_tokenizer()
WORDS = [
    "wonderful",
    "dreadful",
    "film",
    "director",
    "story",
    "slow",
    "quiet",
    "tale",
    "the",
    "of",
    "and",
    "two",
]
SENTENCES = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join),
    min_size=1,
    max_size=5,
)


class Bag(nn.Module):
    "Adds up the weights of words: a model that can be worked out by hand."

    def __init__(self, seed=0, scale=2.0):
        super().__init__()
        self.tokenizer = TOKENIZER
        self.weight = nn.Parameter(
            torch.randn(
                len(TOKENIZER.get_vocab()),
                generator=torch.Generator().manual_seed(seed),
            )
            * scale,
            requires_grad=False,
        )

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        score = (self.weight[input_ids] * attention_mask).sum(1)
        return torch.stack([-score, score], 1)


def answers(model, texts):
    return ev._Victim(model)(list(texts), [None] * len(texts)).argmax(-1).tolist()


def own_labels(model, texts):
    return Dataset.from_dict(dict(text=list(texts), label=answers(model, texts)))


@settings(max_examples=25, deadline=None)
@given(
    SENTENCES, st.integers(0, 50), st.integers(1, 60), st.sampled_from([-1.0, 0.5, 0.9])
)
def test_what_an_attack_may_do_and_says_of_itself(texts, seed, budget, similarity):
    model = Bag(seed)
    found = ev.attack(
        model,
        own_labels(model, texts),
        max_queries=budget,
        similarity=similarity,
        cache=False,
        progress=False,
    )
    assert answers(model, [r["attacked"] for r in found.rows]) == [
        r["after"] for r in found.rows
    ]
    for text, row in zip(texts, found.rows):
        old, new = pieces_of(text), pieces_of(row["attacked"])
        assert (
            row["text"] == text
            and row["before"] == row["label"]
            and row["queries"] <= budget
        )
        assert [
            (i, a, b) for i, (a, b) in enumerate(zip(old, new)) if a != b
        ] == sorted(map(tuple, row["changed"])) and len(old) == len(new)
        for _, a, b in row["changed"]:
            assert same_kind(a, b) and b in [w for w, _ in nearest_words()(a, 50)]
        if row["changed"]:
            assert (
                float(
                    (
                        sentence_vectors([text])[0]
                        * sentence_vectors([row["attacked"]])[0]
                    ).sum()
                )
                >= similarity - 1e-4
            )
    assert found.under_attack == pytest.approx(1 - found.success_rate)


def test_a_larger_budget_or_a_looser_rule_never_saves_a_sentence():
    model = Bag(3)
    data = own_labels(
        model,
        [
            "the wonderful director and the slow story of two quiet tale",
            "dreadful film",
            "quiet wonderful slow director",
        ]
        * 3,
    )
    stands = lambda **how: (
        ev.attack(model, data, cache=False, progress=False, **how).under_attack
    )
    assert stands(max_queries=5) >= stands(max_queries=30) >= stands(max_queries=200)
    assert stands(allow=lambda a, b: False) == 1.0


def test_wrong_answers_are_not_attacked_and_cost_one_query():
    model, texts = Bag(1), ["wonderful film", "slow story"]
    data = Dataset.from_dict(
        dict(text=texts, label=[1 - a for a in answers(model, texts)])
    )
    found = ev.attack(model, data, cache=False, progress=False)
    assert found.accuracy == 0 and all(
        r["queries"] == 1 and r["attacked"] == r["text"] for r in found.rows
    )
    assert (
        found.success_rate != found.success_rate
    )  # nothing was tried: not a number, and no zero


def test_the_second_text_stays_and_counts():
    class Pair(Bag):
        def forward(self, input_ids, attention_mask, token_type_ids):
            return super().forward(input_ids, attention_mask)

    model = Pair(2)
    data = Dataset.from_dict(
        dict(
            text=["wonderful director"] * 2,
            text_pair=["slow story", "quiet film"],
            label=[0, 1],
        )
    )
    labels = (
        ev._Victim(model)(data["text"][:], data["text_pair"][:]).argmax(-1).tolist()
    )
    found = ev.attack(
        model,
        data.remove_columns("label").add_column("label", labels),
        similarity=-1.0,
        cache=False,
        progress=False,
    )
    after = (
        ev._Victim(model)([r["attacked"] for r in found.rows], data["text_pair"][:])
        .argmax(-1)
        .tolist()
    )
    assert after == [r["after"] for r in found.rows]


def test_the_cache_knows_model_rows_and_rules(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path))
    nearest_words()
    sentence_vectors(["warm"])  # with the usual cache
    model, data = Bag(1), own_labels(Bag(1), ["wonderful film", "slow story"])
    files = lambda: (
        len(list((tmp_path / "attacks").glob("*.json")))
        if (tmp_path / "attacks").exists()
        else 0
    )
    calls = []
    real = ev._attacked
    monkeypatch.setattr(ev, "_attacked", lambda *a: calls.append(1) or real(*a))
    attack = lambda m=model, d=data, **how: ev.attack(m, d, progress=False, **how)
    first = attack()
    assert (
        attack().rows
        == [{**r, "changed": [list(c) for c in r["changed"]]} for r in first.rows]
        and len(calls) == 1 == files()
    )
    attack(similarity=0.8)
    attack(m=Bag(2))
    attack(d=data.select([0]))
    attack(allow=Leaning(["good"], [0]))
    attack(allow=Leaning(["bad"], [0]))
    assert len(calls) == 6 == files()
    attack(allow=lambda a, b: True)
    attack(allow=lambda a, b: False)  # a function prints an address: not kept
    assert len(calls) == 8 and files() == 6


def test_text_is_escaped_where_it_is_shown():
    row = dict(
        text="a <b>good</b> film", changed=[(4, "good", "<i>fine")], before=1, after=0
    )
    shown = ev.show_changes([row])
    assert "<b>" not in shown and "<i>" not in shown and "&lt;i&gt;fine" in shown


def test_the_raters_gap_against_a_loop():
    g = torch.Generator().manual_seed(0)
    logits, shares = (
        torch.randn(20, 2, generator=g),
        torch.rand(20, 3, generator=g).softmax(-1),
    )
    shares[0] = torch.tensor([0.0, 0.0, 1.0])
    naive = 0.0
    for z, (low, zero, high) in zip(logits.tolist(), shares.tolist()):
        people, model = (
            (low + zero / 2, high + zero / 2),
            torch.tensor(z).softmax(-1).tolist(),
        )
        naive += sum(
            p * torch.log(torch.tensor(p / q)).item()
            for p, q in zip(people, model)
            if p > 0
        )
    assert ev.rater_gap(logits, shares) == pytest.approx(naive / 20, abs=1e-4)
    assert ev.rater_gap(logits, shares) >= 0


@pytest.mark.data
@pytest.mark.parametrize("task", ev.OUT_OF_DOMAIN)
def test_out_of_domain_sets_ask_the_same_question(task):
    "The same classes in the same order, under whatever name; and rows with text."
    from kdbook.data import load_task

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
    found = ev.out_of_domain(task)
    assert tuple(found) == ev.OUT_OF_DOMAIN[task]
    for name, rows in found.items():
        assert names(rows) == home, name
        assert (
            len(rows) > 50
            and set(rows["label"]) <= set(range(len(home)))
            and "text" in rows.column_names
        )


@pytest.mark.data
def test_a_model_that_reads_only_the_label_words_scores_everywhere():
    "`evaluate` takes what `out_of_domain` gives."
    scores = ev.evaluate(Bag(), ev.out_of_domain("mrpc"))
    assert (
        list(scores.index) == list(ev.OUT_OF_DOMAIN["mrpc"])
        and (scores.accuracy > 0).all()
    )

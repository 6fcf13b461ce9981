"The attack: what it may do, what it counts, and victims whose weak word is known."

import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdbook import evaluation
from kdbook.attack import Attacked, attack, show_changes
from kdbook.models import load_tokenizer
from kdbook.rows import predict_logits
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
        self.asked = 0  # forward passes
        g = torch.Generator().manual_seed(seed)
        weights = torch.randn(len(TOKENIZER.get_vocab()), generator=g)
        self.weight = nn.Parameter(weights * scale, requires_grad=False)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        self.asked += 1
        score = (self.weight[input_ids] * attention_mask).sum(1)
        return torch.stack([-score, score], 1)


def answers(model, texts, pairs=None):
    columns = dict(text=list(texts), **(dict(text_pair=list(pairs)) if pairs else {}))
    rows = Dataset.from_dict(columns)
    return predict_logits(model, rows, progress=False).argmax(-1).tolist()


def own_labels(model, texts):
    return Dataset.from_dict(dict(text=list(texts), label=answers(model, texts)))


@settings(max_examples=25, deadline=None)
@given(
    SENTENCES, st.integers(0, 50), st.integers(1, 60), st.sampled_from([-1.0, 0.5, 0.9])
)
def test_what_an_attack_may_do_and_says_of_itself(texts, seed, budget, similarity):
    model = Bag(seed)
    outcome = attack(
        model,
        own_labels(model, texts),
        max_queries=budget,
        similarity=similarity,
        cache=False,
        progress=False,
    )
    after = [row["after"] for row in outcome.rows]
    assert answers(model, [row["attacked"] for row in outcome.rows]) == after
    for text, row in zip(texts, outcome.rows):
        assert row["text"] == text
        assert row["before"] == row["label"]
        assert row["queries"] <= budget
        old, new = pieces_of(text), pieces_of(row["attacked"])
        assert len(old) == len(new)
        changed = [(i, a, b) for i, (a, b) in enumerate(zip(old, new)) if a != b]
        assert changed == sorted(map(tuple, row["changed"]))
        for _, a, b in row["changed"]:
            assert same_kind(a, b)
            assert b in [word for word, _ in nearest_words()(a, 50)]
    changed_rows = [row for row in outcome.rows if row["changed"]]
    if changed_rows:
        old_vectors = sentence_vectors([row["text"] for row in changed_rows])
        new_vectors = sentence_vectors([row["attacked"] for row in changed_rows])
        assert ((old_vectors * new_vectors).sum(-1) >= similarity - 1e-4).all()
    assert outcome.under_attack == pytest.approx(1 - outcome.success_rate)


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
    stands = lambda **rules: (
        attack(model, data, cache=False, progress=False, **rules).under_attack
    )
    assert stands(max_queries=5) >= stands(max_queries=30) >= stands(max_queries=200)
    assert stands(allow=lambda a, b: False) == 1.0


def test_wrong_answers_are_not_attacked_and_cost_one_query():
    model = Bag(1)
    texts = ["wonderful film", "slow story"]
    wrong = [1 - answer for answer in answers(model, texts)]
    data = Dataset.from_dict(dict(text=texts, label=wrong))
    outcome = attack(model, data, cache=False, progress=False)
    assert outcome.accuracy == 0
    for row in outcome.rows:
        assert row["queries"] == 1
        assert row["attacked"] == row["text"]
    assert math.isnan(outcome.success_rate), "nothing was tried: no number, and no zero"


def test_the_second_text_stays_and_counts():
    class Pair(Bag):
        def forward(self, input_ids, attention_mask, token_type_ids):
            return super().forward(input_ids, attention_mask)

    model = Pair(2)
    texts = ["wonderful director"] * 2
    pairs = ["slow story", "quiet film"]
    labels = answers(model, texts, pairs)
    data = Dataset.from_dict(dict(text=texts, text_pair=pairs, label=labels))
    outcome = attack(model, data, similarity=-1.0, cache=False, progress=False)
    attacked = [row["attacked"] for row in outcome.rows]
    assert answers(model, attacked, pairs) == [row["after"] for row in outcome.rows]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    "A cache of its own; what the attack reads besides is loaded from the usual one."
    nearest_words()
    sentence_vectors(["warm"])
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_knows_model_rows_and_rules(empty_cache):
    model, other = Bag(1), Bag(2)
    data = own_labels(Bag(1), ["wonderful film", "slow story"])
    files = lambda: len(list((empty_cache / "attacks").glob("*.json")))

    def asks(model=model, data=data, **rules):
        "Whether the model is asked anything."
        before = model.asked
        attack(model, data, progress=False, **rules)
        return model.asked > before

    first = attack(model, data, cache=False, progress=False)
    assert asks() and files() == 1
    assert not asks() and files() == 1
    kept = [{**r, "changed": [list(c) for c in r["changed"]]} for r in first.rows]
    assert attack(model, data, progress=False).rows == kept
    assert asks(similarity=0.8)
    assert asks(model=other)
    assert asks(data=data.select([0]))
    assert asks(allow=Leaning(["good"], [0]))
    assert asks(allow=Leaning(["bad"], [0]))
    assert files() == 6
    for _ in range(2):  # a function is known by what it does
        asks(allow=lambda a, b: True)
        asks(allow=lambda a, b: False)
    assert files() == 8


def test_an_outcome_that_cannot_be_kept_is_still_given(empty_cache):
    empty_cache.mkdir()
    (empty_cache / "attacks").touch()  # a file where the folder should be
    model = Bag(1)
    data = own_labels(model, ["wonderful film"])
    with pytest.warns(UserWarning, match="cannot be written"):
        outcome = attack(model, data, progress=False)
    assert outcome.rows == attack(model, data, cache=False, progress=False).rows


def test_the_evaluation_module_hands_the_names_on():
    assert evaluation.attack is attack
    assert evaluation.Attacked is Attacked
    assert evaluation.show_changes is show_changes


def test_text_is_escaped_where_it_is_shown():
    row = dict(
        text="a <b>good</b> film", changed=[(4, "good", "<i>fine")], before=1, after=0
    )
    shown = show_changes([row])
    assert "<b>" not in shown and "<i>" not in shown and "&lt;i&gt;fine" in shown

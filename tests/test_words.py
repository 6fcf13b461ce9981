"Changing sentences: the pieces of any text fit together; an edit does what it says."

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import TOKENIZER, generator, rows

from kdbook import words as w
from kdbook.data import load_task
from kdbook.rows import Rows
from kdbook.training import Progress, settings_of

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
SENTENCE = st.lists(
    st.sampled_from(
        ["good", "film", "A", "it's", "well-made", "slow", "42", "wonderful", "Boring"]
    ),
    min_size=1,
    max_size=12,
).map(" ".join)


def words_of(text):
    return [p for p in w.pieces_of(text) if p[0].isalpha()]


@settings(max_examples=300, deadline=None)
@given(ANY)
def test_pieces_are_the_text(text):
    pieces = w.pieces_of(text)
    assert "".join(pieces) == text
    assert all(pieces[i][0].isalpha() for i in w.word_places(pieces))


@settings(max_examples=150, deadline=None)
@given(SENTENCE, st.integers(0, 99), st.floats(0.05, 1))
def test_deleting_takes_words_and_nothing_else(text, seed, share):
    left = Counter(words_of(w.delete_words([text], random.Random(seed), share)[0]))
    before = Counter(words_of(text))
    assert not left - before
    words, gone = before.total(), (before - left).total()
    if words < 2:
        assert gone == 0
    else:
        assert 1 <= gone < words
        assert gone <= max(1, round(share * words))


@settings(max_examples=150, deadline=None)
@given(SENTENCE, st.integers(0, 99))
def test_swapping_keeps_every_piece(text, seed):
    swapped = w.swap_words([text], random.Random(seed))[0]
    assert Counter(w.pieces_of(swapped)) == Counter(w.pieces_of(text))


@settings(max_examples=60, deadline=None)
@given(SENTENCE, st.integers(0, 99), st.sampled_from([0.15, 0.5, 1.0]))
def test_replacing_uses_allowed_neighbours_only(text, seed, share):
    new = w.pieces_of(w.replace_words([text], random.Random(seed), share)[0])
    old = w.pieces_of(text)
    assert len(new) == len(old)
    for a, b in zip(old, new):
        if a != b:
            assert w.same_kind(a, b)
            assert b.lower() in [word for word, _ in w.nearest_words()(a, 10)]
            assert b[0].isupper() == a[0].isupper()


def test_neighbours_against_a_plain_search():
    near = w.nearest_words()
    for word in random.Random(0).sample(near.words, 20):
        scores = (near.table @ near.table[near.place[word]]).tolist()
        pairs = [(s, v) for v, s in zip(near.words, scores) if v != word]
        naive = sorted((p for p in pairs if p[0] >= near.min_similarity), reverse=True)[
            :5
        ]
        assert [v for v, _ in near(word, 5)] == [v for _, v in naive]
        assert near(word.upper(), 5) == near(word, 5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(SENTENCE, st.integers(0, 2)), min_size=3, max_size=20))
def test_leanings_sum_to_zero_and_refuse_symmetrically(labelled):
    labelled = [*labelled, ("film", 0), ("film", 1), ("film", 2)]
    leaning = w.Leaning(*zip(*labelled))
    for word in ("good", "film", "nowhere"):
        assert leaning.of(word).sum().abs() < 1e-5
    for a, b in (("good", "film"), ("wonderful", "film"), ("slow", "film")):
        assert leaning(a, b) == leaning(b, a)


def test_a_leaning_without_a_row_of_a_class_is_no_nan():
    leaning = w.Leaning(["good", "fine"], [2, 0])
    assert leaning.classes == 3
    assert not any(v.isnan().any() for v in leaning.by_word.values())


def test_two_leanings_have_two_names_and_one_has_one():
    a = w.Leaning(["good", "bad"], [1, 0])
    b = w.Leaning(["good", "bad"], [0, 1])
    again = w.Leaning(["good", "bad"], [1, 0])
    assert repr(a) == repr(again) != repr(b)
    assert " at 0x" not in repr(a)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_special_tokens_are_never_covered(rate, seed):
    batch = Rows(rows(12, seed)).batch(list(range(12)))
    ids = batch["input_ids"]
    torch.manual_seed(seed)
    covered, where = w.mask_tokens(ids, batch["attention_mask"], TOKENIZER, rate)
    special = torch.isin(ids, torch.tensor(TOKENIZER.all_special_ids))
    assert not (where & special).any()
    assert (covered[where] == 3).all()
    assert torch.equal(covered[~where], ids[~where])


def test_a_smaller_vocabulary_gives_columns_of_the_whole():
    vocabulary = torch.tensor([4, 7, 31])
    batch = Rows(rows(6)).batch(list(range(6)))
    whole, few = generator(), generator(vocabulary=vocabulary)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    where = ids > 3
    with torch.no_grad():
        torch.testing.assert_close(
            few(ids, mask, where), whole(ids, mask, where)[:, vocabulary]
        )
    loss = w.MaskedLM(1.0)(few, batch, Progress()).total
    loss.backward()
    assert few.model.get_input_embeddings().weight.grad is None and torch.isfinite(loss)


def test_other_output_layers_work_too():
    "A masked language model that is no BERT: its whole output, at the holes."
    import transformers

    config = transformers.DistilBertConfig(
        vocab_size=40,
        dim=16,
        n_layers=1,
        n_heads=2,
        hidden_dim=32,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    bare = transformers.DistilBertForMaskedLM(config)
    model = w.MaskedGenerator(bare, TOKENIZER).eval()
    ids = torch.randint(4, 40, (3, 8))
    where = torch.rand(3, 8) < 0.5
    with torch.no_grad():
        logits = model(ids, torch.ones_like(ids), where)
        torch.testing.assert_close(logits, bare(ids).logits[where])


def test_filling_is_asked_for_only_what_it_can_do():
    with pytest.raises(ValueError, match="generator"):
        w.fill_words(["a good film"], random.Random(0))
    with pytest.raises(ValueError, match="share"):
        w.delete_words(["a good film"], random.Random(0), share=1.5)


def test_a_masked_objective_says_its_rate():
    assert settings_of(w.MaskedLM()) == {"name": "MaskedLM", "rate": 0.3}


def test_filling_keeps_what_is_beyond_the_longest_text():
    warm = w.warm_up(
        w.masked_generator(),
        load_task("movies")["train"].select(range(64)),
        progress=False,
    )
    long = " ".join(["film"] * 120)
    filled = w.fill_words([long, "Dull."], random.Random(0), warm)
    assert len(w.pieces_of(filled[0])) == len(w.pieces_of(long))
    assert filled[1] == "Dull."


def test_a_warm_up_is_read_back_from_the_cache(monkeypatch):
    data = load_task("movies")["train"].select(range(64))
    first = w.warm_up(w.masked_generator(), data, progress=False)
    monkeypatch.setattr(w, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = w.warm_up(w.masked_generator(), data, progress=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values())
    )
    assert len(first.vocabulary) < 2000


def test_a_warm_up_that_cannot_be_kept_is_still_given(monkeypatch):
    data = load_task("movies")["train"].select(range(64))

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(w, "save_tensors", full)
    monkeypatch.setattr(
        w, "fit", lambda model, *args, **how: type("Run", (), {"student": model})
    )
    with pytest.warns(UserWarning, match="no space left"):
        warm = w.warm_up(w.masked_generator(), data, seed=77, progress=False)
    assert isinstance(warm, w.MaskedGenerator) and not warm.training

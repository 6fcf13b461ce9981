"""Universal-KD: heads on any model, attention, and both losses against loops."""

import pytest
import torch
import torch.nn.functional as F
from helpers import changed, doubtful_images
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook.distillation import annotate
from kdbook.files import fingerprint
from kdbook.models import cnn_student, image_net, lstm_student
from kdbook.rows import Rows, predict_logits
from kdbook.training import CrossEntropy, Recipe, Stage, fit
from kdbook.universal_kd import (
    HiddenKD,
    PseudoClassifiers,
    UniversalKD,
    attend,
    cg_loss,
    il_loss,
    recipe,
    train_heads,
)

FAST = settings(max_examples=60, deadline=None)
EXAMPLE = {"pixel_values": torch.zeros(1, 16)}
SIZES = st.tuples(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(2, 5),
    st.integers(0, 10**6),
)


def answers(sizes):
    "What student layers and teacher layers say, drawn from a seed."
    batch, student_layers, teacher_layers, classes, seed = sizes
    g = torch.Generator().manual_seed(seed)
    draw = lambda layers: (
        2 * torch.randn(batch, layers, classes, generator=g, dtype=torch.float64)
    )
    return draw(student_layers), draw(teacher_layers)


def bare_net(hidden=(8, 8, 8), seed=0, num_labels=4):
    return image_net(hidden, num_labels=num_labels, pixels=16, seed=seed)


def net(hidden=(8, 8, 8), seed=0):
    return PseudoClassifiers(bare_net(hidden, seed), example=EXAMPLE)


def written(seed=3):
    teacher = train_heads(net((8, 8, 8, 8), seed), doubtful_images(), progress=False)
    return annotate(doubtful_images(), teacher, cache=False, progress=False)


def kl(p, q):
    return (F.softmax(p, -1) * (F.log_softmax(p, -1) - F.log_softmax(q, -1))).sum(-1)


@FAST
@given(SIZES, st.booleans())
def test_both_mixtures_against_a_loop(sizes, centre):
    s, t = answers(sizes)
    centred = (lambda u: u - u.mean()) if centre else (lambda u: u)
    by_logits = by_losses = 0.0
    for row, teacher_row in zip(s, t):
        for own in row:
            scores = [centred(own) @ centred(other) for other in teacher_row]
            share = torch.stack(scores).softmax(0)
            mixed = (share[:, None] * teacher_row).sum(0)
            by_logits += kl(mixed, own) / len(s)
            losses = torch.stack([kl(other, own) for other in teacher_row])
            by_losses += (share * losses).sum() / len(s)
    torch.testing.assert_close(il_loss(s, t, centre=centre), by_logits)
    torch.testing.assert_close(il_loss(s, t, centre=centre, mix="losses"), by_losses)


@FAST
@given(SIZES, st.floats(-5, 5))
def test_what_does_not_matter(sizes, shift):
    "The order of the teacher's layers, copies of the batch; centred: constants."
    s, t = answers(sizes)
    g = torch.Generator().manual_seed(sizes[-1])
    order = torch.randperm(t.shape[1], generator=g)
    plain = il_loss(s, t)
    centred = il_loss(s, t, centre=True)
    torch.testing.assert_close(il_loss(s, t[:, order]), plain)
    torch.testing.assert_close(il_loss(torch.cat([s, s]), torch.cat([t, t])), plain)
    torch.testing.assert_close(il_loss(s + shift, t, centre=True), centred)
    moved = torch.cat([t[:, :1] + shift, t[:, 1:]], 1)
    share = attend(s, t, centre=True)[0]
    torch.testing.assert_close(attend(s, moved, centre=True)[0], share)


@pytest.mark.parametrize("mix", ["logits", "losses"])
@pytest.mark.parametrize("detach", [False, True])
def test_gradients(mix, detach):
    "Against finite differences; detached, against attention that is held fixed."
    s, t = answers((2, 2, 3, 3, 5))
    s.requires_grad_()
    if not detach:
        assert torch.autograd.gradcheck(lambda s: il_loss(s, t, mix=mix), (s,))
        return
    share = attend(s.detach(), t)[0]

    if mix == "logits":
        fixed = kl(share @ t, s).sum(1).mean()
    else:
        losses = [kl(layer.expand_as(s), s) for layer in t.split(1, 1)]
        fixed = (share * torch.stack(losses, -1)).sum((1, 2)).mean()
    slope = lambda loss: torch.autograd.grad(loss, s)[0]
    detached = slope(il_loss(s, t, detach=True, mix=mix))
    torch.testing.assert_close(detached, slope(fixed))
    assert not torch.allclose(detached, slope(il_loss(s, t, mix=mix)))


def test_capacity_gap_is_one_more_student_layer():
    s, t = answers((3, 1, 4, 3, 0))
    torch.testing.assert_close(cg_loss(s[:, 0], t[:, :3], t[:, 3]), il_loss(s, t))


def hugging_face_config(kind):
    import transformers as hf

    if kind == "distilbert":
        return hf.DistilBertConfig(
            vocab_size=50, dim=16, n_layers=4, n_heads=2, hidden_dim=32, num_labels=3
        )
    make = {"bert": hf.BertConfig, "roberta": hf.RobertaConfig}[kind]
    return make(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("pool", ["first", "mean"])
def test_hugging_face_models(kind, pool):
    "Heads read states 1 to N - 1; padding changes nothing; the model's output stays."
    from transformers import AutoModelForSequenceClassification

    config = hugging_face_config(kind)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    heads = PseudoClassifiers(model, pool=pool)
    assert heads.layers == (1, 2, 3) and not model.training
    ids = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 6, dtype=torch.long)
    out = heads(input_ids=ids, attention_mask=mask)
    states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    torch.testing.assert_close(out.logits, states.logits)
    second = states.hidden_states[2]
    pooled = second[:, 0] if pool == "first" else second.mean(1)
    torch.testing.assert_close(out.pooled[1], pooled)
    longer = heads(
        input_ids=F.pad(ids, (0, 3), value=1), attention_mask=F.pad(mask, (0, 3))
    )
    torch.testing.assert_close(
        longer.pseudo_logits, out.pseudo_logits, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    "make", [lambda: lstm_student(hidden=16, layers=3), lambda: cnn_student(filters=8)]
)
def test_text_students_learn_from_a_teacher_of_another_kind(make):
    "Every weight but the embeddings moves under the layers' loss, without projections."
    from kdbook.data import load_task

    rows = annotate(load_task("movies")["train"].select(range(40)), "minilm-movies")
    student = PseudoClassifiers(make())
    recipe_ = Recipe((Stage(UniversalKD("il"), 1, 1e-2, 20),))
    trained = fit(student, recipe_, rows, progress=False).student
    assert {h.out_features for h in trained.heads} == {2}
    for (name, before), after in zip(student.named_parameters(), trained.parameters()):
        assert torch.equal(before, after) != before.requires_grad, name


def test_same_seed_same_heads_and_the_generator_stands_still():
    state = torch.get_rng_state()
    first = net().heads[0].weight
    again = net().heads[0].weight
    other = PseudoClassifiers(bare_net(), example=EXAMPLE, seed=1).heads[0].weight
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_heads_for_regression_are_ridge_regression():
    "Least squares with a penalty has a closed form."
    data = doubtful_images()
    data = changed(data, "label", [float(x[0] + x[1]) for x in data["pixel_values"]])
    heads = PseudoClassifiers(bare_net(8, num_labels=1), layers=(0,), example=EXAMPLE)
    train_heads(heads, data, penalty=0.2, progress=False)
    x = torch.tensor(data["pixel_values"], dtype=torch.float64)
    y = torch.tensor(data["label"], dtype=torch.float64)
    z = (x - x.mean(0)) / x.std(0)
    w = torch.linalg.solve(
        z.T @ z / len(z) + 0.1 * torch.eye(16), z.T @ (y - y.mean()) / len(z)
    )
    fitted = heads(pixel_values=x.float()).pseudo_logits.flatten().double()
    torch.testing.assert_close(fitted, z @ w + y.mean(), atol=1e-3, rtol=1e-3)


def test_unlabelled_rows_do_not_teach_heads():
    data = doubtful_images()
    labels = [y if i % 2 else -100 for i, y in enumerate(data["label"])]
    half = train_heads(net(), data.select(range(1, 48, 2)), progress=False)
    both = train_heads(net(), changed(data, "label", labels), progress=False)
    torch.testing.assert_close(
        half.heads[1].weight, both.heads[1].weight, atol=1e-4, rtol=1e-3
    )
    with pytest.raises(ValueError, match="all 48 labels are -100"):
        train_heads(net(), changed(data, "label", [-100] * 48))


def test_the_cache_knows_which_heads_wrote():
    rows = Rows(doubtful_images())
    wrapped = [
        net(),
        net(seed=1),
        PseudoClassifiers(bare_net(), layers=(2, 1), example=EXAMPLE),
        PseudoClassifiers(bare_net(), pool="mean", example=EXAMPLE),
    ]
    assert len({fingerprint(model, rows, 64) for model in wrapped}) == 4


def test_annotate_twice_reads_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path))
    teacher = train_heads(net(), doubtful_images(), progress=False)
    first = annotate(doubtful_images(), teacher, progress=False)
    asked = lambda *_: pytest.fail("the teacher is asked")
    monkeypatch.setattr("kdbook.distillation.run_batches", asked)
    again = annotate(doubtful_images(), teacher, progress=False)
    assert first["teacher_pseudo_logits"] == again["teacher_pseudo_logits"]
    assert len(first["teacher_pseudo_logits"][0]) == 2


def test_the_record_knows_the_layers():
    "Later layers are better, on sentences that nobody was trained on."
    from kdbook.data import load_task

    test = annotate(load_task("movies")["test"], "minilm-movies")
    answers = torch.tensor(test["teacher_pseudo_logits"]).argmax(-1)
    labels = torch.tensor(test["label"])[:, None]
    accuracy = (answers == labels).float().mean(0)
    assert accuracy.shape == (5,)
    assert (accuracy[1:] > accuracy[:-1]).all() and accuracy[0] > 0.7


def test_two_stages_and_what_is_kept():
    run = fit(
        net((8, 8), 1),
        recipe(epochs=(2, 1), batch_size=16),
        written(),
        doubtful_images(seed=2),
        progress=False,
    )
    assert [s["name"] for s in run.history] == ["layers", "layers", "labels"]
    with_heads = predict_logits(run.student, doubtful_images(), progress=False)
    without = predict_logits(run.student.model, doubtful_images(), progress=False)
    torch.testing.assert_close(without, with_heads)


def test_mismatches_are_named():
    rows = written()
    odd = changed(rows, "teacher_pseudo_logits", [[[0.0, 1.0]] for _ in range(48)])
    student = net((8, 8))
    for student, objective, data, words in (
        (student, UniversalKD(), odd, "have 2 classes, teacher_logits 4"),
        (student.model, UniversalKD("il"), rows, r"PseudoClassifiers\(student\)"),
        (student, HiddenKD(), rows, "teacher_hidden.*with_column"),
    ):
        with pytest.raises(ValueError, match=words):
            fit(student, Recipe((Stage(objective, 1),)), data, progress=False)
    for name, value in (
        ("mode", "layers"),
        ("mix", "max"),
        ("logit_weight", -1.0),
        ("temperature", 0.0),
    ):
        with pytest.raises(ValueError, match=name):
            UniversalKD(**{name: value})
    with pytest.raises(ValueError, match="one batch"):
        attend(torch.zeros(2, 3), torch.zeros(2, 3, 4))


def test_a_wrapped_student_trains_by_any_recipe():
    "Heads that an objective does not look at change nothing."
    recipe_ = Recipe((Stage(CrossEntropy(), 2, 5e-3, 16),))
    plain = fit(bare_net((8, 8)), recipe_, doubtful_images(), progress=False).student
    wrapped = fit(net((8, 8)), recipe_, doubtful_images(), progress=False).student.model
    pairs = zip(plain.state_dict().values(), wrapped.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)

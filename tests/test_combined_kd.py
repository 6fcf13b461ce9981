"""Combined-KD and MATE-KD: what is rewritten, who gets which gradient, known losses."""

from copy import deepcopy

import pytest
import torch
from helpers import same
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import TOKENIZER, WORDS, bert, generator, rows

from kdbook import annealing_kd
from kdbook import combined_kd as ck
from kdbook.losses import hinton_loss, logit_mse
from kdbook.models import cnn_student, image_net, lstm_student
from kdbook.rows import Rows, forward
from kdbook.training import Progress, fit

BATCH = Rows(rows(16), ("label", "teacher_logits")).batch(list(range(16)))


def adversary(teacher=None, **kwargs):
    kwargs = {"generator_steps": 1, "student_steps": 2, **kwargs}
    return ck.AdversarialStep(teacher or bert(seed=1), generator(), **kwargs)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_only_ordinary_words_are_rewritten_and_only_by_words_of_the_vocabulary(
    rate, seed
):
    source = ck.Rewriter(bert(), generator(vocabulary=torch.tensor([5, 6, 30])), rate)
    torch.manual_seed(seed)
    ids, new = BATCH["input_ids"], source.rewrite(BATCH)["input_ids"]
    moved = new != ids
    assert not (moved & torch.isin(ids, torch.tensor([0, 1, 2, 3]))).any()
    assert set(new[moved].tolist()) <= {5, 6, 30}
    if rate == 0:
        assert not moved.any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6), st.integers(0, 100))
def test_words_are_drawn_with_the_softmaxs_probabilities(logits, seed):
    torch.manual_seed(seed)
    logits = torch.tensor(logits)
    words = ck.sample_words(logits.expand(20_000, -1))
    shares = torch.bincount(words, minlength=len(logits)) / 20_000
    assert (shares - logits.softmax(-1)).abs().max() < 0.02


@pytest.mark.parametrize(
    "make", [bert, lambda: cnn_student(8, (3,), 16), lambda: lstm_student(8, width=16)]
)
def test_given_embeddings_are_a_look_up(make):
    "Any model with an embedding layer: the words it is given count, not the numbers."
    model, ids = make().eval(), torch.randint(5, WORDS, (3, 8))
    mask, where = torch.ones_like(ids), torch.rand(3, 8) < 0.4
    table = model.get_input_embeddings().weight
    words = torch.nn.functional.one_hot(ids[where], len(table)).float()
    mixed = ck.mixed_embeddings(table, ids.masked_fill(where, 4), where, words)
    with ck.given_embeddings(model, mixed):
        given = model(input_ids=torch.full_like(ids, 4), attention_mask=mask).logits
    looked_up = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(given, looked_up)
    assert not model.get_input_embeddings()._forward_hooks


def test_the_hook_goes_even_when_the_model_fails():
    model = bert()
    with pytest.raises(ZeroDivisionError), ck.given_embeddings(model, torch.zeros(1)):
        1 / 0
    assert not model.get_input_embeddings()._forward_hooks


def soft_gap(game, student, kind):
    "The relaxation that the gradient is of: the same noise each time, soft words."
    torch.manual_seed(5)
    ids, mask = BATCH["input_ids"], BATCH["attention_mask"]
    covered, where = ck.mask_tokens(ids, mask, TOKENIZER, 0.3)
    logits = game.generator(covered, mask, where)
    noise = -torch.empty_like(logits).exponential_().log()
    words = (logits + noise).softmax(-1)
    answers = []
    for model in (game.teacher, student):
        table = model.get_input_embeddings().weight
        mixed = ck.mixed_embeddings(table, ids, where, words, game.generator.vocabulary)
        with ck.given_embeddings(model, mixed):
            answers.append(forward(model, BATCH))
    return ck.gap(*answers, kind)


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_a_small_step_along_the_gradient_widens_the_gap(kind):
    student, game = bert(seed=2), adversary(kind=kind)
    game.generator.eval()
    trained, first = list(game.trained().values()), soft_gap(game, student, kind)
    grads = torch.autograd.grad(first, trained)
    length = sum(g.pow(2).sum() for g in grads).sqrt()
    for p, g in zip(trained, grads):
        p.data.add_(g, alpha=0.02 / length)
    assert soft_gap(game, student, kind) > first


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_a_generators_step_moves_the_generator_alone(kind):
    student, game = bert(seed=2), adversary(kind=kind, lr=1e-2)
    models = (student, game.teacher, game.generator)
    before = [deepcopy(model.state_dict()) for model in models]
    torch.manual_seed(0)
    ck.generator_step(game, student, BATCH)
    unmoved = [same(b, model.state_dict()) for b, model in zip(before, models)]
    assert unmoved == [True, True, False]
    assert all(p.grad is None for m in (student, game.teacher) for p in m.parameters())


@pytest.mark.parametrize(
    "kind, still", [("mse", True), ("kl", True), ("cross_entropy", False)]
)
def test_no_gradient_where_student_and_teacher_are_one(kind, still):
    "Unless the gap is the cross-entropy."
    teacher = bert(seed=1)
    game = adversary(teacher, kind=kind)
    game.generator.eval()
    torch.manual_seed(0)
    value = ck.adversarial_gap(game, teacher, BATCH)
    grads = torch.autograd.grad(value, list(game.trained().values()))
    size = sum(g.abs().sum() for g in grads)
    assert (size < 1e-5) == still, (kind, size)


def test_without_holes_mate_is_plain_kd_and_combined_is_annealing():
    student = bert(seed=2)
    none = adversary(generator_steps=0, mask_rate=0.0)
    teacher_logits = none.teach(BATCH)
    batch = BATCH | {"teacher_logits": teacher_logits}
    logits = forward(student, batch)
    mate = ck.MateKD(none)(student, batch, Progress(step=1)).total
    plain_kd = hinton_loss(logits, teacher_logits, batch["labels"], 1.0, 2 / 3)
    torch.testing.assert_close(mate, plain_kd, atol=1e-5, rtol=1e-5)
    for epoch in range(6):
        progress = Progress(epoch, 6, epoch + 1, 6)
        combined = ck.CombinedKD(none, 3)(student, batch, progress).total
        annealed = annealing_kd.AnnealingKD(3)(student, batch, progress).total
        torch.testing.assert_close(combined, annealed, atol=1e-5, rtol=1e-5)


def test_the_adversarial_half_is_in_the_loss():
    "The slip of public code: computed, and left out."
    student, game = bert(seed=2), adversary(generator_steps=0, mask_rate=1.0)
    torch.manual_seed(0)
    loss = ck.CombinedKD(game, 1)(student, BATCH, Progress(step=1))
    torch.manual_seed(0)
    inputs = game.rewrite(BATCH)
    clean = logit_mse(forward(student, BATCH), BATCH["teacher_logits"])
    adversarial = logit_mse(forward(student, inputs), game.teach(inputs))
    torch.testing.assert_close(loss.total, (clean + adversarial) / 2)
    assert abs(clean - adversarial) > 1e-3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.data())
def test_of_every_round_so_many_updates_are_the_generators(student_steps, data):
    steps = data.draw(st.integers(0, student_steps))
    game = ck.AdversarialStep(generator_steps=steps, student_steps=student_steps)
    start = data.draw(st.integers(0, 1000))
    updates = range(start, start + student_steps)
    assert sum(game.due(Progress(step=s)) for s in updates) == steps


def small_game(make, generator_steps, generator_lr, **kwargs):
    return make(
        bert(seed=1),
        generator(),
        lr=5e-3,
        batch_size=8,
        generator_steps=generator_steps,
        student_steps=4,
        generator_lr=generator_lr,
        **kwargs,
    )


@pytest.mark.parametrize(
    "make, stages",
    [(ck.recipe, dict(tau_max=2, epochs=(2, 1))), (ck.mate_recipe, dict(epochs=3))],
)
def test_a_recipe_can_be_run_twice(make, stages):
    made = small_game(make, 2, 1e-3, **stages)
    first = fit(bert(seed=2), made, rows(), progress=False)
    gaps = list(made.stages[0].objective.adversary.gaps)
    second = fit(bert(seed=2), made, rows(), progress=False)
    assert same(first.student.state_dict(), second.student.state_dict())
    assert gaps == made.stages[0].objective.adversary.gaps and len(gaps) > 3


def test_a_generator_at_rest_and_one_that_learns_differ():
    def weights(generator_steps):
        made = small_game(ck.recipe, generator_steps, 1e-2, tau_max=1, epochs=(2, 1))
        return fit(bert(seed=2), made, rows(), progress=False).student.state_dict()

    assert not same(weights(0), weights(4))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: ck.AdversarialStep(image_net(8), generator()), "get_input_embeddings"),
        (lambda: adversary(mask_rate=1.2), "mask_rate"),
        (lambda: adversary(generator_steps=5), "0..2, got 5"),
        (lambda: ck.recipe(tau_max=9, epochs=(3, 1)), "9"),
        (lambda: ck.gap(torch.zeros(1, 2), torch.zeros(1, 2), "l2"), "l2"),
        (lambda: fit(bert(), ck.mate_recipe(epochs=1), rows()), "warm_up"),
        (lambda: adversary(cnn_student(8, (3,), 16)), "30522 and 40"),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises((ValueError, AttributeError), match=says):
        call()

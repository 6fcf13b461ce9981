"""Combined-KD and MATE-KD: what is rewritten, who gets which gradient, and what the losses are in cases that are known."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import same
from tiny_text import TOKENIZER, WORDS, bert, generator, rows

from kdbook import annealing_kd
from kdbook import combined_kd as ck
from kdbook.losses import hinton_loss, logit_mse
from kdbook.models import cnn_student, image_net, lstm_student
from kdbook.rows import Rows, forward
from kdbook.training import Progress, fit

BATCH = Rows(rows(16), ("label", "teacher_logits")).batch(list(range(16)))


def adversary(teacher=None, **how):
    return ck.AdversarialStep(
        teacher or bert(seed=1),
        generator(),
        **{"generator_steps": 1, "student_steps": 2, **how},
    )


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_only_ordinary_words_are_rewritten_and_only_by_words_of_the_vocabulary(
    rate, seed
):
    source = ck.Rewriter(bert(), generator(vocabulary=torch.tensor([5, 6, 30])), rate)
    torch.manual_seed(seed)
    new = source.rewrite(BATCH)["input_ids"]
    moved = new != BATCH["input_ids"]
    assert not (
        moved & torch.isin(BATCH["input_ids"], torch.tensor([0, 1, 2, 3]))
    ).any()
    assert set(new[moved].tolist()) <= {5, 6, 30}
    if rate == 0:
        assert not moved.any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6), st.integers(0, 100))
def test_words_are_drawn_with_the_softmaxs_probabilities(logits, seed):
    torch.manual_seed(seed)
    logits = torch.tensor(logits)
    drawn = (
        torch.bincount(
            ck.sample_words(logits.expand(20_000, -1)), minlength=len(logits)
        )
        / 20_000
    )
    assert (drawn - logits.softmax(-1)).abs().max() < 0.02


@pytest.mark.parametrize(
    "make", [bert, lambda: cnn_student(8, (3,), 16), lambda: lstm_student(8, width=16)]
)
def test_given_embeddings_are_a_look_up(make):
    "Any model with an embedding layer: the words it is given count, not the numbers."
    model, ids = make().eval(), torch.randint(5, WORDS, (3, 8))
    mask, where = torch.ones_like(ids), torch.rand(3, 8) < 0.4
    table = model.get_input_embeddings().weight
    words = torch.nn.functional.one_hot(ids[where], len(table)).float()
    with ck.given_embeddings(
        model, ck.mixed_embeddings(table, ids.masked_fill(where, 4), where, words)
    ):
        found = model(input_ids=ids * 0 + 4, attention_mask=mask).logits
    torch.testing.assert_close(found, model(input_ids=ids, attention_mask=mask).logits)
    assert not model.get_input_embeddings()._forward_hooks


def test_the_hook_goes_even_when_the_model_fails():
    model = bert()
    with pytest.raises(ZeroDivisionError), ck.given_embeddings(model, torch.zeros(1)):
        1 / 0
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_a_generators_step_moves_the_generator_alone_and_upward(kind):
    student, game = bert(seed=2), adversary(kind=kind, lr=1e-2)
    before = [
        deepcopy(m.state_dict()) for m in (student, game._teacher, game._generator)
    ]
    game._generator.eval()

    def soft_gap():  # the relaxation that the gradient is of: the same noise, soft words
        torch.manual_seed(5)
        _, where = ck.mask_tokens(
            BATCH["input_ids"], BATCH["attention_mask"], TOKENIZER, 0.3
        )
        logits = game._generator(
            BATCH["input_ids"].masked_fill(where, 3), BATCH["attention_mask"], where
        )
        noise, answers = -torch.empty_like(logits).exponential_().log(), []
        for model in (game._teacher, student):
            table = model.get_input_embeddings().weight
            with ck.given_embeddings(
                model,
                ck.mixed_embeddings(
                    table,
                    BATCH["input_ids"],
                    where,
                    (logits + noise).softmax(-1),
                    game._generator.vocabulary,
                ),
            ):
                answers.append(forward(model, BATCH))
        return ck.gap(*answers, kind)

    moving, first = list(ck._moving(game._generator).values()), soft_gap()
    grads = torch.autograd.grad(first, moving)
    length = sum(g.pow(2).sum() for g in grads).sqrt()
    for p, g in zip(moving, grads):
        p.data.add_(g, alpha=0.02 / length)
    assert soft_gap() > first
    game._generator.load_state_dict(before[2])
    torch.manual_seed(0)
    ck.generator_step(game, student, BATCH)
    assert (
        same(before[0], student.state_dict())
        and same(before[1], game._teacher.state_dict())
        and not same(before[2], game._generator.state_dict())
    )
    assert all(p.grad is None for m in (student, game._teacher) for p in m.parameters())


def test_no_gradient_where_student_and_teacher_are_one_unless_it_is_cross_entropy():
    teacher = bert(seed=1)
    for kind, still in (("mse", True), ("kl", True), ("cross_entropy", False)):
        game = adversary(teacher, kind=kind)
        game._generator.eval()
        torch.manual_seed(0)
        size = sum(
            g.abs().sum()
            for g in torch.autograd.grad(
                ck.adversarial_gap(game, teacher, BATCH),
                list(ck._moving(game._generator).values()),
            )
        )
        assert (size < 1e-5) == still, (kind, size)


def test_without_holes_mate_is_plain_kd_and_combined_is_annealing():
    student = bert(seed=2)
    none = adversary(generator_steps=0, mask_rate=0.0)
    with torch.no_grad():
        batch = BATCH | {"teacher_logits": forward(none._teacher, BATCH)}
    own = forward(student, batch)
    torch.testing.assert_close(
        ck.MateKD(none)(student, batch, Progress(step=1)).total,
        hinton_loss(own, batch["teacher_logits"], batch["labels"], 1.0, 2 / 3),
        atol=1e-5,
        rtol=1e-5,
    )
    for epoch in range(6):
        progress = Progress(epoch, 6, epoch + 1, 6)
        torch.testing.assert_close(
            ck.CombinedKD(none, 3)(student, batch, progress).total,
            annealing_kd.AnnealingKD(3)(student, batch, progress).total,
            atol=1e-5,
            rtol=1e-5,
        )


def test_the_adversarial_half_is_in_the_loss():
    "The slip of public code: computed, and left out."
    student, game = bert(seed=2), adversary(generator_steps=0, mask_rate=1.0)
    torch.manual_seed(0)
    loss = ck.CombinedKD(game, 1)(student, BATCH, Progress(step=1))
    torch.manual_seed(0)
    inputs = game.rewrite(BATCH)
    clean, adversarial = (
        logit_mse(forward(student, BATCH), BATCH["teacher_logits"]),
        logit_mse(forward(student, inputs), game.teach(inputs)),
    )
    torch.testing.assert_close(loss.total, (clean + adversarial) / 2)
    assert abs(clean - adversarial) > 1e-3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.data())
def test_of_every_round_so_many_updates_are_the_generators(student_steps, data):
    steps = data.draw(st.integers(0, student_steps))
    game = ck.AdversarialStep(generator_steps=steps, student_steps=student_steps)
    start = data.draw(st.integers(0, 1000))
    assert (
        sum(game.due(Progress(step=s)) for s in range(start, start + student_steps))
        == steps
    )


@pytest.mark.parametrize("make", [ck.recipe, ck.mate_recipe])
def test_a_recipe_can_be_run_twice(make):
    stages = dict(tau_max=2, epochs=(2, 1)) if make is ck.recipe else dict(epochs=3)
    made = make(
        bert(seed=1),
        generator(),
        lr=5e-3,
        batch_size=8,
        generator_steps=2,
        student_steps=4,
        generator_lr=1e-3,
        **stages,
    )
    first = fit(bert(seed=2), made, rows(), progress=False)
    gaps = list(made.callbacks[0].gaps)
    second = fit(bert(seed=2), made, rows(), progress=False)
    assert (
        same(first.student.state_dict(), second.student.state_dict())
        and gaps == made.callbacks[0].gaps
        and len(gaps) > 3
    )


def test_a_generator_at_rest_and_one_that_learns_differ():
    run = lambda steps: (
        fit(
            bert(seed=2),
            ck.recipe(
                bert(seed=1),
                generator(),
                1,
                (2, 1),
                5e-3,
                8,
                generator_steps=steps,
                student_steps=4,
                generator_lr=1e-2,
            ),
            rows(),
            progress=False,
        ).student
    )
    assert not same(run(0).state_dict(), run(4).state_dict())


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: ck.AdversarialStep(image_net(8), generator()), "get_input_embeddings"),
        (lambda: adversary(mask_rate=1.2), "mask_rate"),
        (lambda: adversary(generator_steps=5), "5 of 2"),
        (lambda: ck.recipe(tau_max=9, epochs=(3, 1)), "9"),
        (lambda: ck.gap(torch.zeros(1, 2), torch.zeros(1, 2), "l2"), "l2"),
        (
            lambda: fit(bert(), ck.mate_recipe(epochs=1), rows(), progress=False),
            "warm_up",
        ),
        (
            lambda: ck.AdversarialStep(cnn_student(8, (3,), 16), generator()),
            "30522 and 40",
        ),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises((ValueError, AttributeError), match=says):
        call()

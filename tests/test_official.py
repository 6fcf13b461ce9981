"""The released codes' formulas, written out in plain arithmetic on fixed numbers.

They hold the objectives to what was released, however the package changes. What they
are taken from is told in each chapter's Provenance."""

import math

import pytest
import torch
from tiny_text import bert, generator, rows
from torch import nn

from kdbook import annealing_kd, combined_kd
from kdbook import glitter as gl
from kdbook.rows import Rows, forward
from kdbook.training import Progress

Z_T = [[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]]  # a teacher's logits
Z_S = [[1.0, 0.0, -0.5], [0.5, 1.0, 0.0]]  # a student's


def softmax(z, temperature=1.0):
    powers = [math.exp(v / temperature) for v in z]
    return [p / sum(powers) for p in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def released_mse(student, teacher, scale):
    "Mean over rows and classes; the teacher's logits are scaled, the student's not."
    squares = [
        (s - scale * t) ** 2
        for z_s, z_t in zip(student, teacher)
        for s, t in zip(z_s, z_t)
    ]
    return sum(squares) / len(squares)


def released_counter(epochs, tau_max):
    "The counter of the annealing code over its largest value, at most 1."
    count, factors = 1, []
    for epoch in range(epochs):
        if epoch > 0 and epoch % (epochs // tau_max) == 0:
            count += 1
        factors.append(min(1.0, count / tau_max))
    return factors


@pytest.mark.parametrize("epochs, tau_max", [(14, 7), (10, 7), (25, 10), (30, 14)])
def test_annealing_s_schedule_is_the_counter(epochs, tau_max):
    objective = annealing_kd.AnnealingKD(tau_max)
    ours = [
        objective.phi(Progress(epoch=epoch, epochs=epochs)) for epoch in range(epochs)
    ]
    assert ours == pytest.approx(released_counter(epochs, tau_max))


def test_annealing_s_loss_and_gradient():
    for scale in (1 / 7, 4 / 7, 1.0):
        z_s = torch.tensor(Z_S, requires_grad=True)
        loss = annealing_kd.annealing_loss(z_s, torch.tensor(Z_T), scale)
        loss.backward()
        assert loss.item() == pytest.approx(released_mse(Z_S, Z_T, scale))
        expected = 2 * (torch.tensor(Z_S) - scale * torch.tensor(Z_T)) / 6
        torch.testing.assert_close(z_s.grad, expected)
    # on paper: squares 1, 1, 1, 0.25, 4, 4 of the last scale
    assert loss.item() == pytest.approx(11.25 / 6)


def test_gumbel_straight_through():
    "One-hot forward, the gradient of softmax(log-softmax(g) + noise) backward."
    g = torch.tensor([[0.3, -1.2, 2.0, 0.1], [1.0, 1.0, -0.5, 0.0]], requires_grad=True)
    weights = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.2, 0.4, -1.0, 2.0]])
    torch.manual_seed(3)
    ours = nn.functional.gumbel_softmax(g, hard=True)  # what `adversarial_gap` calls
    torch.manual_seed(3)
    noise = -torch.empty_like(g).exponential_().log()  # Gumbel, as -log(-log u)
    soft = (g.log_softmax(-1) + noise).softmax(-1)
    hard = nn.functional.one_hot(soft.argmax(-1), 4)
    assert torch.equal(ours.detach().round(), hard.float())
    (slope,) = torch.autograd.grad((ours * weights).sum(), g)
    (released,) = torch.autograd.grad((soft * weights).sum(), g)
    torch.testing.assert_close(slope, released)
    # by hand: the Jacobian of a softmax
    p = soft.detach()
    expected = p * (weights - (p * weights).sum(-1, keepdim=True))
    torch.testing.assert_close(slope, expected)


def game(**kwargs):
    settings = {"generator_steps": 0, "student_steps": 2, "mask_rate": 0.5, **kwargs}
    return combined_kd.AdversarialStep(bert(seed=1), generator(), **settings)


def both_texts(adversary, student, batch):
    "Logits of student and teacher on a batch and on its rewritten twin, as lists."
    torch.manual_seed(0)
    twin = adversary.rewrite(batch)
    student_on = [forward(student, inputs).tolist() for inputs in (batch, twin)]
    return student_on, adversary.teach(twin).tolist()


BATCH = Rows(rows(8), ("label", "teacher_logits")).batch(list(range(8)))


@pytest.mark.parametrize("epoch", [0, 3, 6])
def test_combined_kd_s_phase_one(epoch):
    "Half the annealed error on each text; the generator's gap is not annealed."
    adversary, student = game(), bert(seed=2)
    (clean, new), told = both_texts(adversary, student, BATCH)
    phi = released_counter(7, 7)[epoch]
    said = BATCH["teacher_logits"].tolist()
    expected = (released_mse(new, told, phi) + released_mse(clean, said, phi)) / 2
    torch.manual_seed(0)
    progress = Progress(epoch=epoch, epochs=7, step=1)
    loss = combined_kd.CombinedKD(adversary, 7)(student, BATCH, progress)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    gap = combined_kd.gap(torch.tensor(told), torch.tensor(new), "mse")
    assert gap.item() == pytest.approx(released_mse(new, told, 1.0), rel=1e-5)


def test_mate_kd_s_three_thirds():
    adversary, student = game(kind="kl"), bert(seed=2)
    (clean, new), told = both_texts(adversary, student, BATCH)
    mean = lambda values: sum(values) / len(values)
    labels = BATCH["labels"].tolist()
    ce = mean([-math.log(softmax(z)[y]) for z, y in zip(clean, labels)])
    said = BATCH["teacher_logits"].tolist()
    on_clean = mean([kl(softmax(t), softmax(z)) for t, z in zip(said, clean)])
    on_new = mean([kl(softmax(t), softmax(z)) for t, z in zip(told, new)])
    torch.manual_seed(0)
    loss = combined_kd.MateKD(adversary)(student, BATCH, Progress(step=1))
    expected = (ce + on_clean + on_new) / 3
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)


class Looked(nn.Module):
    "A student whose logits are looked up by the first number of a row."

    def __init__(self, logits):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids, attention_mask):
        return self.table[input_ids[:, 0]]


# two rows and their eight variants each, all answers written down
ANSWERS = [[0.1 * i, -0.07 * i * i + 0.5, 0.3 - 0.05 * i] for i in range(18)]
TAUGHT = [[1.5 - 0.2 * i, 0.1 * i, math.sin(i)] for i in range(18)]
LABELS = [2, 0]
TAU, ALPHA, K1 = 5.0, 0.5, 8


def criterion(place, temperature=TAU):
    return kl(softmax(TAUGHT[place], temperature), softmax(ANSWERS[place], temperature))


def of_row(i):
    "Weighted loss of a row itself, in the code's words alpha_true and alpha_ce."
    label = -math.log(softmax(ANSWERS[i])[LABELS[i]])
    return (1 - ALPHA) * label + ALPHA * TAU**2 * criterion(i)


def pooled_batch():
    places = torch.arange(2, 18).view(2, K1)
    return {
        "input_ids": torch.tensor([[0], [1]]),
        "attention_mask": torch.ones(2, 1, dtype=torch.long),
        "labels": torch.tensor(LABELS),
        "idx": torch.arange(2),
        "teacher_logits": torch.tensor(TAUGHT[:2]),
        "pool_length": torch.ones(2, K1, dtype=torch.long),
        "pool_input_ids": places[..., None],
        "pool_teacher_logits": torch.tensor(TAUGHT)[places],
    }


def worst(i, k2):
    "Places of the variants on which the student is farthest from the teacher."
    pool = range(2 + K1 * i, 2 + K1 * (i + 1))
    return sorted(pool, key=lambda place: -criterion(place))[:k2]


@pytest.mark.parametrize("k2", [1, 2, 3])
def test_glitter_s_selection(k2):
    student, objective = Looked(ANSWERS), gl.Glitter("kd", K1, k2, TAU, ALPHA)
    scoring = dict(temperature=TAU, setup="kd")
    chosen = objective.choose(student, pooled_batch(), Progress(epochs=1), **scoring)
    for i, picked in enumerate(chosen.tolist()):
        assert [2 + K1 * i + place for place in picked] == worst(i, k2)


@pytest.mark.parametrize("k2", [1, 2, 3])
def test_glitter_s_loss_adds_the_ranks(k2):
    """The code adds the mean of every rank: that is `aug_weight=k2 * alpha`.

    On the mean of all chosen variants, `alpha` alone would be a k2-th of it."""
    rank = lambda r: sum(TAU**2 * criterion(worst(i, k2)[r]) for i in range(2)) / 2
    released = sum(map(of_row, range(2))) / 2 + ALPHA * sum(map(rank, range(k2)))
    objective = gl.Glitter("kd", K1, k2, TAU, ALPHA, aug_weight=k2 * ALPHA)
    loss = objective(Looked(ANSWERS), pooled_batch(), Progress(epochs=1))
    assert loss.total.item() == pytest.approx(released, rel=1e-5)


def test_vanilla_augmentation_is_one_mean_of_nine():
    "Rows and variants in one list and one mean: `aug_weight=8 * alpha`, over nine."
    variants = [ALPHA * TAU**2 * criterion(place) for place in range(2, 18)]
    released = (sum(map(of_row, range(2))) + sum(variants)) / 18
    objective = gl.Glitter("kd", K1, K1, TAU, ALPHA, aug_weight=K1 * ALPHA)
    loss = objective(Looked(ANSWERS), pooled_batch(), Progress(epochs=1))
    assert loss.total.item() / 9 == pytest.approx(released, rel=1e-5)


def test_consistency_divides_the_prediction_alone():
    "The target is the model's own answer on the row, as it is, and gets no gradient."
    temperature, student = 5.0, Looked(ANSWERS)

    def off(place):
        row = ANSWERS[(place - 2) // K1]
        return kl(softmax(row), softmax(ANSWERS[place], temperature))

    picked = [max(range(2 + K1 * i, 2 + K1 * (i + 1)), key=off) for i in range(2)]
    label = lambda i: -math.log(softmax(ANSWERS[i])[LABELS[i]])
    released = sum(label(i) + off(picked[i]) for i in range(2)) / 2
    objective = gl.Glitter("consistency", K1, 1, temperature)
    loss = objective(student, pooled_batch(), Progress(epochs=1))
    assert loss.total.item() == pytest.approx(released, rel=1e-5)
    loss.total.backward()
    other = [place for place in range(2, 18) if place not in picked]
    assert not student.table.grad[other].any()

"""Loss landscapes: any shape, any batch, any model, and the model stays as it was.

Estimates are held against exact derivatives."""

import copy

import datasets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, hessian

from kdbook.distillation import annotate
from kdbook.landscape import (
    Estimate,
    direction_to,
    hessian_trace,
    logit_line,
    logit_surface,
    moved,
    pca_plane,
    plane,
    project,
    random_direction,
    sharpness,
    surface_of,
    trained_weights,
)
from kdbook.models import cnn_student, image_net, lstm_student, student
from kdbook.rows import predict_logits

FAST = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 10**6)
shapes = st.lists(
    st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple),
    min_size=1,
    max_size=5,
)


def weights_of_shapes(shapes, seed):
    g = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(shape, generator=g) for i, shape in enumerate(shapes)}


def pixels(rows=23, classes=3, size=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    return datasets.Dataset.from_dict(
        {
            "pixel_values": torch.rand(rows, size, generator=g).tolist(),
            "label": torch.randint(0, classes, (rows,), generator=g).tolist(),
        }
    )


def sentences(rows=11, seed=0):
    "Rows of unlike length."
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (rows,), generator=g).tolist()
    return datasets.Dataset.from_dict(
        {
            "input_ids": [
                torch.randint(1000, 9000, (n,), generator=g).tolist() for n in lengths
            ],
            "label": torch.randint(0, 2, (rows,), generator=g).tolist(),
        }
    )


def state(model):
    return {
        **{k: v.clone() for k, v in model.state_dict().items()},
        **{f"mode {n}": m.training for n, m in model.named_modules()},
    }


def same_state(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k]
        for k, v in a.items()
    )


@FAST
@given(shapes, seeds, seeds)
def test_filter_norms_of_any_shape(shapes, seed, other):
    w = weights_of_shapes(shapes, seed)
    for norm in ("filter", "layer"):
        d = random_direction(w, other, norm)
        assert d.keys() == w.keys()
        for name, value in w.items():
            assert d[name].shape == value.shape
            if value.ndim < 2:
                assert not d[name].any()
            elif norm == "filter":
                torch.testing.assert_close(
                    d[name].flatten(1).norm(dim=1),
                    value.flatten(1).norm(dim=1),
                    atol=1e-5,
                    rtol=1e-4,
                )
            else:
                torch.testing.assert_close(
                    d[name].norm(), value.norm(), atol=1e-5, rtol=1e-4
                )
    raw, again = (random_direction(w, other, "none") for _ in range(2))
    assert all(torch.equal(again[k], raw[k]) for k in w)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 7),
        nn.Conv1d(3, 4, 2),
        nn.Conv2d(2, 5, 3),
        nn.Conv3d(2, 3, 2),
        nn.Embedding(9, 4),
        nn.LSTM(3, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_filters_of_layers(layer):
    w = trained_weights(layer)
    generator = torch.get_rng_state()
    d = random_direction(w, 5)
    assert torch.equal(generator, torch.get_rng_state())
    for name, value in w.items():
        if value.ndim > 1:
            torch.testing.assert_close(
                d[name].flatten(1).norm(dim=1), value.flatten(1).norm(dim=1)
            )
    doubles = random_direction({k: v.double() for k, v in w.items()})
    assert all(v.dtype == torch.float64 for v in doubles.values())


def test_a_row_of_zeros_stays():
    "The padding row of an embedding has no norm to give."
    w = trained_weights(nn.Embedding(5, 3, padding_idx=2))
    d = random_direction(w)["weight"]
    assert not d[2].any() and torch.isfinite(d).all() and d[0].any()


@FAST
@given(shapes.filter(lambda s: sum(torch.Size(x).numel() for x in s) >= 4), seeds)
def test_plane_and_projection(shapes, seed):
    a, b, c = (weights_of_shapes(shapes, seed + k) for k in range(3))
    directions, at = plane(a, b, c)
    flat = torch.stack(
        [torch.cat([d[k].double().flatten() for k in a]) for d in directions]
    )
    torch.testing.assert_close(
        flat @ flat.T, torch.eye(2, dtype=torch.float64), atol=1e-4, rtol=0
    )
    assert at[0].tolist() == [0, 0]
    assert at[1, 0] > 0 and at[1, 1] == 0
    assert at[2, 1] > 0
    for weights, place in zip((a, b, c), at):
        back = moved(a, directions, place)
        for name in a:
            torch.testing.assert_close(back[name], weights[name], atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(
            project(weights, a, directions), place, atol=1e-3, rtol=1e-3
        )


@FAST
@given(st.integers(3, 9), seeds)
def test_pca_plane_is_the_pca(count, seed):
    "Directions, coordinates and shares against an SVD of all the weights."
    trail = [weights_of_shapes([(4, 3), (5,), ()], seed + k) for k in range(count)]
    directions, at, shares = pca_plane(trail)
    flat = lambda w: torch.cat([v.double().flatten() for v in w.values()])
    table = torch.stack([flat(w) for w in trail])
    _, s, v = torch.linalg.svd(table - table.mean(0), full_matrices=False)
    torch.testing.assert_close(shares, (s**2 / (s**2).sum())[:2], atol=1e-6, rtol=1e-4)
    axes = torch.stack([flat(d) for d in directions])
    torch.testing.assert_close(
        axes @ axes.T, torch.eye(2, dtype=torch.float64), atol=1e-4, rtol=0
    )
    if s[1] - s[2 if count > 3 else 1] > 0.1 * s[0] and s[0] - s[1] > 0.1 * s[0]:
        cosines = (axes * v[:2]).sum(1).abs()
        ones = torch.ones(2, dtype=torch.float64)
        torch.testing.assert_close(cosines, ones, atol=1e-3, rtol=0)
    torch.testing.assert_close(at, (table - table[-1]) @ axes.T, atol=1e-4, rtol=1e-4)
    assert (at[-1].abs() < 1e-9).all()
    assert (at[0] <= 1e-6).all()


@FAST
@given(st.integers(1, 9), st.integers(1, 30), seeds)
def test_batch_size_changes_nothing(rows, batch_size, seed):
    net = image_net((6, 5), num_labels=3, pixels=9, seed=seed % 1000)
    data = pixels(rows, seed=seed)
    d = random_direction(trained_weights(net), seed)
    xs = [-1, 0, 0.5]
    line = logit_line(net, data, d, xs, batch_size=batch_size, progress=False)
    default = logit_line(net, data, d, xs, progress=False)
    torch.testing.assert_close(line, default, atol=1e-5, rtol=1e-5)
    for x, logits in zip(xs, line):
        probe = copy.deepcopy(net)
        probe.load_state_dict(moved(trained_weights(net), [d], [x]))
        torch.testing.assert_close(
            logits, predict_logits(probe, data, progress=False), atol=1e-5, rtol=1e-5
        )


MODELS = {
    "bert": lambda: student(1, 32),
    "cnn": lambda: cnn_student(6),
    "lstm": lambda: lstm_student(5, 2),
}


@pytest.fixture(params=MODELS)
def text_student(request):
    model = MODELS[request.param]()
    return model.train()


def test_frozen_words_are_no_part_of_a_landscape(text_student):
    w = trained_weights(text_student)
    assert not any(p is q for p in w.values() for q in text_student.parameters())
    assert not any("word_embeddings" in n or n == "embeddings.weight" for n in w)


def test_the_surface_of_text_students(text_student):
    "Own logits in the middle, those of the moved weights elsewhere."
    model, data = text_student, sentences()
    before, w = state(model), trained_weights(model)
    directions = [random_direction(w, 0), random_direction(w, 1)]
    grid = logit_surface(
        model, data, directions, [-0.5, 0], [0, 0.5, 1], batch_size=4, progress=False
    )
    assert grid.shape == (3, 2, 11, 2)
    assert same_state(before, state(model))
    own = predict_logits(model, data, batch_size=4, progress=False)
    assert torch.equal(grid[0, 1], own)
    probe = copy.deepcopy(model)
    probe.load_state_dict(moved(w, directions, (-0.5, 1)), strict=False)
    corner = predict_logits(probe, data, progress=False)
    torch.testing.assert_close(grid[2, 0], corner, atol=1e-5, rtol=1e-4)


def test_estimates_leave_text_students_as_they_were(text_student):
    model, data = text_student, sentences()
    before = state(model)
    for estimate in (
        sharpness(model, data, batch_size=4, progress=False),
        hessian_trace(model, data, samples=3, batch_size=4, progress=False),
    ):
        assert isinstance(estimate, Estimate) and estimate.error > 0
    assert same_state(before, state(model))
    assert all(p.grad is None for p in model.parameters())
    output = model(input_ids=torch.tensor([data[0]["input_ids"]]))
    output.logits.sum().backward()  # it still trains
    assert any(p.grad is not None for p in model.parameters())


class Tied(nn.Module):
    "Two layers with one weight."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(9, 9), nn.Linear(9, 9)
        self.b.weight = self.a.weight

    def forward(self, pixel_values):
        return self.b(torch.relu(self.a(pixel_values)))


def test_tied_weights_move_together():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Tied()
    w = trained_weights(net)
    assert sorted(w) == ["a.bias", "a.weight", "b.bias"]
    d, data = random_direction(w), pixels()
    probe = copy.deepcopy(net)
    with torch.no_grad():
        probe.a.weight.add_(0.3 * d["a.weight"])
    assert probe.b.weight is probe.a.weight
    torch.testing.assert_close(
        logit_line(net, data, d, [0.3], progress=False)[0],
        predict_logits(probe, data, progress=False),
    )


def test_partly_frozen():
    net = image_net((6, 5), num_labels=3, pixels=9)
    net.layers[0].requires_grad_(False)
    assert not any(name.startswith("layers.0") for name in trained_weights(net))
    trace = hessian_trace(net, pixels(), samples=4, progress=False)
    assert trace.error > 0
    assert all(p.grad is None for p in net.parameters())


def exact_trace(net, data):
    w = trained_weights(net)
    x = torch.tensor(data["pixel_values"])
    y = torch.tensor(data["label"])
    sizes = [v.numel() for v in w.values()]

    def loss(flat):
        parts = zip(w.items(), flat.split(sizes))
        weights = {name: part.reshape(v.shape) for (name, v), part in parts}
        return F.cross_entropy(functional_call(net, weights, (x,)).logits, y)

    flat = torch.cat([v.flatten() for v in w.values()])
    return hessian(loss)(flat).trace().item()


@pytest.mark.parametrize("seed", range(4))
def test_hessian_trace_against_the_exact_one(seed):
    net = image_net((5, 4), num_labels=3, pixels=9, seed=seed)
    data = pixels(seed=seed)
    trace = hessian_trace(net, data, samples=300, seed=seed, progress=False)
    exact = exact_trace(net, data)
    assert abs(trace.mean - exact) < 4 * trace.error
    assert trace.error < 0.3 * abs(exact) + 0.1
    few = dict(samples=5, seed=seed, progress=False)
    whole = hessian_trace(net, data, **few).mean
    in_batches = hessian_trace(net, data, batch_size=4, **few).mean
    assert in_batches == pytest.approx(whole, rel=1e-3, abs=1e-4)


def test_hessian_trace_through_attention():
    "A model loaded with fused attention gives what the eager one gives."
    data = sentences(6)
    fused, eager = (student(1, 32, attn_implementation=a) for a in ("sdpa", "eager"))
    trace = lambda model: hessian_trace(model, data, samples=3, progress=False).mean
    assert trace(fused) == pytest.approx(trace(eager), rel=1e-3)


@FAST
@given(st.floats(0.01, 1), st.integers(1, 5), seeds)
def test_sharpness_of_a_bowl(rho, steps, seed):
    "The loss (w.x - y)^2 rises to (|r| + rho |x|)^2, in any number of steps."

    class Flat(nn.Linear):
        def forward(self, pixel_values):
            return super().forward(pixel_values)

    g = torch.Generator().manual_seed(seed)
    net = Flat(3, 1, bias=False)
    net.weight.data = torch.randn(1, 3, generator=g)
    x, y = torch.randn(3, generator=g), torch.randn((), generator=g)
    r, length = (net.weight.detach() @ x - y).abs().item(), x.norm().item()
    if r < 1e-2:
        return
    data = datasets.Dataset.from_dict(
        {"pixel_values": [x.tolist()] * 8, "label": [y.item()] * 8}
    )
    rise = sharpness(net, data, rho, steps, batch_size=4, progress=False)
    exact = (r + rho * length) ** 2 - r**2
    assert rise.mean == pytest.approx(exact, rel=1e-3, abs=1e-4)
    assert rise.error == pytest.approx(0, abs=1e-5)


def test_sharpness_at_a_flat_place_is_zero():
    net = image_net(4, num_labels=3, pixels=9)
    flat = lambda logits, batch: logits.sum() * 0
    assert sharpness(net, pixels(), loss=flat, progress=False).mean == 0


def test_a_loss_of_ones_own():
    "Rows without labels will do where the loss reads the teacher."
    net, data = image_net(5, num_labels=3, pixels=9), pixels()
    teacher = image_net(8, num_labels=3, pixels=9, seed=4)
    annotated = annotate(data, teacher, cache=False, progress=False)
    unlabelled = annotated.remove_columns("label")
    own = dict(
        loss=lambda logits, batch: F.mse_loss(logits, batch["teacher_logits"]),
        progress=False,
    )
    assert sharpness(net, unlabelled, **own).mean > 0
    assert hessian_trace(net, unlabelled, samples=2, **own).mean > 0
    with pytest.raises(ValueError, match="'label'"):
        sharpness(net, unlabelled)


def test_rows_without_a_label_are_left_out():
    net, data = image_net(5, num_labels=3, pixels=9), pixels(12)
    half = datasets.Dataset.from_dict(
        {
            "pixel_values": 2 * list(data["pixel_values"]),
            "label": list(data["label"]) + [-100] * 12,
        }
    )
    trace = lambda rows: hessian_trace(net, rows, samples=3, progress=False)
    assert trace(half) == trace(data)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda net, data, d: moved(trained_weights(net), [d], [1, 2]),
            "1 directions but 2",
        ),
        (lambda net, data, d: direction_to(d, {"x": torch.zeros(2)}), "one of the two"),
        (
            lambda net, data, d: logit_line(net, data, {"x": torch.zeros(2)}, [0]),
            "one of the two",
        ),
        (
            lambda net, data, d: logit_line(
                net,
                data,
                d,
                [0],
                origin=trained_weights(image_net(7, num_labels=3, pixels=9)),
            ),
            r"\(4, 9\) and \(7, 9\)",
        ),
        (lambda net, data, d: logit_line(net, data, d, []), "no points"),
        (lambda net, data, d: logit_surface(net, data, [d], [0], [0]), "got 1"),
        (lambda net, data, d: surface_of(torch.zeros(3, 2), sum), r"\(3, 2\)"),
        (lambda net, data, d: pca_plane([d, d]), "got 2"),
        (lambda net, data, d: plane(d, d, d), "line"),
        (lambda net, data, d: random_direction(d, norm="row"), "row"),
        (lambda net, data, d: sharpness(net, data, rho=-1), "rho must be > 0, got -1"),
        (
            lambda net, data, d: sharpness(net, data, steps=0),
            "steps must be >= 1, got 0",
        ),
        (lambda net, data, d: hessian_trace(net, data, samples=0), "got 0"),
    ],
)
def test_what_cannot_work_says_so(call, words):
    net = image_net(4, num_labels=3, pixels=9)
    with pytest.raises(ValueError, match=words):
        call(net, pixels(), random_direction(trained_weights(net)))


@pytest.mark.slow
def test_the_surface_of_a_book_sized_student():
    "A 2x128 student and a surface of real size; its middle is the model's own logits."
    model, data = student(), sentences(256)
    w = trained_weights(model)
    pair = [random_direction(w, seed) for seed in (0, 1)]
    xs = [k / 3 for k in range(-3, 4)]
    grid = logit_surface(model, data, pair, xs, xs, progress=False)
    assert grid.shape == (7, 7, 256, 2)
    assert torch.equal(grid[3, 3], predict_logits(model, data, progress=False))

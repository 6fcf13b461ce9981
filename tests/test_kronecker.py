"""Kronecker products against dense ones, KroneckerBERT on disk, and the two stages."""

import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import bert, rows
from torch import nn

from kdbook import kronecker as kr
from kdbook import kronecker_bert as kb
from kdbook.rows import Rows
from kdbook.training import Progress

DIVISORS = st.sampled_from([1, 2, 3, 4, 5, 6])
SMALL = {
    "*.attention.self.*": (4, 8),
    "*.attention.output.dense": (4, 8),
    "*.intermediate.dense": (8, 2),
    "*.layer.*.output.dense": (2, 8),
    "*word_embeddings": (40, 4),
}
HEADS = (
    transformers.BertModel,
    transformers.BertForSequenceClassification,
    transformers.BertForMaskedLM,
)
AUTO = {
    transformers.BertModel: transformers.AutoModel,
    transformers.BertForSequenceClassification: (
        transformers.AutoModelForSequenceClassification
    ),
    transformers.BertForMaskedLM: transformers.AutoModelForMaskedLM,
}


@st.composite
def weights(draw):
    "A weight, the shape of A, and a rank that they allow."
    m1, n1, m2, n2 = (draw(DIVISORS) for _ in range(4))
    rank = draw(st.integers(1, min(m1 * n1, m2 * n2)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    weight = torch.randn(m1 * m2, n1 * n2, generator=g, dtype=torch.float64)
    return weight, (m1, n1), rank


def by_entries(a, b):
    "(A (x) B)[i*m2 + p, j*n2 + q] = A[i, j] B[p, q], entry by entry."
    (m1, n1), (m2, n2) = a.shape, b.shape
    out = torch.zeros(m1 * m2, n1 * n2, dtype=a.dtype)
    for i in range(m1):
        for j in range(n1):
            for p in range(m2):
                for q in range(n2):
                    out[i * m2 + p, j * n2 + q] = a[i, j] * b[p, q]
    return out


@settings(max_examples=100, deadline=None)
@given(weights())
def test_nearest_against_a_full_svd(case):
    w, shape, rank = case
    factors, errors = kr.nearest_kronecker(w, shape, rank), kr.kronecker_error(w, shape)
    whole = sum(by_entries(a, b) for a, b in zip(*factors))
    torch.testing.assert_close(factors.product(), whole)
    s = torch.linalg.svdvals(kr.rearranged(w, shape))
    torch.testing.assert_close(
        (w - whole).norm().square(), s[rank:].square().sum(), atol=1e-9, rtol=1e-7
    )
    torch.testing.assert_close(
        errors[rank] * w.norm(), (w - whole).norm(), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(
        factors.a.flatten(1).norm(dim=1), factors.b.flatten(1).norm(dim=1)
    )  # sqrt(sigma) on both


@settings(max_examples=60, deadline=None)
@given(weights(), st.integers(0, 3), st.booleans())
def test_every_way_of_multiplying(case, batch, with_bias):
    "Empty batches too; values and all gradients."
    w, shape, rank = case
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, w.shape[1], generator=g, dtype=torch.float64)
    bias = None
    if with_bias:
        bias = torch.randn(len(w), generator=g, dtype=torch.float64)
    factors = kr.Factors(
        *(f.requires_grad_() for f in kr.nearest_kronecker(w, shape, rank))
    )
    x.requires_grad_()
    expected = nn.functional.linear(x, factors.product(), bias)
    grads = torch.autograd.grad(expected.square().sum(), (x, *factors))
    for contraction in kr.MULTIPLY:
        y = kr.kronecker_linear(x, factors, bias, contraction)
        torch.testing.assert_close(y, expected)
        way_grads = torch.autograd.grad(y.square().sum(), (x, *factors))
        torch.testing.assert_close(way_grads, grads)


@settings(max_examples=50, deadline=None)
@given(*(DIVISORS for _ in range(4)))
def test_flops_against_counting(m1, n1, m2, n2):
    product = lambda m, k, n: m * n * (2 * k - 1)  # of m x k with k x n
    assert kr.flops((m1, n1), (m2, n2)) == dict(
        b=product(m2, n2, n1) + product(m2, n1, m1),
        a=product(n2, n1, m1) + product(m2, n2, m1),
    )


def test_the_paper_stacks_columns_and_nothing_changes():
    w = torch.randn(12, 20, dtype=torch.float64)
    columns = torch.stack(
        [
            w[i * 3 : i * 3 + 3, j * 4 : j * 4 + 4].T.flatten()
            for j in range(5)
            for i in range(4)
        ]
    )  # row i + j*m1
    u, s, v = torch.linalg.svd(columns, full_matrices=False)
    a, b = s[0].sqrt() * u[:, 0].view(5, 4).T, s[0].sqrt() * v[0].view(4, 3).T
    torch.testing.assert_close(
        by_entries(a, b), kr.nearest_kronecker(w, (4, 5)).product()
    )
    assert torch.linalg.matrix_rank(kr.rearranged(by_entries(a, b), (4, 5))) == 1


def test_half_precision_and_views():
    dense = nn.Linear(24, 18).bfloat16()
    layer = kr.KroneckerLinear.from_dense(dense, (6, 4), 2)
    assert layer(torch.randn(3, 24).bfloat16()).dtype == torch.bfloat16
    assert layer.a.dtype == torch.bfloat16
    x = torch.randn(24, 7).T  # not contiguous
    layer = layer.float()
    torch.testing.assert_close(layer(x), layer.to_dense()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            (5, 2),
            "m1=5 does not divide 32, a side of the 32x16 weight (outputs by inputs): "
            "take one of 1, 2, 4, 8, 16, 32",
        ),
        ((4, 3), "n1=3 does not divide 16"),
        ((4, 2, 9), "rank must be in 1..8"),
        ((4, 2, 0), "got 0"),
        ((0, 2), "m1=0"),
    ],
)
def test_wrong_shapes_name_the_layer_and_the_way_out(entry, message):
    with pytest.raises(ValueError, match="intermediate") as e:
        kr.kroneckerize(bert(), {"*.intermediate.dense": entry})
    assert message in str(e.value)


def test_wrong_specs():
    for spec, message in (
        ({}, "empty"),
        ({"*.nothing": (2, 2)}, "means no"),
        ({"*LayerNorm": (2, 2)}, "LayerNorm"),
        ("kronecker-bert-5", "kronecker-bert-8"),
    ):
        with pytest.raises(ValueError, match=message):
            kr.kroneckerize(bert(), spec)
    with pytest.raises(ValueError, match="max_norm"):
        kr.kroneckerize(nn.Sequential(nn.Embedding(8, 4, max_norm=1.0)), {"0": (8, 2)})


@pytest.mark.parametrize("kind", HEADS)
def test_the_exact_model_is_the_model(kind):
    "All products: the same outputs, through saving and the Auto classes."
    dense = bert(kind=kind)
    exact = {
        "*.attention.self.*": (4, 4, 16),
        "*.intermediate.dense": (8, 4, 16),
        "*word_embeddings": (40, 4, 4),
    }
    small = kr.kroneckerize(dense, exact)
    ids = torch.tensor([[1, 9, 33, 2], [1, 5, 2, 0]])
    torch.testing.assert_close(
        small(input_ids=ids)[0], dense(input_ids=ids)[0], atol=1e-4, rtol=1e-3
    )
    assert not small.training and all(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("kind", HEADS)
def test_saved_and_loaded(kind, tmp_path):
    small = kr.kroneckerize(bert(kind=kind), SMALL)
    small.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.py"))
    loaded, report = AUTO[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and type(loaded) is type(small)
    )
    ids = torch.tensor([[1, 9, 33, 2]])
    torch.testing.assert_close(
        loaded.eval()(input_ids=ids)[0], small(input_ids=ids)[0], atol=1e-5, rtol=1e-5
    )
    if kind is HEADS[2]:
        for model in (small, loaded):
            assert (
                model.cls.predictions.decoder.a
                is model.bert.embeddings.word_embeddings.a
            )


AUTO_CLASS = "AutoModelForSequenceClassification as Auto"
ORDERS = (
    f"import kdbook.kronecker_bert; from transformers import {AUTO_CLASS}",
    f"from transformers import {AUTO_CLASS}; import kdbook.kronecker_bert",
    "import kdbook.kronecker_bert; from transformers import AutoConfig; "
    f"AutoConfig.from_pretrained(sys.argv[1]); from transformers import {AUTO_CLASS}",
    "import kdbook.kronecker_bert; "
    f"from transformers import AutoTokenizer, BertModel, pipeline, {AUTO_CLASS}",
)


@pytest.mark.parametrize("line", ORDERS)
def test_a_reader_needs_one_import(line, tmp_path):
    """Before or after transformers, whatever is imported of it first.

    Nothing is asked about remote code."""
    kr.kroneckerize(bert(), SMALL).save_pretrained(tmp_path)
    show = "print(type(Auto.from_pretrained(sys.argv[1])).__name__)"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; {line}; {show}", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    name = run.stdout.strip()
    assert name == "KroneckerBertForSequenceClassification", run.stderr[-2000:]


ALONE = """
import sys

sys.modules["transformers"] = None
import torch
from kdbook import kronecker

layer = kronecker.KroneckerLinear(8, 8, (2, 2))
assert layer(torch.ones(1, 8)).shape == (1, 8)
assert "kdbook.kronecker_bert" not in sys.modules
try:
    kronecker.KroneckerBertModel
except ModuleNotFoundError as e:
    print(e.name)
"""


def test_it_needs_no_transformers():
    "Its names for BERT are there, and need transformers when they are asked for."
    command = [sys.executable, "-c", ALONE]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "transformers"


def test_the_names_of_kronecker_bert_are_those_of_kronecker():
    for name in ("KroneckerBertConfig", "PRESETS", "recipe", "with_encoder", "TaskKD"):
        assert getattr(kr, name) is getattr(kb, name)
    with pytest.raises(AttributeError, match="'kdbook.kronecker' has no .*'TaskKDs'"):
        kr.TaskKDs


def test_fresh_weights_and_frozen_ones():
    torch.manual_seed(0)
    config = kb.KroneckerBertConfig(
        kronecker=kb.bert_spec(bert().config, (4, 4), (4, 2), 4),
        **{k: v for k, v in bert().config.to_dict().items() if k != "model_type"},
    )
    table = kb.KroneckerBertModel(config).embeddings.word_embeddings
    assert torch.isfinite(table.a).all() and table.factors.product().std() > 0.1
    frozen = bert()
    frozen.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    assert not kr.kroneckerize(
        frozen, SMALL
    ).bert.embeddings.position_embeddings.weight.requires_grad


@pytest.mark.parametrize("spec", [SMALL, {"*.intermediate.dense": (32, 1, 3)}])
def test_onnx(spec, tmp_path):
    "Exported and run elsewhere: the same logits, for batches of another size too."
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small, path = kr.kroneckerize(bert(), spec), tmp_path / "model.onnx"

    def example(n, length):
        mask = torch.ones(n, length, dtype=torch.long)
        mask[-1, -1] = 0
        return {"input_ids": torch.randint(4, 40, (n, length)), "attention_mask": mask}

    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        small,
        kwargs=example(2, 7),
        f=path,
        dynamo=True,
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        dynamic_shapes={"input_ids": free, "attention_mask": free},
        verbose=False,
    )
    session = runtime.InferenceSession(str(path))
    for n, length in ((2, 7), (5, 4)):
        inputs = example(n, length)
        (logits,) = session.run(["logits"], {k: v.numpy() for k, v in inputs.items()})
        np.testing.assert_allclose(
            logits, small(**inputs).logits.detach().numpy(), atol=1e-4
        )


@pytest.mark.parametrize(
    "n, m, shape_a, rank",
    [
        (96, 96, (48, 32), 2),
        (96, 96, (48, 48), 1),
        (64, 48, (48, 1), 5),
        (96, 64, (64, 24), 3),
        (768, 768, (384, 48), 1),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_layers_of_every_kind_of_shape(n, m, shape_a, rank, train):
    """Wide and thin first factors, halves that are dealt out, sums, low rank.

    Values and all gradients of the dense layer."""
    torch.manual_seed(0)
    layer = kr.KroneckerLinear(n, m, shape_a, rank).double()
    x = torch.randn(5, 3, n, dtype=torch.float64, requires_grad=train)
    grad = torch.randn(5, 3, m, dtype=torch.float64)
    with torch.set_grad_enabled(train):
        y = layer(x)
        dense = x @ layer.factors.product().T + layer.bias
    torch.testing.assert_close(y, dense)
    if train:
        inputs = (x, *layer.parameters())
        grads = torch.autograd.grad(y, inputs, grad)
        torch.testing.assert_close(grads, torch.autograd.grad(dense, inputs, grad))


def test_a_layer_under_autocast_keeps_its_type():
    layer = kr.KroneckerLinear(96, 96, (48, 48))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 96)).dtype == torch.bfloat16
        with torch.no_grad():
            assert layer(torch.randn(3, 96)).dtype == torch.bfloat16


def test_shared_and_frozen_biases_stay_so():
    net = nn.ModuleDict(dict(one=nn.Linear(8, 6), two=nn.Linear(8, 6)))
    net["two"].bias = net["one"].bias
    net["one"].bias.requires_grad_(False)
    small = kr.kroneckerize(net, {"*": (2, 2)})
    bias = small["one"].bias
    assert bias is small["two"].bias
    assert bias is not net["one"].bias
    assert not bias.requires_grad


def test_products_of_nothing_can_learn():
    for weight, rank in (
        (torch.zeros(6, 8), 1),
        (torch.kron(torch.randn(3, 2), torch.randn(2, 4)), 3),
    ):
        factors = kr.Factors(
            *(f.requires_grad_() for f in kr.nearest_kronecker(weight, (3, 2), rank))
        )
        torch.testing.assert_close(factors.product(), weight, atol=1e-5, rtol=1e-4)
        (factors.product() * torch.randn(6, 8)).sum().backward()
        assert all(grad.abs().max() > 1e-3 for grad in factors.b.grad)


def test_what_has_no_kronecker_form_is_refused():
    with pytest.raises(ValueError, match="MultiheadAttention"):
        kr.kroneckerize(nn.TransformerEncoderLayer(8, 2), {"*": (2, 2)})
    with pytest.raises(ValueError, match="scale_grad_by_freq"):
        kr.kroneckerize(
            nn.ModuleDict(dict(t=nn.Embedding(6, 8, scale_grad_by_freq=True))),
            {"t": (6, 2)},
        )
    tied = nn.ModuleDict(dict(t=nn.Embedding(6, 8), o=nn.Linear(8, 6)))
    tied["o"].weight = tied["t"].weight
    with pytest.raises(ValueError, match="share a weight"):
        kr.kroneckerize(tied, {"t": (6, 2), "o": (6, 4)})
    with pytest.raises(ValueError, match="meta"):
        kr.kronecker_error(torch.empty(4, 4, device="meta"), (2, 2))
    assert kr.KroneckerEmbedding(6, 8, (6, 2), padding_idx=-1).padding_idx == 5


def test_a_second_compression_fits_every_head(tmp_path):
    "Names of one head must not keep a layer dense under another."
    small = kr.kroneckerize(
        kr.kroneckerize(bert(), {"*.intermediate.dense": (8, 2)}),
        {"bert.encoder.layer.0.attention.self.query": (4, 8)},
    )
    small.save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    assert isinstance(model.encoder.layer[0].attention.self.query, kr.KroneckerLinear)


@pytest.mark.filterwarnings("ignore")  # tracing warns of every shape it reads
@pytest.mark.parametrize("shape_a, rank", [((48, 48), 1), ((48, 32), 2), ((24, 1), 5)])
def test_layers_under_other_tools(shape_a, rank):
    """Autocast, half precision, vmap, tracing, the compiler's front end, no rows.

    The dense layer's values every time."""
    torch.manual_seed(0)
    layer = kr.KroneckerLinear(96, 96, shape_a, rank)
    x = torch.randn(4, 3, 96)
    dense = layer.to_dense()(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), dense, atol=0.1, rtol=0.1)
    for y in (
        torch.func.vmap(layer)(x),
        torch.jit.trace(layer, x[:2])(x),
        torch.compile(layer, backend="aot_eager")(x),
    ):
        torch.testing.assert_close(y, dense, atol=1e-5, rtol=1e-4)
    assert layer(x[:0]).shape == (0, 3, 96)
    half = layer.bfloat16()(x.bfloat16())
    torch.testing.assert_close(half.float(), dense, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("contraction", list(kr.MULTIPLY), ids=" ".join)
@pytest.mark.parametrize("shape_a, rank", [((12, 6), 1), ((12, 24), 2)])
def test_onnx_for_every_contraction(contraction, shape_a, rank, tmp_path):
    "No contraction bakes the example's batch size into the graph."
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer = kr.KroneckerLinear(48, 24, shape_a, rank)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    layer.eval().contraction = contraction
    torch.onnx.export(
        layer,
        (torch.randn(3, 4, 48),),
        f=tmp_path / "layer.onnx",
        dynamo=True,
        input_names=["x"],
        dynamic_shapes=(free,),
        verbose=False,
    )
    x = torch.randn(5, 2, 48)
    session = runtime.InferenceSession(str(tmp_path / "layer.onnx"))
    (y,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, layer(x).detach().numpy(), atol=1e-5)


def test_hooks_are_gone_even_after_an_error():
    "What was kept is no longer filled."
    teacher = bert()
    with pytest.raises(RuntimeError):
        with kb.watched(teacher) as kept:
            raise RuntimeError
    teacher(input_ids=torch.tensor([[1, 9, 33, 2]]))
    assert not kept


def test_only_holes_are_scored():
    "Stage one's masked-LM loss, against all logits; the same draw of holes."
    teacher = bert(kind=HEADS[2])
    student = kr.kroneckerize(bert(kind=HEADS[2], seed=1), SMALL)
    batch = Rows(rows(6), ()).batch(list(range(6)))
    torch.manual_seed(3)
    loss = kb.PretrainingKD(teacher, 0.4)(student, batch, Progress())
    torch.manual_seed(3)
    covered, where = kb.mask_tokens(
        batch["input_ids"], batch["attention_mask"], student.tokenizer, 0.4
    )
    logits = student(input_ids=covered, attention_mask=batch["attention_mask"]).logits
    expected = nn.functional.cross_entropy(logits[where], batch["input_ids"][where])
    torch.testing.assert_close(loss.parts["masked_lm"], expected.detach())
    torch.testing.assert_close(loss.total.detach(), sum(loss.parts.values()))


def test_the_losses_against_a_loop():
    "Sentence by sentence, without padding."
    teacher, student = bert(layers=2), bert(layers=2, seed=1)
    batch = Rows(rows(6), ("label",)).batch(list(range(6)))

    def look(model, inputs):
        with torch.no_grad(), kb.watched(model) as kept:
            model(**inputs)
        return kb.inside(kept, 2)

    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    losses = kb.intermediate_losses(
        look(student, inputs), look(teacher, inputs), batch["attention_mask"]
    )
    squares = defaultdict(list)
    for ids, mask in zip(*inputs.values()):
        sentence = {"input_ids": ids[mask.bool()][None]}
        s, t = look(student, sentence), look(teacher, sentence)
        squares["embedding"].append((s.embedding - t.embedding).square().flatten())
        for i in range(2):
            scores = (s.scores[i] - t.scores[i]).square()
            squares[f"attention {i}"].append(scores.flatten())
            squares[f"ffn {i}"].append((s.ffn[i] - t.ffn[i]).square().flatten())
    mean = {k: torch.cat(v).mean() for k, v in squares.items()}
    assert set(losses) == {"embedding", "attention", "ffn"} and len(mean) == 5
    for name, loss in losses.items():
        by_hand = sum(v for k, v in mean.items() if k.startswith(name))
        torch.testing.assert_close(loss, by_hand, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "pattern", ["bert.embeddings.word_embeddings", "*.word_embeddings", "*decoder"]
)
def test_the_table_by_any_name(pattern, tmp_path):
    "A pattern with the head's own prefix is stored so that every head can read it."
    small = kr.kroneckerize(
        bert(kind=HEADS[2]),
        {pattern: (40, 4), "bert.encoder.layer.0.intermediate.dense": (8, 2)},
    )
    small.save_pretrained(tmp_path)
    assert small.cls.predictions.decoder.a is small.bert.embeddings.word_embeddings.a
    if pattern != "*decoder":
        body = transformers.AutoModel.from_pretrained(tmp_path)
        assert (
            type(body.embeddings.word_embeddings) is kr.KroneckerEmbedding
            and type(body.encoder.layer[0].intermediate.dense) is kr.KroneckerLinear
        )


def test_models_of_other_kinds_are_not_stored_by_mistake(tmp_path):
    other = kr.kroneckerize(bert(kind=transformers.BertForTokenClassification), SMALL)
    with pytest.raises(TypeError, match="state_dict"):
        other.save_pretrained(tmp_path)
    bare = transformers.BertModel(bert().config, add_pooling_layer=False)
    assert kr.kroneckerize(bare, {"*.intermediate.dense": (8, 2)}).pooler is None
    untied = bert(kind=HEADS[2]).config
    untied.tie_word_embeddings = False
    loose = kr.kroneckerize(
        transformers.BertForMaskedLM(untied), {"*word_embeddings": (40, 4)}
    )
    assert type(loose.cls.predictions.decoder) is nn.Linear
    twice = kr.kroneckerize(
        kr.kroneckerize(bert(), {"*.intermediate.dense": (8, 2)}),
        {"*pooler.dense": (4, 4)},
    )
    twice.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert (
        not report["missing_keys"]
        and type(again.bert.pooler.dense) is kr.KroneckerLinear
    )


def test_rank_deficient_weights_have_finite_factors():
    w = torch.kron(torch.randn(4, 6), torch.randn(8, 3))
    for rank in (1, 2, 24):
        factors = kr.nearest_kronecker(w, (4, 6), rank)
        assert all(torch.isfinite(f).all() for f in factors)
        torch.testing.assert_close(factors.product(), w)
        a, b = (factor.flatten(1).norm(dim=1) for factor in factors)
        # where B is next to nothing, A has length one, so that B can learn
        expected = torch.where(b > 1e-3, b, 1.0)
        torch.testing.assert_close(a, expected, atol=1e-6, rtol=1e-4)
    assert (kr.nearest_kronecker(torch.zeros(4, 4), (2, 2)).product() == 0).all()


def test_a_failed_call_changes_nothing():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    with pytest.raises(ValueError, match="m1=4 does not divide 6"):
        kr.replace_layers(net, {"*": (4, 4)})
    assert all(type(layer) is nn.Linear for layer in net)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="parametrization"):
        kr.kroneckerize(normed, {"0": (2, 2)})


def test_kroneckerize_draws_nothing_of_the_readers():
    models = bert(), nn.Sequential(nn.Linear(4, 4))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    kr.kroneckerize(models[0], SMALL)
    kr.kroneckerize(models[1], {"0": (2, 2)})
    assert torch.equal(torch.rand(3), expected)


def test_half_precision_losses():
    "Squares of large differences stay finite; heads are the student's own count."
    big = kb.Inside(
        torch.full((2, 64, 32), 60.0).half(),
        (torch.full((2, 2, 64, 64), 300.0).half(),),
        (torch.full((2, 64, 32), 60.0).half(),),
    )
    zeros = lambda tensors: tuple(torch.zeros_like(t) for t in tensors)
    none = kb.Inside(zeros([big.embedding])[0], zeros(big.scores), zeros(big.ffn))
    losses = {k: v.item() for k, v in kb.intermediate_losses(big, none).items()}
    assert losses == dict(embedding=3600.0, attention=90000.0, ffn=3600.0)
    student = bert()
    student.config.num_attention_heads = 4
    with pytest.raises(ValueError, match="same layers, heads"):
        kb.TaskKD(bert())(student, Rows(rows(4), ("label",)).batch([0, 1]), Progress())


def test_encoders_that_do_not_match():
    small = kr.kroneckerize(bert(layers=2), SMALL)
    deep = kr.kroneckerize(bert(layers=1), SMALL)
    with pytest.raises(ValueError, match="is missing in the pre-trained"):
        kb.with_encoder(small, deep)
    with pytest.raises(ValueError, match="KroneckerBertForMaskedLM"):
        kb.PretrainingKD(bert(kind=HEADS[2]))(
            small, Rows(rows(4), ()).batch([0, 1]), Progress()
        )


# layers with a forward of their own


class Twice(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_with_its_own_forward_keeps_it():
    layers = torch.nn.Sequential(Twice(8, 8), torch.nn.Linear(8, 8))
    small = kr.kroneckerize(layers, {"*": (4, 4, 4)})  # rank 4 is exact
    x = torch.randn(3, 8)
    torch.testing.assert_close(small(x), layers(x), atol=1e-5, rtol=1e-5)
    assert isinstance(small[0], Twice) and isinstance(small[1], kr.KroneckerLinear)
    names = {name for name, _ in small[0].named_parameters() if "weight" in name}
    assert names == {f"parametrizations.weight.original{n}" for n in (0, 1)}
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_scaled_tables_that_share_a_weight_go_on_sharing():
    config = transformers.BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=30,
        scale_embedding=True,
        init_std=0.5,
        eos_token_id=2,
    )
    model = transformers.BartForSequenceClassification(config).eval()
    ids = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 8, 3, 2]])
    spec = {"*embed_tokens": (40, 4, 4), "*shared": (40, 4, 4)}
    small = kr.kroneckerize(model, spec | {"*embed_positions": (32, 4, 4)})
    got, wanted = small(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    inner = small.model
    tables = (inner.encoder.embed_tokens, inner.decoder.embed_tokens)
    first, second = (t.parametrizations.weight.original0 for t in tables)
    assert first is second


@pytest.mark.parametrize("kind", ["DistilBert", "Roberta", "MPNet", "GPT2"])
def test_other_families_are_not_stored_as_dense_models(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=18,
        pad_token_id=1,
        **({"dim": 16, "hidden_dim": 32} if kind == "DistilBert" else {}),
    )
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    table = "*wte" if kind == "GPT2" else "*word_embeddings"
    small = kr.kroneckerize(model, {table: (40, 4)})
    with pytest.raises(TypeError, match="no configuration describes a compressed"):
        small.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_table_of_factors_can_be_read_and_grows():
    dense = torch.nn.Embedding(10, 6, padding_idx=0)
    table = kr.KroneckerEmbedding.from_dense(dense, (10, 3), 2)
    assert torch.equal(table.weight, table.factors.product())
    larger = table.resized(12)
    assert torch.equal(larger.weight[:10], table.weight)
    torch.testing.assert_close(larger.weight[10:], table.weight.mean(0).expand(2, -1))
    assert torch.equal(table.resized(4).weight, table.weight[:4])


# weights that are degenerate, or no numbers

DEGENERATE = {
    "ones": torch.ones(8, 12),
    "zeros": torch.zeros(8, 12),
    "one row": torch.zeros(8, 12).index_fill(0, torch.tensor([3]), 1.0),
    "rank one": torch.arange(8.0)[:, None] @ torch.arange(12.0)[None],
}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_more_products_than_a_weight_has(kind, rank):
    weight = DEGENERATE[kind]
    factors = kr.several_factors(weight, [(2, 2), (2, 3)], rank)
    assert all(f.isfinite().all() and len(f) == rank for f in factors)
    product = sum(torch.kron(torch.kron(a, b), c) for a, b, c in zip(*factors))
    if kind in ("ones", "zeros"):
        torch.testing.assert_close(product, weight, atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(value):
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8))
    layers[0].weight.data[0, 0] = value
    with pytest.raises(ValueError, match="^0: 1 of 64 entries.*not finite"):
        kr.kroneckerize(layers, {"0": (2, 2)})
    with pytest.raises(ValueError, match="not finite"):
        kr.several_factors(layers[0].weight.detach(), [(2, 2), (2, 2)])

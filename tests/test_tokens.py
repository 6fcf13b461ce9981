"Causal, sequence-to-sequence and token models: what counts, and what is stored."

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from datasets import Dataset
from helpers import go
from torch.testing import assert_close
from transformers import TrainingArguments

from kdbook.distillation import annotate
from kdbook.hf import DistillationTrainer
from kdbook.losses import soft_target_loss
from kdbook.recipes import Divergence, Recipe, Stage
from kdbook.rows import predict_logits, token_mask
from kdbook.tokens import TopK, TopKD, next_token, top_k_loss
from kdbook.training import CrossEntropy, Hinton, LogitMSE, one_stage


@pytest.fixture(autouse=True)
def no_accelerator_stays():
    "A Trainer leaves one behind, with its precision."
    yield
    AcceleratorState._reset_state(True)


WORDS = 30


def gpt(width=16, seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=16,
        n_embd=width,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def texts(count=24, prompt=3, seed=0, noise=None):
    "Rows of 6 to 10 tokens; with `noise`, other prompts before the same replies."
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, 11, (), generator=g))
        rows.append(torch.randint(2, WORDS, (length,), generator=g).tolist())
    data = Dataset.from_dict({"input_ids": rows, "asked": [prompt] * count})
    return next_token(data, prompt="asked")


def told(data, **others):
    return annotate(data, gpt(24, 5), cache=False, progress=False, **others)


OBJECTIVES = {
    "labels": CrossEntropy(),
    "plain KD": Hinton(2.0, 0.7),
    "logit MSE": LogitMSE(),
    "reverse": Divergence("reverse"),
    "top": TopKD(alpha=0.7),
}


def loss_of(objective, student, data):
    recipe = one_stage(objective, epochs=1, lr=1e-9, batch_size=len(data))
    return go(student, recipe, data).history[0]["loss"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_a_prompt_is_answered_with_does_not_count(name):
    "Other words of the teacher in the prompt: the same loss; in the reply: another."
    objective, data = OBJECTIVES[name], told(texts())
    data = annotate(data, gpt(24, 5), cache=False, progress=False, write=TopK(8))
    wanted = loss_of(objective, gpt(), data)

    def changed(places):
        def other(row):
            out = dict(row)
            for column in ("teacher_logits", "teacher_top_logprobs"):
                values = torch.tensor(row[column])
                values[places] = values[places].flip(-1)
                out[column] = values.tolist()
            return out

        return data.map(other)

    in_prompt = loss_of(objective, gpt(), changed(slice(0, 2)))
    assert in_prompt == pytest.approx(wanted, rel=1e-5)
    if name != "labels":
        in_reply = loss_of(objective, gpt(), changed(slice(3, 5)))
        assert in_reply != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_does_not_count(name):
    "A row beside a longer one, and alone: the mean of their losses."
    objective = OBJECTIVES[name]
    data = told(texts(2, prompt=0, seed=1))
    data = annotate(data, gpt(24, 5), cache=False, progress=False, write=TopK(8))
    lengths = {len(row) for row in data["input_ids"]}
    assert len(lengths) == 2
    both = loss_of(objective, gpt(), data)
    alone = [loss_of(objective, gpt(), data.select([i])) for i in range(2)]
    assert both == pytest.approx(sum(alone) / 2, rel=1e-4)


def test_kept_prompts_are_learned():
    data = texts().remove_columns(["label", "loss_mask"])
    whole = next_token(data, prompt="asked", keep_prompt=True)
    assert "loss_mask" not in whole.column_names
    assert all(
        label[0] == ids[1] for label, ids in zip(whole["label"], whole["input_ids"])
    )


def test_the_mask_of_a_model_that_writes_is_that_of_what_it_writes():
    "Both masks have one shape here, so only the name tells them apart."
    read, wrote = torch.tensor([[1, 1, 1]]), torch.tensor([[1, 0, 0]])
    batch = {
        "attention_mask": read,
        "decoder_attention_mask": wrote,
        "decoder_input_ids": wrote,
    }
    logits = torch.zeros(1, 3, 5)
    assert token_mask(logits, batch).tolist() == wrote.tolist()
    assert token_mask(logits, {"attention_mask": read}).tolist() == read.tolist()
    del batch["decoder_attention_mask"]
    assert token_mask(logits, batch) is None


def test_a_model_that_reads_and_writes():
    "T5: the teacher's word for each written token, and the loss of its own labels."
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        dropout_rate=0.0,
    )
    student = transformers.T5ForConditionalGeneration(config).eval()
    student.inputs = (
        "input_ids",
        "attention_mask",
        "decoder_input_ids",
        "decoder_attention_mask",
    )
    g = torch.Generator().manual_seed(0)
    words = lambda n: torch.randint(2, WORDS, (n,), generator=g).tolist()
    reads = [words(5), words(5), words(5)]
    writes = [words(5), words(5), words(5)]
    data = Dataset.from_dict(
        {
            "input_ids": reads,
            "decoder_input_ids": [[0, *row[:-1]] for row in writes],
            "label": writes,
        }
    )
    batch = {"input_ids": torch.tensor(reads), "labels": torch.tensor(writes)}
    with torch.no_grad():
        wanted = student(**batch).loss.item()
    recipe = one_stage(CrossEntropy(), epochs=1, lr=1e-9, batch_size=3)
    assert go(student, recipe, data).history[0]["loss"] == pytest.approx(
        wanted, rel=1e-4
    )


def test_the_top_is_cached_apart_from_all_logits(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path))
    data, teacher = texts(), gpt(24, 5)
    write = lambda k: annotate(data, teacher, progress=False, write=TopK(k))
    one = write(4)
    folders = {p.name for p in (tmp_path / "annotations").iterdir()}
    again = write(4)
    assert {p.name for p in (tmp_path / "annotations").iterdir()} == folders
    assert one["teacher_top_ids"][:] == again["teacher_top_ids"][:]
    assert one["teacher_top_logprobs"][:] == again["teacher_top_logprobs"][:]
    assert len(write(5)["teacher_top_ids"][0][0]) == 5
    assert "teacher_logits" in annotate(data, teacher, progress=False).column_names
    assert len({*(tmp_path / "annotations").iterdir()}) == 3


def test_the_top_takes_little_space():
    data = texts(40)
    places = sum(map(len, data["input_ids"]))
    size = lambda rows: rows.data.nbytes - data.data.nbytes
    top, whole = size(told(data, write=TopK(4))), size(told(data))
    assert top / places < 4 * 4 + 2 * 5 + 20  # and what a list costs
    assert whole / places > 4 * WORDS


@pytest.mark.parametrize("k", [1, 3, WORDS])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_top_by_hand(k, temperature):
    "Boxes counted one by one."
    g = torch.Generator().manual_seed(k)
    z_s, z_t = torch.randn(2, 7, WORDS, generator=g, dtype=torch.double)
    top = TopK(k, temperature)(z_t)
    found = top_k_loss(z_s, *top.values(), temperature, "none")
    for row in range(7):
        p, q = (
            (z_t[row] / temperature).softmax(-1),
            (z_s[row] / temperature).softmax(-1),
        )
        order = p.argsort(descending=True)
        value = 0.0
        for word in order[:k]:
            value += p[word] * (p[word] / q[word]).log()
        if k < WORDS:
            rest_p, rest_q = p[order[k:]].sum(), q[order[k:]].sum()
            value += rest_p * (rest_p / rest_q).log()
        assert_close(found[row], value * temperature**2, rtol=1e-4, atol=1e-6)


def test_a_gradient_through_the_top_is_that_of_the_boxes():
    g = torch.Generator().manual_seed(0)
    z_t = torch.randn(3, WORDS, generator=g, dtype=torch.double)
    z_s = torch.randn(3, WORDS, generator=g, dtype=torch.double, requires_grad=True)
    loss = lambda z: top_k_loss(z, *TopK(5)(z_t).values())
    assert torch.autograd.gradcheck(loss, (z_s,))
    whole = lambda z: soft_target_loss(z, z_t)
    (full,) = torch.autograd.grad(whole(z_s), z_s)
    top = TopK(WORDS)(z_t).values()
    (by_top,) = torch.autograd.grad(top_k_loss(z_s, *top), z_s)
    assert_close(full, by_top, rtol=1e-4, atol=1e-6)


def test_a_trainer_of_language_models(tmp_path):
    "Loss masks and top columns reach the objective through a Trainer too."
    data = told(texts(16), write=TopK(6))
    args = TrainingArguments(
        str(tmp_path),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    recipe = Recipe((Stage(TopKD(), 2, 0.1, 16, optimizer=torch.optim.SGD),))
    by_trainer = gpt()
    DistillationTrainer(by_trainer, args, recipe=recipe, train_dataset=data).train()
    by_fit = go(gpt(), recipe, data).student
    pairs = zip(by_trainer.parameters(), by_fit.parameters())
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-4


def test_tokens_with_classes():
    "Token classification: what follows the teacher, and what has no label."
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    make = transformers.BertForTokenClassification
    student, teacher = make(config).eval(), make(config).eval()
    data = texts(16).remove_columns(["label", "loss_mask"])
    labels = [
        [word % 3 if word % 2 else -100 for word in row] for row in data["input_ids"]
    ]
    data = data.add_column("label", labels)
    data = annotate(data, teacher, cache=False, progress=False)
    run = go(student, one_stage(Hinton(), epochs=40, lr=1e-2, batch_size=16), data)
    logits = predict_logits(run.student, data, progress=False)
    flat = torch.cat(logits) if isinstance(logits, list) else logits.flatten(0, 1)
    known = torch.tensor(sum(labels, []))
    right = flat.argmax(-1)[known != -100] == known[known != -100]
    assert right.float().mean() > 0.8

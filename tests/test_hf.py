"DistillationTrainer beside `fit`: the same updates, cut off at any place."

import json
import os
import shutil
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from helpers import ROOT, changed, images, net, same, weights
from tiny_text import bert, rows
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from kdbook import annealing_kd, reweighted_kd, swa
from kdbook.distillation import annotate, live
from kdbook.files import load_tensors, save_tensors
from kdbook.hf import Collator, DistillationTrainer, SWACallback
from kdbook.models import student as bert_student
from kdbook.recipes import Recipe, Stage
from kdbook.rows import copied, encode, predict_logits
from kdbook.training import (
    CrossEntropy,
    Hinton,
    LengthBuckets,
    LogitMSE,
    fit,
    mix_seed,
    one_stage,
    then_labels,
)


@pytest.fixture(autouse=True)
def no_accelerator_stays():
    "A Trainer leaves one behind, with its precision."
    yield
    AcceleratorState._reset_state(True)


def arguments(folder, **others):
    quiet = dict(report_to="none", use_cpu=True, disable_tqdm=True)
    quiet |= dict(save_strategy="no", logging_strategy="no")
    return TrainingArguments(str(folder), **(quiet | others))


class InTheOrderOfFit(DistillationTrainer):
    "Batches that `fit` would make."

    def get_train_dataloader(self):
        rows, stage = self.train_dataset, self.stage
        lengths = [len(ids) for ids in rows["input_ids"]]
        seed = mix_seed(0, self.run.stage)
        order = LengthBuckets(lengths, stage.batch_size, seed)
        keep = rows.select_columns([n for n in rows.column_names if n in self.wanted()])
        batches = torch.utils.data.DataLoader(
            keep, batch_sampler=order, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(batches)

    def wanted(self):
        self._set_signature_columns_if_needed()
        return self._signature_columns


def distance(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values())
    return max((a.float() - b.float()).abs().max().item() for a, b in pairs)


RECIPES = {
    "hinton": one_stage(Hinton(alpha=0.7), epochs=3, lr=1e-3, batch_size=16),
    "annealing": annealing_kd.recipe(2, epochs=(3, 2), lr=1e-3, batch_size=16),
    "constant rate, no clipping, SGD": Recipe(
        (
            Stage(
                LogitMSE(),
                2,
                1e-2,
                16,
                schedule="constant",
                clip=0.0,
                optimizer=torch.optim.SGD,
            ),
        )
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_as_fit_on_the_same_batches(name, tmp_path):
    train = rows(48)
    by_fit = fit(bert(), RECIPES[name], train, progress=False).student
    by_trainer = bert()
    InTheOrderOfFit(
        by_trainer, arguments(tmp_path), recipe=RECIPES[name], train_dataset=train
    ).train()
    assert distance(bert(), by_fit) > 1e-3
    assert distance(by_fit, by_trainer) < 1e-5


def test_accumulated_pieces_are_one_batch(tmp_path):
    "Pieces of equal size; rows are not shuffled, since all of them are one batch."
    train, sgd = rows(48), torch.optim.SGD
    recipe = Recipe((Stage(Hinton(), 3, 1e-1, 48, optimizer=sgd),))
    students = []
    for steps in (1, 3):
        args = arguments(tmp_path, gradient_accumulation_steps=steps)
        students.append(bert())
        trainer = DistillationTrainer(
            students[-1], args, recipe=recipe, train_dataset=train
        )
        assert trainer.train().global_step == 3
    assert distance(bert(), students[0]) > 1e-3
    assert distance(*students) < 1e-6


def two_stages():
    "RW-KD, whose weights learn as well, then labels with a mean of weights."
    meta = images(12, seed=5)
    first = reweighted_kd.recipe(meta, epochs=3, lr=1e-2, batch_size=16).stages
    second = Stage(CrossEntropy(), 3, 1e-2, 16, schedule="constant")
    return Recipe((*first, second), (swa.SWA(start=0.25),))


@pytest.mark.parametrize("stage, step", [(1, 5), (1, 9), (2, 2), (2, 7)])
def test_cut_off_anywhere_it_ends_on_the_same_bits(stage, step, tmp_path):
    args = arguments(
        tmp_path / "run", save_strategy="steps", save_steps=2, save_total_limit=2
    )
    make = lambda args, *callbacks: DistillationTrainer(
        net(),
        args,
        recipe=two_stages(),
        train_dataset=images(48),
        callbacks=[*callbacks],
    )
    whole = make(arguments(tmp_path / "whole"))
    whole.train()
    cut = make(args)
    seen = []

    class Here(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            seen.append((cut.run.stage + 1, state.global_step))
            if seen[-1] == (stage, step):
                raise KeyboardInterrupt

    cut.add_callback(Here())
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = make(args)
    again.train(resume_from_checkpoint=True)
    assert same(again.model, whole.model)


def test_nothing_to_resume_from(tmp_path):
    trainer = DistillationTrainer(
        net(), arguments(tmp_path), recipe=Hinton(), train_dataset=images()
    )
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)


def test_a_memory_that_is_gone_is_missed(tmp_path):
    args = arguments(tmp_path, save_strategy="epoch")
    make = lambda: DistillationTrainer(
        net(), args, recipe=two_stages(), train_dataset=images(48)
    )
    make().train()
    for path in tmp_path.rglob("kdbook.pt"):
        path.unlink()
    with pytest.raises(ValueError, match="does not hold what the recipe remembered"):
        make().train(resume_from_checkpoint=True)


def test_columns_and_parts(tmp_path):
    "Text goes, the teacher's column stays; parts are in the logs."
    train = rows(32).add_column("text", ["x"] * 32).add_column("more", [0] * 32)
    seen = []

    class Seeing(Hinton):
        def __call__(self, student, batch, progress):
            seen.append((sorted(batch), progress))
            loss = super().__call__(student, batch, progress)
            return replace(loss, parts={"twice": 2 * loss.total.detach()})

    args = arguments(tmp_path, logging_strategy="epoch", num_train_epochs=2)
    trainer = DistillationTrainer(
        bert(), args, recipe=Seeing(), train_dataset=train, eval_dataset=rows(16, 1)
    )
    trainer.train()
    columns = ["attention_mask", "input_ids", "labels", "row", "teacher_logits"]
    assert all(names == columns for names, _ in seen)
    assert [p.step for _, p in seen] == list(range(8))
    assert [p.epoch for _, p in seen] == [0] * 4 + [1] * 4
    assert {(p.steps, p.epochs) for _, p in seen} == {(8, 2)}
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["twice"] == pytest.approx(2 * line["loss"], rel=1e-3)


def test_evaluation_needs_no_teacher(tmp_path):
    held_out = rows(16, 1).remove_columns("teacher_logits")
    student = bert()
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path),
        recipe=Hinton(),
        train_dataset=rows(32),
        eval_dataset={"one": held_out, "two": rows(8, 2)},
        compute_metrics=lambda seen: {"rows": len(seen.predictions)},
    )
    found = trainer.evaluate()
    assert found["eval_one_rows"] == 16 and found["eval_two_rows"] == 8
    logits = torch.from_numpy(trainer.predict(held_out).predictions)
    wanted = predict_logits(student, held_out, progress=False)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(wanted, torch.tensor(held_out["label"]))
    assert found["eval_one_loss"] == pytest.approx(loss.item(), abs=1e-4)


@pytest.mark.parametrize("keep", ["all", "last"])
def test_the_best_of_all_stages_or_of_the_last(keep, tmp_path):
    "The second stage unlearns, by labels turned round."
    train, held_out = images(64), images(64, 1)
    wrong = [(label + 1) % 4 for label in train["label"]]
    train = changed(train, "label", wrong)
    recipe = then_labels(LogitMSE(), epochs=(6, 2), lr=5e-2, batch_size=16)
    args = arguments(
        tmp_path,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="right",
        greater_is_better=True,
    )
    right = lambda seen: {"right": (seen[0].argmax(-1) == seen[1]).mean().item()}
    trainer = DistillationTrainer(
        net(),
        args,
        recipe=replace(recipe, keep=keep),
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=right,
    )
    trainer.train()
    scored = [x for x in trainer.state.log_history if "eval_right" in x]
    of = lambda stage: max(x["eval_right"] for x in scored if x["stage"] == stage)
    assert of(1) > of(2)
    assert trainer.evaluate()["eval_right"] == of({"all": 1, "last": 2}[keep])


def test_rows_without_a_label_train_where_they_can(tmp_path):
    train = images(48, labelled=16)
    recipe = then_labels(LogitMSE(), epochs=(1, 1), lr=1e-2, batch_size=16)
    trainer = DistillationTrainer(
        net(), arguments(tmp_path), recipe=recipe, train_dataset=train
    )
    assert trainer.train().global_step == 1  # of the second stage: 16 rows
    assert len(trainer.train_dataset) == 48


def test_a_mean_in_any_trainer(tmp_path):
    "By hand: the mean of what the weights were after each update."
    seen = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **rest):
            seen.append(weights(model))

    args = arguments(
        tmp_path, max_steps=6, lr_scheduler_type="constant", learning_rate=1e-2
    )
    data = [{k: r[k] for k in ("input_ids", "label")} for r in rows(32)]
    student = bert()
    callbacks = [Note(), SWACallback(start=0.5)]
    Trainer(student, args, Collator(), data, callbacks=callbacks).train()
    for name, value in student.named_parameters():
        mean = torch.stack([w[name] for w in seen[2:]]).mean(0)
        torch.testing.assert_close(value.detach(), mean, rtol=0, atol=1e-6)


def test_a_mean_is_resumed(tmp_path):
    data = [{k: r[k] for k in ("input_ids", "label")} for r in rows(32)]
    args = arguments(
        tmp_path / "cut",
        max_steps=8,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=5,
    )
    make = lambda args: Trainer(
        bert(), args, Collator(), data, callbacks=[SWACallback(start=0.25)]
    )
    whole = make(replace(args, output_dir=str(tmp_path / "whole")))
    whole.train()
    make(args).train()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-8")
    again = make(args)
    again.train(resume_from_checkpoint=True)
    assert same(again.model, whole.model)


def test_a_live_teacher_says_what_a_written_one_does(tmp_path):
    teacher, train = bert(width=24, seed=3), rows(32).remove_columns("teacher_logits")
    told = annotate(train, teacher, cache=False, progress=False)
    students = [bert(), bert()]
    recipe = lambda objective: one_stage(objective, epochs=2, lr=1e-3, batch_size=16)
    data = [(recipe(live(teacher, Hinton())), train), (recipe(Hinton()), told)]
    for student, (each, data_of_it) in zip(students, data):
        DistillationTrainer(
            student, arguments(tmp_path), recipe=each, train_dataset=data_of_it
        ).train()
    assert distance(*students) < 1e-5


def test_a_live_teacher_with_other_words_is_refused():
    from argparse import Namespace

    teacher, student = bert(), bert()
    teacher.tokenizer = Namespace(vocab_size=30_522, pad_token_id=0)
    student.tokenizer = Namespace(vocab_size=40, pad_token_id=0)
    recipe = one_stage(live(teacher, Hinton()), epochs=1)
    with pytest.raises(ValueError, match="has 40 words and the teacher's 30,522"):
        fit(student, recipe, rows(16).remove_columns("teacher_logits"), progress=False)


def test_a_stream_and_rows_of_ones_own(tmp_path):
    train = rows(32)
    one, two = bert(), bert()
    args = arguments(tmp_path, max_steps=4)
    stream = train.to_iterable_dataset()
    own = [
        {k: row[k] for k in ("input_ids", "label", "teacher_logits")} for row in train
    ]
    for student, data in ((one, stream), (two, own)):
        trainer = DistillationTrainer(
            student, args, recipe=Hinton(), train_dataset=data
        )
        assert trainer.train().global_step == 4
        assert distance(student, bert()) > 1e-5


@pytest.mark.parametrize(
    "what, message",
    [
        (dict(recipe=Hinton), "recipe must be a Recipe"),
        (dict(recipe="annealing_kd"), "recipe must be a Recipe"),
        (dict(model="bert"), "model must be a PyTorch model"),
        (dict(train_dataset=rows(8).remove_columns("teacher_logits")), "annotate"),
        (dict(train_dataset=rows(8).rename_column("label", "labels")), "rename_column"),
        (dict(recipe=one_stage(Hinton(), epochs=1, batch_size=10)), "dealt out"),
    ],
)
def test_refused_before_it_begins(what, message, tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=4)
    given = dict(model=bert(), args=args, recipe=Hinton(), train_dataset=rows(8))
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(**(given | what)).train()


def test_bf16_trains(tmp_path):
    student = bert()
    args = arguments(tmp_path, bf16=True, num_train_epochs=1)
    trainer = DistillationTrainer(
        student, args, recipe=Hinton(), train_dataset=rows(16)
    )
    trainer.train()
    assert distance(student, bert()) > 1e-6
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_the_log_is_json(tmp_path):
    recipe = annealing_kd.recipe(1, epochs=(1, 1), batch_size=16)
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=1)
    trainer = DistillationTrainer(
        copied(bert()), args, recipe=recipe, train_dataset=rows(32)
    )
    trainer.train()
    assert {line["stage"] for line in trainer.state.log_history} == {1, 2}
    json.dumps(trainer.state.log_history)


def train_shared(folder, out):
    "One process, or one of two that a launcher began."
    sgd = torch.optim.SGD
    recipe = Recipe((Stage(Hinton(), 2, 0.1, 16, optimizer=sgd),))
    args = arguments(folder, ddp_find_unused_parameters=False)
    student = bert()
    trainer = DistillationTrainer(student, args, recipe=recipe, train_dataset=rows(64))
    assert trainer.train().global_step == 8
    if trainer.is_world_process_zero():
        save_tensors(dict(student.named_parameters()), Path(out))


def test_two_processes_make_the_updates_of_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    two, one = tmp_path / "two.safetensors", tmp_path / "one.safetensors"
    done = subprocess.run([*command, str(two)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    train_shared(tmp_path / "alone", one)
    both, alone = load_tensors(two), load_tensors(one)
    start = dict(bert().named_parameters())
    assert max((alone[n] - start[n]).abs().max().item() for n in alone) > 1e-2
    assert max((alone[n] - both[n]).abs().max().item() for n in alone) < 1e-5


if __name__ == "__main__":
    train_shared(*sys.argv[1:])


def by_letters():
    "A student whose tokenizer knows letters, and nothing of its teacher's words."
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *string.ascii_lowercase, " "]
    words = Tokenizer(WordLevel({x: k for k, x in enumerate(letters)}, "[UNK]"))
    words.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    model = bert(width=32)
    model.tokenizer = tokenizer
    return model


def test_teacher_and_student_have_tokenizers_of_their_own(tmp_path):
    "The text is what they share: the teacher writes beside it, the student reads it."
    rng = np.random.default_rng(0)
    words = ["yes", "no", "so"]
    texts = [" ".join(rng.choice(words, 4)) for _ in range(64)]
    labels = [int(text.count("yes") > text.count("no")) for text in texts]
    data = Dataset.from_dict({"text": texts, "label": labels})
    teacher = bert_student(layers=1, width=32, seed=0)
    told = annotate(data, teacher, cache=False, progress=False)
    assert told.column_names == ["text", "label", "teacher_logits"]
    run = fit(by_letters(), one_stage(Hinton(), epochs=2), told, progress=False)
    logits = predict_logits(run.student, data, progress=False)
    assert logits.shape == (64, 2) and not torch.equal(logits[0], logits[-1])
    trainer = DistillationTrainer(
        by_letters(), arguments(tmp_path), recipe=Hinton(), train_dataset=told
    )
    assert trainer.train().training_loss > 0
    ids = encode(data, by_letters())["input_ids"][:]
    assert [len(x) for x in ids] == [len(text) for text in texts]
    with pytest.raises(ValueError, match="tokenizer"):
        fit(by_letters(), one_stage(Hinton()), encode(told, teacher), progress=False)

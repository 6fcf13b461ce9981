"""`fit`: the same bits every time, also after being killed; what it keeps, and what it refuses."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdbook import training
from kdbook.models import image_net
from kdbook.rows import forward
from kdbook.training import (
    Callback,
    CrossEntropy,
    Hinton,
    LengthBuckets,
    LogitMSE,
    Loss,
    Progress,
    Recipe,
    Run,
    Stage,
    describe,
    fit,
    lr_factor,
    mix_seed,
    score,
    stage_rows,
)

HERE = Path(__file__).resolve().parent
FAST = settings(max_examples=60, deadline=None)


def images(rows=64, seed=0, labelled=None):
    "Sixteen pixels, four classes; the labels are a linear teacher's, all but `labelled` rows hidden."
    from datasets import Dataset

    g = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 16, generator=g)
    teacher = (
        4 * (x - 0.5) @ torch.randn(16, 4, generator=torch.Generator().manual_seed(99))
    )
    labels = teacher.argmax(-1)
    if labelled is not None:
        labels[labelled:] = -100
    return Dataset.from_dict(
        dict(
            pixel_values=x.tolist(),
            label=labels.tolist(),
            teacher_logits=teacher.tolist(),
        )
    )


class Plain(nn.Module):
    "Any module that returns a tensor will do; this one draws random numbers while it trains."

    def __init__(self, outputs=4, dropout=0.3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head, self.drop = (
                nn.Linear(16, 12),
                nn.Linear(12, outputs),
                nn.Dropout(dropout),
            )

    def forward(self, pixel_values):
        return self.head(self.drop(torch.relu(self.body(pixel_values))))


def net():
    return image_net(hidden=8, num_labels=4, pixels=16)


def one(
    objective=None,
    epochs=2,
    lr=5e-3,
    batch_size=16,
    callbacks=(),
    keep="all",
    **settings,
):
    return Recipe(
        (Stage(objective or CrossEntropy(), epochs, lr, batch_size, **settings),),
        tuple(callbacks),
        keep,
    )


def go(model, recipe, train=None, validation=None, **settings):
    return fit(
        model,
        recipe,
        images() if train is None else train,
        validation,
        progress=False,
        **settings,
    )


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, atol):
    for (k, x), y in zip(a.state_dict().items(), b.state_dict().values()):
        torch.testing.assert_close(x, y, atol=atol, rtol=0, msg=lambda m: f"{k}: {m}")


# the same bits


def test_one_seed_gives_the_same_bits_and_another_gives_others():
    runs = [go(Plain(), one(), validation=images(32, 1), seed=s) for s in (3, 3, 4)]
    assert (
        same(runs[0].student, runs[1].student)
        and runs[0].history == runs[1].history
        and runs[0].best == runs[1].best
    )
    assert not same(runs[0].student, runs[2].student)


def test_what_is_passed_in_stays_as_it_was():
    model = Plain().train()
    before, data = weights(model), images()
    columns, rows = data.column_names, data[:]
    generators = lambda: (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )
    was = generators()
    run = go(model, one(), data, data)
    assert (
        same(before, model)
        and model.training
        and all(p.grad is None for p in model.parameters())
    )
    assert generators() == was
    assert data.column_names == columns and data[:] == rows
    assert (
        run.student is not model
        and not run.student.training
        and not same(before, run.student)
    )


def test_global_generators_do_not_matter():
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        runs.append(go(Plain(), one()))
    assert same(runs[0].student, runs[1].student)


def test_a_small_bert_on_sentences():
    from kdbook.data import load_task
    from kdbook.models import student

    model, task = student(layers=1, width=32), load_task("movies")
    before = weights(model)
    rows, held_out = (
        task["train"].select(range(96)),
        task["validation"].select(range(32)),
    )
    runs = [
        go(model, one(epochs=2, lr=1e-3, batch_size=32), rows, held_out)
        for _ in range(2)
    ]
    assert same(runs[0].student, runs[1].student) and same(before, model)
    assert runs[0].student.tokenizer is model.tokenizer, (
        "tokenizers are shared, not copied"
    )
    words = runs[0].student.get_input_embeddings().weight
    assert (
        torch.equal(words, model.get_input_embeddings().weight)
        and not words.requires_grad
    ), "frozen ones stay"
    assert list(runs[0].table().columns) == [
        "stage",
        "name",
        "epoch",
        "lr",
        "loss",
        "label_loss",
        "val_score",
    ]


# killed and started again


class Watch(Callback):
    "Counts updates and sums up weights, as an averaging callback would; `_kill` ends the process at some point."

    def __init__(self, kill=None):
        self.updates, self.stages, self._sum, self._kill, self._here = (
            0,
            0,
            0.0,
            kill,
            0,
        )

    def at(self, *place):
        if self._kill == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_step(self, run, progress):
        self.updates, self._here = self.updates + 1, self._here + 1
        self._sum = self._sum + run.student.head.weight.detach().clone()
        self.at("step", self._here)

    def after_epoch(self, run, progress):
        self.at("epoch", len(run.history))

    def after_stage(self, run, progress):
        self.stages += 1
        self.at("stage", self.stages)

    def state_dict(self):
        return {"updates": self.updates, "stages": self.stages, "sum": self._sum}

    def load_state_dict(self, state):
        self.updates, self.stages, self._sum = (
            state["updates"],
            state["stages"],
            state["sum"],
        )


def two_stages(watch):
    "Three epochs of four updates, then two epochs of two."
    return Recipe(
        (Stage(LogitMSE(), 3, 5e-3, 16), Stage(CrossEntropy(), 2, 5e-3, 16)), (watch,)
    )


def kill_in(module, name, call, before=lambda *_: None):
    "Let the process die in its `call`-th call of `module.name`."
    real, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            before(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, dying)


SCENARIOS = {  # where the first process dies, the second, ...; the one after them runs to the end
    "uninterrupted": [],
    "in epochs": [("step", 2), ("step", 6), ("step", 7), ("step", 5), ("step", 1)],
    "between stages": [("epoch", 2), ("stage", 1), ("stage", 1), ("stage", 2)],
    "while writing": [("replace", 1), ("replace", 2), ("save", 2), ("replace", 3)],
}


def one_process(folder, kill):
    torch.set_num_threads(1)
    if kill and kill[0] == "replace":
        kill_in(training.os, "replace", kill[1])
    if kill and kill[0] == "save":
        kill_in(torch, "save", kill[1], lambda state, f: (f.write(b"half"), f.flush()))
    watch = Watch(kill)
    run = go(
        Plain(),
        two_stages(watch),
        images(labelled=32),
        images(32, 1),
        checkpoint=folder / "checkpoint",
    )
    torch.save(
        dict(
            weights=run.student.state_dict(),
            history=run.history,
            best=run.best,
            watch=watch.state_dict(),
            here=watch._here,
        ),
        folder / "run.pt",
    )


def forked(job, *args):
    "Run `job` in a child of this process; its exit code, or minus the signal that ended it."
    pid = os.fork()
    if not pid:
        code = 1
        try:
            job(*args)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def all_scenarios(folder):
    "Runs in a process of its own, which imports everything once, computes nothing, and so can be forked safely."
    import accelerate  # noqa: F401
    import datasets

    for name, kills in SCENARIOS.items():
        place = Path(folder) / name
        place.mkdir()
        codes = [forked(one_process, place, kill) for kill in (*kills, None)]
        (place / "codes.json").write_text(json.dumps(codes))


def in_new_process(call, *args, module="test_training", **env):
    code = f"import sys, {module}; {module}.{call}(*sys.argv[1:])"
    path = os.pathsep.join(
        [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    in_new_process("all_scenarios", folder)
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", [n for n in SCENARIOS if n != "uninterrupted"])
def test_killed_runs_end_on_the_same_bits(killed, name):
    codes = json.loads((killed / name / "codes.json").read_text())
    assert codes == [-signal.SIGKILL] * len(SCENARIOS[name]) + [0]
    whole, run = (
        torch.load(killed / n / "run.pt", weights_only=True)
        for n in ("uninterrupted", name)
    )
    assert same(whole["weights"], run["weights"])
    assert (
        run["history"] == whole["history"]
        and len(run["history"]) == 5
        and run["best"] == whole["best"]
    )
    assert torch.equal(run["watch"]["sum"], whole["watch"]["sum"]), (
        "a callback's state goes on, bit for bit"
    )
    assert (
        run["watch"]["updates"] == whole["watch"]["updates"] == whole["here"] == 16
        and run["watch"]["stages"] == 2
    )
    assert run["here"] < 16, "the last process did only what was left"
    assert [p.name for p in (killed / name / "checkpoint").iterdir()] == ["last.pt"], (
        "nothing half-written is left lying about"
    )


def test_a_finished_run_is_read_not_repeated(tmp_path):
    data = images(labelled=32)
    first = go(Plain(), two_stages(Watch()), data, images(32, 1), checkpoint=tmp_path)
    watch = Watch()
    second = go(Plain(), two_stages(watch), data, images(32, 1), checkpoint=tmp_path)
    assert (
        watch._here == 0
        and same(first.student, second.student)
        and first.history == second.history
        and first.best == second.best
    )


def test_interrupted_in_a_notebook_and_run_again(tmp_path):
    "The same cell again, with the same callback object, which has counted in the meantime."

    class Stop(Watch):
        def after_step(self, run, progress):
            super().after_step(run, progress)
            if self._here == 6:
                raise KeyboardInterrupt

    whole = go(Plain(), two_stages(Watch()), images(labelled=32))
    watch = Stop()
    with pytest.raises(KeyboardInterrupt):
        go(Plain(), two_stages(watch), images(labelled=32), checkpoint=tmp_path)
    again = go(Plain(), two_stages(watch), images(labelled=32), checkpoint=tmp_path)
    assert (
        same(whole.student, again.student)
        and whole.history == again.history
        and watch.updates == 16
    )


def test_a_function_among_the_settings_does_not_change_the_description():
    "Its address differs from process to process, and a resume would be refused."

    class Scaled(LogitMSE):
        def __init__(self, scale, schedule):
            self.scale, self.schedule = scale, schedule

    say = lambda scale: describe(one(Scaled(scale, lambda t: t)))
    kept = [
        lambda: None for _ in range(100)
    ]  # so that the second lambda gets another address
    assert say(2.0) == say(2.0) != say(3.0) and kept


@pytest.mark.parametrize(
    "what, words",
    [
        ("seed", ["seed 0", "seed 1"]),
        ("recipe", ["lr=0.005", "lr=0.006"]),
        ("objective", ["temperature=2.0", "temperature=3.0"]),
        ("labels", ["data"]),
        ("rows", ["data"]),
        ("validation", ["data"]),
        ("student", ["weights"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, what, words):
    data, held_out, model = images(), images(32, 1), net()
    go(model, one(Hinton(), epochs=1), data, held_out, checkpoint=tmp_path)
    recipe = (
        one(Hinton(), epochs=1, lr=6e-3)
        if what == "recipe"
        else one(Hinton(3.0), 1)
        if what == "objective"
        else one(Hinton(), 1)
    )
    if what == "labels":
        data = images(labelled=60)
    if what == "rows":
        data = data.select(range(63))
    if what == "validation":
        held_out = images(32, 2)
    if what == "student":
        model.head.bias.data[0] += 1
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError) as error:
        go(model, recipe, data, held_out, checkpoint=tmp_path, seed=int(what == "seed"))
    assert all(w in str(error.value) for w in (*words, str(tmp_path))), error.value
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_checkpoint_is_plain_data(tmp_path):
    "Also when the metric gives a numpy number, which pickles as code."
    recipe, data = one(callbacks=[Watch()]), images()
    run = go(
        net(),
        recipe,
        data,
        data,
        checkpoint=tmp_path,
        metric=lambda z, y: np.float64(score(z, y)),
    )
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["history"] == run.history and state["callbacks"][0]["updates"] == 8
    assert (
        go(
            net(),
            one(callbacks=[Watch()]),
            data,
            data,
            checkpoint=tmp_path,
            metric=lambda z, y: np.float64(score(z, y)),
        ).history
        == run.history
    )


# one batch, cut up in several ways


class Spy(CrossEntropy):
    "Keeps the whole gradient of the first update, and the precision the model computed in."

    def __init__(self):
        self._gradients, self._seen, self._calls = {}, set(), 0

    def __call__(self, student, batch, progress):
        self._calls += 1
        first = next(m for m in student.modules() if isinstance(m, nn.Linear))
        hooks = [
            first.register_forward_hook(lambda m, i, out: self._seen.add(out.dtype))
        ]
        if progress.step == 0:
            for name, p in student.named_parameters():
                p.register_post_accumulate_grad_hook(
                    lambda p, name=name: (
                        self._gradients.__setitem__(name, p.grad.clone())
                        if not self._done
                        else None
                    )
                )
        self._done = progress.step > 0
        loss = super().__call__(student, batch, progress)
        for hook in hooks:
            hook.remove()
        return loss


def test_micro_batches_give_the_same_gradient_and_weights():
    runs, spies = [], [Spy(), Spy()]
    for spy, pieces in zip(spies, (1, 4)):  # batches of 13: pieces of 4, 4, 4 and 1
        runs.append(
            go(
                net(),
                one(spy, batch_size=13, clip=0.0),
                images(65),
                micro_batches=pieces,
            )
        )
    assert spies[1]._calls == 4 * spies[0]._calls == 40
    for name, gradient in spies[0]._gradients.items():
        torch.testing.assert_close(
            spies[1]._gradients[name], gradient, atol=1e-6, rtol=1e-5
        )
    close(runs[0].student, runs[1].student, 1e-4)
    assert [r["loss"] for r in runs[1].history] == pytest.approx(
        [r["loss"] for r in runs[0].history], abs=1e-5
    )
    with pytest.raises(ValueError, match="micro_batches"):
        go(net(), one(), micro_batches=0)


def test_mixed_precision_is_used_and_can_change_within_a_process():
    seen = []
    for precision in ("no", "bf16", "no"):
        spy = Spy()
        run = go(net(), one(spy), validation=images(), mixed_precision=precision)
        seen.append(spy._seen)
        assert {p.dtype for p in run.student.parameters()} == {torch.float32}
        assert (
            forward(run.student, {"pixel_values": torch.rand(2, 16)}).dtype
            == torch.float32
        )
    assert seen == [{torch.float32}, {torch.bfloat16}, {torch.float32}]


# schedules and order


def test_lr_factor_by_hand():
    assert [lr_factor(s, 10, 0.2) for s in range(10)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    assert [lr_factor(s, 4, 0.25, "constant") for s in range(4)] == [0.5, 1, 1, 1]
    assert [lr_factor(s, 4, 0.0) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert lr_factor(0, 1) == 0.5 and lr_factor(4, 4) == 0


@FAST
@given(st.integers(1, 300), st.floats(0, 0.95))
def test_lr_factor_against_transformers(steps, warmup):
    "After warm-up they agree; during it, transformers starts at zero and so wastes an update, and this one does not."
    from transformers import get_linear_schedule_with_warmup

    rising = max(1, round(warmup * steps)) if warmup else 0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, rising, steps).lr_lambdas[0]
    found = [lr_factor(s, steps, warmup) for s in range(steps + 1)]
    assert found[rising:] == pytest.approx(
        [theirs(s) for s in range(rising, steps + 1)]
    )
    assert all(0 < f <= 1 for f in found[:-1]) and found[
        : min(rising + 1, steps)
    ] == sorted(found[: min(rising + 1, steps)])


def test_the_optimiser_gets_the_schedule_and_no_decay_on_biases():
    rates, groups = [], []

    class Rates(Callback):
        def after_step(self, run, progress):
            rates.append([g["lr"] for g in loops[-1].optimizer.param_groups])

        def after_stage(self, run, progress):
            groups.extend(loops[-1].optimizer.param_groups)

    loops, real = [], training._start_stage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training,
            "_start_stage",
            lambda loop, *a: (loops.append(loop), real(loop, *a))[1],
        )
        run = go(
            net(),
            one(
                epochs=2,
                lr=0.1,
                batch_size=16,
                warmup=0.25,
                weight_decay=0.3,
                callbacks=[Rates()],
            ),
        )
    assert [r[0] for r in rates] == pytest.approx(
        [0.1 * lr_factor(s, 8, 0.25) for s in range(1, 9)]
    )
    assert [r["lr"] for r in run.history] == pytest.approx(
        [0.1 * lr_factor(s, 8, 0.25) for s in (0, 4)]
    )
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [
        (0.3, {2}),
        (0.0, {1}),
    ]


@FAST
@given(
    st.lists(st.integers(1, 60), max_size=80),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_every_row_once_an_epoch(lengths, batch_size, pool, epoch):
    sampler = LengthBuckets(lengths, batch_size, seed=1, pool=pool)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(sum(batches, [])) == list(range(len(lengths))) and len(
        batches
    ) == len(sampler)
    assert sum(len(b) != batch_size for b in batches) <= 1
    assert list(sampler) == batches


def test_buckets_waste_less_padding_and_change_with_the_epoch():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 60, (640,), generator=g).tolist()

    def waste(pool):
        batches = list(LengthBuckets(lengths, 32, pool=pool))
        return (
            sum(max(lengths[i] for i in b) * len(b) for b in batches) / sum(lengths) - 1
        )

    assert waste(50) < 0.1 < 0.5 < waste(1)
    sampler, orders = LengthBuckets(lengths, 32), []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert [set(b) for b in orders[0]] != [set(b) for b in orders[1]], (
        "other batches, not only another order of them"
    )
    longest = [max(lengths[i] for i in b) for b in orders[0]]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert list(LengthBuckets(lengths, 32, seed=1)) != orders[0]


def test_mixed_seeds_differ():
    seeds = [
        mix_seed(*p)
        for p in (("a", 1, 2), ("a", 2, 1), ("b", 1, 2), ("a", 12), ("a", 1, 2, 0))
    ]
    assert (
        len(set(seeds)) == 5
        and all(0 <= s < 2**63 for s in seeds)
        and mix_seed("a", 1, 2) == seeds[0]
    )


def test_progress_goes_from_zero_to_one_in_every_stage():
    seen = []

    class See(CrossEntropy):
        def __call__(self, student, batch, progress):
            seen.append(("loss", progress))
            return super().__call__(student, batch, progress)

    class Follow(Callback):
        def after_step(self, run, progress):
            seen.append(("step", progress))

        def after_epoch(self, run, progress):
            seen.append(("epoch", progress))

        def after_stage(self, run, progress):
            seen.append(("stage", progress))

    go(
        net(),
        Recipe(
            (Stage(See(), 2, batch_size=16), Stage(See(), 3, batch_size=20)),
            (Follow(),),
        ),
        images(50),
    )
    ends = [i + 1 for i, (what, _) in enumerate(seen) if what == "stage"]
    for start, end, epochs, steps in ((0, ends[0], 2, 8), (ends[0], ends[1], 3, 9)):
        part = seen[start:end]
        t = [p.t for _, p in part]
        assert t == sorted(t) and t[0] == 0 and t[-1] == 1
        assert [p.t for what, p in part if what == "loss"] == [
            s / steps for s in range(steps)
        ]
        assert [p.t for what, p in part if what == "step"] == [
            (s + 1) / steps for s in range(steps)
        ]
        assert [p.epoch for what, p in part if what == "epoch"] == list(
            range(1, epochs + 1)
        )
        assert {(p.epochs, p.steps) for _, p in part} == {(epochs, steps)}
    assert Progress(0, 0, 0, 0).t == 0


# which rows, which weights


def test_a_stage_on_labels_skips_unlabelled_rows():
    labels = {"labelled": [], "all": []}

    class See(CrossEntropy):
        def __init__(self, rows):
            self.rows = rows

        def __call__(self, student, batch, progress):
            labels[self.rows] += batch["labels"].tolist()
            return super().__call__(student, batch, progress)

    data = images(50, labelled=20)
    go(
        net(),
        Recipe(
            (
                Stage(See("labelled"), 1, batch_size=8),
                Stage(See("all"), 1, batch_size=25),
            )
        ),
        data,
    )
    assert sorted(labels["labelled"]) == sorted(data["label"][:20]) and sorted(
        labels["all"]
    ) == sorted(data["label"])
    assert stage_rows(Stage(CrossEntropy(), 1), data) == list(range(20))


class Spoil(Callback):
    "Sets the last layer to zero after the epochs `rows` of the history."

    def __init__(self, *rows):
        self._rows, self._before = rows, {}

    def after_epoch(self, run, progress):
        row = len(run.history)
        if row in self._rows:
            run.student.head.weight.data.zero_(), run.student.head.bias.data.zero_()
        self._before[row] = weights(run.student)


def test_the_best_weights_are_kept():
    spoil, data = Spoil(3), images()
    run = go(net(), one(epochs=4, lr=2e-2, callbacks=[spoil]), data, data)
    assert run.history[3]["val_score"] < run.history[2]["val_score"]
    assert run.best == dict(
        stage=0, epoch=3, row=2, score=run.history[2]["val_score"], replaced=False
    ) and same(run.student, spoil._before[2])
    logits = forward(run.student, {"pixel_values": torch.tensor(data["pixel_values"])})
    assert score(logits, torch.tensor(data["label"])) == pytest.approx(
        run.best["score"]
    )


def test_without_validation_the_last_weights_are_kept():
    spoil = Spoil(1)
    run = go(net(), one(epochs=2, callbacks=[spoil]))
    assert (
        run.best is None
        and same(run.student, spoil._before[1])
        and [r["val_score"] for r in run.history] == [None, None]
    )


@pytest.mark.parametrize("keep, stage", [("all", 0), ("last", 1)])
def test_keep_says_which_stages_count(keep, stage):
    spoil, data = Spoil(3, 4), images()
    stages = (Stage(CrossEntropy(), 3, 2e-2, 16), Stage(CrossEntropy(), 2, 1e-3, 16))
    run = go(net(), Recipe(stages, (spoil,), keep), data, data)
    assert run.best["stage"] == stage and same(
        run.student, spoil._before[run.best["row"]]
    )
    assert run.best["row"] == (2 if keep == "all" else 3)


@pytest.mark.parametrize("reload_best, row", [(True, 1), (False, 2)])
def test_a_stage_begins_where_the_one_before_ended(reload_best, row):
    starts = []

    class See(CrossEntropy):
        def __call__(self, student, batch, progress):
            if progress.step == 0:
                starts.append(weights(student))
            return super().__call__(student, batch, progress)

    spoil, data = Spoil(2), images()
    go(
        net(),
        Recipe(
            (
                Stage(See(), 3, 2e-2, 16, reload_best=reload_best),
                Stage(See(), 1, 1e-3, 16),
            ),
            (spoil,),
        ),
        data,
        data,
    )
    assert same(starts[1], spoil._before[row])


def test_validation_happens_when_asked_and_at_the_end():
    run = go(net(), one(epochs=5, validate_every=2), validation=images(32, 1))
    assert [r["val_score"] is not None for r in run.history] == [
        False,
        True,
        False,
        True,
        True,
    ]


def test_regression():
    from datasets import Dataset

    g = torch.Generator().manual_seed(0)
    x = torch.rand(64, 16, generator=g)
    data = Dataset.from_dict(
        dict(pixel_values=x.tolist(), label=(x.sum(-1) - 8).tolist())
    )
    run = go(Plain(1, 0.0), one(epochs=30, lr=1e-2), data, data)
    assert run.history[-1]["loss"] < 0.5 * run.history[0]["loss"]
    assert (
        run.best["score"] == max(r["val_score"] for r in run.history)
        and -0.5 < run.best["score"] < 0
    ), "a constant reaches -1.3"
    assert score(
        torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([1.5, 2.0, -100.0])
    ) == pytest.approx(-0.125)


def test_score_counts_labelled_rows():
    assert score(
        torch.tensor([[2.0, 1], [0, 1], [5, 0], [1, 0]]), torch.tensor([0, 1, 1, -100])
    ) == pytest.approx(2 / 3)


# what cannot work


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(epochs=0), ["epochs", "0"]),
        (dict(batch_size=0), ["batch_size", "0"]),
        (dict(lr=0.0), ["lr", "0"]),
        (dict(lr=-1e-3), ["lr", "-0.001"]),
        (dict(warmup=1.0), ["warmup", "1.0"]),
        (dict(warmup=-0.1), ["warmup", "-0.1"]),
        (dict(schedule="cosine"), ["schedule", "cosine"]),
        (dict(validate_every=0), ["validate_every", "0"]),
        (dict(clip=-1.0), ["clip", "-1.0"]),
        (dict(weight_decay=-0.1), ["weight_decay", "-0.1"]),
        (dict(keep="best"), ["keep", "best"]),
    ],
)
def test_impossible_settings_are_named(settings, words):
    with pytest.raises(ValueError) as error:
        go(net(), one(**{"name": "first", **settings}))
    assert all(
        w in str(error.value)
        for w in (*words, *(["first"] if "keep" not in settings else []))
    ), error.value


def test_missing_columns_and_rows_are_named_before_training():
    data = images()
    for model in (
        net(),
        nn.Identity(),
    ):  # the second could not be trained at all: the data is checked first
        with pytest.raises(ValueError, match="'LogitMSE'.*'teacher_logits'.*annotate"):
            go(model, one(LogitMSE()), data.remove_columns("teacher_logits"))
    with pytest.raises(ValueError, match="'label'"):
        go(net(), one(), data.remove_columns("label"))
    with pytest.raises(ValueError, match="labelled rows.*64"):
        go(net(), one(), images(labelled=0))
    with pytest.raises(ValueError, match="no rows"):
        go(net(), one(), data.select([]))
    for held_out in (data.remove_columns("label"), images(labelled=0), data.select([])):
        with pytest.raises(ValueError, match="validation"):
            go(net(), one(), data, held_out)
    with pytest.raises(ValueError, match="no stages"):
        go(net(), Recipe(()))


def test_a_frozen_student_is_named():
    model = Plain()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="Plain.*requires_grad"):
        go(model, one())


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    class Breaks(CrossEntropy):
        def __call__(self, student, batch, progress):
            loss = super().__call__(student, batch, progress)
            return Loss(loss.total * (float("nan") if progress.epoch == 1 else 1))

    with pytest.raises(FloatingPointError, match="Breaks.*epoch 2.*nan.*0.005"):
        go(net(), one(Breaks(), epochs=3), checkpoint=tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["epoch"] == 1 and all(
        v.isfinite().all() for v in state["model"].values()
    )


def test_training_works():
    "A run returns a student that learned something, in a table with one row an epoch."
    data = images(200)
    run = go(net(), one(Hinton(), epochs=10, lr=2e-2), data, images(100, 1))
    assert isinstance(run, Run) and run.best["score"] > 0.6 and len(run.table()) == 10
    assert run.history[-1]["loss"] < 0.7 * run.history[0]["loss"] and all(
        math.isfinite(r["loss"]) for r in run.history
    )

"""Every recipe is called alike; callbacks see, stop and remember what they should."""

import importlib
import inspect
import math
from functools import partial

import pytest
import torch
from helpers import go, images, net, same
from house import TECHNIQUES

from kdbook import combined_kd, noisy_label_kd
from kdbook.recipes import (
    Callback,
    CrossEntropy,
    Hinton,
    LogitMSE,
    Recipe,
    Stage,
    alone_recipe,
    one_stage,
    then_labels,
)
from kdbook.swa import SWA
from kdbook.training import EarlyStopping

SHARED = ("epochs", "lr", "batch_size", "label_validate_every")
HOMES = ("recipes", *TECHNIQUES)


def recipes():
    "Name and function of every recipe of the book."
    for home in HOMES:
        module = importlib.import_module(f"kdbook.{home}")
        for name, call in sorted(vars(module).items()):
            if name.endswith("recipe") and inspect.isfunction(call):
                if call.__module__ == module.__name__:
                    yield f"{home}.{name}", call


RECIPES = dict(recipes())
each_recipe = pytest.mark.parametrize("name", RECIPES)


def by_kind(call):
    "Parameters of a recipe: its own, and the shared ones."
    own, shared = {}, {}
    for name, p in inspect.signature(call).parameters.items():
        (shared if p.kind is p.KEYWORD_ONLY else own)[name] = p.default
    return own, shared


def test_they_are_all_there():
    modules = {name.split(".")[0] for name in RECIPES}
    assert modules == {*HOMES} - {"kronecker"}, "kronecker's are kronecker_bert's"
    assert len(RECIPES) == 15


@each_recipe
def test_every_recipe_is_called_alike(name):
    own, shared = by_kind(RECIPES[name])
    assert tuple(shared) == SHARED
    epochs = shared.pop("epochs")
    assert epochs in (18, (14, 4))
    assert shared == {"lr": 5e-4, "batch_size": 32, "label_validate_every": 1}
    assert not any(p is inspect.Parameter.empty for p in own.values())
    made = RECIPES[name]()
    stages = [epochs] if isinstance(epochs, int) else list(epochs)
    assert [stage.epochs for stage in made.stages] == stages


@each_recipe
def test_shared_arguments_mean_the_same_everywhere(name):
    two = isinstance(by_kind(RECIPES[name])[1]["epochs"], tuple)
    given = dict(lr=1e-3, batch_size=8, label_validate_every=3)
    made = RECIPES[name](epochs=(20, 6) if two else 20, **given)
    assert [s.epochs for s in made.stages] == ([20, 6] if two else [20])
    assert {(s.lr, s.batch_size) for s in made.stages} == {(1e-3, 8)}
    assert made.stages[-1].validate_every == 3
    assert all(s.validate_every == 1 for s in made.stages[:-1])


# what a recipe calls by another name, or makes from several arguments
OTHER_NAMES = {"lr": "generator_lr"}
MADE_HERE = {"adversary"}
# options of the label loss belong to an objective that is made by hand
MADE_HERE |= {"label_smoothing", "class_weights"}


@each_recipe
def test_every_argument_of_the_objective_is_reachable(name):
    own, _ = by_kind(RECIPES[name])
    things = [stage.objective for stage in RECIPES[name]().stages]
    things += [t.adversary for t in things if hasattr(t, "adversary")]
    things = [type(t) for t in things]
    if name.startswith("noisy_label_kd"):
        things = [*noisy_label_kd._MITIGATIONS.values()]
    for kind in things:
        for argument in inspect.signature(kind).parameters:
            known = {argument, OTHER_NAMES.get(argument)}
            assert argument in MADE_HERE or known & {*own}, f"{kind}: {argument}"


def numbers(call):
    "Arguments with a number as their default, or a pair of them."
    for name, p in inspect.signature(call).parameters.items():
        ends = p.default if isinstance(p.default, tuple) else (p.default,)
        plain = [type(end) in (int, float) for end in ends]
        if plain and all(plain):
            yield name, p.default


def objectives():
    for home in HOMES:
        module = importlib.import_module(f"kdbook.{home}")
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and hasattr(kind, "requires"):
                if kind.__module__ == module.__name__ and name != "Objective":
                    yield f"{home}.{name}", kind


CALLS = {**RECIPES, **dict(objectives()), "Stage": partial(Stage, CrossEntropy(), 1)}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "one"], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_no_number_is_refused_where_it_is_given(name, bad):
    "Not an hour later: NaN and infinity pass most comparisons."
    call = CALLS[name]
    if "adversary" in inspect.signature(call).parameters:
        call = partial(call, combined_kd.AdversarialStep())
    for argument, default in numbers(call):
        values = [(bad, 1), (1, bad)] if isinstance(default, tuple) else [bad]
        for value in values:
            with pytest.raises(ValueError, match=argument.split("_", 1)[-1]):
                call(**{argument: value})


def test_an_argument_of_another_mitigation_is_refused():
    with pytest.raises(ValueError, match="'select' has no beta"):
        noisy_label_kd.recipe("select", beta=0.5)
    made = noisy_label_kd.recipe("small_loss", share=0.5)
    assert made.stages[0].objective.share == 0.5


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Recipe(Stage(CrossEntropy(), 1)), r"\(stage,\)"),
        (lambda: Recipe([CrossEntropy()]), "made of stages"),
        (lambda: Recipe(()), "no stages"),
        (lambda: Stage(CrossEntropy, 1), "make an instance"),
        (lambda: Stage("labels", 1), "'labels'"),
        (lambda: alone_recipe(epochs=(3, 1)), "epochs must be a whole number"),
        (lambda: then_labels(LogitMSE(), epochs=3), "must be a pair"),
    ],
)
def test_what_is_no_recipe_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_list_of_stages_will_do():
    made = Recipe([Stage(CrossEntropy(), 1)], [Watch()])
    assert isinstance(made.stages, tuple) and isinstance(made.callbacks, tuple)


# callbacks


class Watch(Callback):
    "Keeps what it sees; stops where it is told to."

    def __init__(self, stop=None, what="run"):
        self._stop, self._what = stop, what
        self._seen = []

    def see(self, run, *what):
        self._seen.append(what)
        if what == self._stop:
            run.stop(self._what)

    def before_stage(self, run, progress):
        self.see(run, "stage", run.stage)

    def after_step(self, run, progress):
        self._loss = run.loss.item()
        self.see(run, "step", run.stage, progress.step)

    def after_epoch(self, run, progress):
        self.see(run, "epoch", run.stage, progress.epoch)

    def after_validation(self, run, row):
        assert run.history[-1] is row and row["val_score"] is not None
        self.see(run, "validation", run.stage, row["epoch"])

    def after_stage(self, run, progress):
        self.see(run, "end", run.stage)


def watched(watch, **stage):
    "Three epochs of four updates, then two of four."
    made = then_labels(LogitMSE(), epochs=(3, 2), lr=1e-2, batch_size=16)
    return Recipe(made.stages, (watch,))


def test_hooks_are_called_in_order():
    watch = Watch()
    go(net(), watched(watch), images(), images(32, 1))
    epoch = lambda stage, n: [
        *(("step", stage, 4 * (n - 1) + i) for i in (1, 2, 3, 4)),
        ("epoch", stage, n),
        ("validation", stage, n),
    ]
    assert watch._seen == [
        ("stage", 0),
        *epoch(0, 1),
        *epoch(0, 2),
        *epoch(0, 3),
        ("end", 0),
        ("stage", 1),
        *epoch(1, 1),
        *epoch(1, 2),
        ("end", 1),
    ]


def test_a_callback_sees_the_loss_of_every_update():
    losses = []

    class Losses(Callback):
        def after_step(self, run, progress):
            losses.append(float(run.loss))
            assert "label_loss" in run.parts and "loss" not in run.parts

    for pieces in (1, 4):
        losses.clear()
        made = Recipe(alone_recipe(epochs=2, batch_size=16).stages, (Losses(),))
        run = go(net(), made, images(), micro_batches=pieces)
        means = [sum(losses[i : i + 4]) / 4 for i in (0, 4)]
        assert means == pytest.approx([row["loss"] for row in run.history])


STOPS = {
    "in an epoch": (("step", 0, 6), 2),
    "after an epoch": (("epoch", 0, 2), 2),
    "after a validation": (("validation", 0, 2), 2),
    "in the last stage": (("step", 1, 1), 4),
}


@pytest.mark.parametrize("at, rows", STOPS.values(), ids=STOPS)
def test_a_stopped_run_ends_on_its_best_weights(tmp_path, at, rows):
    data, held_out = images(), images(32, 1)
    run = go(net(), watched(Watch(at)), data, held_out, checkpoint=tmp_path)
    assert len(run.history) == rows
    assert all(row["val_score"] is not None for row in run.history)
    assert run.best["score"] == max(row["val_score"] for row in run.history)
    assert not run.student.training
    # and stays stopped
    watch = Watch(at)
    again = go(net(), watched(watch), data, held_out, checkpoint=tmp_path)
    assert watch._seen == [("end", at[1])]
    assert again.history == run.history and same(again.student, run.student)


def test_a_stopped_stage_is_followed_by_the_next():
    at, data, held_out = ("validation", 0, 1), images(), images(32, 1)
    run = go(net(), watched(Watch(at, "stage")), data, held_out)
    assert [row["stage"] for row in run.history] == [0, 1, 1]
    short = then_labels(LogitMSE(), epochs=(3, 2), lr=1e-2, batch_size=16)
    full = go(net(), short, data, held_out)
    assert run.history[0] == full.history[0]


def test_a_stopped_stage_goes_on_after_a_kill(tmp_path):
    "Killed in the second stage, the first one is not begun again."

    class Dies(Watch):
        def after_epoch(self, run, progress):
            super().after_epoch(run, progress)
            if run.stage == 1 and self._dies:
                raise KeyboardInterrupt

    data, at = images(), ("step", 0, 5)
    whole = go(net(), watched(Watch(at, "stage")), data)
    watch = Dies(at, "stage")
    for watch._dies in (True, False):
        try:
            run = go(net(), watched(watch), data, checkpoint=tmp_path)
        except KeyboardInterrupt:
            assert watch._dies
    assert run.history == whole.history and same(run.student, whole.student)


# objectives with a state


class Remembers(LogitMSE):
    "Halves its weight with every epoch that it has seen begin."

    def __init__(self):
        super().__init__()
        self.weight = 1.0

    def __call__(self, student, batch, progress):
        if progress.step % 4 == 0:
            self.weight /= 2
        loss = super().__call__(student, batch, progress)
        loss.total = loss.total * self.weight
        return loss

    def before_stage(self, run, progress):
        self.weight = 1.0

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight = state["weight"]


class Kills(Callback):
    def __init__(self, at):
        self._at = at

    def after_step(self, run, progress):
        if progress.step == self._at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("twice", [False, True], ids=["once", "passed twice"])
def test_an_objective_with_a_state_is_saved_by_fit(tmp_path, twice):
    data, made = images(), lambda: one_stage(Remembers(), epochs=4, batch_size=16)
    whole = go(net(), made(), data)
    recipe = made()
    objective = recipe.stages[0].objective
    for at in (10, None):
        others = (objective, Kills(at)) if twice else (Kills(at),)
        try:
            run = go(net(), Recipe(recipe.stages, others), data, checkpoint=tmp_path)
        except KeyboardInterrupt:
            assert at == 10
    assert run.history == whole.history and same(run.student, whole.student)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert [s for s in state["callbacks"] if s] == [{"weight": 1 / 16}]
    # the same recipe run again begins anew
    assert go(net(), recipe, data).history == whole.history


# optimisers and schedules of the reader's own


def half(progress):
    return 0.5 if progress.epoch else 1.0


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_own_optimiser_and_schedule_resume_to_the_same_bits(tmp_path, epochs):
    sgd = partial(torch.optim.SGD, momentum=0.9)
    stage = Stage(Hinton(), 3, 0.1, 16, warmup=0, schedule=half, optimizer=sgd)
    data, held_out = images(), images(32, 1)
    whole = go(net(), Recipe((stage,)), data, held_out)
    assert [row["lr"] for row in whole.history] == [0.1, 0.05, 0.05]
    adam = go(net(), Recipe((Stage(Hinton(), 3, 0.1, 16),)), data, held_out)
    assert not same(adam.student, whole.student)
    for at in (4 * epochs + 2, None):
        made = Recipe((stage,), (Kills(at),))
        try:
            run = go(net(), made, data, held_out, checkpoint=tmp_path)
        except KeyboardInterrupt:
            assert at
    assert run.history == whole.history and same(run.student, whole.student)


# the label term


@pytest.mark.parametrize("per", ["row", "labelled"])
def test_few_labels_in_pieces_are_the_same_update(per):
    "By default; a mean over the labelled rows of a piece is another mean."
    data = images(labelled=6)
    one = one_stage(Hinton(per=per), epochs=2, lr=1e-2, batch_size=16)
    whole, pieces = (go(net(), one, data, micro_batches=m) for m in (1, 4))
    losses = [[row["loss"] for row in run.history] for run in (whole, pieces)]
    if per == "row":
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        for name, value in whole.student.state_dict().items():
            other = pieces.student.state_dict()[name]
            torch.testing.assert_close(other, value, atol=1e-4, rtol=0)
    else:
        assert losses[0] != pytest.approx(losses[1], abs=1e-3)


# what a reader's objective may get wrong


class Parts(LogitMSE):
    def __init__(self, **parts):
        super().__init__()
        self._parts = parts

    def __call__(self, student, batch, progress):
        loss = super().__call__(student, batch, progress)
        there = {name: part(progress) for name, part in self._parts.items()}
        loss.parts.update({name: value for name, value in there.items() if value})
        return loss


def test_a_part_that_is_not_always_there_is_a_mean_of_what_there_is():
    first = lambda progress: 4.0 * (progress.step % 4 == 0)
    run = go(net(), one_stage(Parts(rare=first), epochs=2, batch_size=16))
    assert [row["rare"] for row in run.history] == [4.0, 4.0]


@pytest.mark.parametrize("name", ["loss", "epoch", "lr", "val_score"])
def test_a_part_does_not_overwrite_the_history(name):
    with pytest.raises(ValueError, match=f"cannot be named '{name}'"):
        go(net(), one_stage(Parts(**{name: lambda progress: 1.0}), epochs=1))


def test_requires_is_a_tuple():
    class Forgot(LogitMSE):
        requires = "label"

    with pytest.raises(ValueError, match=r"\('label',\)"):
        go(net(), one_stage(Forgot(), epochs=1))


def test_without_validation_a_mean_counts_in_its_own_stage_alone():
    stages = then_labels(LogitMSE(), epochs=(2, 3), lr=1e-2, batch_size=16).stages
    plain = go(net(), Recipe(stages))
    run = go(net(), Recipe(stages, (SWA(stage=0),)))
    assert not same(run.student, plain.student)  # it began elsewhere
    last = {}

    class Last(Callback):
        def after_stage(self, run, progress):
            last.update({k: v.clone() for k, v in run.student.state_dict().items()})

    run = go(net(), Recipe(stages, (SWA(stage=0), Last())))
    assert same(run.student, last)


@pytest.mark.parametrize("every", [1, 3])
def test_early_stopping_counts_the_validations_of_its_stage(every):
    "A better first stage does not count, and neither do epochs between validations."
    scores = iter([0.5, 0.9, 0.1, 0.3, 0.2, 0.2, 0.4])
    first = Stage(LogitMSE(), 1, 1e-3, 16)
    second = Stage(CrossEntropy(), 40, 1e-3, 16, validate_every=every)
    made = Recipe((first, second), (EarlyStopping(patience=2),))
    run = go(net(), made, images(), images(16), metric=lambda *_: next(scores))
    seen = [r["val_score"] for r in run.history if r["val_score"] is not None]
    assert seen == [0.9, 0.1, 0.3, 0.2, 0.2]
    assert len(run.history) == 1 + 4 * every

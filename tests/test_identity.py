"""What is told apart, what is the same, and what is refused under which name."""

import importlib
import re
import subprocess
import sys
import threading
from enum import Enum
from functools import cache, partial
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import ROOT, go, images, net, same
from torch import nn

from kdbook.distillation import annotate
from kdbook.identity import digest, identity
from kdbook.kronecker_bert import TaskKD
from kdbook.training import Callback, CrossEntropy, LogitMSE, Recipe, Stage


class Teacher(nn.Module):
    "The same weights every time, and something besides."

    def __init__(self, **besides):
        super().__init__()
        self.net = nn.Linear(16, 4)
        nn.init.constant_(self.net.weight, 0.1)
        nn.init.constant_(self.net.bias, 0.2)
        for name, value in besides.items():
            setattr(self, name, value)

    def forward(self, pixel_values):
        return self.net(pixel_values)


def with_buffer(value, persistent):
    teacher = Teacher()
    teacher.register_buffer("offset", torch.tensor(value), persistent=persistent)
    return teacher


def with_weight(value, name="bias"):
    teacher = Teacher()
    getattr(teacher.net, name).data[0] = value
    return teacher


def defined(body, base="object"):
    "A class as a notebook cell defines it."
    place = {"nn": nn, "Teacher": Teacher, "__name__": "__main__"}
    exec(f"class Made({base}):\n    {body}", place)
    return place["Made"]()


def closure(value):
    return lambda x: x + value


def long(at):
    values = torch.zeros(5000)
    values[at] = 1
    return values


class Plain:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Says(Plain):
    def settings(self):
        return {"alpha": self.alpha}


class Inherits(Says):
    pass


class Slots:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


class MoreSlots(Slots):
    __slots__ = ()


def layer(body):
    class Layer(nn.Module):
        forward = body

    return Layer


Up, Down = layer(lambda self, x: x + 1), layer(lambda self, x: x - 1)


def hooked(hook):
    model = Teacher()
    model.register_forward_hook(hook)
    return model


def globally(value):
    return eval("lambda x: x + offset", {"offset": value, "__name__": "__main__"})


def traced(function):
    return torch.jit.trace(Act(function), torch.zeros(2))


class Act(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def quantised(value):
    model = nn.Sequential(nn.Linear(2, 2))
    nn.init.constant_(model[0].weight, value)
    nn.init.zeros_(model[0].bias)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


OTHERS = {
    "weights": (with_weight(1.0), with_weight(2.0)),
    "the last bit": (
        with_weight(1.0),
        with_weight(float(np.nextafter(1, 2, dtype="f"))),
    ),
    "buffer": (with_buffer(1.0, True), with_buffer(2.0, True)),
    "buffer that is not saved": (with_buffer(1.0, False), with_buffer(2.0, False)),
    "attribute": (Teacher(scale=1.0), Teacher(scale=2.0)),
    "private attribute": (Teacher(_scale=1.0), Teacher(_scale=2.0)),
    "list": (Teacher(layers=[1, 2]), Teacher(layers=[2, 1])),
    "nested": (Teacher(how={"a": [1]}), Teacher(how={"a": [2]})),
    "activation": (Teacher(act=torch.relu), Teacher(act=torch.tanh)),
    "activation object": (Teacher(act=nn.ReLU()), Teacher(act=nn.LeakyReLU(0.1))),
    "argument of a layer": (
        Teacher(act=nn.LeakyReLU(0.2)),
        Teacher(act=nn.LeakyReLU(0.1)),
    ),
    "lambda": (Teacher(act=lambda x: x), Teacher(act=lambda x: -x)),
    "long tensor": (Plain(x=long(2000)), Plain(x=long(3000))),
    "dtype": (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "array": (np.zeros(3), np.ones(3)),
    "forward": (
        defined("def forward(self, x): return x", "nn.Module"),
        defined("def forward(self, x): return -x", "nn.Module"),
    ),
    "constant of a class": (
        defined("scale = 1", "nn.Module"),
        defined("scale = 2", "nn.Module"),
    ),
    "inherited forward": (
        defined("pass", "Teacher"),
        defined(
            "def forward(self, pixel_values): return -self.net(pixel_values)", "Teacher"
        ),
    ),
    "closure": (closure(1), closure(2)),
    "default": (lambda x, y=1: x, lambda x, y=2: x),
    "partial": (partial(torch.pow, exponent=2), partial(torch.pow, exponent=3)),
    "position in a partial": (partial(max, 1), partial(max, 2)),
    "bound method": (Says(alpha=1).settings, Says(alpha=2).settings),
    "settings": (Says(alpha=1), Says(alpha=2)),
    "attribute besides inherited settings": (
        Inherits(alpha=1, gamma=1),
        Inherits(alpha=1, gamma=2),
    ),
    "live teacher": (Says(alpha=1, t=Teacher(a=1)), Says(alpha=1, t=Teacher(a=2))),
    "list of teachers": (
        Says(alpha=1, t=[Teacher(a=1)]),
        Says(alpha=1, t=[Teacher(a=2)]),
    ),
    "slots": (Slots(1), Slots(2)),
    "hook": (hooked(lambda *_: None), hooked(lambda *_: print(end=""))),
    "order of a dictionary": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "key of a dictionary": ({1: 0}, {"1": 0}),
    "set": ({1}, {"1"}),
    "private attribute of a helper": (Teacher(f=Plain(_a=1)), Teacher(f=Plain(_a=2))),
    "global of a function": (globally(torch.zeros(2)), globally(torch.ones(2))),
    "enum": (Enum("E", {"A": 1}).A, Enum("E", {"A": 2}).A),
    "pattern": (re.compile("a"), re.compile("b")),
    "cached function": (cache(lambda x: x), cache(lambda x: -x)),
    "table of a class": (defined("t = {1: 2}"), defined("t = {1: 3}")),
    "inherited slots": (MoreSlots(1), MoreSlots(2)),
    "which part is which": (nn.Sequential(Up(), Down()), nn.Sequential(Down(), Up())),
    "traced": (traced(torch.relu), traced(torch.tanh)),
    "quantised": (quantised(1.0), quantised(2.0)),
    "nan": (float("nan"), float("inf")),
    "kind": (1, "1"),
    "class": (CrossEntropy(), LogitMSE()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_two_things_have_two_identities(name):
    one, other = OTHERS[name]
    assert digest(one) != digest(other)
    assert digest(one) == digest(one)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, pixel_values):
        self.calls += 1
        return pixel_values


class CountsUpdates(Callback):
    def __init__(self):
        self.updates = 0

    def after_step(self, run, progress):
        self.updates += 1


def used(thing):
    if isinstance(thing, nn.Module):
        thing(torch.zeros(1))
    else:
        thing.after_step(None, None)
    return thing


SAME = {
    "made again": lambda: Teacher(scale=1.0),
    "defined again": lambda: defined("def forward(self, x): return x", "nn.Module"),
    "lambda": lambda: lambda x: x + 1,
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_thing_made_again_is_the_same(name):
    assert digest(SAME[name]()) == digest(SAME[name]())


def test_use_does_not_make_it_another():
    for kind in (Counts, CountsUpdates):
        assert digest(kind()) == digest(used(kind()))
    model = Teacher()
    before = digest(model)
    model.train()
    model(torch.zeros(1, 16)).sum().backward()
    assert digest(model) == before


@pytest.mark.parametrize("hidden", [threading.Lock(), iter([1]), (i for i in "a")])
def test_what_hides_is_refused_with_its_place(hidden):
    with pytest.raises(ValueError, match=r"it\.how\['x'\] is a .*key="):
        identity(Plain(how={"x": hidden}))
    assert digest(Says(alpha=1, _how=hidden)) == digest(Says(alpha=1, _how=None))
    known = [digest(Plain(how=hidden), key=key) for key in "aab"]
    assert known[0] == known[1] != known[2]


def test_a_thing_that_holds_itself_comes_to_an_end():
    ring, row, model = Plain(a=1), [1], Teacher()
    ring.itself = ring
    row.append(row)
    model.helper = Plain(method=model.forward, model=model)
    for each in (ring, row, model):
        assert digest(each) == digest(each)


def test_what_is_used_often_is_read_once():
    thing = Plain(a=1)
    for _ in range(60):  # as a tree: 2 ** 60 things
        thing = Plain(left=thing, right=thing)
    assert digest(thing) == digest(thing)


@pytest.mark.parametrize(
    "values", [torch.zeros(2, 2).to_sparse(), torch.ones(1).to("meta")]
)
def test_a_tensor_without_plain_values_is_refused_with_its_place(values):
    with pytest.raises(ValueError, match=r"it\.how is a tensor.*key="):
        identity(Plain(how=values))


def test_a_module_of_the_reader_s_counts_with_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number in (1, 2):
        path = tmp_path / f"mine_{number}.py"
        path.write_text(f"def by(x): return x * {number}")
        module = importlib.import_module(path.stem)
        module.__name__ = "mine"
        place = {"mine": module, "__name__": "__main__"}
        found.append(digest(eval("lambda x: mine.by(x)", place)))
    assert found[0] != found[1]


def test_packages_of_another_environment_are_installed_too(tmp_path, monkeypatch):
    there = tmp_path / "lib" / "site-packages"
    there.mkdir(parents=True)
    (there / "lent.py").write_text("def f(x):\n    return x\n")
    monkeypatch.syspath_prepend(there)
    lent = importlib.import_module("lent")
    assert identity(lent) == "lent" and identity(lent.f) == "lent.f"


def test_a_module_made_in_memory_is_known_by_its_name():
    module = ModuleType("made_up")
    module.__file__ = "nowhere.py"
    assert identity(module) == "made_up"


def test_what_a_callback_collects_is_not_what_it_is():
    one, other = (Plain(seen=seen, every=2) for seen in ([], [1, 2]))
    kept = [
        identity(each, in_use=True) for each in (one, other, Plain(seen=[], every=3))
    ]
    assert kept[0] == kept[1] != kept[2]


CODE = """
import sys, torch
sys.path.insert(0, "tests")
from test_identity import OTHERS
from kdbook.identity import digest
print(*(digest(one) for one, _ in OTHERS.values()))
"""


def test_another_process_gives_the_same():
    runs = [
        subprocess.run(
            [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True
        )
        for _ in range(2)
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) > 900


# annotate


@pytest.mark.parametrize(
    "name", [n for n in OTHERS if isinstance(OTHERS[n][0], Teacher)]
)
def test_another_teacher_does_not_read_the_cache(name, tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path))
    folders = lambda: len(list((tmp_path / "annotations").iterdir()))
    for number, teacher in enumerate(OTHERS[name], 1):
        for _ in range(2):
            annotate(images(), teacher, progress=False)
            assert folders() == number


def test_a_teacher_that_hides_something_is_not_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path))
    teacher = Teacher(lock=threading.Lock())
    with pytest.warns(
        UserWarning, match=r"not cached, since the model\.lock is a lock"
    ):
        annotate(images(), teacher, progress=False)
    assert not (tmp_path / "annotations").exists()
    annotate(images(), teacher, progress=False, key="mine")
    assert (tmp_path / "annotations").exists()


# fit


class Interrupts(Callback):
    "Raises after the first epoch, where it is told to."

    def __init__(self, now):
        self._now = now

    def after_step(self, run, progress):
        if self._now and progress.epoch == 1:
            raise KeyboardInterrupt


class Held(LogitMSE):
    "An objective of the reader's, with a live teacher and a number of its own."

    def __init__(self, teacher=None, gamma=1.0):
        super().__init__()
        self.teacher, self.gamma = teacher, gamma


def louder(logits, labels):
    return -(logits.argmax(-1) != labels).float().mean().item()


CHANGES = {
    "live teacher": dict(objective=lambda: Held(Teacher(scale=2.0))),
    "its weights": dict(objective=lambda: Held(with_weight(9.0))),
    "a number": dict(objective=lambda: Held(gamma=2.0)),
    "schedule": dict(schedule=lambda progress: 0.5, part="the schedule of stage 1"),
    "optimiser": dict(
        optimizer=partial(torch.optim.SGD, momentum=0.5),
        part="the optimizer of stage 1",
    ),
    "metric": dict(metric=lambda logits, labels: 0.0, part="the metric"),
}
FIRST = dict(
    objective=lambda: Held(Teacher(scale=1.0)),
    schedule=lambda progress: 1.0,
    optimizer=partial(torch.optim.SGD, momentum=0.9),
    metric=louder,
)


def run(folder, now, key="", **changes):
    given = FIRST | changes
    stage = Stage(
        given["objective"](),
        3,
        1e-2,
        16,
        schedule=given["schedule"],
        optimizer=given["optimizer"],
    )
    return go(
        net(),
        Recipe((stage,), (Interrupts(now),)),
        images(),
        images(32, 1),
        metric=given["metric"],
        checkpoint=folder,
        key=key,
    )


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_go_on_with_something_else(name, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, True)
    part = CHANGES[name].get("part", "the objective of stage 1")
    with pytest.raises(ValueError, match=f"another run .* differs in {part}: give"):
        run(tmp_path, False, **CHANGES[name])
    assert len(run(tmp_path, False).history) == 3


def test_the_book_s_live_teachers_are_known(tmp_path):
    one, other = (TaskKD(Teacher(scale=s)) for s in (1.0, 2.0))
    assert digest(one) != digest(other)
    assert digest(one) == digest(TaskKD(Teacher(scale=1.0)))


def test_a_callback_that_hides_something_needs_a_key(tmp_path):
    class Logs(Interrupts):
        def __init__(self, now):
            super().__init__(now)
            self.lock = threading.Lock()

    def attempt(now, **arguments):
        stage = Stage(CrossEntropy(), 3, 1e-2, 16)
        return go(net(), Recipe((stage,), (Logs(now),)), images(), **arguments)

    assert len(attempt(False).history) == 3  # without a checkpoint nobody asks
    with pytest.raises(ValueError, match=r"callback .*Logs\.lock is a lock.*key="):
        attempt(False, checkpoint=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        attempt(True, checkpoint=tmp_path, key="mine")
    resumed = attempt(False, checkpoint=tmp_path, key="mine")
    assert same(resumed.student, attempt(False).student)

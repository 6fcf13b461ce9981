"The runner: equal budgets, records that are whole, runs that resume, settings that are not mixed."

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdbook.benchmark as b
import kdbook.methods as m
from kdbook.training import CrossEntropy, Recipe, Stage

ROOT = Path(__file__).resolve().parent.parent
TINY = b.Setting(
    "tiny", "digits", 40, 20, (4, 1), 20, (1e-2, 3e-2), tau_max=2, student=(16,)
)
AS_LONG = [
    m for m in b.METHODS if m.endswith("_as_long")
]  # their budget is another method's time, not its updates
METHODS = [
    m for m in b.METHODS if b.METHODS[m].recipe and m not in AS_LONG
]  # the others take their recipe from a candidate
REAL = [(s, m) for s in b.SETTINGS for m in METHODS]


def quick_teacher(task, *trails):
    "An untrained net, whose trail says the same at every place."
    from kdbook.models import image_net

    net = image_net(hidden=8, seed=0)
    for trail in trails:
        for step in trail.steps:
            trail.keep(net, step)
    return net


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A setting of twenty updates, a teacher that needs no training, and a folder of its own."
    monkeypatch.setenv("KDBOOK_RESULTS", str(tmp_path))
    monkeypatch.setitem(b.SETTINGS, "tiny", TINY)
    monkeypatch.setattr(b, "digits_teacher", quick_teacher)
    threads = torch.get_num_threads()
    b._task.cache_clear()
    yield tmp_path / "ladder" / "tiny"
    b._task.cache_clear()
    torch.set_num_threads(threads)


# -- equal budgets -------------------------------------------------------------------------------------------------


def stage_rows(stage, setting):
    return setting.labelled if stage.objective.rows == "labelled" else setting.rows


@pytest.mark.parametrize("name, method", REAL)
def test_every_method_has_the_budget_of_its_setting(name, method):
    "Counted from the recipe: passes x batches, and looks at the validation rows."
    setting = b.SETTINGS[name]
    recipe = b.METHODS[method].recipe(setting, 1e-3)
    updates = sum(
        stage.epochs * -(-stage_rows(stage, setting) // stage.batch_size)
        for stage in recipe.stages
    )
    looks = sum(-(-stage.epochs // stage.validate_every) for stage in recipe.stages)
    assert updates == setting.updates
    assert looks == sum(setting.epochs)
    assert {stage.batch_size for stage in recipe.stages} == {setting.batch_size}
    assert {stage.lr for stage in recipe.stages} == {1e-3}


@pytest.mark.parametrize(
    "name, method", [(s, method) for s in m.TIMES for method in AS_LONG]
)
def test_a_method_that_takes_anothers_time_does_so(name, method):
    "Its updates are the measured ratio of the two methods' costs, to an epoch and a tenth; it is validated as often as all others, and less than twice as often."
    setting = b.SETTINGS[name]
    key, other = {"annealing_as_long": ("combined", "combined_kd")}.get(
        method, (method.removesuffix("_as_long"), "glitter")
    )
    if key not in m.TIMES[name]:
        pytest.skip("not run in this setting")
    first, *rest = b.METHODS[method].recipe(setting, 1e-3).stages
    plain = setting.epochs[0] if rest else sum(setting.epochs)
    ratio = json.loads(
        (ROOT / "results" / "study" / "cost" / f"{name}.json").read_text()
    )["ratio"]
    measured = ratio[other] / ratio["annealing_kd" if key == "combined" else key]
    assert abs(first.epochs - measured * plain) <= max(1, 0.1 * first.epochs)
    looks = -(-first.epochs // first.validate_every)
    assert (
        min(plain, first.epochs) <= looks < 2 * plain
    )  # whole epochs between looks; what is left over is to this method's advantage


def test_two_stage_methods_split_the_budget_alike():
    for setting in b.SETTINGS.values():
        two = [b.METHODS[m].recipe(setting, 1e-3) for m in METHODS]
        splits = {
            tuple(stage.epochs for stage in recipe.stages)
            for recipe in two
            if len(recipe.stages) == 2
        }
        assert len(splits) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(0, 30),
    st.integers(1, 10),
)
def test_any_setting_that_can_be_made_is_fair(
    passes, batches, batch_size, first, second
):
    labelled = batches * batch_size
    tau_max = 2
    setting = b.Setting(
        "",
        "digits",
        passes * labelled,
        labelled,
        (first + tau_max, second),
        batch_size,
        (1e-3,),
        tau_max,
    )
    for method in map(b.METHODS.get, METHODS):
        stages = method.recipe(setting, 1e-3).stages
        assert (
            sum(s.epochs * -(-stage_rows(s, setting) // s.batch_size) for s in stages)
            == setting.updates
        )
        assert sum(-(-s.epochs // s.validate_every) for s in stages) == sum(
            setting.epochs
        )


@pytest.mark.parametrize(
    "change", [dict(rows=50), dict(labelled=30), dict(batch_size=15)]
)
def test_a_setting_that_would_be_unfair_cannot_be_made(change):
    with pytest.raises(ValueError, match="multiple of"):
        replace(TINY, **change)


def test_settings_and_seeds_are_sane():
    assert not set(b.SEARCH_SEEDS) & set(range(50)), "reported seeds are 0, 1, 2, ..."
    for setting in b.SETTINGS.values():
        assert (
            list(setting.lrs) == sorted(set(setting.lrs))
            and setting.epochs[0] >= setting.tau_max
        )
    for ladder in m.LADDERS.values():
        assert set(m.BASELINES) <= set(ladder) <= set(b.METHODS)


# -- rows ----------------------------------------------------------------------------------------------------------


def test_training_rows_depend_on_the_seed_alone(tiny):
    _, train, _ = b._task("digits")
    rows = b.training_rows(train, TINY, 0)
    assert len(rows) == 40 and sum(label != -100 for label in rows["label"]) == 20
    known = dict(zip(train["idx"], train["label"]))
    assert all(
        label in (-100, known[i]) for i, label in zip(rows["idx"], rows["label"])
    )
    again, other = b.training_rows(train, TINY, 0), b.training_rows(train, TINY, 1)
    assert (
        again["idx"] == rows["idx"]
        and again["label"] == rows["label"]
        and other["idx"] != rows["idx"]
    )


# -- records -------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=300))
def test_pack_and_unpack(values):
    text = b.pack(np.array(values, int))
    assert json.loads(json.dumps(text)) == text
    assert b.unpack(text).tolist() == values


def test_write_json_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    b.write_json({"a": 1}, path)
    with pytest.raises(TypeError):
        b.write_json({"a": object()}, path)
    monkeypatch.setattr(
        b.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError):
        b.write_json({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.glob("*.json")] == ["x.json"]


def test_a_record_holds_what_its_use_needs(tiny):
    record = b.run_one("tiny", "alone", 0.01, 0)
    assert json.loads(
        b.record_path("tiny", "alone", 0.01, 0).read_text()
    ) == json.loads(json.dumps(record))
    assert set(record["splits"]) == {"validation", "test"}
    assert {"commit", "python", "torch", "seconds", "best", "settings"} <= set(record)
    labels = np.array(b._task("digits")[0]["test"]["label"])
    assert (
        b.unpack(record["splits"]["test"]["predictions"]) == labels
    ).mean() == pytest.approx(record["splits"]["test"]["accuracy"], abs=1e-6)


@pytest.mark.parametrize("seed", b.SEARCH_SEEDS)
def test_search_runs_carry_no_test_scores(tiny, seed, monkeypatch):
    scored = []
    monkeypatch.setattr(b, "predict_logits", lambda *a, **k: scored.append(a))
    record = b.run_one("tiny", "hinton", 0.01, seed)
    assert not scored, "a search run must not even compute test answers"
    assert (
        "splits" not in record
        and "teacher_agreement" not in record
        and "predictions" not in json.dumps(record)
    )


def test_same_run_same_answers(tiny):
    first, second = (b.run_one("tiny", "annealing_kd", 0.01, 0) for _ in range(2))
    assert first["splits"] == second["splits"] and first["best"] == second["best"]


# -- the search ----------------------------------------------------------------------------------------------------


def search(monkeypatch, scores):
    monkeypatch.setattr(
        b,
        "read_record",
        lambda setting, method, lr, seed: (
            scores.get((lr, seed)) and {"best": {"score": scores[lr, seed]}}
        ),
    )
    return b.chosen_lr("tiny", "alone")


def test_the_rule_of_the_search(monkeypatch):
    monkeypatch.setitem(b.SETTINGS, "tiny", replace(TINY, lrs=(3e-2, 1e-2, 1e-3)))
    monkeypatch.setattr(b, "SEARCH_SEEDS", (100, 101))
    one, two = b.SEARCH_SEEDS
    flat = {(lr, seed): 0.8 for lr in (3e-2, 1e-2, 1e-3) for seed in (one, two)}
    assert search(monkeypatch, flat) == 1e-3, (
        "the smaller rate on a tie, in whatever order they are listed"
    )
    assert search(monkeypatch, flat | {(1e-2, two): 0.9}) == 1e-2
    assert search(monkeypatch, flat | {(1e-2, one): 0.9, (3e-2, two): 0.9}) == 1e-2
    assert (
        search(monkeypatch, {k: v for k, v in flat.items() if k != (3e-2, two)}) is None
    )


def test_a_single_rate_needs_no_search(tiny, monkeypatch):
    monkeypatch.setitem(b.SETTINGS, "single", replace(TINY, lrs=(1e-2,)))
    b.run_ladder("hinton", ["single"], seeds=2)
    assert [b.chosen_lr("single", method) for method in m.BASELINES] == [1e-2] * 3
    names = [p.name for p in (tiny.parent / "single").glob("*.json")]
    assert len(names) == 3 * 2 and not any(
        f"seed{s}" in n for n in names for s in b.SEARCH_SEEDS
    )


# -- the ladder ----------------------------------------------------------------------------------------------------


def test_ladder_resumes_and_refuses_to_mix(tiny, monkeypatch):
    b.run_ladder("hinton", ["tiny"], seeds=2)
    before = {p: p.stat().st_mtime_ns for p in tiny.glob("*.json")}
    assert len(before) == 3 * (2 * len(b.SEARCH_SEEDS) + 2)
    b.run_ladder("hinton", ["tiny"], seeds=2)
    assert {p: p.stat().st_mtime_ns for p in tiny.glob("*.json")} == before, (
        "nothing was missing"
    )
    b.run_ladder("hinton", ["tiny"], seeds=3)
    assert len(list(tiny.glob("*.json"))) == len(before) + 3

    rungs = b.ladder("tiny", "hinton")
    assert [r.method for r in rungs] == [*m.BASELINES, "teacher"] and rungs[
        0
    ].seeds == 3
    assert rungs[0].gain == b.paired_difference(
        b.correct("tiny", "alone"), b.correct("tiny", "hinton")
    )
    assert list(b.ladder_table("tiny", "hinton").index) == [
        "student alone",
        "plain KD",
        "logit MSE",
        "teacher",
    ]
    with pytest.raises(
        FileNotFoundError,
        match="python -m kdbook ladder logit_mse_labels --setting tiny",
    ):
        b.ladder_table("tiny", "annealing_kd")

    for name, other in [
        ("epochs", replace(TINY, epochs=(4, 2))),
        ("batch", replace(TINY, batch_size=10)),
        ("title", replace(TINY, title="other")),
    ]:
        monkeypatch.setitem(b.SETTINGS, "tiny", other)
        with pytest.raises(ValueError, match="was run with setting="):
            b.run_ladder("hinton", ["tiny"], seeds=3)
    monkeypatch.setitem(b.SETTINGS, "tiny", TINY)
    stage = lambda s, lr: Recipe(
        (Stage(CrossEntropy(), sum(s.epochs) * 2, lr, s.batch_size, weight_decay=0.5),)
    )
    monkeypatch.setitem(b.METHODS, "alone", m.Method("student alone", stage))
    with pytest.raises(ValueError, match="was run with recipe="):
        b.ladder_table("tiny", "hinton")


def test_a_method_is_one_line(tiny, monkeypatch):
    monkeypatch.setitem(b.METHODS, "mine", m.Method("mine", b.METHODS["hinton"].recipe))
    b.run_ladder("mine", ["tiny"], seeds=2)
    assert m.ladder_of("mine") == (*m.BASELINES, "mine")
    rung = b.ladder("tiny", "mine")[3]
    assert (rung.method, rung.gain.mean) == ("mine", 0.0), (
        "plain KD under another name gains nothing"
    )


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: m.ladder_of("anealing"), "annealing_kd"),
        (lambda: b.setting_of("tiniest"), "digits"),
        (lambda: b.run_ladder("alone", ["digits"], seeds=1), "seeds"),
        (lambda: b.run_ladder("alone", ["digits"], jobs=0), "jobs"),
    ],
)
def test_mistakes_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# -- violence ------------------------------------------------------------------------------------------------------

DRIVER = """
import os, sys, time
from pathlib import Path
import kdbook.benchmark as b
from kdbook.models import image_net

FOLDER = Path(os.environ["KDBOOK_RESULTS"])
b.SETTINGS["tiny"] = b.Setting("tiny", "digits", 40, 20, (4, 1), 20, (1e-2, 3e-2), tau_max=2, student=(16,))
b.SEARCH_SEEDS = (100, 101)

def quick_teacher(task, *trails):
    net = image_net(hidden=8, seed=0)
    for trail in trails:
        for step in trail.steps: trail.keep(net, step)
    return net

b.digits_teacher = quick_teacher
rows_of = b.training_rows

def slowly(train, setting, seed):
    (FOLDER / f"worker-{os.getpid()}").touch()
    if seed == int(os.environ.get("FAIL", -1)): raise RuntimeError("made to fail")
    time.sleep(float(os.environ.get("DELAY", 0)))
    return rows_of(train, setting, seed)

b.training_rows = slowly
if __name__ == "__main__":
    b.run_ladder("hinton", ["tiny"], seeds=3, jobs=int(sys.argv[1]))
"""


def driver(folder, jobs, **env):
    folder.mkdir(exist_ok=True)
    script = folder / "driver.py"
    script.write_text(DRIVER)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(script), str(jobs)],
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "KDBOOK_RESULTS": str(folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
            **env,
        },
    )


def records(folder):
    return {
        p.name: json.loads(p.read_text())
        for p in sorted((folder / "ladder" / "tiny").glob("*.json"))
    }


def lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(
        f"/proc/{pid}/stat"
    )  # where nobody collects orphans they stay as zombies
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def wait_for(what, seconds):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX thing")
def test_killed_in_the_middle_and_called_again(tmp_path):
    killed, smooth = tmp_path / "killed", tmp_path / "smooth"
    run = driver(killed, 2, DELAY="0.5")
    wait_for(
        lambda: (
            run.poll() is not None
            or len(list((killed / "ladder" / "tiny").glob("*.json"))) >= 3
        ),
        240,
    )
    assert run.poll() is None, run.stderr.read()
    run.send_signal(signal.SIGKILL)
    run.wait()
    workers = [int(p.name.split("-")[1]) for p in killed.glob("worker-*")]
    wait_for(lambda: not any(map(lives, workers)), 30)  # no orphans that wait for ever
    kept = records(killed)  # every file is whole JSON
    assert 3 <= len(kept) < 21
    times = {n: (killed / "ladder" / "tiny" / n).stat().st_mtime_ns for n in kept}

    again = driver(killed, 2)
    assert again.wait(300) == 0, again.stderr.read()
    done = records(killed)
    assert len(done) == 3 * (2 * 2 + 3), "none missing, none twice"
    assert {
        n: (killed / "ladder" / "tiny" / n).stat().st_mtime_ns for n in kept
    } == times, "what was there is not run again"
    named = {
        (r["settings"]["method"], r["settings"]["lr"], r["settings"]["seed"])
        for r in done.values()
    }
    assert len(named) == len(done)

    calm = driver(smooth, 1)
    assert calm.wait(300) == 0, calm.stderr.read()
    expected = records(smooth)
    assert done.keys() == expected.keys()
    for name in done:
        assert (
            done[name].get("splits") == expected[name].get("splits")
            and done[name]["best"] == expected[name]["best"]
        ), name


def test_a_failing_run_is_told_at_once(tmp_path):
    "The error comes up without waiting for all the other runs."
    run = driver(tmp_path / "failing", 2, FAIL="101", DELAY="2")
    _, errors = run.communicate(timeout=300)
    assert run.returncode != 0 and "made to fail" in errors
    assert len(records(tmp_path / "failing")) < 6, (
        "the rest of the search was cancelled"
    )

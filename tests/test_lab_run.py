"The runner: equal budgets, lines that are whole, runs that resume, never mixed."

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

import kdbook.files as files
import kdbook.lab.run as run
import kdbook.lab.teachers as teachers
from kdbook.evaluation import paired_difference
from kdbook.lab.methods import PLANS, Plan, looks_of, updates_of
from kdbook.records import ladder as tables
from kdbook.records import settings as names
from kdbook.records.settings import METHODS, SETTINGS, Method, Setting
from kdbook.records.store import (
    append_record,
    ladder_file,
    read_lines,
    read_record,
    study_records,
    unpack,
)
from kdbook.training import CrossEntropy, Recipe, Stage

TINY = Setting(
    "tiny", "digits", 40, 20, (4, 1), 20, (1e-2, 3e-2), tau_max=2, student=(16,)
)
# their budget is another method's time, not its updates
SAME_TIME = [m for m in PLANS if m.endswith("_same_time")]
EQUAL = [m for m in PLANS if m not in SAME_TIME]
REAL = [(s, m) for s in SETTINGS for m in EQUAL]


def quick_teacher(task, *trails):
    "An untrained net, whose trail says the same at every place."
    from kdbook.models import image_net

    net = image_net(hidden=8, seed=0)
    for trail in trails:
        for step in trail.steps:
            trail.keep(net, step)
    return net


@pytest.fixture(scope="module")
def quick_digits():
    "Digits with what the quick teacher writes, made once for all tests here."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "digits_teacher", quick_teacher)
        teachers.task_rows.cache_clear()
        yield teachers.task_rows("digits")
    teachers.task_rows.cache_clear()


@pytest.fixture
def tiny(tmp_path, monkeypatch, quick_digits):
    "A setting of twenty updates, a teacher without training, a folder of its own."
    monkeypatch.setenv("KDBOOK_RESULTS", str(tmp_path))
    monkeypatch.setitem(SETTINGS, "tiny", TINY)
    threads = torch.get_num_threads()
    yield ladder_file("tiny")
    torch.set_num_threads(threads)


# -- equal budgets ---------------------------------------------------------------------


@pytest.mark.parametrize("name, method", REAL)
def test_every_method_has_the_budget_of_its_setting(name, method):
    "Counted from the recipe: passes x batches, and looks at the validation rows."
    setting = SETTINGS[name]
    recipe = PLANS[method].recipe(setting, 1e-3)
    assert sum(updates_of(recipe, setting)) == setting.updates
    assert looks_of(recipe) == sum(setting.epochs)
    assert {stage.batch_size for stage in recipe.stages} == {setting.batch_size}
    assert {stage.lr for stage in recipe.stages} == {1e-3}


@pytest.mark.parametrize(
    "name, method", [(s, method) for s in names.TIMES for method in SAME_TIME]
)
def test_a_method_that_takes_anothers_time_does_so(name, method):
    """Its updates are the measured ratio of the two methods' costs, to an epoch and a
    tenth; it is validated as often as all others, and less than twice as often."""
    setting = SETTINGS[name]
    key, other = {"annealing_same_time": ("combined", "combined_kd")}.get(
        method, (method.removesuffix("_same_time"), "glitter")
    )
    if key not in names.TIMES[name]:
        pytest.skip("not run in this setting")
    first, *rest = PLANS[method].recipe(setting, 1e-3).stages
    plain = setting.epochs[0] if rest else sum(setting.epochs)
    ratio = {r["setting"]: r["ratio"] for r in study_records("cost")}[name]
    measured = ratio[other] / ratio["annealing_kd" if key == "combined" else key]
    assert abs(first.epochs - measured * plain) <= max(1, 0.1 * first.epochs)
    # whole epochs between looks; what is left over is to this method's advantage
    looks = -(-first.epochs // first.validate_every)
    assert min(plain, first.epochs) <= looks < 2 * plain


def test_two_stage_methods_split_the_budget_alike():
    for setting in SETTINGS.values():
        recipes = [PLANS[m].recipe(setting, 1e-3) for m in EQUAL]
        two = [recipe.stages for recipe in recipes if len(recipe.stages) == 2]
        assert len({tuple(stage.epochs for stage in stages) for stages in two}) == 1


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
    labelled, tau_max = batches * batch_size, 2
    rows, epochs = passes * labelled, (first + tau_max, second)
    setting = Setting(
        "", "digits", rows, labelled, epochs, batch_size, (1e-3,), tau_max
    )
    for method in EQUAL:
        recipe = PLANS[method].recipe(setting, 1e-3)
        assert sum(updates_of(recipe, setting)) == setting.updates
        assert looks_of(recipe) == sum(setting.epochs)


@pytest.mark.parametrize(
    "change", [dict(rows=50), dict(labelled=30), dict(batch_size=15)]
)
def test_a_setting_that_would_be_unfair_cannot_be_made(change):
    with pytest.raises(ValueError, match="multiple of"):
        replace(TINY, **change)


def test_settings_and_seeds_are_sane():
    reported = set(range(50))
    assert not set(names.SEARCH_SEEDS) & reported, "reported seeds are 0, 1, 2, ..."
    for setting in SETTINGS.values():
        assert list(setting.lrs) == sorted(set(setting.lrs))
        assert setting.epochs[0] >= setting.tau_max
    for ladder in names.LADDERS.values():
        assert set(names.BASELINES) <= set(ladder) <= set(METHODS)


# -- rows ------------------------------------------------------------------------------


def test_training_rows_depend_on_the_seed_alone(tiny):
    _, train, _ = teachers.task_rows("digits")
    rows = teachers.training_rows(train, TINY, 0)
    assert len(rows) == 40 and sum(label != -100 for label in rows["label"]) == 20
    known = dict(zip(train["idx"], train["label"]))
    for idx, label in zip(rows["idx"], rows["label"]):
        assert label in (-100, known[idx])
    again, other = (teachers.training_rows(train, TINY, seed) for seed in (0, 1))
    assert again["idx"] == rows["idx"] and again["label"] == rows["label"]
    assert other["idx"] != rows["idx"]


def test_other_rows_than_those_of_the_records_are_refused(tiny):
    teachers.write_rows("digits")
    task = teachers.task_rows("digits")[0]
    teachers.check_rows("digits", task)
    task = {**task, "test": task["test"].select(range(5))}
    with pytest.raises(ValueError, match="test_labels of task 'digits'.*have changed"):
        teachers.check_rows("digits", task)


# -- records ---------------------------------------------------------------------------


def test_a_record_holds_what_its_use_needs(tiny):
    record = run.run_one("tiny", "alone", 0.01, 0)
    assert json.loads(json.dumps(record)) == record, "JSON, and nothing is lost in it"
    assert set(record["splits"]) == {"validation", "test"}
    assert {"provenance", "seconds", "best", "recipe", "method", "lr"} <= set(record)
    assert {"commit", "python", "torch"} <= set(record["provenance"])
    labels = np.array(teachers.task_rows("digits")[0]["test"]["label"])
    scores = record["splits"]["test"]
    right = (unpack(scores["predictions"]) == labels).mean()
    assert right == pytest.approx(scores["accuracy"], abs=1e-6)


@pytest.mark.parametrize("seed", names.SEARCH_SEEDS)
def test_search_runs_carry_no_test_scores(tiny, seed, monkeypatch):
    scored = []
    monkeypatch.setattr(run, "predict_logits", lambda *a, **k: scored.append(a))
    record = run.run_one("tiny", "hinton", 0.01, seed)
    assert not scored, "a search run must not even compute test answers"
    assert "splits" not in record and "teacher_agreement" not in record
    assert "predictions" not in json.dumps(record)


def test_same_run_same_answers(tiny):
    first, second = (run.run_one("tiny", "annealing_kd", 0.01, 0) for _ in range(2))
    assert first["splits"] == second["splits"] and first["best"] == second["best"]


def test_a_full_cache_warns_and_the_record_is_still_made(tiny, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "save_tensors", full)
    with pytest.warns(UserWarning, match="No space left.*"):
        record = run.run_one("tiny", "alone", 0.01, 0)
    assert "splits" in record


def test_a_kept_student_is_the_reported_one_or_refused(tiny, own_cache, monkeypatch):
    monkeypatch.setattr(run, "chosen_lr", lambda *_: 0.01)
    trained, _ = run.train_one("tiny", "hinton", 0.01, 0)
    kept = run.kept_student("tiny", "hinton", 0)
    for name, weight in trained.student.named_parameters():
        assert torch.equal(weight, dict(kept.named_parameters())[name]), name
    (path,) = own_cache.rglob("hinton-*.safetensors")
    weights = {f"model.{n}": p.data for n, p in kept.named_parameters()}
    files.save_tensors(weights, path)
    with pytest.raises(ValueError, match="another model; hinton may train more"):
        run.kept_student("tiny", "hinton", 0)


# -- the records and today's code ------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_records_are_those_of_todays_recipes(name):
    "The one place where every stored run is compared with what would be run today."
    assert run.outdated(name)[:3] == []


def stored_settings(recipe):
    return json.loads(json.dumps(recipe.settings()))


def test_a_new_option_and_a_changed_default_leave_old_lines_alone(monkeypatch):
    recipe = run.recipe_of("digits", "hinton", 0.01)
    old = stored_settings(recipe)
    del old["stages"][0]["clip"], old["stages"][0]["objective"]["alpha"]
    assert run.differences(old, recipe) == [], "older than both options"
    changed = replace(recipe.stages[0], clip=2.0)
    found = run.differences(old, Recipe((changed,)))
    assert found == ["recipe.stages[0].clip: 1.0, now 2.0"]
    monkeypatch.setitem(run.INTRODUCED, ("Stage", "clip"), 2.0)
    assert run.differences(old, Recipe((changed,))) == [], "introduced as 2"
    assert run.differences(stored_settings(recipe), recipe) == [], "written is written"


def test_a_new_field_of_settings_leaves_old_headers_alone(tiny, monkeypatch):
    header = run.header_of("tiny")
    del header["setting"]["tau_max"]  # as if it were older than that field
    monkeypatch.setitem(SETTINGS, "tiny", replace(TINY, tau_max=7))
    append_record(tiny, {"method": "alone", "lr": 1, "seed": 0}, header)
    assert run.setting_differences("tiny") == [], "7 is the default"
    monkeypatch.setitem(SETTINGS, "tiny", TINY)
    assert run.setting_differences("tiny") == ["tau_max 7, now 2"]


def test_a_setting_that_is_not_run_yet_is_not_outdated(tiny):
    assert run.outdated("tiny") == []


def test_what_is_gone_and_what_is_another_class_is_told():
    recipe = run.recipe_of("digits", "swa", 0.01)
    old = stored_settings(recipe)
    old["stages"][0]["momentum"] = 0.9
    old["callbacks"][0]["name"] = "EMA"
    assert run.differences(old, recipe) == [
        "recipe.stages[0].momentum: no longer a setting",
        "recipe.callbacks[0]: EMA, now SWA",
    ]
    assert run.differences({**old, "callbacks": []}, recipe)


# -- the search ------------------------------------------------------------------------


def search(monkeypatch, scores):
    record = lambda setting, method, lr, seed: (
        scores.get((lr, seed)) and {"best": {"score": scores[lr, seed]}}
    )
    monkeypatch.setattr(tables, "read_record", record)
    return tables.chosen_lr("tiny", "alone")


def test_the_rule_of_the_search(monkeypatch):
    rates = (3e-2, 1e-2, 1e-3)
    monkeypatch.setitem(SETTINGS, "tiny", replace(TINY, lrs=rates))
    one, two = tables.SEARCH_SEEDS
    flat = {(lr, seed): 0.8 for lr in rates for seed in (one, two)}
    assert search(monkeypatch, flat) == 1e-3, "the smaller rate on a tie"
    assert search(monkeypatch, flat | {(1e-2, two): 0.9}) == 1e-2
    assert search(monkeypatch, flat | {(1e-2, one): 0.9, (3e-2, two): 0.9}) == 1e-2
    unfinished = {key: score for key, score in flat.items() if key != (3e-2, two)}
    assert search(monkeypatch, unfinished) is None


def test_a_rate_that_diverges_is_recorded_and_the_search_goes_on(tiny, monkeypatch):
    monkeypatch.setitem(SETTINGS, "tiny", replace(TINY, lrs=(1e-2, 1e30)))
    run.run_ladder("hinton", ["tiny"], seeds=2)
    wild = read_record("tiny", "logit_mse", 1e30, names.SEARCH_SEEDS[0])
    assert wild["best"] is None and "the loss became" in wild["diverged"]
    assert tables.chosen_lr("tiny", "logit_mse") == 1e-2
    before = ladder_file("tiny").read_bytes()
    run.run_ladder("hinton", ["tiny"], seeds=2)
    assert ladder_file("tiny").read_bytes() == before, "it is not tried again"


def test_a_single_rate_needs_no_search(tiny, monkeypatch):
    monkeypatch.setitem(SETTINGS, "single", replace(TINY, lrs=(1e-2,)))
    run.run_ladder("hinton", ["single"], seeds=2)
    for method in names.BASELINES:
        assert tables.chosen_lr("single", method) == 1e-2
    seeds = [r["seed"] for _, r in read_lines(ladder_file("single"))[1:]]
    assert sorted(seeds) == [0, 0, 0, 1, 1, 1]


# -- the ladder ------------------------------------------------------------------------


def test_ladder_resumes_and_tables_read_it(tiny):
    run.run_ladder("hinton", ["tiny"], seeds=2)
    before = tiny.read_bytes()
    assert len(read_lines(tiny)) - 1 == 3 * (2 * len(names.SEARCH_SEEDS) + 2)
    run.run_ladder("hinton", ["tiny"], seeds=2)
    assert tiny.read_bytes() == before, "nothing was missing"
    run.run_ladder("hinton", ["tiny"], seeds=3)
    assert tiny.read_bytes().startswith(before), "lines are added, none is touched"
    teachers.write_rows("digits")
    teachers.write_digits_record()
    rungs = tables.ladder("tiny", "hinton")
    assert [r.method for r in rungs] == [*names.BASELINES, "teacher"]
    assert (rungs[0].seeds, rungs[0].pairs) == (3, 3)
    right = [tables.correct("tiny", method) for method in ("alone", "hinton")]
    assert rungs[0].gain == paired_difference(*right)
    titles = ["student alone", "plain KD", "logit MSE", "teacher"]
    assert list(tables.ladder_table("tiny", "hinton").index) == titles
    command = "python -m kdbook ladder logit_mse_labels --setting tiny"
    with pytest.raises(FileNotFoundError, match=command):
        tables.ladder_table("tiny", "annealing_kd")


def test_ladder_refuses_to_mix(tiny, monkeypatch):
    monkeypatch.setitem(SETTINGS, "tiny", replace(TINY, lrs=(1e-2,)))
    run.run_ladder("hinton", ["tiny"], seeds=2)
    for change, what in [
        (dict(epochs=(4, 2)), "epochs: .* now"),
        (dict(batch_size=10), "batch_size: 20, now 10"),
    ]:
        other = replace(TINY, lrs=(1e-2,), **change)
        monkeypatch.setitem(SETTINGS, "tiny", other)
        with pytest.raises(ValueError, match=what):
            run.run_ladder("hinton", ["tiny"], seeds=2)
    # what no recipe shows stands in the header
    monkeypatch.setitem(SETTINGS, "tiny", replace(TINY, lrs=(1e-2,), title="other"))
    with pytest.raises(ValueError, match="title .*, now 'other'"):
        run.run_ladder("hinton", ["tiny"], seeds=3)
    monkeypatch.setitem(SETTINGS, "tiny", replace(TINY, lrs=(1e-2,)))
    stage = lambda s, lr: Stage(CrossEntropy(), 10, lr, s.batch_size, weight_decay=0.5)
    monkeypatch.setitem(PLANS, "alone", Plan(lambda s, lr: Recipe((stage(s, lr),))))
    with pytest.raises(ValueError, match="weight_decay: 0.01, now 0.5"):
        run.run_ladder("hinton", ["tiny"], seeds=2)


def test_a_method_is_a_title_and_a_plan(tiny, monkeypatch):
    monkeypatch.setitem(SETTINGS, "tiny", replace(TINY, lrs=(1e-2,)))
    monkeypatch.setitem(METHODS, "mine", Method("mine"))
    monkeypatch.setitem(PLANS, "mine", PLANS["hinton"])
    run.run_ladder("mine", ["tiny"], seeds=2)
    teachers.write_rows("digits")
    teachers.write_digits_record()
    assert names.ladder_of("mine") == (*names.BASELINES, "mine")
    rung = tables.ladder("tiny", "mine")[3]
    assert rung.method == "mine"
    assert rung.gain.mean == 0.0, "plain KD under another name gains nothing"


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: names.ladder_of("anealing"), "annealing_kd"),
        (lambda: names.setting_of("tiniest"), "digits"),
        (lambda: run.run_ladder("alone", ["digits"], seeds=1), "seeds"),
        (lambda: run.run_ladder("alone", ["digits"], jobs=0), "jobs"),
    ],
)
def test_mistakes_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# -- violence --------------------------------------------------------------------------

DRIVER = """
import os, sys, time
from pathlib import Path
import kdbook.files as files
import kdbook.lab.run as run
import kdbook.lab.teachers as teachers
from kdbook.models import image_net
from kdbook.records.settings import SETTINGS, Setting

FOLDER = Path(os.environ["KDBOOK_RESULTS"])
SETTINGS["tiny"] = Setting(
    "tiny", "digits", 40, 20, (4, 1), 20, (1e-2, 3e-2), tau_max=2, student=(16,)
)


def quick_teacher(task, *trails):
    net = image_net(hidden=8, seed=0)
    for trail in trails:
        for step in trail.steps:
            trail.keep(net, step)
    return net


teachers.digits_teacher = quick_teacher
rows_of = run.training_rows


def slowly(train, setting, seed):
    (FOLDER / f"worker-{os.getpid()}").touch()
    if seed == int(os.environ.get("FAIL", -1)):
        raise RuntimeError("made to fail")
    time.sleep(float(os.environ.get("DELAY", 0)))
    return rows_of(train, setting, seed)


run.training_rows = slowly
if __name__ == "__main__":
    run.run_ladder("hinton", ["tiny"], seeds=3, jobs=int(sys.argv[1]))
"""


def driver(folder, jobs, **env):
    folder.mkdir(exist_ok=True)
    script = folder / "driver.py"
    script.write_text(DRIVER)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"KDBOOK_RESULTS": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, str(script), str(jobs)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own, **env},
    )


def records(folder):
    "The whole lines of a ladder's file, by method, rate and seed."
    path = folder / "ladder" / "tiny.jsonl"
    lines = path.read_text().split("\n")[1:-1] if path.exists() else []
    found = [json.loads(line) for line in lines]
    assert len(found) == len({(r["method"], r["lr"], r["seed"]) for r in found})
    return {(r["method"], r["lr"], r["seed"]): r for r in found}


def lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # where nobody collects orphans they stay as zombies
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX thing")
def test_killed_in_the_middle_and_called_again(tiny, tmp_path):
    killed = tmp_path / "killed"
    process = driver(killed, 2, DELAY="0.5")
    enough = lambda: process.poll() is not None or len(records(killed)) >= 3
    wait_for(enough, 240)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers = [int(p.name.split("-")[1]) for p in killed.glob("worker-*")]
    wait_for(lambda: not any(map(lives, workers)), 30)  # no orphans that wait for ever
    kept = records(killed)  # every line is whole JSON
    assert 3 <= len(kept) < 21
    with open(killed / "ladder" / "tiny.jsonl", "a") as file:
        file.write('{"method": "hinton", "lr": 0.0')  # as if killed while writing

    again = driver(killed, 2)
    run.run_ladder("hinton", ["tiny"], seeds=3)  # the same, undisturbed
    assert again.wait(300) == 0, again.stderr.read()
    done = records(killed)
    assert len(done) == 3 * (2 * 2 + 3), "none missing, none twice"
    for key, record in kept.items():
        assert done[key] == record, "what was there is not run again"
    expected = records(tmp_path)
    assert done.keys() == expected.keys()
    for key, record in done.items():
        assert record.get("splits") == expected[key].get("splits"), key
        assert record["best"] == expected[key]["best"], key


def test_a_failing_run_is_told_at_once(tmp_path):
    "The error comes up without waiting for all the other runs."
    process = driver(tmp_path / "failing", 2, FAIL="101", DELAY="2")
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "made to fail" in errors
    cancelled = "the rest of the search was cancelled"
    assert len(records(tmp_path / "failing")) < 6, cancelled

"The race: what is compared is comparable, and what is due is what is missing."

import json

import numpy as np
import pytest
import race_pack
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kdbook.evaluation import Difference
from kdbook.files import results_dir, text_crc
from kdbook.lab import race
from kdbook.records.claims import judge, verdicts
from kdbook.records.race import (
    COURSES,
    ENTRIES,
    FLOORS,
    GRID_METHODS,
    GRID_TEXT,
    MOST_RATES,
    SEARCH,
    TUNED,
    grid_name,
    rated,
)
from kdbook.records.standings import (
    begun_on,
    chosen,
    difference,
    knobs_text,
    race_file,
    race_table,
    rates_of,
    report_due,
    rungs,
    search_due,
)
from kdbook.records.store import append_record, read_lines
from kdbook.training import Recipe

RUN = [m for m in ENTRIES if m in race.RECIPES]


def knobs_of(method):
    return ENTRIES[ENTRIES[method].twin or method].knobs


def spent(course, recipe):
    updates = 0
    for stage in recipe.stages:
        labelled = stage.objective.rows == "labelled"
        rows = course.labelled if labelled else course.rows
        updates += stage.epochs * rows // stage.batch_size
    return updates


@pytest.mark.parametrize("name", COURSES)
def test_every_method_gets_the_same_updates(name):
    course = COURSES[name]
    for method in course.methods or RUN:
        for knobs in knobs_of(method):
            recipe = race.RECIPES[method](course, 1e-4, **knobs)
            assert isinstance(recipe, Recipe)
            assert spent(course, recipe) == course.updates, (method, knobs)


def test_every_entry_can_be_run_and_every_course_has_its_teacher():
    assert {*ENTRIES} == {*race.RECIPES} | {*FLOORS}
    for course in COURSES.values():
        assert TUNED[course.teacher].task == course.task
        assert not course.search_of or not COURSES[course.search_of].search_of
    for spec in TUNED.values():
        assert not spec.of or spec.of in TUNED


def test_a_null_differs_in_its_shuffles_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(
        race, "annotated", lambda *_: ({"validation": None}, None, None)
    )
    monkeypatch.setattr(race, "rows_of", lambda *_: "rows")
    monkeypatch.setattr(race, "classes_of", lambda _: 2)
    monkeypatch.setattr(race, "student_of", lambda *arguments: arguments[1:])
    monkeypatch.setattr(race, "fit", lambda *a, **k: calls.append((a, k["seed"])))
    monkeypatch.setattr(
        race, "annotated", lambda *_: ({"validation": None, "train": None}, None, None)
    )
    for method in ("hinton", "null"):
        knobs = {"alpha": 0.5, "temperature": 2.0}
        race.train_one(COURSES["movies-400"], method, 1e-4, knobs, 3)
    (ours, seed), (theirs, other) = calls
    assert (seed, other) == (3, 1003)
    assert ours[0] == theirs[0] == (2, 3) and ours[2:] == theirs[2:]
    assert ours[1].settings() == theirs[1].settings()


# searches


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_RESULTS", str(tmp_path))
    (tmp_path / "teacher").mkdir()
    for name in TUNED:
        (tmp_path / "teacher" / f"{name}.json").write_text("{}")
    return tmp_path


def pretend(course, method, lr, knobs, seed, score=0.5, **more):
    line = dict(method=method, lr=lr, knobs=json.loads(knobs), seed=seed)
    best = None if score is None else {"score": score}
    append_record(race_file(course), line | {"best": best} | more, {"toy": course})


def search(course, method, score):
    while due := search_due(course, method):
        for run in due:
            pretend(course, *run, score=score(run[1], json.loads(run[2])))


@pytest.mark.parametrize("peak", [1e-6, 5e-5, 1e-4, 1.6e-3, 1.0])
def test_a_grid_grows_until_the_best_is_inside_or_it_has_had_enough(empty, peak):
    search("movies-400", "alone", lambda lr, _: -abs(np.log(lr / peak)))
    rates, best = rates_of("movies-400", "alone")
    inside = 0 < rates.index(best) < len(rates) - 1
    assert inside or len(rates) == MOST_RATES
    assert len(rates) <= MOST_RATES and rates == sorted(rates)


def test_a_rate_that_diverged_is_not_chosen(empty):
    search("movies-400", "alone", lambda lr, _: None if lr > 1e-4 else 0.5)
    assert chosen("movies-400", "alone")[0] < 1e-4  # of two equal ones the smaller


def test_a_family_shares_its_rates_and_a_twin_its_knobs(empty):
    assert search_due("movies-400", "null") == []
    assert search_due("movies-400", "annealing_kd") == []  # waits for its family
    search("movies-400", "hinton", lambda lr, k: lr + k["alpha"])
    assert chosen("movies-400", "null") == chosen("movies-400", "hinton")
    search("movies-400", "logit_mse_labels", lambda lr, _: -lr)
    due = search_due("movies-400", "annealing_kd")
    assert {run[1] for run in due} == {rates_of("movies-400", "logit_mse_labels")[1]}
    assert len(due) == len(ENTRIES["annealing_kd"].knobs) * len(SEARCH)


def test_what_is_due_is_searched_first_and_then_goes_seed_by_seed(empty):
    methods = ("tfidf", "alone")
    kinds = [run[-1] in SEARCH for run in race.due("movies-400", methods)]
    assert any(kinds) and kinds == sorted(kinds, reverse=True)  # a floor needs none
    search("movies-400", "alone", lambda lr, _: -abs(np.log(lr / 1e-4)))
    seeds = [run[-1] for run in race.due("movies-400", methods)]
    assert seeds == sorted([*range(8)] * 2)
    pretend("movies-400", "tfidf", None, "{}", 0)
    assert report_due("movies-400", "tfidf", 0) == []


def test_the_students_of_a_seed_are_trained_on_one_kind_of_device(empty):
    methods = ("tfidf", "alone", "logit_mse")
    for method in methods[1:]:
        search("movies-400", method, lambda lr, _: -abs(np.log(lr / 1e-4)))
    for seed, device in enumerate(({}, {"device": "a GPU"})):
        line = dict(recipe={}, **device)
        pretend("movies-400", "alone", 1e-4, "{}", seed, **line)
        pretend("movies-400", "tfidf", None, "{}", seed)
    assert begun_on("movies-400", 0) == "cpu" and begun_on("movies-400", 2) == ""
    for device, others in (("cpu", 1), ("a GPU", 0)):
        seeds = {run[-1] for run in race.due("movies-400", methods, device)}
        assert seeds == {*range(8)} - {others}
    with pytest.raises(ValueError, match="torch sees no GPU"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            race.device_name("cuda")


def test_what_waits_for_a_teacher_is_left_out(empty):
    (empty / "teacher" / "assistant-movies.json").unlink()
    assert race.missing_teachers(("movies-400",), ("takd",)) == ["assistant-movies"]
    search("movies-400", "hinton", lambda lr, k: -lr + k["alpha"])
    assert race.due("movies-400", ("takd",)) == []
    (empty / "teacher" / "mpnet-movies.json").unlink()
    assert race.due("movies-400", ("alone",)) == []


def test_the_grid_searches_once_for_each_number_of_labels(empty):
    course = grid_name(250, 1000, "random", "minilm")
    assert race.due(course, tuple(ENTRIES))
    for text in GRID_TEXT:
        other = grid_name(250, text, "random", "mpnet")
        assert race.due(other, GRID_METHODS) == []  # waits
    search(course, "hinton", lambda lr, k: -lr + k["alpha"])
    other = grid_name(250, 0, "random", "mpnet")
    assert chosen(other, "hinton") == chosen(course, "hinton")
    assert {run[0] for run in race.due(other, tuple(ENTRIES))} == {"hinton"}


def test_too_few_sound_students_make_no_comparison(empty, monkeypatch):
    monkeypatch.setattr(
        "kdbook.records.standings.labels_of", lambda *_: np.tile([0, 1], 50)
    )
    search("movies-400", "alone", lambda lr, _: -abs(np.log(lr / 1e-4)))
    right = {"accuracy": 1.0, "largest": 0.5}
    packed = race.pack(np.tile([0, 1], 50))
    for seed in range(8):
        floor = right | {"predictions": packed}
        pretend("movies-400", "tfidf", None, "{}", seed, splits={"test": floor})
        one = floor if seed < 3 else floor | {"largest": 1.0}
        pretend("movies-400", "alone", 1e-4, "{}", seed, splits={"test": one})
    assert difference("movies-400", "alone", "tfidf") is None
    alone = rungs("movies-400", "tfidf")[-1]
    assert (alone.seeds, alone.collapsed) == (3, 5)
    for seed in range(3):
        one = right | {"predictions": packed, "largest": 1.0}
        pretend("movies-400", "alone", 1e-4, "{}", seed, splits={"test": one})
    table = race_table("movies-400", "tfidf")
    assert table.loc["student alone", "test, %"] == "all collapsed"


# what may be said of a paper's claim


def test_a_claim_is_judged_when_all_seeds_have_been_run(empty, monkeypatch):
    monkeypatch.setattr(
        "kdbook.records.standings.labels_of", lambda *_: np.tile([0, 1], 500)
    )
    methods = {"alone": 0.6, "swa": 0.7, "hinton": 0.8, "annealing_kd": 0.5}
    largest = {"annealing_kd": 1.0}  # its students have collapsed
    for method in ("logit_mse_labels", *methods):  # the first is a family
        search("movies-400", method, lambda lr, _: -abs(np.log(lr / 1e-4)))

    def report(seed):
        for method, share in methods.items():
            rng = np.random.default_rng([seed, len(method)])
            labels, wrong = np.tile([0, 1], 500), rng.random(1000) > share
            split = {"accuracy": share, "largest": largest.get(method, 0.5)}
            split["predictions"] = race.pack(np.where(wrong, 1 - labels, labels))
            lr, knobs = chosen("movies-400", method)
            line = dict(splits={"test": split}, recipe={})
            pretend("movies-400", method, lr, knobs_text(knobs), seed, **line)

    told = lambda: {
        v.base: (v.word, v.why)
        for v in verdicts("swa")
        if v.course == "movies-400" and v.base in methods
    }
    for seed in range(7):
        report(seed)
    assert told()["alone"] == ("not tried", "7 of 8 seeds have been run")
    report(7)
    assert (told()["alone"][0], told()["hinton"][0]) == ("seen", "contradicted")
    assert told()["annealing_kd"] == (
        "not tried",
        "too many of the students gave one class only",
    )
    assert told()["alone"][1].startswith("+10.") or told()["alone"][1].startswith("+9.")


@settings(max_examples=100, deadline=None)
@given(st.floats(-5, 5), st.floats(0.01, 5), st.floats(0, 1), st.floats(0.1, 5))
def test_a_verdict_says_no_more_than_its_interval(mean, half, p, effect):
    gain = Difference(mean / 100, (mean - half) / 100, (mean + half) / 100, p)
    word = judge(gain, p, effect)
    assert (word in ("seen", "contradicted")) == (p < 0.05)
    if word == "not seen":
        assert half <= effect * (1 + 1e-9)


# taken to another machine


def test_a_packed_weight_is_itself_in_half_precision():
    array = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    back = race_pack.whole(race_pack.halves(array), [7, 5])
    assert np.array_equal(back, array.astype(np.float16).astype(np.float32))
    names = [f"encoder.layer.{n}.output.dense.weight" for n in range(6)]
    assert [race_pack.needed(name) for name in names] == [True] * 3 + [False] * 3
    assert race_pack.needed("embeddings.word_embeddings.weight")


def test_lines_from_there_come_once_and_none_of_a_trial(empty, tmp_path, monkeypatch):
    away, run = tmp_path / "away", ("logit_mse", 1e-4, "{}")
    away.mkdir()
    monkeypatch.setenv("KDBOOK_RESULTS", str(away))
    for seed in (0, 1):
        pretend("movies-400", *run, seed, recipe={}, device="a GPU")
    monkeypatch.setenv("KDBOOK_RESULTS", str(empty))
    pretend("movies-400", *run, 0, recipe={}, device="a GPU")
    assert race_pack.merge(away / "race") == 1
    assert race_pack.merge(away / "race") == 0
    assert {line["seed"] for _, line in read_lines(race_file("movies-400"))[1:]} == {
        0,
        1,
    }
    monkeypatch.setenv("KDBOOK_RESULTS", str(away))
    pretend("movies-400", *run, 2, recipe={}, device="cpu")
    monkeypatch.setenv("KDBOOK_RESULTS", str(empty))
    with pytest.raises(ValueError, match="students of a CPU"):
        race_pack.merge(away / "race")


# the committed records


def lines():
    return [
        (name, record)
        for name in COURSES
        for _, record in read_lines(race_file(name))[1:]
    ]


def test_records_are_what_would_be_run_today():
    for course, line in lines():
        keys = ("method", "lr", "knobs", "seed")
        today = race.run_settings(course, *(line[key] for key in keys))
        for key, value in json.loads(json.dumps(today)).items():
            assert line[key] == value, (course, line["method"], key)


def test_seeds_that_choose_are_never_scored_on_test_rows():
    for course, line in lines():
        assert (line["seed"] in SEARCH) == ("splits" not in line) or line.get(
            "diverged"
        )
        assert rated(ENTRIES[line["method"]]) or line["method"] in ENTRIES
        assert json.loads(knobs_text(line["knobs"])) == line["knobs"]


TEACHERS = [n for n in TUNED if (results_dir() / "teacher" / f"{n}.json").exists()]


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teachers_record_is_of_the_epoch_that_was_best(name):
    from kdbook.data import load_task

    path = results_dir() / "teacher" / name
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    tensors, task = load_file(path.with_suffix(".safetensors")), load_task("movies")
    told = record["splits"]["validation"]["accuracy"]
    assert told == pytest.approx(record["best"]["score"], abs=0.02)
    rows = task["validation"]
    place = {int(i): n for n, i in enumerate(tensors["idx"])}
    index = [place[i] for i in rows["idx"]]
    assert torch.equal(tensors["text_crc"][index], text_crc(rows))
    right = tensors["teacher_logits"][index].argmax(-1) == torch.tensor(
        rows["label"][:]
    )
    assert right.float().mean().item() == pytest.approx(told, abs=0.002)
    trail = tensors["teacher_trail"].float()
    apart = (trail[:, 1:] - trail[:, :-1]).abs().mean((0, 2))
    assert (apart > 0.01).all()  # every place of the trail is another model

"Records: whole lines, questions and their answers, tables that say what they stand on."

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import kdbook.files as files
from kdbook.records import ladder as tables
from kdbook.records import store
from kdbook.records.settings import LADDERS, METHODS, SETTINGS, Setting

ABOUT = {"setting": {"name": "toy"}}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBOOK_RESULTS", str(tmp_path))
    return store.ladder_file("toy")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=300))
def test_pack_and_unpack(values):
    text = store.pack(np.array(values, int))
    assert json.loads(json.dumps(text)) == text
    assert store.unpack(text).tolist() == values


def test_write_json_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    files.write_json({"a": 1}, path)
    with pytest.raises(TypeError):
        files.write_json({"a": object()}, path)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError):
        files.write_json({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.glob("*.json")] == ["x.json"]


def test_every_torn_end_is_dropped_and_written_over(toy):
    for seed in range(3):
        store.append_record(toy, {"method": "alone", "lr": 1, "seed": seed}, ABOUT)
    whole = toy.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        toy.write_bytes(whole[:end])
        assert [r["seed"] for r in store.runs_of("toy", "alone")] == [0, 1], end
        store.append_record(toy, {"method": "alone", "lr": 1, "seed": 2}, ABOUT)
        assert toy.read_bytes() == whole, end


def test_a_torn_header_is_a_new_file(toy):
    toy.parent.mkdir()
    toy.write_text('{"form')
    assert store.read_lines(toy) == [] and store.runs_of("toy", "alone") == []
    store.append_record(toy, {"method": "alone", "lr": 1, "seed": 0}, ABOUT)
    assert len(store.read_lines(toy)) == 2


@pytest.mark.parametrize("damage", ["", "{", "[1]", "null", '{"a": NaN', "\u2603"])
def test_a_damaged_line_is_named_with_its_file_and_number(toy, damage):
    for seed in range(3):
        store.append_record(toy, {"method": "alone", "lr": 1, "seed": seed}, ABOUT)
    lines = toy.read_text().split("\n")
    lines[2] = damage
    toy.write_text("\n".join(lines))
    for read in (
        lambda: store.runs_of("toy", "alone"),
        lambda: store.append_record(toy, {"method": "alone"}, ABOUT),
    ):
        with pytest.raises(store.DamagedRecord, match=r"toy\.jsonl, line 3 is damaged"):
            read()


def test_another_format_and_another_subject_are_refused(toy):
    store.append_record(toy, {"method": "alone", "lr": 1, "seed": 0}, ABOUT)
    other = {"setting": {"name": "other"}}
    with pytest.raises(ValueError, match="set KDBOOK_RESULTS"):
        store.append_record(toy, {"method": "alone", "lr": 1, "seed": 1}, other)
    toy.write_text(toy.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(store.DamagedRecord, match="has format 2"):
        store.runs_of("toy", "alone")


def test_the_later_of_two_lines_counts(toy):
    for score in (1, 2):
        line = {"method": "alone", "lr": 0.1, "seed": 0, "score": score}
        store.append_record(toy, line, ABOUT)
    assert [r["score"] for r in store.runs_of("toy", "alone")] == [2]
    assert store.read_record("toy", "alone", 0.1, 0)["score"] == 2


def test_who_reads_is_noted_and_a_digest_answers_the_question(toy):
    line = {"method": "alone", "lr": 0.1, "seed": 0}
    store.append_record(toy, line, ABOUT)
    store.runs_of("toy", "alone")
    assert ("ladder/toy.jsonl", "alone") in files.reads()
    digests = lambda: [
        store.digest("ladder/toy.jsonl", query) for query in ("alone", "hinton", "")
    ]
    before = digests()
    store.append_record(toy, {**line, "method": "hinton"}, ABOUT)
    assert [a == b for a, b in zip(before, digests())] == [True, False, False]
    assert store.digest("ladder/none.jsonl", "alone") == "missing"


def test_two_processes_add_to_one_file(toy):
    code = (
        "import sys; from kdbook.records import store; "
        "[store.append_record(store.ladder_file('toy'), {'method': sys.argv[1], "
        "'lr': 1, 'seed': n}, {'setting': {'name': 'toy'}}) for n in range(40)]"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, name], cwd=ROOT)
        for name in ("alone", "hinton")
    ]
    assert [process.wait(120) for process in both] == [0, 0]
    for name in ("alone", "hinton"):
        assert [r["seed"] for r in store.runs_of("toy", name)] == list(range(40))


def test_a_commit_is_named_only_where_the_repository_tracks_the_package(
    tmp_path, monkeypatch
):
    assert store.provenance()["commit"], "this checkout tracks it"
    package = tmp_path / "kdbook"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "other"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    import kdbook

    monkeypatch.setattr(kdbook, "__file__", str(package / "__init__.py"))
    assert store.provenance()["commit"] == "", "somebody else's repository"
    subprocess.run([*git, "add", "kdbook"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-qm", "kdbook"], cwd=tmp_path, check=True)
    clean = store.provenance()["commit"]
    assert len(clean) == 40
    (package / "__init__.py").write_text("x = 1\n")
    assert store.provenance()["commit"] == clean + "+changes"


def test_a_table_says_when_its_lines_come_from_several_commits_or_versions():
    made = lambda commit, torch: {"provenance": {"commit": commit, "torch": torch}}
    note = store.provenance_note
    assert note([made("a", "2.13"), made("a", "2.13")]) == ""
    both = [made("a", "2.13"), made("b+changes", "2.14"), made("c+changes", "2.14")]
    assert note(both) == "3 commits, 2 with changes; torch 2.13 and 2.14"
    table = tables.ladder_table("few-labels", "techniques")
    assert "commits" in table.columns.name


@pytest.fixture
def race(toy, monkeypatch):
    "Two methods on ten rows, with other seeds each, one of which diverged."
    monkeypatch.setitem(
        SETTINGS, "toy", Setting("toy", "none", 10, 10, (1, 1), 10, (0.1,))
    )
    from safetensors.numpy import save_file

    store.rows_file("none").parent.mkdir()
    labels = np.zeros(10, np.uint8)
    save_file({"test_labels": labels}, store.rows_file("none"))

    def line(method, seed, wrong):
        guesses = np.array([1] * wrong + [0] * (10 - wrong))
        scores = {"predictions": store.pack(guesses), "accuracy": 1 - wrong / 10}
        base = {"method": method, "lr": 0.1, "seed": seed, "best": {"score": 1}}
        base["provenance"] = {"commit": "a", "torch": "2"}
        if wrong < 0:
            return {**base, "best": None, "diverged": "the loss became nan"}
        splits = {"test": {**scores, "nll": 0.1}}
        return {**base, "splits": splits, "teacher_accuracy": 1.0}

    runs = [("hinton", 0, 1), ("hinton", 1, 2), ("hinton", 2, 1), ("hinton", 3, 0)]
    runs += [("alone", 1, 3), ("alone", 2, -1), ("alone", 3, 4), ("alone", 9, 2)]
    runs += [("logit_mse", 0, 1), ("logit_mse", 1, 2)]
    for each in runs:
        store.append_record(toy, line(*each), ABOUT)


def test_the_n_beside_a_gain_is_the_number_of_seeds_behind_it(race):
    rungs = {r.method: r for r in tables.ladder("toy", "logit_mse")}
    alone = rungs["alone"]
    assert (alone.seeds, alone.pairs, alone.diverged) == (3, 2, 1)
    # seeds 1 and 3: 7 against 8 right, and 6 against 10
    assert alone.gain.mean == pytest.approx(-0.25)
    assert rungs["logit_mse"].gain.mean == 0 and rungs["logit_mse"].pairs == 2
    table = tables.ladder_table("toy", "logit_mse")
    assert table.loc["student alone", "n"] == 2
    assert "(1 diverged)" in table.loc["student alone", "test accuracy, %"]


def test_tables_and_pictures_use_one_title_a_method():
    from kdbook.plots import METHOD_LABELS

    rungs = {rung for ladder in LADDERS.values() for rung in ladder}
    assert {m: METHOD_LABELS[m] for m in rungs} == {m: METHODS[m].title for m in rungs}


def test_a_reader_of_tables_loads_no_technique_and_no_data_set():
    code = (
        "import sys, torch; before = set(sys.modules); "
        "from kdbook.records import ladder; "
        "ladder.ladder_table('same-rows', 'annealing_kd'); "
        "print(*sorted(m for m in set(sys.modules) - before if m[:6] == 'kdbook'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {
        "kdbook",
        "kdbook.checks",
        "kdbook.evaluation",
        "kdbook.files",
        "kdbook.losses",
        "kdbook.records",
        "kdbook.records.ladder",
        "kdbook.records.settings",
        "kdbook.records.store",
        "kdbook.rows",
    }

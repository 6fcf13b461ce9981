"`kdbook distill`, `annotate`, `evaluate` and `compare` as processes and as calls."

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT
from transformers import AutoModelForSequenceClassification

from kdbook.__main__ import main
from kdbook.commands import Job, distill, plan, ready_teacher, tables_of
from kdbook.compare import Comparison, comparison_table, differences, run_comparison
from kdbook.data import load_task
from kdbook.deliver import save_student
from kdbook.models import student

WORDS = ["good", "bad", "dull", "bright", "slow", "quick", "warm", "cold"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    "An untrained encoder without a head for the task, saved."
    folder = tmp_path_factory.mktemp("teacher")
    model = student(layers=1, width=64, seed=3)
    model.bert.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    "Three tables: two classes, pairs of five classes, and scores."
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    for split, count in (("train", 160), ("validation", 64), ("test", 96)):
        texts = [" ".join(rng.choice(WORDS, 5)) for _ in range(count)]
        others = [" ".join(rng.choice(WORDS, 4)) for _ in range(count)]
        scores = np.array([text.count("good") - text.count("bad") for text in texts])
        frame = pd.DataFrame(
            {
                "review": texts,
                "reply": others,
                "verdict": np.where(scores > 0, "up", "down"),
                "stars": rng.integers(1, 6, count),
                "grade": scores / 2 + 0.25,
            }
        )
        frame.to_csv(folder / f"{split}.csv", index=False)
        frame.to_json(folder / f"{split}.jsonl", orient="records", lines=True)
    return folder


def request(tables, teacher, out, *more):
    "A line for `kdbook distill` that takes seconds."
    line = [
        "--train",
        f"{tables}/train.csv",
        "--validation",
        f"{tables}/validation.csv",
    ]
    line += ["--test", f"{tables}/test.csv", "--teacher", teacher, "--out", str(out)]
    line += ["--student", "1x32", "--epochs", "2", "--lr", "2e-3", "--max-length", "16"]
    return [*line, "--teacher-epochs", "1", "--teacher-lr", "1e-3", *more]


ONE = ("--text", "review", "--label", "verdict")
KINDS = {
    "two classes": (ONE, ["down", "up"]),
    "pairs of five classes": (
        (
            "--text",
            "review",
            "--text",
            "reply",
            "--label",
            "stars",
            "--metric",
            "f1_macro",
        ),
        ["1", "2", "3", "4", "5"],
    ),
    "scores": (("--text", "review", "--label", "grade"), None),
    "two stages": ((*ONE, "--method", "annealing_kd"), ["down", "up"]),
    "no teacher": ((*ONE, "--method", "alone", "--seeds", "2"), ["down", "up"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_table_to_a_folder(kind, tables, teacher, tmp_path, capsys):
    more, classes = KINDS[kind]
    assert main(["distill", *request(tables, teacher, tmp_path / "small", *more)]) == 0
    printed = capsys.readouterr().out
    assert "student, " in printed and "  test " in printed
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert model.config.num_labels == len(classes or [0])
    if classes:
        assert [*model.config.id2label.values()] == classes
    record = json.loads((tmp_path / "small" / "training.json").read_text())
    assert [*record["scores"]] == ["validation", "test"]
    columns = [x for x in more if x != "--seeds"]
    pairs = [columns[i : i + 2] for i in range(0, len(columns), 2)]
    asked = [
        x
        for pair in pairs
        if pair[0] in ("--text", "--label", "--metric")
        for x in pair
    ]
    line = ["evaluate", str(tmp_path / "small"), f"{tables}/test.csv", *asked]
    assert main(line) == 0
    (value,) = record["scores"]["test"].values()
    assert f"{value:.4g}" in capsys.readouterr().out


def test_json_lines_say_what_csv_says(tables, teacher, tmp_path):
    found = []
    for kind in ("csv", "jsonl"):
        job = Job(
            train=f"{tables}/train.{kind}",
            validation=f"{tables}/validation.{kind}",
            out=str(tmp_path / kind),
            teacher=teacher,
            text=("review",),
            label="verdict",
        )
        found.append(tables_of(job))
    one, other = found
    assert (
        one.classes == other.classes and one.train["text"][:] == other.train["text"][:]
    )
    assert one.train["label"][:] == other.train["label"][:]


def test_killed_and_asked_again_it_ends_the_same(tables, teacher, tmp_path):
    "Killed twice, while the teacher or the student trains."
    more = (*ONE, "--epochs", "20", "--teacher-epochs", "3")
    whole = request(tables, teacher, tmp_path / "whole", *more)
    assert main(["distill", *whole]) == 0
    line = request(tables, teacher, tmp_path / "cut", *more)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-m", "kdbook", "distill", *line]
    for place in ("teacher-checkpoint/last.pt", "seed-0/last.pt"):
        child = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        path = tmp_path / "cut" / "work" / place
        end = time.monotonic() + 120
        while not path.exists() and child.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert path.exists()
    assert main(["distill", *line]) == 0
    one, other = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        for name in ("whole", "cut")
    )
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_a_dry_run_writes_nothing(tables, teacher, tmp_path, capsys):
    line = request(tables, teacher, tmp_path / "small", *ONE, "--dry-run")
    assert main(["distill", *line]) == 0
    printed = capsys.readouterr().out
    assert "160 to train on" in printed and "5 updates of fine-tuning" in printed
    assert "1 x 10 of 32 rows" in printed and not (tmp_path / "small").exists()


WRONG = {
    "no such file": (("--train", "nowhere.csv"), "there is no file nowhere.csv"),
    "no table": (("--train", str(ROOT / "README.md")), "is none of .csv"),
    "no such column": (("--text", "title"), "the column 'title', but there are review"),
    "no text": ((), "which column is the text"),
    "no label": (("--text", "review", "--label", "mood"), "label names the column"),
    "no labels at all": (("--text", "review"), "give --label"),
    "another class": ((*ONE, "--classes", "up,left"), "none of the classes up, left"),
    "no teacher": ((*ONE, "--teacher", "nobody"), "no model 'nobody'"),
    "no student": ((*ONE, "--student", "layers:two"), "write layers:3"),
    "too deep": ((*ONE, "--student", "layers:9"), "layers must be 1 to 1"),
    "no epochs": ((*ONE, "--epochs", "0"), "epochs must be >= 1"),
    "a short run of two stages": (
        (*ONE, "--method", "annealing_kd", "--epochs", "1"),
        "2 epochs or more",
    ),
    "too long": ((*ONE, "--max-length", "9999"), "max_length=9999"),
    "a score of classes": ((*ONE, "--metric", "spearman"), "'spearman' does not fit"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_request_is_a_sentence(kind, tables, teacher, tmp_path, capsys):
    more, message = WRONG[kind]
    out = tmp_path / "small"
    assert main(["distill", *request(tables, teacher, out, *more)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_is_one_piece_of_work(tables, teacher, tmp_path, capsys):
    "Other settings in the same folder, a file, and a folder of other things."
    out = tmp_path / "small"
    line = request(tables, teacher, out, *ONE)
    assert main(["distill", *line]) == 0
    assert main(["distill", *line, "--seeds", "2"]) == 0
    capsys.readouterr()
    for more, told in {
        ("--lr", "1e-3"): "was made with lr 0.002, and now it is 0.001",
        ("--method", "alone"): "was made with method 'hinton'",
        ("--teacher-epochs", "2"): "was made with epochs 1, and now it is 2",
    }.items():
        assert main(["distill", *line, *more]) == 2
        assert told in capsys.readouterr().err
    file = tmp_path / "file"
    file.write_text("mine")
    assert main(["distill", *request(tables, teacher, file, *ONE)]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["distill", *request(tables, teacher, tmp_path, *ONE)]) == 2
    assert "holds other things" in capsys.readouterr().err and file.exists()


def test_what_learned_nothing_says_so(teacher, tmp_path, capsys):
    "One row in twelve has the other label, by chance: the answer is always the same."
    table, rng = tmp_path / "chance.csv", np.random.default_rng(1)
    rows = [
        (" ".join(rng.choice(WORDS, 5)), "down" if k % 12 == 5 else "up")
        for k in range(240)
    ]
    pd.DataFrame(rows, columns=["review", "verdict"]).to_csv(table, index=False)
    line = ["--train", str(table), "--teacher", teacher, "--out", str(tmp_path / "o")]
    line += ["--student", "1x32", "--teacher-epochs", "1", *ONE]
    with pytest.warns(UserWarning, match="answers 'up' on every row of validation"):
        assert main(["distill", *line]) == 0
    assert "the commonest class on every row" in capsys.readouterr().out


def test_one_label_is_nothing_to_learn(teacher, tmp_path):
    table = tmp_path / "one.csv"
    table.write_text("review,verdict\n" + "good,up\n" * 20)
    job = Job(train=str(table), out="o", teacher=teacher, label="verdict")
    with pytest.raises(ValueError, match="all 20 labels of .* are 'up'"):
        tables_of(replace(job, text=("review",)))


def test_rows_that_are_trained_on_and_scored_are_counted(tables, teacher, tmp_path):
    "Also where the copies differ in case and blanks."
    train = pd.read_csv(tables / "train.csv")
    test = train.head(3).assign(review=lambda t: t["review"].str.upper() + " .")
    test.to_csv(tmp_path / "seen.csv", index=False)
    job = Job(
        train=f"{tables}/train.csv",
        validation=f"{tables}/validation.csv",
        test=(str(tmp_path / "seen.csv"),),
        out="o",
        teacher=teacher,
        text=("review",),
        label="verdict",
    )
    with pytest.warns(UserWarning, match="3 of the 3 rows of '.*seen.csv'"):
        tables_of(job)


def test_annotated_tables_and_teachers_without_a_head(
    tables, teacher, tmp_path, capsys
):
    out = str(tmp_path / "told.parquet")
    line = ["annotate", f"{tables}/test.csv", "--text", "review", "--out", out]
    assert main([*line, "--teacher", teacher]) == 2
    assert "has no head" in capsys.readouterr().err
    assert main(["distill", *request(tables, teacher, tmp_path / "small", *ONE)]) == 0
    tuned = str(tmp_path / "small" / "work" / "teacher")
    assert main([*line, "--teacher", tuned]) == 0
    told = pd.read_parquet(out)
    assert len(told) == 96 and len(told["teacher_logits"][0]) == 2
    assert {"review", "verdict", "grade"} <= {*told.columns}


def test_a_teacher_with_classes_of_its_own(tables, tmp_path):
    "In another order they are matched; under other names it says so."
    model = student(layers=1, width=32, seed=1)
    job = lambda folder: Job(
        train=f"{tables}/train.csv",
        out=str(tmp_path / "o"),
        teacher=str(folder),
        text=("review",),
        label="verdict",
    )
    for names, folder in ((["Up", "Down"], "turned"), (["POS", "NEG"], "other")):
        model.config.id2label = dict(enumerate(names))
        save_student(model, tmp_path / folder)
    assert tables_of(job(tmp_path / "turned")).classes == ["up", "down"]
    with pytest.raises(ValueError, match="which is which"):
        tables_of(job(tmp_path / "other"))


@pytest.mark.parametrize("kept", [None, 12])
def test_a_finished_teacher_reads_what_it_was_trained_on(kept, tables, tmp_path):
    model = student(layers=1, width=32, seed=3)
    model.config.id2label = {0: "down", 1: "up"}
    model.config.kdbook_max_length = kept
    save_student(model, tmp_path / "big")
    teacher = str(tmp_path / "big")
    job = Job(
        train=f"{tables}/train.csv",
        out=str(tmp_path / "out"),
        teacher=teacher,
        student="1x32",
        text=("review",),
        label="verdict",
        max_length=24,
        epochs=1,
    )
    assert ready_teacher(job, tables_of(job)).max_length == (kept or 24)
    assert any("about" in line for line in plan(job))
    distill(job, progress=False)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["kdbook_max_length"] == 24
    if kept is None:
        with pytest.raises(ValueError, match="max_length=9999"):
            ready_teacher(replace(job, max_length=9999), tables_of(job))


@pytest.fixture(scope="module")
def compared(tables, teacher, tmp_path_factory):
    job = Job(
        train=f"{tables}/train.csv",
        validation=f"{tables}/validation.csv",
        test=(f"{tables}/test.csv",),
        out=str(tmp_path_factory.mktemp("race")),
        teacher=teacher,
        student="1x32",
        text=("review",),
        label="verdict",
        max_length=16,
        epochs=2,
        lr=2e-3,
        teacher_epochs=1,
        teacher_lr=1e-3,
    )
    comparison = Comparison(job, ("alone", "hinton"), seeds=2, rates=3)
    assert run_comparison(comparison, progress=False) == 2 * 3 + 3 * 2
    return comparison


def test_a_comparison_by_hand(compared):
    tables = tables_of(compared.job)
    lines = [json.loads(x) for x in compared.file.read_text().splitlines()[1:]]
    labels = np.array(tables.test["test"]["label"][:])
    table = comparison_table(compared, tables, "test")
    right = {}
    for method in ("alone", "hinton", "null"):
        mine = [x for x in lines if x["method"] == method and "answers" in x]
        assert [x["seed"] for x in mine] == [0, 1]
        right[method] = np.mean(
            [np.array(x["answers"]["test"]) == labels for x in mine]
        )
        assert table.loc[method, "score"] == pytest.approx(right[method])
        if method != "null":
            tried = [x for x in lines if x["method"] == method and x["seed"] == 100]
            best = max(
                sorted(tried, key=lambda x: x["lr"]), key=lambda x: x["validation"]
            )
            assert {x["lr"] for x in mine} == {best["lr"]}
    gains = differences(compared, tables, "test")
    assert gains["alone"].mean == pytest.approx(right["alone"] - right["hinton"])
    # what the words say decides the label, so a linear model finds it
    assert table.loc["word counts", "score"] > 0.9
    assert not [*compared.job.folder("work").glob("alone-*")]


def test_a_comparison_goes_on_and_is_not_mixed_with_another(compared):
    from dataclasses import replace

    lines = compared.file.read_text().splitlines(keepends=True)
    compared.file.write_text("".join(lines[:-2]))
    assert run_comparison(compared, progress=False) == 2
    assert compared.file.read_text().splitlines(keepends=True)[-1] == lines[-1]
    other = replace(compared, job=replace(compared.job, epochs=3), seeds=3)
    with pytest.raises(ValueError, match="holds runs of"):
        run_comparison(other, progress=False)


def test_real_sentences_by_command(tmp_path):
    "The book's own: a teacher that learns, a student that follows."
    task = load_task("movies")
    for split, count in (("train", 400), ("validation", 150)):
        task[split].select(range(count)).to_parquet(tmp_path / f"{split}.parquet")
    job = Job(
        train=str(tmp_path / "train.parquet"),
        validation=str(tmp_path / "validation.parquet"),
        out=str(tmp_path / "small"),
        teacher_epochs=3,
        student="layers:3",
        lr=2e-4,
        epochs=6,
    )
    found = distill(job, progress=False)
    assert found["teacher"]["validation"]["accuracy"] > 0.65
    assert found["scores"]["validation"]["accuracy"] > 0.6

"""Every number, prediction and seed of the old one-file-a-run records came across.

This test stands in one commit only: the next one removes the old files and it.
"""

import ast
import json

import pytest

from kdbook.files import results_dir
from kdbook.records.store import ladder_file, read_lines, study_file

LADDER, STUDY = results_dir() / "ladder", results_dir() / "study"
FOLDERS = sorted(p.name for p in LADDER.iterdir() if p.is_dir())
STUDIES = sorted(p.name for p in STUDY.iterdir() if p.is_dir())


def old_files(folder):
    return [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]


def new_name(method):
    return method.replace("_as_long", "_same_time")


@pytest.mark.parametrize("name", FOLDERS)
def test_runs_came_across(name):
    old, (header, *lines) = old_files(LADDER / name), read_lines(ladder_file(name))
    new = {(r["method"], r["lr"], r["seed"]): r for _, r in lines}
    assert len(old) == len(lines) == len(new)
    for record in old:
        settings = record.pop("settings")
        stored = new[new_name(settings["method"]), settings["lr"], settings["seed"]]
        assert header[1]["setting"] == {"name": name, **settings["setting"]}
        rest = {k: v for k, v in stored.items() if k not in ("recipe", "provenance")}
        rest = {k: v for k, v in rest.items() if k not in ("method", "lr", "seed")}
        assert {**rest, **stored["provenance"]} == record
        stages = settings["recipe"].split(" | ")
        numbers = [part for part in stages if part.startswith("objective=")]
        assert len(numbers) == len(stored["recipe"]["stages"])
        for text, stage in zip(numbers, stored["recipe"]["stages"]):
            plain = ast.parse(f"f({text[text.index(', epochs=') + 2 :]})").body[0].value
            for each in plain.keywords:
                assert stage[each.arg] == ast.literal_eval(each.value)
            assert stage["objective"]["name"] == text[11:].split("(")[0]
        assert f"keep={stored['recipe']['keep']}" == stages[-1]


@pytest.mark.parametrize("name", STUDIES)
def test_studies_came_across(name):
    old, (_, *lines) = old_files(STUDY / name), read_lines(study_file(name))
    assert len(old) == len(lines)
    new = [{k: v for k, v in r.items() if k != "key"} for _, r in lines]
    made = [r.pop("provenance") for r in new]
    flat = [{**r, **each} for r, each in zip(new, made)]
    if name == "landscape":
        for record in (*flat, *old):
            for run in record["runs"].values():
                del run["recipe"]
    for record in old:
        assert record in flat

"""README.md: its tables are those of the records, its links exist, its code runs."""

import re

import pytest
import readme_table

from kdbook.records.store import study_records

README = readme_table.README.read_text(encoding="utf-8")
ROOT = readme_table.README.parent


@pytest.fixture(scope="module")
def tables():
    "Made once, for they are read from all records."
    return readme_table.tables()


def test_tables_are_fresh(tables):
    fresh = readme_table.renewed(README, tables)
    assert fresh == README, "run python tools/readme_table.py"


def test_a_changed_table_is_noticed(tables):
    changed = README.replace("plain KD |", "plain KD! |", 1)
    assert readme_table.renewed(changed, tables) == README != changed


def test_files_and_targets_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for script in re.findall(r"python ((?:tests|tools)/\S+\.py)", README):
        assert (ROOT / script).exists(), script
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make (book|test|lab|help)\b", README)):
        assert f"\n{target}:" in makefile, target


def mean_accuracy(size):
    "Of the students of one size, in percent."
    scores = [
        record["splits"]["test"]["accuracy"]
        for record in study_records("compression")
        if record["settings"]["size"] == size and record["settings"]["signal"] == "both"
    ]
    return 100 * sum(scores) / len(scores) if scores else 0


def test_kroneckerberts_numbers_are_those_of_the_records():
    sentence = (
        r"KroneckerBERT makes.*?right on ([\d.]+) % of the movie test"
        r".*?same size on ([\d.]+) %"
    )
    printed = re.search(sentence, README, re.S).groups()
    means = [round(mean_accuracy(size), 1) for size in ("kronecker-8", "low-rank")]
    assert [float(number) for number in printed] == means

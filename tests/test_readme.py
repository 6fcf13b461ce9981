"""README.md: what it says of the records is so, its links exist, its code runs."""

import re

from helpers import ROOT

from kdbook.evaluation import paired_difference
from kdbook.records.ladder import correct
from kdbook.records.settings import rungs_of
from kdbook.records.store import study_records

README = (ROOT / "README.md").read_text(encoding="utf-8")


def gains(setting):
    "Of every technique and of the student alone over plain KD."
    known = [
        m for m in rungs_of(setting, "techniques") if m not in ("hinton", "teacher")
    ]
    base = correct(setting, "hinton")
    return {m: paired_difference(correct(setting, m), base) for m in known}


def test_what_it_says_of_the_ladder():
    same = gains("same-rows")
    assert len(same) > 8 and all(gain.low < 0 < gain.high for gain in same.values())
    halves = sorted(100 * gain.half_width for gain in same.values())
    assert 1.75 < halves[len(halves) // 2] < 2.5  # "about two points to either side"
    few, digits = gains("few-labels"), gains("digits")
    assert str(few["alone"]).startswith("-3.5 [-5.2, -1.9]")
    assert few["annealing_kd"].high < 0
    lighter = correct("few-labels", "weight_50")
    for method in ("logit_mse", "universal_kd"):
        gap = paired_difference(correct("few-labels", method), lighter)
        assert gap.low < 0 < gap.high
    assert all(digits[m].high < 0 for m in ("progressive_kd", "universal_kd", "swa"))


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

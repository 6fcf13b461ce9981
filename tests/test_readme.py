"""README.md: its tables are those of the records, its links exist, its code runs."""

import re

import pytest
import readme_table
import torch
from torch import nn

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


class OneLayer(nn.Module):
    "A model of one line, with logits where a reader's model has them."

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"logits": self.net(input_ids)})


def test_the_loop_runs():
    "The code under 'In your own code', as printed."
    torch.manual_seed(0)
    model = OneLayer()
    batch = dict(
        input_ids=torch.randn(8, 4),
        attention_mask=torch.ones(8, 4),
        teacher_logits=torch.randn(8, 2),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scope = dict(model=model, loader=[batch], optimizer=optimizer)
    before = model.net.weight.clone()
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(next(block for block in blocks if "temperature_schedule" in block), scope)
    assert not torch.equal(model.net.weight, before) and scope["loss"].isfinite()


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

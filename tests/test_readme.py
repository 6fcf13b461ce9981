"""README.md: its tables come from the records, its links and files exist, its code runs."""

import re

import readme_table

from kdbook.studies import study_records

README = readme_table.README.read_text(encoding="utf-8")
ROOT = readme_table.README.parent


def test_tables_are_fresh():
    assert readme_table.renewed(README) == README, "run python tools/readme_table.py"


def test_a_changed_table_is_noticed():
    assert (
        readme_table.renewed(README.replace("plain KD |", "plain KD! |", 1)) == README
    )


def test_files_and_targets_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for script in re.findall(r"python (tests/\S+\.py)", README):
        assert (ROOT / script).exists(), script
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make (book|test|lab|help)\b", README)):
        assert f"\n{target}:" in makefile, target


def test_the_loop_runs():
    "The code under 'In your own code', on a model of one line."
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 2)

        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"logits": self.net(input_ids)})

    torch.manual_seed(0)
    model = Model()
    batch = dict(
        input_ids=torch.randn(8, 4),
        attention_mask=torch.ones(8, 4),
        teacher_logits=torch.randn(8, 2),
    )
    scope = dict(
        model=model,
        loader=[batch],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    before = model.net.weight.clone()
    block = next(
        b
        for b in re.findall(r"```python\n(.*?)```", README, re.S)
        if "temperature_schedule" in b
    )
    exec(block, scope)  # the reader's own loop, as printed
    assert not torch.equal(model.net.weight, before) and scope["loss"].isfinite()


def test_kroneckerberts_numbers_are_those_of_the_records():
    mean = lambda size: (
        100 * sum(found) / len(found)
        if (
            found := [
                r["splits"]["test"]["accuracy"]
                for r in study_records("compression")
                if (r["settings"]["size"], r["settings"]["way"]) == (size, "both")
            ]
        )
        else 0
    )
    said = re.search(
        r"KroneckerBERT makes.*?right on ([\d.]+) % of the movie test.*?same size on ([\d.]+) %",
        README,
        re.S,
    )
    assert [float(x) for x in said.groups()] == [
        round(mean(size), 1) for size in ("kronecker-8", "low-rank")
    ]

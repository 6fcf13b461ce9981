"""The figures of tools/house.py, on pieces of code whose figures are known."""

import ast

import fresh
import house
import pytest

LOW = '''"Low."
# a comment

_x = 1


def f():
    """Two
    lines."""
    text = """a

    b"""
    return text, _x  # counted
'''
HIGH = """from . import low
from .low import _x as seen
import kdbook.low as again

z = low._x + again.f() + low.__doc__ + seen
"""


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "kdbook"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "low.py").write_text(LOW)
    (folder / "high.py").write_text(HIGH)
    return fresh.Package(folder)


def test_lines_of_code():
    assert house.code_lines(LOW) == {4, 7, 10, 11, 12, 13}


def test_readers_of_a_line(package):
    reached = {
        "one": package.reached(["kdbook.low:f"]),
        "two": package.reached(["kdbook.high:z"]),
        "three": set(),
    }
    found = house.readers(package, reached)
    lines = {4: {"one", "two"}, 7: {"one", "two"}, 13: {"one", "two"}}
    assert {n: found["kdbook.low", n] for n in lines} == lines
    assert found["kdbook.high", 5] == {"two"}
    assert len(found) == 7


def test_private_names(package):
    high, low = package.modules["kdbook.high"], package.modules["kdbook.low"]
    of = lambda m: house.private_names(m.tree, package, m.name, m.package)
    assert of(high) == {"low._x"} and of(low) == set()
    cell = ast.parse("from kdbook import low, high\nlow._x, high.z, high._none")
    assert house.private_names(cell, package) == {"low._x"}


def test_wide_lines():
    assert house.is_wide("x" * 89) and not house.is_wide("x" * 88)
    assert not house.is_wide("#| fig-alt: " + "x" * 89)


def test_harmless_changes_of_a_module(package):
    "Every change is one, and none but the control changes a digest."
    low = package.modules["kdbook.low"]
    was, folder = package.digests, low.path.parent
    changes = house.changes(low)
    for what, files in changes.items():
        for name, text in files.items():
            (folder / name).write_text(text)
        assert any(text != LOW for text in files.values()), what
        now = fresh.Package(folder)
        home = now.find("kdbook.low.f")[0].id
        assert (now.digests[home] == was["kdbook.low:f"]) == (what != house.CONTROL)
        (folder / "_moved.py").unlink(missing_ok=True)


def test_a_missed_figure_fails(monkeypatch, capsys):
    figures = [
        lambda: house.Figure("files", "1", "<= 2", True),
        lambda: house.Figure("pages", "3", "<= 2", False, ("here", "there")),
    ]
    monkeypatch.setattr(house, "FIGURES", figures)
    assert not house.main(["1"])
    assert capsys.readouterr().out.splitlines()[1:] == ["  1 | files | 1 | <= 2"]
    assert house.main(["--verbose"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == "! 2 | pages | 3 | <= 2".split()
    assert [line.strip() for line in lines[3:]] == ["here", "there"]

"""The site builds with no warning, no broken link and nothing raw on its pages."""

import html
import re

import owner
import pages
import pytest
import refresh
from helpers import built_site

TAGS = re.compile(r"<(script|style|annotation)\b.*?</\1>|<[^>]*>", re.S)
# a cell's directive, a callout's fence, a formula
RAW = re.compile(r"^#\| .*|^::: ?.*|\\[(\[][^)]*\\[)\]]", re.M)


@pytest.mark.slow
def test_site_builds(tmp_path_factory):
    docs = built_site(tmp_path_factory)
    for chapter in refresh.chapters():
        page = docs / "nbs" / f"{chapter.stem}.html"
        shown = html.unescape(TAGS.sub("", page.read_text(encoding="utf-8")))
        raw = RAW.search(shown)
        assert not raw, f"{chapter.stem}: {raw.group(0)[:80]!r} is on the page as text"


def test_pages_do_not_say_what_was_loaded(tmp_path_factory):
    "But for the chapter that is about it."
    pages = (built_site(tmp_path_factory) / "nbs").glob("*.html")
    told = [p.stem for p in pages if "duplicates dropped" in p.read_text("utf-8")]
    assert told == ["data"]


def test_formulas_become_mathml():
    problems = []
    draw = lambda match: pages.mathml(match, "page", problems)
    for tex in (
        r"p_i = \frac{\exp(z_i/T)}{\sum_j \exp(z_j/T)} \tag{1}",
        r"\begin{aligned} a &amp;= b \\ c &amp;&lt; d \end{aligned}",
        r"\arg\max_i z_i",
        r"\big\| x \big\|_2^2",
    ):
        page = f'<span class="math inline">\\({tex}\\)</span>'
        drawn = pages.MATH.sub(draw, page)
        assert drawn.count("<math") == 1 and r"\(" not in drawn
        assert tex in drawn  # as an annotation
    assert not problems
    pages.MATH.sub(draw, r'<span class="math inline">\(\nosuch x\)</span>')
    assert "nosuch" in problems[0]


@pytest.mark.skipif(not (owner.ROOT / ".git").exists(), reason="asks git for files")
def test_addresses_have_the_owner_of_the_settings():
    names = {
        found["name"]
        for path in owner.texts()
        for found in owner.ADDRESS.finditer(path.read_text(encoding="utf-8"))
    }
    assert names == {owner.owner()}, "python tools/owner.py NAME writes them anew"

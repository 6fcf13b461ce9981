"""The site builds from _quarto.yml with no warning, no broken link and nothing raw on its pages."""

import html
import re

import build_site
import pytest
import refresh


@pytest.mark.slow
def test_site_builds(tmp_path, capsys):
    failed = build_site.main(out=tmp_path / "docs", work=tmp_path / "work")
    assert not failed, capsys.readouterr().out
    for chapter in refresh.chapters():
        page = (tmp_path / "docs" / "nbs" / f"{chapter.stem}.html").read_text(
            encoding="utf-8"
        )
        shown = html.unescape(
            re.sub(
                r"<(script|style|annotation)\b.*?</\1>|<[^>]*>", "", page, flags=re.S
            )
        )
        raw = re.search(r"^#\| .*|^::: ?.*|\\[(\[][^)]*\\[)\]]", shown, re.M)
        assert not raw, f"{chapter.stem}: {raw.group(0)[:80]!r} is on the page as text"


def test_formulas_become_mathml():
    problems = []
    for tex in (
        r"p_i = \frac{\exp(z_i/T)}{\sum_j \exp(z_j/T)} \tag{1}",
        r"\begin{aligned} a &amp;= b \\ c &amp;&lt; d \end{aligned}",
        r"\arg\max_i z_i",
        r"\big\| x \big\|_2^2",
    ):
        page = f'<span class="math inline">\\({tex}\\)</span>'
        out = build_site.MATH.sub(
            lambda m: build_site.mathml(m, "page", problems), page
        )
        assert (
            out.count("<math") == 1 and r"\(" not in out and tex in out
        )  # the TeX stays, as an annotation
    assert not problems
    build_site.MATH.sub(
        lambda m: build_site.mathml(m, "page", problems),
        r'<span class="math inline">\(\nosuch x\)</span>',
    )
    assert "nosuch" in problems[0]

"""Sliders without a kernel: what the HTML twin holds, escapes, repeats and refuses."""

import ast
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import refresh
from PIL import Image

from kdbook import plots, widgets
from kdbook.widgets import MOST_FRAMES, Explore, Explore2

mpl.use("Agg", force=False)
VIEW = "application/vnd.jupyter.widget-view+json"


def draw(value, other=0):
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.bar([0, 1], [value, other])
    ax.set_ylim(0, 10)
    return fig


class Tags(HTMLParser):
    "All start tags with their attributes, and the text of the script."

    def __init__(self, page):
        super().__init__()
        self.tags, self.script, self.inside = [], "", None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.script += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self):
        return json.loads(re.search(r"^const D = (.*);$", self.script, re.M).group(1))

    @property
    def rows(self):
        "What the script puts above the picture."
        return Tags(self.data["rows"])


def test_twin_has_a_frame_a_text_and_a_label_for_every_value():
    say = lambda value: f"height {value}"
    slider = Explore(draw, [1, 2.5, 4, 8], name="height", start=2, alt=say)
    page = Tags(slider.html)
    assert page.data["alts"] == ["height 1", "height 2.5", "height 4", "height 8"]
    assert page.data["labels"] == [["1", "2.5", "4", "8"]]
    # the start frame is the picture itself
    assert [bool(f) for f in page.data["frames"]] == [True, True, False, True]
    (control,) = page.rows.all("input")
    assert control["type"] == "range"
    assert [control[key] for key in ("min", "max", "value")] == ["0", "3", "2"]
    assert control["aria-label"] == "height" and control["aria-valuetext"] == "4"
    (picture,) = page.all("img")
    assert picture["alt"] == "height 4"
    assert (picture["width"], picture["height"]) == ("192", "96")


def test_without_its_script_the_page_has_a_picture_and_no_controls():
    page = Tags(Explore2(draw, [1, 2], [3, 4], play=True).html)
    assert not page.all("input") and not page.all("button")
    assert len(page.all("img")) == 1
    assert len(page.rows.all("input")) == 2 and len(page.rows.all("button")) == 1


def test_two_sliders_run_the_second_fastest():
    say = lambda a, b: f"{a}-{b}"
    slider = Explore2(draw, [1, 2, 3], [4, 5], ("a", "b"), start=(1, 1), alt=say)
    assert slider.alts == ["1-4", "1-5", "2-4", "2-5", "3-4", "3-5"]
    frames = Tags(slider.html).data["frames"]
    assert [k for k, frame in enumerate(frames) if not frame] == [3]
    assert len(set(slider.frames)) == 6
    slider.sliders[0].index = 2
    assert 'alt="3-5"' in slider.picture.value
    slider.sliders[1].index = 0
    assert 'alt="3-4"' in slider.picture.value


HOSTILE = dict(
    script='"><script>alert(1)</script>',
    html="a & b < c",
    quote="it's",
    template="$uid ${data}",
    lines="\u2028 \\ \n",
)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_names_labels_and_texts_are_escaped(text):
    label = lambda value: text + str(value)
    slider = Explore(draw, [1, 2], name=text, alt=lambda value: text, formatter=label)
    page = Tags(slider.html)
    assert len(page.all("script")) == 1 and slider.html.count("</script>") == 1
    assert page.rows.all("input")[0]["aria-label"] == text
    assert page.all("img")[0]["alt"] == text
    assert page.data["alts"] == [text, text]
    assert page.data["labels"] == [[text + "1", text + "2"]]


def test_same_input_gives_the_same_bytes_and_other_input_another_mark():
    mark = lambda slider: re.search(r'data-kd="(\w+)"', slider.html).group(1)
    one, two = Explore(draw, [1, 2], name="a"), Explore(draw, [1, 2], name="a")
    assert one.html == two.html and one.frames == two.frames
    marks = {
        mark(one),
        mark(Explore(draw, [1, 3], name="a")),
        mark(Explore(draw, [1, 2], name="b")),
        mark(Explore(draw, [1, 2], name="a", start=1)),
        mark(Explore(draw, [1, 2], name="a", play=True)),
    }
    assert len(marks) == 5


def test_stored_output_has_the_twin_a_short_text_and_the_live_view():
    bundle = Explore(draw, [1, 2], name="height")._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", VIEW}
    assert bundle["text/plain"] == "Explore: 2 frames over height"
    assert bundle["text/html"].startswith("<style>")


def test_frames_have_one_size_whatever_the_reader_configured():
    own = {"savefig.bbox": "tight", "savefig.dpi": 37, "savefig.transparent": True}
    with mpl.rc_context(own | {"figure.dpi": 201}):
        slider = Explore(lambda value: draw(10**value), [-3, 0, 3], dpi=100)
    images = [Image.open(io.BytesIO(frame)) for frame in slider.frames]
    assert {image.size for image in images} == {(200, 100)}
    assert {image.mode for image in images} == {"P"}
    corners = {image.convert("RGB").getpixel((0, 0)) for image in images}
    assert corners == {(255, 255, 255)}


def test_twenty_frames_stay_under_400_kilobytes():
    a, b = np.meshgrid(np.linspace(-2, 2, 40), np.linspace(-2, 2, 40))

    def surface(k):
        fig, ax = plt.subplots(figsize=(6, 4))
        ax.contourf(a, b, np.cos(k * a) + b**2, levels=20)
        return fig

    frames = Explore(surface, [0.5, 1, 2]).frames
    assert 20 * max(map(len, frames)) * 4 / 3 < 400_000


@pytest.mark.parametrize(
    "values, start, message",
    [
        ([], 0, "'height' has no values"),
        (range(MOST_FRAMES + 1), 0, "61 frames for 'height', the limit is 60"),
        ([1, 2], 2, "start = 2"),
        ([1, 2], -1, "start = -1"),
    ],
)
def test_impossible_sliders_are_refused_before_anything_is_drawn(
    values, start, message
):
    def never(value):
        raise AssertionError("drawn")

    with pytest.raises(ValueError, match=re.escape(message)):
        Explore(never, values, name="height", start=start)


def test_a_generator_of_values_is_read_once():
    assert len(Explore(draw, (k for k in (1, 2, 3))).frames) == 3


@pytest.mark.parametrize(
    "wrong", [lambda value: None, lambda value: draw(value).axes[0]]
)
def test_draw_must_return_a_figure(wrong):
    before = plt.get_fignums()
    message = "not a matplotlib Figure, at height = 1: end it with `return fig`"
    with pytest.raises(TypeError, match=message):
        Explore(wrong, [1], name="height")
    assert plt.get_fignums() == before


def test_an_error_in_draw_names_the_value_and_leaves_no_figure_open():
    def breaks(value):
        plt.figure()
        return 1 / (value - 2)

    before = plt.get_fignums()
    with pytest.raises(ZeroDivisionError) as caught:
        Explore(lambda value: breaks(value) and draw(value), [1, 2], name="height")
    assert any("height = 2" in note for note in caught.value.__notes__)
    assert plt.get_fignums() == before


def test_frames_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="at height = 3 has .* the same figsize"):
        Explore(lambda value: plt.figure(figsize=(value, 1)), [2, 3], name="height")


def test_refresh_drops_the_live_view_and_keeps_the_twin():
    bundle = Explore(draw, [1, 2])._repr_mimebundle_()
    output = nbformat.v4.new_output("execute_result", bundle)
    cell = nbformat.v4.new_code_cell("slider", outputs=[output])
    tidied = refresh.tidy(nbformat.v4.new_notebook(cells=[cell]))
    assert set(tidied.cells[0].outputs[0].data) == {"text/plain", "text/html"}


def test_plots_keeps_one_style_per_method():
    colors, markers = plots.METHOD_COLORS, plots.METHOD_MARKERS
    labels = plots.METHOD_LABELS
    assert set(colors) == set(markers) == set(labels)
    for name in colors:
        look = dict(color=colors[name], marker=markers[name], label=labels[name])
        assert plots.method_style(name) == look


def test_style_comes_off_again_when_the_block_raises():
    before = {key: mpl.rcParams[key] for key in plots.BOOK_STYLE}
    with pytest.raises(KeyError):
        with plots.style():
            raise KeyError
    assert {key: mpl.rcParams[key] for key in plots.BOOK_STYLE} == before


def imported_at_once(path):
    "The packages that a module imports when it is imported."
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def test_no_module_but_these_three_needs_matplotlib_or_ipywidgets():
    for path in Path(widgets.__file__).parent.rglob("*.py"):
        if path.stem not in ("plots", "widgets", "figures"):
            drawing = imported_at_once(path) & {"matplotlib", "ipywidgets"}
            assert not drawing, path.name

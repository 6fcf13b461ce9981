"""The built site in a real browser: no errors, nothing sideways, figures that move.

Chromium is the system's. Where there is none the tests are skipped, but for a CI that
sets KDBOOK_BROWSER, where they fail."""

import os
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from helpers import ROOT, built_site

from kdbook.annealing_kd import phi, temperature_schedule
from kdbook.continuation_kd import linear_psi, stage_phi
from kdbook.figures import (
    Moving,
    annealing_landscape,
    attention_figure,
    average_figure,
    gap_figure,
    gradients_figure,
    kronecker_figure,
    noise_figure,
    pass_figure,
    pool_figure,
    schedules_figure,
    temperature_figure,
    twins_figure,
    walks_figure,
)
from kdbook.glitter import select_worst
from kdbook.losses import soft_targets
from kdbook.noisy_label_kd import transition_matrix
from kdbook.progressive_kd import footsteps, trail_target
from kdbook.reweighted_kd import weights_of
from kdbook.universal_kd import attend

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome")
LARGEST = 600_000  # bytes of a page


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        say = pytest.fail if os.environ.get("KDBOOK_BROWSER") else pytest.skip
        say("no Chromium: install it, for example apt-get install chromium")
    with playwright.sync_playwright() as found:
        chromium = found.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return built_site(tmp_path_factory)


def opened(browser, address, **options):
    "A page, and what went wrong on it."
    page, wrong = browser.new_page(**options), []
    told = lambda message: (
        wrong.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("console", told)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"failed {request.url}"))
    page.goto(address, wait_until="load")
    return page, wrong


def pages(site):
    return sorted((site / "nbs").glob("*.html"))


def test_pages_load_without_errors_and_fit(site, browser):
    assert len(pages(site)) == len(list((ROOT / "nbs").glob("*.ipynb")))
    sideways = "document.documentElement.scrollWidth - innerWidth"
    for path in pages(site):
        assert path.stat().st_size < LARGEST, path.name
        page, wrong = opened(
            browser, path.as_uri(), viewport={"width": 1280, "height": 900}
        )
        assert page.evaluate(sideways) <= 0, f"{path.name} scrolls sideways when wide"
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate(sideways) <= 0, f"{path.name} scrolls sideways on a phone"
        assert not wrong, (path.name, wrong)
        page.close()


CHAPTERS = ("index", "distillation", "annealing_kd", "figures", "benchmark", "hf")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_for_axe(site, browser, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for name in CHAPTERS:
        address = (site / "nbs" / f"{name}.html").as_uri()
        page, _ = opened(browser, address, color_scheme=scheme)
        found = axe.run(page).response["violations"]
        serious = [
            (v["id"], v["nodes"][0]["html"][:200], len(v["nodes"]))
            for v in found
            if v["impact"] in ("serious", "critical")
        ]
        assert not serious, (name, scheme, serious)
        page.close()


@pytest.fixture(scope="module")
def served(site):
    "The site's address on a server: a search reads its index from one."
    handler = partial(SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/nbs"
    server.shutdown()


@pytest.mark.parametrize(
    "words, first",
    [
        ("loss landscape", "Loss landscapes"),
        ("annealing", "Annealing-KD"),
        ("select_worst", "Glitter"),
        ("csv", None),
    ],
)
def test_a_search_finds_the_page_of_that_name_first(served, browser, words, first):
    page, wrong = opened(browser, f"{served}/index.html")
    page.fill(".smalldocs-search input >> visible=true", words)
    page.wait_for_selector(".search-result", timeout=30_000)
    titles = page.locator(".search-result-title").all_inner_texts()
    assert not wrong and (first is None or titles[0] == first), titles
    page.close()


def test_a_step_of_the_path_stays_ticked(served, browser):
    page, _ = opened(browser, f"{served}/index.html")
    steps = page.locator(".kd-path li input")
    assert steps.count() == page.locator(".kd-path li").count() > 3
    steps.nth(1).check()
    page.reload()
    ticked = [steps.nth(i).is_checked() for i in range(steps.count())]
    assert [i for i, tick in enumerate(ticked) if tick] == [1]
    page.close()


def test_a_solution_stands_folded_beneath_its_exercise(site, browser):
    page, _ = opened(browser, (site / "nbs" / "annealing_kd.html").as_uri())
    blocks = page.locator("details.solution")
    assert blocks.count() == 5 and not blocks.locator("pre >> visible=true").count()
    blocks.nth(2).locator("summary").click()
    assert "def smooth_phi" in blocks.nth(2).inner_text()
    page.close()


def test_the_first_screen_of_a_technique_has_a_figure_and_no_import(site, browser):
    from house import TECHNIQUES

    for name in ("index", "distillation", "landscape", *TECHNIQUES):
        address = (site / "nbs" / f"{name}.html").as_uri()
        page, _ = opened(browser, address, viewport={"width": 1280, "height": 900})
        figure = page.locator(".kd-figure[data-ready]").first.bounding_box()
        assert figure["y"] < 500, name
        code = page.locator("main pre:visible").first.bounding_box()
        assert code is None or code["y"] > 900 or code["y"] > figure["y"], name
        page.close()


# Figures


def figures():
    "One of each kind."
    weight = np.add.outer(np.arange(8.0), np.arange(8.0))
    factors = (np.ones((2, 2, 4)), np.ones((2, 4, 2)))
    trail = [[0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 2.0, 3.0, 4.0, 5.0]]
    return {
        "temperature": temperature_figure([2.0, 1.0, -1.0], ["a", "b", "c"]),
        "schedules": schedules_figure(trail=trail),
        "landscape": annealing_landscape(phi=0.5),
        "attention": attention_figure(),
        "gradients": gradients_figure(),
        "noise": noise_figure(),
        "kronecker": kronecker_figure(weight, [factors, factors[::-1]]),
        "average": average_figure(),
        "pool": pool_figure(),
        "gap": gap_figure(),
        "pass": pass_figure(
            range(5), range(4), weight[:4, :5] ** 2, [[1, 1], [3, 2]], ["a", "b"]
        ),
        "twins": twins_figure(
            [1, 3],
            ([-1, 0, 1], [2, 1, 3], [[2, 1, 3], [9, 1, 8]]),
            ([-1, 0, 1], [2, 1, 2], [[2, 1, 2], [2, 1, 2.5]]),
        ),
        "walks": walks_figure(
            ["a", "b"],
            range(5),
            range(4),
            [[weight[:4, :5]], [weight[:4, :5], weight[:4, :5] ** 2]],
            [[[1, 1], [3, 2], [4, 3]], [[1, 1], [2, 2], [2, 3]]],
            [["x", "y"], ["x", "y"]],
        ),
    }


@pytest.fixture(scope="module")
def stage(browser, tmp_path_factory):
    "A page with one figure of each kind, as a notebook's outputs would stand there."
    made = figures()
    assert set(made) == set(Moving.KINDS)
    path = tmp_path_factory.mktemp("figures") / "page.html"
    parts = "\n".join(figure._repr_html_() for figure in made.values())
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{parts}", "utf-8")
    page, wrong = opened(browser, path.as_uri())
    yield page
    assert not wrong
    page.close()


SHOWN = """kind => {
  const card = document.querySelector(`[data-kind=${kind}]`);
  const drawn = [...card.querySelectorAll("canvas")].map((c) => c.toDataURL());
  return card.innerHTML + drawn.join("");
}"""


@pytest.mark.parametrize("kind", Moving.KINDS)
def test_every_control_moves_its_picture(stage, kind):
    card = stage.locator(f"[data-kind={kind}]")
    assert card.locator(".kd-still").count() == 0
    for control in card.locator("input[type=range]").all():
        before = stage.evaluate(SHOWN, kind)
        value = float(control.input_value())
        low, high = (float(control.get_attribute(name)) for name in ("min", "max"))
        control.fill(str(low if value > (low + high) / 2 else high))
        assert stage.evaluate(SHOWN, kind) != before, control.get_attribute(
            "aria-label"
        )
    for control in card.locator("input[type=checkbox]").all():
        before = stage.evaluate(SHOWN, kind)
        control.click()
        assert stage.evaluate(SHOWN, kind) != before
    for knob in card.locator("[role=slider]").all():
        before = stage.evaluate(SHOWN, kind)
        knob.focus()
        stage.keyboard.press("ArrowUp")
        assert stage.evaluate(SHOWN, kind) != before, "a knob obeys the keys"
    for number in range(card.locator("button").count()):
        before = stage.evaluate(SHOWN, kind)
        card.locator("button").nth(number).click()
        stage.wait_for_timeout(150)
        assert stage.evaluate(SHOWN, kind) != before


def test_a_knob_is_dragged_and_a_surface_turned(stage):
    for kind, place in (("temperature", "circle"), ("landscape", "canvas")):
        handle = stage.locator(f"[data-kind={kind}] {place}").first
        handle.scroll_into_view_if_needed()
        before, box = stage.evaluate(SHOWN, kind), handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        stage.mouse.move(x, y)
        stage.mouse.down()
        stage.mouse.move(x + 40, y - 30, steps=4)
        stage.mouse.up()
        assert stage.evaluate(SHOWN, kind) != before


def test_a_figure_follows_the_page_s_colours(stage):
    before = stage.evaluate(SHOWN, "temperature")
    stage.evaluate("document.body.style.color = '#eee'; document.body.className = 'x'")
    stage.wait_for_timeout(50)
    assert stage.evaluate(SHOWN, "temperature") != before


def close(page, script, wanted, *values):
    found = page.evaluate(f"(v) => {{ {script} }}", list(values))
    np.testing.assert_allclose(np.array(found, float), wanted, rtol=1e-5, atol=1e-6)


def test_scripts_say_what_python_says(stage):
    rng = np.random.default_rng(0)
    for T in (0.3, 1, 5):
        z = rng.normal(0, 3, 4)
        wanted = soft_targets(torch.tensor(z), T).numpy()
        close(stage, "return kdbook.softmax(v[0], v[1])", wanted, z.tolist(), T)
    for epochs, tau in ((14, 7), (20, 3), (5, 5)):
        temperatures = temperature_schedule(epochs, tau)
        script = "return kdbook.schedules.temperatures(v[0], v[1])"
        close(stage, script, temperatures, epochs, tau)
        close(
            stage,
            "return v[0].map((T) => kdbook.schedules.phi(T, v[1]))",
            [phi(T, tau) for T in temperatures],
            temperatures,
            tau,
        )
        psi = linear_psi(epochs + 4)
        close(stage, "return kdbook.schedules.linearPsi(v[0])", psi, epochs + 4)
        script = "return kdbook.schedules.stagePhi(v[0], v[1])"
        close(stage, script, stage_phi(psi, tau), psi, tau)
    trail = torch.arange(4.0)[None, :, None]
    for epoch in range(14):
        wanted = trail_target(trail, epoch / 14)[1] - 1
        assert footsteps(4)[int(wanted)] == wanted
        close(stage, "return kdbook.schedules.place(v[0], 14, 4)", wanted, epoch)


def test_techniques_in_scripts_say_what_python_says(stage):
    rng = np.random.default_rng(1)
    student, layers = rng.normal(size=3), rng.normal(size=(4, 3))
    shares, mixed = attend(
        torch.tensor(student)[None, None], torch.tensor(layers)[None]
    )
    script = "return kdbook.attention.attend(v[0], v[1])"
    close(stage, script, shares[0, 0], student.tolist(), layers.tolist())
    script = "return kdbook.attention.mixed(v[0], v[1])"
    close(stage, script, mixed[0, 0], shares[0, 0].tolist(), layers.tolist())
    for _ in range(5):
        held, label, teacher = rng.normal(size=(3, 2))
        wanted = weights_of(torch.tensor([[held @ label, held @ teacher]]))
        script = "return [kdbook.gradients.teacherWeight(v[0], v[1], v[2], 1e-8)]"
        close(stage, script, wanted, held.tolist(), label.tolist(), teacher.tolist())
    for kind in ("symmetric", "pair"):
        wanted = transition_matrix(kind, 0.35, 4)
        close(stage, "return kdbook.noise.transition(v[0], 0.35, 4)", wanted, kind)
    a, b = rng.normal(size=(2, 2, 3)), rng.normal(size=(2, 3, 2))
    wanted = sum(np.kron(x, y) for x, y in zip(a, b))
    script = "return kdbook.kronecker.sum(v[0], v[1], 2)"
    close(stage, script, wanted, a.tolist(), b.tolist())
    losses = rng.random(8)
    wanted = select_worst(torch.tensor(losses)[None], 3)[0].sort().values
    close(stage, "return kdbook.pool.worst(v[0], 3)", wanted, losses.tolist())
    noise = rng.normal(size=(9, 2))
    places = [np.array([1.0, -1.0])]
    for step in noise:
        places.append(places[-1] - 0.2 * (places[-1] * [1, 4] + step))
    script = "return kdbook.average.walk(v[0], v[1], 0.2)"
    close(stage, script, places, [1.0, -1.0], noise.tolist())
    known = [[0.1, 0.3], [0.5, 0.9], [0.8, 0.2]]
    xs = np.linspace(0, 1, 11)
    script = "return v[1].map((x) => kdbook.gap.interpolated(v[0], x))"
    close(stage, script, np.interp(xs, *np.array(known).T), known, xs.tolist())


def test_surfaces_in_scripts_say_what_python_says(stage):
    data = annealing_landscape().data
    low, high = np.array(data["low"]), np.array(data["high"])
    script = "return kdbook.landscape.mix(v[0], v[1], v[2], v[3])"
    for share in (0, 0.3, 1):
        wanted = share * high + (1 - share) * low - share * (1 - share) * data["cross"]
        flat = low.flatten().tolist(), high.flatten().tolist()
        close(stage, script, wanted.flatten(), *flat, data["cross"], share)
    # a cubic in both directions is met exactly where four neighbours are there
    u = np.arange(7.0)
    cubic = (u**3 - 4 * u)[:, None] + (u**2)[None]
    fine = stage.evaluate(
        "v => kdbook.landscape.finer(v, 7, 7)", cubic.flatten().tolist()
    )
    half = np.arange(13) / 2
    wanted = (half**3 - 4 * half)[:, None] + (half**2)[None]
    inner = np.array(fine).reshape(13, 13)[2:-2, 2:-2]
    np.testing.assert_allclose(inner, wanted[2:-2, 2:-2], atol=1e-9)
    script = "return [kdbook.landscape.between(v[0], 7, 7, 1 / 3, 0.5)]"
    close(stage, script, [cubic[3, 2]], cubic.flatten().tolist())
    for heights, wanted in (([1.0, 4, 1], 3), ([0.0, 2, 2], 1), ([0.0, 1, 2], 0)):
        close(stage, "return [kdbook.pass.barrier(v[0])]", [wanted], heights)
    # a level of the plane x + y is a line: all its pieces lie on it
    plane = np.add.outer(np.arange(5.0), np.arange(5.0)).flatten().tolist()
    script = "return kdbook.landscape.contour(v[0], 5, 5, 2.5)"
    pieces = np.array(stage.evaluate(f"(v) => {{ {script} }}", [plane]))
    assert len(pieces) and np.allclose(4 * pieces.reshape(-1, 2).sum(1), 2.5)

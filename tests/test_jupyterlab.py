"""Two chapters in JupyterLab, as a reader runs them: every cell, then a slider."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from helpers import ROOT
from test_browser import browser  # noqa: F401  a fixture

pytestmark = pytest.mark.slow
CHAPTERS = "widgets", "figures"  # those that move, and they take seconds
FOLDERS = "settings", "workspaces"  # not the reader's own
SETTINGS = {"@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"}}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of a JupyterLab on copies of the chapters without outputs."
    pytest.importorskip("jupyterlab")
    home = tmp_path_factory.mktemp("lab")
    for name in CHAPTERS:
        nb = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(nb, home / f"{name}.ipynb")
    for place, setting in SETTINGS.items():
        file = home / "settings" / f"{place}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(setting))
    port = free_port()
    own = {f"JUPYTERLAB_{k.upper()}_DIR": str(home / k) for k in FOLDERS}
    own |= {"KDBOOK_RESULTS": str(ROOT / "results"), "PYTHONPATH": str(ROOT)}
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | own
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}"]
    command += ["--allow-root", "--IdentityProvider.token=", "--port-retries=0"]
    command += [f"--ServerApp.root_dir={home}"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.5)
        else:
            pytest.fail(f"JupyterLab did not start: {(home / 'log').read_text()}")
        yield address, home
    finally:
        server.terminate()
        server.wait(30)


def run_all(page, address, home, name):
    "Run every cell and save; the code cells as they lie on the disk then."
    page.goto(f"{address}/lab/workspaces/{name}/tree/{name}.ipynb")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=120_000)
    page.wait_for_selector("text=/ipykernel.*Idle/", timeout=120_000)
    page.click('.lm-MenuBar-itemLabel:text-is("Run")')
    page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
    for _ in range(60):
        page.wait_for_timeout(3000)
        page.keyboard.press("Control+s")
        nb = nbformat.read(home / f"{name}.ipynb", 4)
        code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source]
        if all(cell.execution_count for cell in code):
            return code
    return pytest.fail(f"{name}: not all cells were run in three minutes")


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_runs_and_its_slider_moves(lab, browser, name):  # noqa: F811
    address, home = lab
    page = browser.new_page(viewport=dict(width=1400, height=1000))
    code = run_all(page, address, home, name)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("text/html" in o.get("data", {}) for o in outputs)
    # drawn by a script of ours, or by ipywidgets
    knob = ":is(input[type=range], .noUi-handle)"
    card = page.locator(f":is(.kd-figure, .jupyter-widgets):has({knob})").first
    slider = card.locator(knob).first
    card.scroll_into_view_if_needed()
    before = card.screenshot()
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(500)
    assert card.screenshot() != before
    page.close()

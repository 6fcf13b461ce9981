"""Settings every test run shares."""

import os
import subprocess
import sys
import time
from importlib.metadata import version

import pytest

STARTED = time.monotonic()
A_WHOLE_RUN = 1000  # tests, and more
# Before torch is imported: two threads at most, so that a run on a laptop and one on a
# shared runner take alike.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing in the book needs a model hub, and without a network a try costs minutes.
# HF_HUB_OFFLINE=0 lets tests ask it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_report_header(config):
    folder = os.environ.get("KDBOOK_DATA")
    return [
        f"torch {version('torch')}, {os.environ['OMP_NUM_THREADS']} threads",
        f"KDBOOK_DATA: {folder or 'not set, so tests marked `data` are skipped'}",
    ]


def pytest_collection_modifyitems(config, items):
    # The chapters take longest: begun last, they would leave other processes idle.
    items.sort(key=lambda item: "test_chapter_runs" not in item.nodeid)
    if os.environ.get("KDBOOK_DATA"):
        return
    reason = "needs KDBOOK_DATA, a folder of GLUE-like parquet files"
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session, exitstatus):
    "The minutes of a whole run are kept; the workers of pytest-xdist leave it alone."
    config = session.config
    ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    cut_short = session.shouldstop or session.shouldfail or config.option.collectonly
    if hasattr(config, "workerinput") or not ended or cut_short:
        return
    if session.testscollected > A_WHOLE_RUN:
        folder = config.rootpath / ".pytest_cache"
        folder.mkdir(exist_ok=True)
        minutes = (time.monotonic() - STARTED) / 60
        (folder / "kdbook_minutes").write_text(f"{minutes:.2f}\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def no_leftovers():
    "nbdev's test_nb sets IN_TEST and prepends to sys.path; neither may stay."
    before = os.environ.get("IN_TEST")
    path = list(sys.path)
    yield
    sys.path[:] = path
    os.environ.pop("IN_TEST", None)
    if before is not None:
        os.environ["IN_TEST"] = before


@pytest.fixture
def no_process(monkeypatch):
    "Any new process is a failure, once this is called."

    def refuse(*args, **kwargs):
        raise AssertionError(f"started a process: {args}")

    return lambda: monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    "The folder of a cache of its own, which does not exist yet."
    folder = tmp_path / "cache"
    monkeypatch.setenv("KDBOOK_CACHE", str(folder))
    return folder


@pytest.fixture
def one_thread():
    "Torch computes with one thread."
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

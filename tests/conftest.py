"""Settings every test run shares."""

import os
import subprocess
from importlib.metadata import version

import pytest

# Before torch is imported: two threads at most, so that a run on a laptop and one on a shared runner take alike.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing in the book needs a model hub, and without a network a try costs minutes. HF_HUB_OFFLINE=0 lets tests ask it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_report_header(config):
    data = (
        os.environ.get("KDBOOK_DATA") or "not set, so tests marked `data` are skipped"
    )
    return [
        f"torch {version('torch')}, {os.environ['OMP_NUM_THREADS']} threads",
        f"KDBOOK_DATA: {data}",
    ]


def pytest_collection_modifyitems(config, items):
    if not os.environ.get("KDBOOK_DATA"):
        skip = pytest.mark.skip(
            reason="needs KDBOOK_DATA, a folder of GLUE-like parquet files"
        )
        for item in items:
            if "data" in item.keywords and item.get_closest_marker("data"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_leftovers():
    "nbdev's test_nb sets IN_TEST and prepends to sys.path; neither may reach the next test."
    import sys

    was, path = os.environ.get("IN_TEST"), list(sys.path)
    yield
    sys.path[:] = path
    if was is None:
        os.environ.pop("IN_TEST", None)
    else:
        os.environ["IN_TEST"] = was


@pytest.fixture
def no_process(monkeypatch):
    "Any new process is a failure."

    def refuse(*args, **kwargs):
        raise AssertionError(f"started a process: {args}")

    return lambda: monkeypatch.setattr(subprocess, "Popen", refuse)

"""What several test files need: rows and nets that cost nothing, and processes."""

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from datasets import Dataset

from kdbook.models import image_net
from kdbook.training import Callback, fit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


# rows, nets, weights


def rows_of(pixels, labels, teacher_logits):
    return Dataset.from_dict(
        dict(
            pixel_values=pixels.tolist(),
            label=labels.tolist(),
            teacher_logits=teacher_logits.tolist(),
        )
    )


def images(rows=64, seed=0, labelled=None):
    """Sixteen pixels, four classes, labels by a linear teacher.

    All but `labelled` rows hide theirs; every seed has the same teacher."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.rand(rows, 16, generator=g)
    weights = torch.randn(16, 4, generator=torch.Generator().manual_seed(99))
    teacher_logits = 4 * (pixels - 0.5) @ weights
    labels = teacher_logits.argmax(-1)
    if labelled is not None:
        labels[labelled:] = -100
    return rows_of(pixels, labels, teacher_logits)


def doubtful_images(rows=48, seed=0):
    "The same shapes, and a linear teacher of its own that gets some labels wrong."
    g = torch.Generator().manual_seed(seed)
    pixels = torch.rand(rows, 16, generator=g)
    weights = torch.randn(16, 4, generator=g)
    teacher_logits = (pixels - 0.5) @ weights
    noise = 0.5 * torch.randn(rows, 4, generator=g)
    return rows_of(pixels, (teacher_logits + noise).argmax(-1), teacher_logits)


def changed(data, name, values):
    "The data set with another column of that name."
    return data.remove_columns(name).add_column(name, values)


def net(seed=0):
    "A student of `images`."
    return image_net(hidden=8, num_labels=4, pixels=16, seed=seed)


def go(model, recipe, train=None, validation=None, **arguments):
    "`fit` without a progress bar, on `images()` where no rows are given."
    train = images() if train is None else train
    return fit(model, recipe, train, validation, progress=False, **arguments)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    "Whether two models, or two dictionaries of tensors, are equal to the bit."
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# processes


class Kill(Callback):
    "Ends the process without a word in its `step`-th update."

    def __init__(self, step):
        self.left = step

    def settings(self):
        return {}

    def after_step(self, run, progress):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def forked(job, *arguments):
    "Runs `job` in a child of this process; its exit code, or minus the signal."
    pid = os.fork()
    if not pid:
        code = 1
        try:
            job(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_new_process(module, call, *arguments, **env):
    "Runs `module.call(*arguments)`, all of them text, in a Python of its own."
    code = f"import sys, {module}; {module}.{call}(*sys.argv[1:])"
    path = os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# the site


def built_site(tmp_path_factory):
    "The site, built once for all processes of a test run; warnings fail the test."
    import build_site
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    docs, told = base / "docs", base / "warnings.txt"
    with FileLock(base / "site.lock"):
        if not told.exists():
            warnings = build_site.main(out=docs, work=base / "work")
            told.write_text("\n".join(warnings), encoding="utf-8")
    assert not told.read_text(encoding="utf-8")
    return docs

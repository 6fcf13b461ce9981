"""Try to break kdbook, for as long as you like, and count what happened.

python tools/torture.py --minutes 20            all kinds of trouble, in turns
python tools/torture.py --minutes 1 --only flip one kind
python tools/torture.py --minutes 60 --store    the figures of the chapter

Every round has a seed of its own, which a failure names: `--seed N --rounds 1 --only
KIND` does that round again. A round ends as "noticed" (an error that says what to do),
"harmless" (the right result all the same), or it is wrong: another result, half a file,
or an error that says nothing. One wrong round ends the campaign with exit code 1.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm

from kdbook import archives, reweighted_kd, swa
from kdbook.checkpoints import load_checkpoint, save_checkpoint
from kdbook.distillation import annotate
from kdbook.files import load_tensors, results_dir, save_tensors, write_json
from kdbook.models import image_net
from kdbook.records import store
from kdbook.training import CrossEntropy, Recipe, Stage, fit

NOTICED, HARMLESS = "noticed", "harmless"


class Wrong(AssertionError):
    "What must not happen."


def rows(count=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 16, generator=g)
    logits = 4 * (pixels - 0.5) @ torch.randn(16, 4, generator=g)
    return Dataset.from_dict(
        dict(
            pixel_values=pixels.tolist(),
            label=logits.argmax(-1).tolist(),
            teacher_logits=logits.tolist(),
        )
    )


ROWS, HELD_OUT, META = rows(), rows(24, 1), rows(12, 2)


def net(seed=0):
    return image_net(hidden=8, num_labels=4, pixels=16, seed=seed)


def recipe():
    "Two stages with all that has a state: RW-KD's own updates, and SWA's mean."
    first = reweighted_kd.recipe(META, epochs=3, lr=1e-2, batch_size=12).stages
    second = Stage(CrossEntropy(), 4, 1e-2, 12, schedule="constant")
    return Recipe((*first, second), (swa.SWA(start=0.25),))


def train(folder, seed=0):
    run = fit(
        net(), recipe(), ROWS, HELD_OUT, seed=seed, checkpoint=folder, progress=False
    )
    return {"weights": run.student.state_dict(), "history": run.history}


def same(one, other):
    if one["history"] != other["history"]:
        return False
    pairs = zip(one["weights"].values(), other["weights"].values())
    return all(torch.equal(a, b) for a, b in pairs)


def forked(job: Callable, *arguments) -> int:
    "The exit code of a child that does a job; minus the signal that ended it."
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


# A process is killed at a moment that nobody chose.


def kill(rng: random.Random, place: Path) -> str:
    wanted, span = TRUTH.result()
    for _ in range(rng.randint(1, 3)):
        pid = os.fork()
        if not pid:
            train(place / "run")
            os._exit(0)
        time.sleep(rng.random() * span)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not same(train(place / "run"), wanted):
        raise Wrong("a run that was killed and went on ended elsewhere")
    left = {path.name for path in (place / "run").iterdir()} - {"last.pt", ".lock"}
    if any(not name.startswith(".tmp") and ".part" not in name for name in left):
        raise Wrong(f"killed runs left {sorted(left)}")
    return HARMLESS


class Truth:
    "What the run ends on when nobody disturbs it, and how long it takes."

    def __init__(self):
        self.known = None

    def result(self):
        if self.known is None:
            with tempfile.TemporaryDirectory() as folder:
                train(folder)  # the first is slower
            with tempfile.TemporaryDirectory() as folder:
                started = time.monotonic()
                wanted = train(folder)
                self.known = wanted, time.monotonic() - started
        return self.known


TRUTH = Truth()


# One bit of one file is flipped.


def flipped(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def read_again(read: Callable, wanted, equal: Callable, says: str) -> str:
    "Read a damaged file: it says so, or the content is as it was."
    try:
        found = read()
    except Exception as e:
        if says not in str(e):
            raise Wrong(f"{type(e).__name__} does not say {says!r}: {e}") from e
        return NOTICED
    if not equal(found, wanted):
        raise Wrong("a flipped bit gave another content, and nobody noticed")
    return HARMLESS


def tensors_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def flip_tensors(rng, place):
    wanted = {"a": torch.randn(40), "b": torch.arange(9)}
    path = place / "x.safetensors"
    save_tensors(wanted, path)
    flipped(path, rng)
    return read_again(lambda: load_tensors(path), wanted, tensors_equal, "damaged")


def flip_checkpoint(rng, place):
    wanted = {"a": torch.randn(40), "epoch": 3, "name": "x"}
    path = place / "last.pt"
    save_checkpoint(wanted, path)
    flipped(path, rng)

    def equal(found, wanted):
        rest = {k: v for k, v in found.items() if k != "a"}
        return torch.equal(found["a"], wanted["a"]) and rest == {
            "epoch": 3,
            "name": "x",
        }

    return read_again(lambda: load_checkpoint(path), wanted, equal, "damaged")


def flip_annotations(rng, place):
    "The cache makes again what is damaged."
    wanted = annotate(ROWS, net(3), cache=False, progress=False)["teacher_logits"][:]
    with environment(KDBOOK_CACHE=str(place)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        annotate(ROWS, net(3), progress=False)
        files = [p for p in (place / "annotations").rglob("*") if p.is_file()]
        flipped(rng.choice(sorted(files)), rng)
        found = annotate(ROWS, net(3), progress=False)["teacher_logits"][:]
    if found != wanted:
        raise Wrong("a flipped bit in the cache changed what a teacher says")
    return HARMLESS


def flip_record(rng, place):
    path = place / "x.jsonl"
    for seed in range(3):
        line = {"method": "a", "seed": seed, "score": rng.random(), "knobs": {"t": 2.0}}
        store.append_record(path, line, {"about": "torture"})
    wanted = [record for _, record in store.read_lines(path)]
    flipped(path, rng)
    found = lambda: [record for _, record in store.read_lines(path)]
    # a torn last line is run again
    equal = lambda a, b: a == b or a == b[:-1]
    return read_again(found, wanted, equal, "")


def flip_teacher(rng, place):
    record = {
        "idx": torch.arange(4),
        "teacher_logits": torch.randn(4, 2),
    }
    path = place / "teacher" / "toy.safetensors"
    save_tensors(record, path)
    flipped(path, rng)
    few = Dataset.from_dict({"idx": [0, 1, 2, 3]})
    with environment(KDBOOK_RESULTS=str(place)):
        read = lambda: torch.tensor(annotate(few, "toy")["teacher_logits"][:])
        return read_again(read, record["teacher_logits"], torch.equal, "damaged")


FLIPS = (flip_tensors, flip_checkpoint, flip_annotations, flip_record, flip_teacher)


def flip(rng: random.Random, place: Path) -> str:
    return rng.choice(FLIPS)(rng, place)


# Something small unpacks to something large.


def refused(job: Callable, *kinds: type) -> str:
    try:
        job()
    except kinds:
        return NOTICED
    raise Wrong("nothing was refused")


def bomb_archive(rng, place):
    path = place / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("box/a.txt", b"0" * rng.randint(10**6, 10**7))
    pinned = {"a.txt": (3, "00" * 32)}
    spec = archives.Archive("small==1", path.name, 3, "", ("box",), pinned)
    (place / "into").mkdir()
    outcome = refused(
        lambda: archives.unpack(path, spec, place / "into"), archives.FetchError
    )
    if sum(p.stat().st_size for p in (place / "into").iterdir()) > 4:
        raise Wrong("more was written than was pinned")
    return outcome


def bomb_packed(rng, place):
    text = store.pack(torch.zeros(rng.randint(11_000_000, 20_000_000)).numpy())
    return refused(lambda: store.unpack(text), ValueError)


def bomb_nesting(rng, place):
    path = place / "x.jsonl"
    depth = rng.randint(10_000, 200_000)
    path.write_text(json.dumps({"format": 1}) + "\n" + "[" * depth + "\n")
    return refused(lambda: store.read_lines(path), store.DamagedRecord)


def bomb_header(rng, place):
    "A safetensors file that promises terabytes."
    path = place / "x.safetensors"
    size = rng.randint(2**33, 2**62)
    path.write_bytes(size.to_bytes(8, "little") + b"{}")
    return refused(lambda: load_tensors(path), ValueError)


def bomb_pickle(rng, place):
    "A checkpoint that would run code."

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {place / 'ran'}",)

    torch.save({"digest": "x", "model": Evil()}, place / "last.pt")
    outcome = refused(lambda: load_checkpoint(place / "last.pt"), ValueError)
    if (place / "ran").exists():
        raise Wrong("a checkpoint ran code")
    return outcome


BOMBS = (bomb_archive, bomb_packed, bomb_nesting, bomb_header, bomb_pickle)


def bomb(rng: random.Random, place: Path) -> str:
    return rng.choice(BOMBS)(rng, place)


# The disk is full: no file may grow beyond a size.


def full(rng: random.Random, place: Path) -> str:
    wanted, _ = TRUTH.result()
    limit = rng.choice((0, 100, 1000, 5000))

    def job():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            train(place / "run")
        except OSError:
            return
        os._exit(3)

    code = forked(job)
    if code not in (0, 3):
        raise Wrong(f"a full disk ended a run with code {code}")
    if not same(train(place / "run"), wanted):
        raise Wrong("what a full disk left led to another result")
    return NOTICED if code == 0 else HARMLESS


# Two of everything at once.


def twice(rng: random.Random, place: Path) -> str:
    wanted, span = TRUTH.result()
    pids = []
    for _ in range(2):
        pid = os.fork()
        if not pid:
            try:
                code = 0 if same(train(place / "run"), wanted) else 4
            except ValueError as e:
                code = 2 if "another run is writing" in str(e) else 5
            except BaseException:
                traceback.print_exc()
                code = 6
            os._exit(code)
        pids.append(pid)
        time.sleep(rng.random() * span)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if 0 not in codes or {*codes} - {0, 2}:
        raise Wrong(f"two runs in one folder ended with {codes}")
    return NOTICED if 2 in codes else HARMLESS


def twice_annotated(rng: random.Random, place: Path) -> str:
    "Two processes that want one cache entry."
    wanted = annotate(ROWS, net(3), cache=False, progress=False)["teacher_logits"][:]

    def job():
        with environment(KDBOOK_CACHE=str(place)):
            if annotate(ROWS, net(3), progress=False)["teacher_logits"][:] != wanted:
                raise Wrong("two that annotate at once get another answer")

    pids = []
    for _ in range(2):
        pid = os.fork()
        if not pid:
            code = 1
            with contextlib.suppress(BaseException):
                job()
                code = 0
            os._exit(code)
        pids.append(pid)
    if any(os.waitpid(pid, 0)[1] for pid in pids):
        raise Wrong("one of two that annotate at once failed")
    return HARMLESS


@contextlib.contextmanager
def environment(**values: str):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


KINDS = {
    "kill": kill,
    "flip": flip,
    "bomb": bomb,
    "full": full,
    "twice": twice,
    "twice_annotated": twice_annotated,
}


def one_round(kind: str, seed: int) -> str:
    "Raises `Wrong`."
    rng = random.Random(f"{kind} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        return KINDS[kind](rng, Path(folder))


def campaign(kinds, seed, done: Callable[[int], bool]) -> collections.Counter:
    "Rounds of all kinds in turn until `done`; how often each ended in which way."
    counts, number = collections.Counter(), 0
    while not done(number):
        kind = kinds[number % len(kinds)]
        try:
            counts[kind, one_round(kind, seed + number)] += 1
        except Exception as e:
            raise Wrong(
                f"{e}\nagain: --only {kind} --seed {seed + number} --rounds 1"
            ) from e
        number += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, help="in the place of minutes")
    parser.add_argument("--only", choices=KINDS, action="append")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--store", action="store_true", help="keep the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    # tqdm's lock is shared with children: one that is killed holding it stops us all
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    started = time.monotonic()
    ends = started + 60 * args.minutes
    done = lambda n: n >= args.rounds if args.rounds else time.monotonic() > ends
    counts = campaign(list(args.only or KINDS), args.seed, done)
    minutes = (time.monotonic() - started) / 60
    for (kind, ending), count in sorted(counts.items()):
        print(f"{kind:<16} {ending:<10} {count:>6}")
    print(f"{sum(counts.values())} rounds in {minutes:.1f} minutes, none wrong")
    if args.store:
        found = [[*key, count] for key, count in sorted(counts.items())]
        record = {"minutes": round(minutes), "seed": args.seed, "rounds": found}
        path = results_dir() / "torture.json"
        write_json(record | {"provenance": store.provenance()}, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the data chapter is too short for in fetching.

Hostile archives, broken caches, killed processes, and a pip that misbehaves."""

import hashlib
import importlib.util
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
from helpers import ROOT, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook import archives
from kdbook.archives import ARCHIVES, Archive, FetchError, damaged, fetch, unpack

PYTHON = sys.executable
GOOD = b"the bytes that were pinned\n"


def sha(content):
    return hashlib.sha256(content).hexdigest()


def tar_bytes(*members, mode="w:gz"):
    "A tar archive of (name, bytes) pairs or ready-made TarInfo objects."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                t.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                t.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def spec_of(content, files={"a.txt": GOOD}, filename="small-1.tar.gz", inside=("box",)):
    pinned = {name: (len(b), sha(b)) for name, b in files.items()}
    return Archive("small==1", filename, len(content), sha(content), inside, pinned)


def everything_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def unpacked(tmp_path, content, spec):
    "Unpacks `content`; the files in the target folder, and what else lies beside it."
    folder = tmp_path / "place"
    into = folder / "into"
    into.mkdir(parents=True)
    (folder / spec.filename).write_bytes(content)
    unpack(folder / spec.filename, spec, into)
    names = everything_below(folder)
    expected = ("into", spec.filename)
    beside = [n for n in names if n not in expected and not n.startswith("into/")]
    return everything_below(into), beside


def wheel_bytes(*members):
    "A zip archive of (name, bytes) pairs."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


# unpacking


def test_takes_the_named_member_of_a_nested_tar(tmp_path):
    inner = tar_bytes(("box/a.txt", GOOD), ("box/b.txt", b"not wanted"))
    outer = tar_bytes(
        ("pkg/inner.tar.gz", inner),
        ("pkg/setup.py", b"raise SystemExit('never run, never written')"),
    )
    spec = spec_of(outer, inside=("pkg/inner.tar.gz", "box"))
    files, beside = unpacked(tmp_path, outer, spec)
    assert files == ["a.txt"] and not beside


def test_takes_the_named_member_of_a_wheel(tmp_path):
    content = wheel_bytes(
        ("box/a.txt", GOOD), ("../climbs.txt", b"x"), ("/absolute.txt", b"x")
    )
    spec = spec_of(content, filename="small-1-py3-none-any.whl")
    files, beside = unpacked(tmp_path, content, spec)
    assert files == ["a.txt"] and not beside
    assert not (tmp_path / "climbs.txt").exists() and not Path("/absolute.txt").exists()


def test_other_members_go_nowhere(tmp_path):
    absolute = str(tmp_path / "absolute.txt")
    content = tar_bytes(
        ("../climbs.txt", b"x"),
        ("box/../../climbs.txt", b"x"),
        (absolute, b"x"),
        ("box/a.txt", GOOD),
        link("box/l", "/etc"),
    )
    files, beside = unpacked(tmp_path, content, spec_of(content))
    assert files == ["a.txt"] and not beside
    assert everything_below(tmp_path) == [
        "place",
        "place/into",
        "place/into/a.txt",
        "place/small-1.tar.gz",
    ]


KINDS = ("SYMTYPE", "LNKTYPE", "FIFOTYPE", "CHRTYPE", "DIRTYPE")


@pytest.mark.parametrize("kind", [getattr(tarfile, kind) for kind in KINDS], ids=KINDS)
def test_a_wanted_member_that_is_no_file_is_refused(tmp_path, kind):
    # a hard link to a member with the right bytes would pass the digest
    content = tar_bytes(("box/real.txt", GOOD), link("box/a.txt", "box/real.txt", kind))
    with pytest.raises(FetchError, match="no regular file"):
        unpacked(tmp_path, content, spec_of(content))
    assert not (tmp_path / "place/into/a.txt").exists()


def test_a_link_before_a_file_of_that_name_leads_nowhere(tmp_path):
    outside = tmp_path / "outside.txt"
    content = tar_bytes(link("box/a.txt", str(outside)), ("box/a.txt", GOOD))
    files, _ = unpacked(tmp_path, content, spec_of(content))
    assert files == ["a.txt"] and not outside.exists()
    assert not (tmp_path / "place/into/a.txt").is_symlink()


def test_nothing_is_written_through_a_link_that_stands_in_the_folder(tmp_path):
    content = tar_bytes(("box/a.txt", GOOD))
    outside = tmp_path / "outside.txt"
    (tmp_path / "into").mkdir()
    (tmp_path / "into/a.txt").symlink_to(outside)
    (tmp_path / "small-1.tar.gz").write_bytes(content)
    with pytest.raises(FileExistsError):
        unpack(tmp_path / "small-1.tar.gz", spec_of(content), tmp_path / "into")
    assert not outside.exists()


OTHER_BYTES = dict(
    none=b"",
    shorter=GOOD[:-1],
    longer=GOOD + b"x",
    other=GOOD.replace(b"p", b"q"),
    much_longer=b"x" * 5_000_000,
)


@pytest.mark.parametrize("inside_file", OTHER_BYTES.values(), ids=OTHER_BYTES)
def test_other_bytes_are_refused_after_one_byte_too_many(tmp_path, inside_file):
    content = tar_bytes(("box/a.txt", inside_file))
    with pytest.raises(FetchError, match="not the pinned file"):
        unpacked(tmp_path, content, spec_of(content))
    assert (tmp_path / "place/into/a.txt").stat().st_size <= len(GOOD) + 1


def test_a_missing_member_is_named(tmp_path):
    content = tar_bytes(("box/b.txt", GOOD))
    with pytest.raises(FetchError, match="box/a.txt"):
        unpacked(tmp_path, content, spec_of(content))


@pytest.mark.parametrize("filename", ["small-1.tar.gz", "small-1-py3-none-any.whl"])
@pytest.mark.parametrize("keep", [0, 0.02, 0.3, 0.6, 0.95])
def test_a_truncated_archive_is_one_clear_error(tmp_path, filename, keep):
    body = random.Random(0).randbytes(50_000)
    archive_of = wheel_bytes if filename.endswith(".whl") else tar_bytes
    whole = archive_of(("box/a.txt", body))
    cut = whole[: int(keep * len(whole))]
    # even if the pinned digest of the archive were that of the truncated one
    with pytest.raises(FetchError):
        unpacked(tmp_path, cut, spec_of(cut, {"a.txt": body}, filename))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_an_archive_with_one_byte_changed_never_passes_for_another_file(
    tmp_path_factory, position, value
):
    tmp_path = tmp_path_factory.mktemp("flip")
    content = bytearray(tar_bytes(("box/a.txt", GOOD)))
    content[position % len(content)] = value
    try:
        unpacked(tmp_path, bytes(content), spec_of(bytes(content)))
    except FetchError:
        return
    assert (tmp_path / "place/into/a.txt").read_bytes() == GOOD


# fetching


@pytest.fixture
def instead_of_pip(tmp_path, monkeypatch):
    """A function that puts a program in pip's place.

    The program knows pip's arguments, `dest` among them, and the `shelf`."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()

    def replace(program):
        script = tmp_path / "pip.py"
        script.write_text(
            f"import os, json, shutil, sys, time, uuid\nshelf = {str(shelf)!r}\n"
            f"dest = sys.argv[sys.argv.index('--dest') + 1]\n{program}\n"
        )
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec "{PYTHON}" "{script}" "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        return shelf

    return replace


COPY = "shutil.copy(shelf + '/small-1.tar.gz', dest)"


@pytest.fixture
def small(own_cache, instead_of_pip, monkeypatch):
    "A cache of its own, a small archive in the list, and the shelf it comes from."
    content = tar_bytes(("box/a.txt", GOOD), ("box/b.txt", GOOD * 2))
    spec = spec_of(content, {"a.txt": GOOD, "b.txt": GOOD * 2})
    archive = instead_of_pip(COPY) / spec.filename
    archive.write_bytes(content)
    monkeypatch.setitem(ARCHIVES, "small", spec)
    return own_cache, spec, archive


@pytest.fixture
def moved(small, monkeypatch):
    "A function that moves the cache, to where this process has verified nothing yet."
    cache, spec, _ = small
    elsewhere = cache.with_name("elsewhere")

    def move():
        cache.rename(elsewhere)
        monkeypatch.setenv("KDBOOK_CACHE", str(elsewhere))
        return elsewhere

    return move


def test_fetches_once_and_then_starts_nothing_and_writes_nothing(
    small, moved, no_process, capsys
):
    cache, spec, _ = small
    folder = fetch("small")
    assert (folder / "a.txt").read_bytes() == GOOD and damaged(folder, spec.files) == []
    files = [folder.name, f"{folder.name}/a.txt", f"{folder.name}/b.txt", "small.lock"]
    assert everything_below(cache) == sorted(files)
    assert "fetching small-1.tar.gz (0.0 MB)" in capsys.readouterr().out
    elsewhere = moved()
    before = {p: p.stat().st_mtime_ns for p in elsewhere.rglob("*")}
    no_process()
    assert fetch("small") == elsewhere / folder.name
    assert {p: p.stat().st_mtime_ns for p in elsewhere.rglob("*")} == before
    assert capsys.readouterr().out == ""


DAMAGES = {
    "flipped": lambda content: b"T" + content[1:],
    "shorter": lambda content: content[:-1],
    "longer": lambda content: content + b"\n",
    "gone": lambda content: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_noticed_named_and_fetched_again(small, capsys, damage):
    fetch("small")
    folder = fetch("small")  # looks at the files, which have now been seen to be whole
    capsys.readouterr()
    file = folder / "b.txt"
    whole = file.read_bytes()
    content = DAMAGES[damage](whole)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    fetch("small")
    printed = capsys.readouterr().out.splitlines()
    assert file.read_bytes() == whole
    again = "small: b.txt in the cache damaged or missing; fetching again"
    assert printed[0] == again and len(printed) == 2


def test_a_folder_in_a_files_place_is_not_ours_to_delete(small):
    file = fetch("small") / "b.txt"
    file.unlink()
    file.mkdir()
    with pytest.raises(FetchError, match="KDBOOK_CACHE"):
        fetch("small")


def test_a_flip_that_keeps_size_and_time_is_noticed_by_who_looks_anew(small, moved):
    _, spec, _ = small
    folder = fetch("small")
    assert damaged(folder, spec.files) == []
    file = folder / "a.txt"
    times = file.stat()
    file.write_bytes(b"T" + GOOD[1:])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert damaged(moved() / folder.name, spec.files) == ["a.txt"]


def test_an_unchanged_file_is_hashed_once(small, monkeypatch):
    fetch("small")
    fetch("small")
    monkeypatch.setattr(
        archives, "sha256_of", lambda path: pytest.fail(f"hashed {path} again")
    )
    fetch("small")


def test_an_archive_with_another_digest_is_refused_before_it_is_opened(
    small, monkeypatch
):
    cache, spec, archive = small
    members = ("box/a.txt", GOOD), ("box/b.txt", GOOD * 2), ("box/c.txt", b"one more")
    archive.write_bytes(tar_bytes(*members))
    monkeypatch.setattr(archives, "unpack", lambda *args: pytest.fail("unpacked"))
    with pytest.raises(FetchError, match=f"has sha256 .*expected {spec.sha256[:14]}"):
        fetch("small")
    assert not (cache / spec.folder).exists() and not list(cache.glob(".tmp-*"))


def test_a_truncated_download_is_refused(small):
    cache, spec, archive = small
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(FetchError, match="sha256"):
        fetch("small")
    assert not (cache / spec.folder).exists()


def test_an_archive_put_into_the_cache_by_hand_is_used_and_checked(small, no_process):
    cache, spec, archive = small
    cache.mkdir()
    (cache / spec.filename).write_bytes(b"something else")
    no_process()
    with pytest.raises(FetchError, match="refused"):
        fetch("small")
    (cache / spec.filename).write_bytes(archive.read_bytes())
    assert (fetch("small") / "a.txt").read_bytes() == GOOD
    assert (cache / spec.filename).exists()


def test_what_pip_says_reaches_the_user_with_a_way_out(small, instead_of_pip):
    cache, _, _ = small
    instead_of_pip(
        "print('Looking in indexes')\n"
        "print('ERROR: No matching distribution found for small==1')\n"
        "sys.exit(1)"
    )
    with pytest.raises(FetchError) as error:
        fetch("small")
    message = str(error.value)
    assert "No matching distribution" in message and "Looking in" not in message
    assert "small-1.tar.gz" in message and str(cache) in message
    assert not list(cache.glob(".tmp-*"))


def test_without_pip_the_error_says_how_to_get_it(small, monkeypatch):
    find = importlib.util.find_spec
    no_pip = lambda name: None if name == "pip" else find(name)
    monkeypatch.setattr(importlib.util, "find_spec", no_pip)
    with pytest.raises(FetchError, match="ensurepip.*uv pip install pip"):
        fetch("small")


@pytest.mark.parametrize(
    "name, kind", [("movies", "--no-binary"), ("minilm", "--only-binary")]
)
def test_the_pip_call_pins_the_digest_and_takes_no_dependencies(
    own_cache, instead_of_pip, name, kind
):
    shelf = instead_of_pip(
        "wanted = open(sys.argv[sys.argv.index('--requirement') + 1]).read()\n"
        "json.dump([sys.argv[1:], wanted], open(shelf + '/call.json', 'w'))\n"
        "sys.exit(1)"
    )
    with pytest.raises(FetchError, match="pip could not download"):
        fetch(name)
    arguments, wanted = json.loads((shelf / "call.json").read_text())
    spec = ARCHIVES[name]
    assert arguments[:3] == ["-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--no-input", kind} <= set(arguments)
    assert wanted == f"{spec.requirement} --hash=sha256:{spec.sha256}\n"
    # the user's own settings decide
    assert not any("index" in argument for argument in arguments)


def test_pip_itself_refuses_another_digest_before_it_runs_setup_py(
    tmp_path, own_cache, monkeypatch
):
    "The real pip, with a local shelf for an index, and an archive of another digest."
    ran = tmp_path / "setup_ran"
    setup = (
        f"open({str(ran)!r}, 'w').close()\n"
        "from setuptools import setup\nsetup(name='small', version='1')\n"
    )
    metadata = b"Metadata-Version: 1.0\nName: small\nVersion: 1\n"
    content = tar_bytes(
        ("small-1/setup.py", setup.encode()), ("small-1/PKG-INFO", metadata)
    )
    (tmp_path / "small-1.tar.gz").write_bytes(content)
    monkeypatch.setitem(ARCHIVES, "small", spec_of(b"what was pinned"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FetchError, match="DO NOT MATCH THE HASHES"):
        fetch("small")
    assert not ran.exists() and everything_below(own_cache) == ["small.lock"]


def test_ctrl_c_ends_the_download_and_leaves_nothing(
    small, instead_of_pip, monkeypatch
):
    cache, _, _ = small
    instead_of_pip("time.sleep(60)")
    processes = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            processes.append(self)
            if timeout == 10:
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("small")
    assert processes[0].poll() is not None
    assert everything_below(cache) == ["small.lock"]


def test_progress_is_said_while_waiting(small, monkeypatch, capsys):
    once = []

    class Slow(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout == 10 and not once:
                once.append(1)
                raise subprocess.TimeoutExpired("pip", 10)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    fetch("small")
    assert re.search(r"^  0\.0 of 0\.0 MB$", capsys.readouterr().out, re.M)


# caches that cannot be written


def one_sentence(error, cache):
    message = str(error.value)
    assert isinstance(error.value, FetchError) and "\n" not in message
    assert str(cache) in message and "KDBOOK_CACHE" in message


def test_a_file_where_the_cache_folder_should_be(small):
    cache, _, _ = small
    cache.write_text("in the way")
    with pytest.raises(FetchError) as error:
        fetch("small")
    one_sentence(error, cache)


def test_a_file_where_the_archives_folder_should_be(small):
    cache, spec, _ = small
    cache.mkdir()
    (cache / spec.folder).write_text("in the way")
    with pytest.raises(FetchError) as error:
        fetch("small")
    one_sentence(error, cache)
    assert not list(cache.glob(".tmp-*"))


DENIED = PermissionError(13, "Permission denied")
FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "owner, name, error",
    [(Path, "mkdir", DENIED), (tempfile, "mkdtemp", DENIED), (os, "replace", FULL)],
)
def test_a_disk_that_refuses_ends_in_one_sentence(
    small, monkeypatch, owner, name, error
):
    cache, _, _ = small

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(FetchError, match=error.strerror) as raised:
        fetch("small")
    one_sentence(raised, cache)


def test_a_read_only_cache_folder(small):
    cache, _, _ = small
    cache.mkdir()
    cache.chmod(0o555)
    if os.access(cache, os.W_OK):
        pytest.skip("this user may write anywhere")
    try:
        with pytest.raises(FetchError) as error:
            fetch("small")
        one_sentence(error, cache)
    finally:
        cache.chmod(0o755)


def test_a_full_cache_may_be_read_only(small, moved, monkeypatch):
    folder = fetch("small")
    elsewhere = moved()

    def refuse(*args, **kwargs):
        raise DENIED

    writers = (Path, "mkdir"), (tempfile, "mkdtemp"), (os, "replace")
    for owner, name in (*writers, (filelock, "FileLock")):
        monkeypatch.setattr(owner, name, refuse)
    assert fetch("small") == elsewhere / folder.name


# several processes, killed processes


def child(small, program):
    "A process of its own, with the stand-in for pip and the small archive."
    cache, spec, _ = small
    setting = textwrap.dedent(f"""
        import os, sys, time, traceback
        import filelock
        from kdbook import archives
        from kdbook.archives import Archive, fetch
        sys.executable = {sys.executable!r}
        archives.ARCHIVES["small"] = {spec!r}
    """)
    return subprocess.Popen(
        [PYTHON, "-c", setting + textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


FOUR_FETCH = """
def one_of_four():
    try:
        print(fetch("small"), flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

children = []
for _ in range(4):
    children.append(os.fork() or one_of_four())
sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
"""


def four_fetch(small, setting=""):
    "Four processes at once, all of which must come back served."
    cache, spec, _ = small
    process = child(small, textwrap.dedent(setting) + FOUR_FETCH)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert printed.count(spec.folder) == 4
    assert damaged(cache / spec.folder, spec.files) == []
    assert not list(cache.glob(".tmp-*"))


def test_of_several_processes_one_downloads_and_all_are_served(small, instead_of_pip):
    shelf = instead_of_pip(
        f"open(f'{{shelf}}/call-{{uuid.uuid4().hex}}', 'w').close()\n"
        f"time.sleep(.3)\n{COPY}"
    )
    four_fetch(small)
    assert len(list(shelf.glob("call-*"))) == 1, "more than one process downloaded"


def test_processes_that_do_not_see_each_others_lock_still_end_with_whole_files(
    small, instead_of_pip
):
    instead_of_pip(f"time.sleep(.3)\n{COPY}")
    no_lock = """
        class NoLock:
            def __init__(self, path): pass
            def acquire(self, timeout=None): pass
            def release(self): pass

        filelock.FileLock = NoLock
    """
    four_fetch(small, no_lock)


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_killed_while_downloading(small, instead_of_pip, capsys):
    cache, spec, _ = small
    instead_of_pip("open(dest + '/part', 'w').write('half')\ntime.sleep(60)")
    process = child(small, "fetch('small')")
    wait_for(lambda: list(cache.glob(".tmp-*/part")))
    kill(process)
    scratch = next(cache.glob(".tmp-*"))
    assert not (cache / spec.folder).exists()
    instead_of_pip(COPY)
    # the lock went with its holder
    assert (fetch("small") / "a.txt").read_bytes() == GOOD
    assert "waiting" not in capsys.readouterr().out
    assert scratch.exists()  # may belong to a living process: kept for a day


def test_killed_between_two_renames(small):
    cache, spec, _ = small
    slowly = "os.replace = lambda a, b, real=os.replace: (real(a, b), time.sleep(60))"
    process = child(small, f"{slowly}\nfetch('small')")
    wait_for(lambda: (cache / spec.folder / "a.txt").exists())
    kill(process)
    # one whole file, one missing, no half
    assert damaged(cache / spec.folder, spec.files) == ["b.txt"]
    fetch("small")
    assert damaged(cache / spec.folder, spec.files) == []


def test_what_a_killed_process_left_is_cleared_after_a_day(small):
    cache, _, _ = small
    ages = {".tmp-old": 100_000, ".tmp-young": 3_000, "tmp-yours": 100_000}
    for name, age in ages.items():
        (cache / name).mkdir(parents=True)
        (cache / name / "part").write_text("half")
        os.utime(cache / name, (time.time() - age,) * 2)
    fetch("small")
    names = sorted(path.name for path in cache.iterdir() if "tmp" in path.name)
    assert names == [".tmp-young", "tmp-yours"]


# an archive in parts


@pytest.fixture
def in_parts(own_cache, instead_of_pip, monkeypatch):
    "A zip in three pieces, each in a wheel of its own, on the shelf."
    whole = wheel_bytes(("box/a.txt", GOOD), ("box/c.txt", GOOD * 500))
    cuts = [whole[:100], whole[100:150], whole[150:]]
    shelf, parts = (
        instead_of_pip(
            "name = sys.argv[sys.argv.index('--dest') - 3]\n"
            "shutil.copy(f'{shelf}/{name}-1-py3-none-any.whl', dest)"
        ),
        [],
    )
    for number, piece in enumerate(cuts, 1):
        name = f"small.zip.{number:03}"
        content = wheel_bytes((f"part_{number}/{name}", piece), ("x.py", b"not wanted"))
        pinned = {name: (len(piece), sha(piece))}
        parts.append(
            Archive(
                f"part{number}==1",
                f"part{number}-1-py3-none-any.whl",
                len(content),
                sha(content),
                (f"part_{number}",),
                pinned,
            )
        )
        (shelf / parts[-1].filename).write_bytes(content)
    spec = spec_of(whole, {"a.txt": GOOD}, "small.zip")
    spec = replace(spec, parts=tuple(parts))
    monkeypatch.setitem(ARCHIVES, "small", spec)
    return own_cache, spec, shelf


def test_pieces_are_joined_in_order_and_only_what_was_pinned_stays(in_parts):
    cache, spec, _ = in_parts
    folder = fetch("small")
    assert (folder / "a.txt").read_bytes() == GOOD
    inside = [spec.folder, f"{spec.folder}/a.txt", "small.lock"]
    assert everything_below(cache) == inside


@pytest.mark.parametrize("damage", ["a wheel", "a piece", "the order"])
def test_a_part_with_other_bytes_is_refused(in_parts, monkeypatch, damage):
    cache, spec, shelf = in_parts
    if damage == "a wheel":
        (shelf / spec.parts[1].filename).write_bytes(b"something else")
    elif damage == "a piece":
        wrong = replace(spec.parts[1], files={"small.zip.002": (50, "00" * 32)})
        parts = (spec.parts[0], wrong, spec.parts[2])
        monkeypatch.setitem(ARCHIVES, "small", replace(spec, parts=parts))
    else:
        other = replace(spec, parts=spec.parts[::-1])
        monkeypatch.setitem(ARCHIVES, "small", other)
    with pytest.raises(FetchError, match="refused"):
        fetch("small")
    assert everything_below(cache) == ["small.lock"]


def test_the_whole_may_be_put_into_the_cache_by_hand(in_parts, no_process):
    cache, spec, shelf = in_parts
    pieces = []
    for part in spec.parts:
        with zipfile.ZipFile(shelf / part.filename) as z:
            pieces.append(z.read(f"{part.inside[0]}/{next(iter(part.files))}"))
    cache.mkdir(exist_ok=True)
    (cache / "small.zip").write_bytes(b"".join(pieces))
    assert (fetch("small") / "a.txt").read_bytes() == GOOD


def test_an_encrypted_member_is_refused(tmp_path):
    content = bytearray(wheel_bytes(("box/a.txt", GOOD)))
    for signature in (b"PK\x03\x04", b"PK\x01\x02"):  # of the member, of the list
        flag = content.index(signature) + (6 if signature.endswith(b"\x04") else 8)
        content[flag] |= 1
    spec = spec_of(bytes(content), filename="small-1-py3-none-any.whl")
    with pytest.raises(FetchError, match="cannot be unpacked.*encrypted"):
        unpacked(tmp_path, bytes(content), spec)

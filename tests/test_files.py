from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dbcap import files
from dbcap.errors import LockHeldError
from dbcap.files import Lock, in_units, open_atomic, write_atomic


def test_write_atomic_replaces_and_keeps_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.txt"
    write_atomic(path, b"one")
    path.chmod(0o640)
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(path.parent) == ["a.txt"]


def test_write_atomic_keeps_a_link_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    (tmp_path / "link").symlink_to(target)
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert target.read_bytes() == b"new"


def test_a_failure_while_writing_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write_half() -> None:
        with open_atomic(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


HOLD = (
    "import sys, time; from pathlib import Path; from dbcap.files import Lock\n"
    "with Lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout
        holder.stdout.readline()
        with pytest.raises(LockHeldError, match="another dbcap"), Lock(path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with Lock(path):
        assert path.exists()


def test_who_looks_at_a_lock_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert not files.is_locked(path)
    with Lock(path):
        assert files.is_locked(path)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            files.is_locked(path)
            time.sleep(0.001)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(100):
            with Lock(path):
                assert files.is_locked(path)
    finally:
        stop.set()
        looking.join()
    assert not files.is_locked(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (full, str(tmp_path / "temporary")))
    with pytest.raises(OSError, match="No space left on device") as failure:
        write_atomic(tmp_path / "one.json", b"text")
    assert failure.value.filename == str(tmp_path / "one.json")


def test_a_lock_that_removes_its_file_locks_out_who_opened_it_before(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with Lock(path, remove=True):
        with pytest.raises(LockHeldError), Lock(path, remove=True):
            pass
        assert path.exists()
    assert not path.exists()
    with Lock(path, remove=True), pytest.raises(LockHeldError), Lock(path):
        pass


def test_many_processes_share_a_removed_lock_without_overlap(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from dbcap.files import Lock\n"
        "from dbcap.errors import LockHeldError\n"
        "folder = Path(sys.argv[1]); won = 0\n"
        "while won < 20:\n"
        "    try:\n"
        "        with Lock(folder / 'lock', remove=True):\n"
        "            (folder / 'inside').touch(exist_ok=False); (folder / 'inside').unlink(); won += 1\n"
        "    except LockHeldError:\n"
        "        time.sleep(0.001)\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    deadline = time.monotonic() + 60
    assert [process.wait(max(1, deadline - time.monotonic())) for process in started] == [0] * 4


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (4_200, "4.2 kB"), (982_000_000, "982 MB"), (5e12, "5000 GB")],
)
def test_in_units(size: int, text: str) -> None:
    assert in_units(int(size)) == text

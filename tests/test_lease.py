from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autorank.errors import FileError, StudyError
from autorank.lease import Lease, owner

HOLDER = """
import sys, time
from pathlib import Path
from autorank.lease import Lease, owner

with Lease(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "banking"
    folder.mkdir()
    with hold(folder) as process:
        with pytest.raises(FileError) as caught, Lease(folder):
            pass
        assert f"process {process.pid} on" in str(caught.value)
        assert "'banking'" in str(caught.value)
        assert caught.value.exit_code == 6
        process.communicate("")
    with Lease(folder):
        assert json.loads((folder / "lease.json").read_text())["pid"] == os.getpid()
    assert not (folder / "lease.json").exists()


def test_the_lease_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "lease.json").exists()
    for draft in ("lease", "cost"):
        (tmp_path / f".tmp-{draft}.json-1").touch()
    with Lease(tmp_path):
        assert not list(tmp_path.glob(".tmp-*"))
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()


def test_readers_are_told_who_trains_by_a_note_that_may_be_stale(tmp_path: Path) -> None:
    assert owner(tmp_path) is None
    with hold(tmp_path) as process:
        told = owner(tmp_path)
        assert told is not None and told.startswith(f"process {process.pid} on")
        note = json.loads((tmp_path / "lease.json").read_text())
        # The number may be another's by now: one that began after the note was written.
        (tmp_path / "lease.json").write_text(json.dumps({**note, "started": "2020-01-01T00:00:00+00:00"}))
        assert owner(tmp_path) is None
        (tmp_path / "lease.json").write_text(json.dumps({**note, "host": "elsewhere"}))
        assert owner(tmp_path) == told.replace(note["host"], "elsewhere")
        (tmp_path / "lease.json").write_text(json.dumps(note))
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "lease.json").exists() and owner(tmp_path) is None
    with Lease(tmp_path):
        assert owner(tmp_path) is None  # who asks is no other


def test_one_process_cannot_take_it_twice_and_an_error_gives_it_back(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Lease(tmp_path):
        with pytest.raises(FileError, match=f"process {os.getpid()} on"), Lease(tmp_path):
            pass
        raise RuntimeError
    with Lease(tmp_path):
        pass


def test_a_note_that_cannot_be_written_gives_the_lock_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("autorank.lease.write_json", full)
        with pytest.raises(OSError, match="no space"), Lease(tmp_path):
            pass
    with Lease(tmp_path):
        pass


def test_a_holder_whose_note_is_unreadable_is_another_process(tmp_path: Path) -> None:
    with Lease(tmp_path):
        for note in ("", "[]", '{"pid": 1}'):
            (tmp_path / "lease.json").write_text(note)
            with pytest.raises(FileError, match="in use by another process"), Lease(tmp_path):
                pass


def test_without_a_study_there_is_no_lease_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no study 'none'"), Lease(tmp_path / "none"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_made_is_a_file_error(tmp_path: Path) -> None:
    (tmp_path / "lease.lock").mkdir()
    with pytest.raises(FileError, match="cannot be locked"), Lease(tmp_path):
        pass

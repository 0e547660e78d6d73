from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autorank.errors import FileError, StudyError
from autorank.folder import StudyFolder, study_folder, study_names


def fill(path: Path) -> None:
    path.write_text("database")


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_comes_into_being_at_once_and_complete(tmp_path: Path) -> None:
    seen = []

    def look(path: Path) -> None:
        fill(path)
        seen.append((tmp_path / "deep" / "s").exists())

    StudyFolder(tmp_path / "deep" / "s").create({"budget": 1}, look)
    assert seen == [False]
    assert listing(tmp_path / "deep") == ["s", "s/config.json", "s/study.db"]
    assert StudyFolder(tmp_path / "deep" / "s").config() == {"budget": 1}


def test_a_home_is_where_its_user_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    StudyFolder(study_folder("~/studies", "s")).create({}, fill)
    assert study_names("~/studies") == study_names(tmp_path / "studies") == ["s"]


def test_a_file_is_no_folder_of_studies(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="file is a file: --studies-dir must be a folder"):
        study_names(tmp_path / "file")
    assert study_names(tmp_path / "none") == []


def test_what_fails_while_it_is_made_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        fill(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match="s cannot be made: No space left on device"):
        StudyFolder(tmp_path / "s").create({}, fail)
    assert listing(tmp_path) == []


def test_an_empty_folder_is_free_and_any_other_is_not(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    StudyFolder(tmp_path / "s").create({}, fill)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").touch()
    (tmp_path / "u").touch()
    for name in "stu":
        with pytest.raises(StudyError, match=f"autorank resume {name}"):
            StudyFolder(tmp_path / name).create({}, fill)
    assert (tmp_path / "t" / "mine.txt").exists()


def test_of_two_that_make_the_same_study_one_is_refused(tmp_path: Path) -> None:
    def meanwhile(path: Path) -> None:
        fill(path)
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "study.db").write_text("the other's")

    with pytest.raises(StudyError, match="exists already"):
        StudyFolder(tmp_path / "s").create({}, meanwhile)
    assert listing(tmp_path) == ["s", "s/study.db"]
    assert (tmp_path / "s" / "study.db").read_text() == "the other's"


def test_drafts_of_dead_processes_are_swept_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    names = (f".tmp-s-{dead.pid}", f".tmp-s-{os.getpid()}", f".tmp-s-{os.getppid()}", f".tmp-t-{dead.pid}")
    for name in (*names, ".tmp-s-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.db").touch()
    StudyFolder(tmp_path / "s").create({}, fill)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"s", names[2], names[3], ".tmp-s-x"}


def test_a_folder_that_cannot_be_made_is_a_file_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot be made"):
        StudyFolder(tmp_path / "file" / "s").create({}, fill)


def test_names_are_those_of_folders_with_a_database(tmp_path: Path) -> None:
    for name in ("b", "a", ".tmp-c-1", "with space"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.db").touch()
    (tmp_path / "empty").mkdir()
    assert study_names(tmp_path) == ["a", "b"]
    assert study_names(tmp_path / "none") == []


def test_events_survive_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    assert folder.events() == []
    folder.log_event("first", {"a": "größer"})
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('\n{"kind": "cut')
    folder.log_event("second", {})
    events = folder.events()
    assert [event["kind"] for event in events] == ["first", "second"]
    assert events[0]["a"] == "größer"
    assert events[0]["time"].endswith("+00:00")
    (tmp_path / "events.jsonl").write_text('[1]\nnull\n{"kind": "x"}\n' + json.dumps("text"))
    assert folder.events() == [{"kind": "x"}]

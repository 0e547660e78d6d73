from __future__ import annotations

import json
import pickle
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from study_world import make_study, run

from autorank import database
from autorank.database import network_filesystem, storage_errors
from autorank.errors import FileError, StudyError
from autorank.study import Study

OPENERS: tuple[Callable[[Path], Study], ...] = (Study.open, Study.open_read_only)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three trials, made once; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("pristine") / "s"
    with make_study(folder) as study:
        run(study, 3)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "s"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(folder: Path, *, error: type[Exception] = StudyError) -> str:
    """The one message that opening gives, either way; nothing is created or changed by it."""
    before = contents(folder.parent)
    messages = set()
    for opener in OPENERS:
        with pytest.raises(error) as caught:
            opener(folder)
        messages.add(str(caught.value))
    assert contents(folder.parent) == before
    assert len(messages) == 1
    message = messages.pop()
    assert "\n" not in message
    assert "sqlalchemy" not in message.lower()
    return message


def execute(folder: Path, *statements: str, parameters: tuple[Any, ...] = ()) -> None:
    with closing(sqlite3.connect(folder / "study.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement, parameters)


# -- the file ------------------------------------------------------------------------------------


def test_an_undamaged_copy_opens_both_ways(folder: Path) -> None:
    for opener in OPENERS:
        with opener(folder) as study:
            assert len(study.trials()) == 3


def test_a_missing_study_is_not_created_and_close_names_are_offered(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("banking77"))
    assert "did you mean banking77?" in refusal(folder.with_name("banking"))
    assert "there are: banking77, s" in refusal(folder.with_name("xyz"))
    assert "there is none yet" in refusal(folder.parent / "nowhere" / "s")


def test_a_folder_without_a_database_is_no_study(folder: Path) -> None:
    (folder / "study.db").unlink()
    assert "study.db is missing" in refusal(folder)


def test_a_file_in_place_of_the_folder_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    assert "is a file, not the folder of a study" in refusal(tmp_path / "s")


def test_a_folder_in_place_of_the_database_is_no_study(folder: Path) -> None:
    (folder / "study.db").unlink()
    (folder / "study.db").mkdir()
    assert "is a folder, not a study's database" in refusal(folder)


def test_a_link_that_leads_nowhere_is_no_study(folder: Path) -> None:
    (folder / "study.db").unlink()
    (folder / "study.db").symlink_to(folder / "study.db")
    assert "study.db" in refusal(folder)


def test_an_empty_file_is_no_study(folder: Path) -> None:
    (folder / "study.db").write_bytes(b"")
    assert "is empty" in refusal(folder)


def test_a_text_file_is_no_database(folder: Path) -> None:
    (folder / "study.db").write_text("trial,value\n1,0.5\n" * 100)
    assert "is not a SQLite database" in refusal(folder)


@pytest.mark.parametrize("kept", [100, 4096, 0.5, 0.9])
def test_a_truncated_database_is_damaged(folder: Path, kept: float) -> None:
    content = (folder / "study.db").read_bytes()
    (folder / "study.db").write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    message = refusal(folder)
    assert "is damaged" in message
    assert "restore it from a copy" in message


def test_overwritten_pages_are_damage(folder: Path) -> None:
    path = folder / "study.db"
    content = bytearray(path.read_bytes())
    content[4096 : len(content) - 4096] = b"\xa5" * (len(content) - 8192)
    path.write_bytes(content)
    assert "is damaged" in refusal(folder)


def test_any_overwritten_page_is_damage_also_where_nothing_is_read(folder: Path) -> None:
    path = folder / "study.db"
    whole = path.read_bytes()
    pages = len(whole) // 4096
    assert pages > 20
    for page in range(1, pages, 3):
        path.write_bytes(whole[: 4096 * page] + b"\xa5" * 4096 + whole[4096 * (page + 1) :])
        assert "is damaged" in refusal(folder)


def test_a_database_of_something_else_is_no_study_and_gets_no_tables(folder: Path) -> None:
    (folder / "study.db").unlink()
    execute(folder, "CREATE TABLE cookies (name TEXT)")
    message = refusal(folder)
    assert "is a SQLite database but no study" in message
    assert "trials" in message


def test_the_tables_of_a_newer_optuna_are_named_so(folder: Path) -> None:
    execute(folder, "UPDATE alembic_version SET version_num = 'v9.0.0.a'")
    message = refusal(folder)
    assert "made by a newer Optuna (tables v9.0.0.a, this one has " in message


def test_the_tables_of_an_older_optuna_are_not_upgraded_unasked(folder: Path) -> None:
    execute(folder, "UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    message = refusal(folder)
    assert "made by an older Optuna (tables v2.6.0.a" in message
    assert "copy the file, then run `optuna storage upgrade" in message


@pytest.mark.parametrize("table", ["alembic_version", "version_info"])
def test_a_database_that_does_not_say_its_version_is_refused(folder: Path, table: str) -> None:
    execute(folder, f"DELETE FROM {table}")
    assert "does not say which Optuna made it" in refusal(folder)


def test_no_study_and_two_studies_in_a_file_are_refused(folder: Path) -> None:
    execute(folder, "INSERT INTO studies (study_name) VALUES ('second')")
    assert "holds 2 studies" in refusal(folder)
    execute(folder, "DELETE FROM studies")
    assert "holds 0 studies" in refusal(folder)


def test_a_study_of_optuna_that_autorank_did_not_make_is_refused(folder: Path) -> None:
    (folder / "study.db").unlink()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder}/study.db")
    optuna.create_study(storage=storage, study_name="s", direction="maximize")
    storage.remove_session()
    storage.engine.dispose()
    assert "is an Optuna study that autorank did not make" in refusal(folder)


def test_a_study_in_another_format_names_both(folder: Path) -> None:
    execute(folder, "UPDATE study_user_attributes SET value_json = '{\"format\": 2}' WHERE key = 'autorank'")
    assert "has format 2, this autorank reads 1" in refusal(folder)


@pytest.mark.parametrize("facts", ["[]", "{", '{"format": 1}', '{"format": 1, "metric": "a", "seed": 0}'])
def test_damaged_facts_of_a_study_are_one_error(folder: Path, facts: str) -> None:
    execute(
        folder,
        "UPDATE study_user_attributes SET value_json = ? WHERE key = 'autorank'",
        parameters=(facts,),
    )
    assert "study.db" in refusal(folder)


def test_another_direction_is_refused(folder: Path) -> None:
    execute(folder, "UPDATE study_directions SET direction = 'MINIMIZE'")
    message = refusal(folder)
    assert "has the directions minimize, but the study was made to maximize accuracy" in message


def test_a_second_objective_is_refused(folder: Path) -> None:
    execute(folder, "INSERT INTO study_directions (direction, study_id, objective) VALUES ('MINIMIZE', 1, 1)")
    assert "has the directions maximize, minimize" in refusal(folder)


# -- what is in it -------------------------------------------------------------------------------


def test_parameters_outside_the_space_are_refused(folder: Path) -> None:
    execute(folder, "UPDATE trial_params SET param_value = 999 WHERE param_name = 'rank'")
    assert "rank is 999, outside the stored space" in refusal(folder)


def test_a_category_that_does_not_exist_is_refused(folder: Path) -> None:
    execute(folder, "UPDATE trial_params SET param_value = 7 WHERE param_name = 'target_modules'")
    assert "holds what autorank did not write" in refusal(folder)


def test_other_dimensions_than_the_stored_ones_are_refused(folder: Path) -> None:
    wider = json.dumps(
        {"name": "IntDistribution", "attributes": {"log": True, "step": 1, "low": 1, "high": 9}}
    )
    execute(
        folder, "UPDATE trial_params SET distribution_json = ? WHERE param_name = 'rank'", parameters=(wider,)
    )
    assert "has other dimensions than the stored space" in refusal(folder)


def test_a_waiting_trial_was_not_made_by_autorank(folder: Path) -> None:
    execute(folder, "UPDATE trials SET state = 'WAITING' WHERE number = 2")
    assert "did not make trial 2 (WAITING)" in refusal(folder)


def test_a_trial_without_our_attributes_was_not_made_by_autorank(folder: Path) -> None:
    execute(folder, "DELETE FROM trial_user_attributes WHERE key = 'seed'")
    assert "did not make trial 0" in refusal(folder)


def test_a_path_in_place_of_a_layer_is_refused(folder: Path) -> None:
    record = json.dumps({"trainable_parameters": 1, "ranks": {"../../../etc/cron.d/x": 1}})
    execute(
        folder, "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'record'", parameters=(record,)
    )
    assert "has ranks for layers that all-linear lacks: ../../../etc/cron.d/x" in refusal(folder)


def test_an_oversized_attribute_is_refused_before_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_LARGEST_ATTRIBUTE", 50_000)
    execute(
        folder,
        "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (1, 'x', ?)",
        parameters=(json.dumps("x" * 60_000),),
    )
    assert "an attribute of 60,002 characters in trial_user_attributes" in refusal(folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_a_pickled_sampler_state_is_never_unpickled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = json.dumps(pickle.dumps(Bomb()).hex())
    for key in ("cma:optimizer:0", "cma:optimizer", "tpe:relative_params:0"):
        for table in ("trial_system_attributes (trial_id", "study_system_attributes (study_id"):
            execute(
                folder,
                f"INSERT INTO {table}, key, value_json) VALUES (1, ?, ?)",
                parameters=(key, state),
            )
    with Study.open(folder) as study:
        run(study, 6)
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_config_is_refused_when_it_is_read(folder: Path) -> None:
    (folder / "config.json").write_text('{"name": ')
    with Study.open_read_only(folder) as study, pytest.raises(StudyError, match=r"config\.json is damaged"):
        _ = study.config
    (folder / "config.json").write_text("[]")
    with Study.open_read_only(folder) as study, pytest.raises(StudyError, match=r"config\.json is damaged"):
        _ = study.config
    (folder / "config.json").unlink()
    with Study.open_read_only(folder) as study, pytest.raises(StudyError, match=r"config\.json is missing"):
        _ = study.config


# -- while it is written -------------------------------------------------------------------------


@pytest.fixture
def hot(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """A study as a kill in the middle of a commit leaves it: changed pages, and the journal to undo them."""
    left = tmp_path / "left" / "s"
    with closing(sqlite3.connect(folder / "study.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN")
        connection.execute("UPDATE trial_values SET value = 99")
        for number in range(200):
            connection.execute(
                "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (1, ?, ?)",
                (f"k{number}", json.dumps("x" * 500)),
            )
        shutil.copytree(folder, left)
        connection.execute("ROLLBACK")
    assert (left / "study.db-journal").stat().st_size > 512
    assert (left / "study.db").read_bytes() != (folder / "study.db").read_bytes()
    yield left


def test_a_reader_sees_the_state_before_an_interrupted_commit_and_changes_nothing(
    hot: Path, folder: Path
) -> None:
    before = contents(hot)
    with Study.open_read_only(hot) as left, Study.open_read_only(folder) as whole:
        assert left.trials() == whole.trials()
    assert contents(hot) == before


def test_the_next_writer_rolls_an_interrupted_commit_back(hot: Path, folder: Path) -> None:
    with Study.open(hot) as left, Study.open(folder) as whole:
        assert left.trials() == whole.trials()
        assert run(left, 5) == run(whole, 5)
    assert not (hot / "study.db-journal").exists()


def test_a_locked_database_is_a_file_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_LOCK_TIMEOUT_S", 0.01)
    monkeypatch.setattr("time.sleep", lambda _: None)  # Optuna waits between its five tries
    with Study.open(folder) as study, closing(sqlite3.connect(folder / "study.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(FileError, match="is locked by another process"):
            study.ask(9)
        with pytest.raises(FileError, match="is locked by another process"):
            study.set_result({})
        other.execute("ROLLBACK")
        assert len(study.trials()) == 3
        assert study.ask(9) is not None


def test_a_full_disk_keeps_the_last_state_and_says_what_is_needed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sqlite3.connect

    def small(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = real(*arguments, **options)
        connection.execute(f"PRAGMA max_page_count = {(folder / 'study.db').stat().st_size // 4096}")
        return connection

    with Study.open(folder) as study:
        with monkeypatch.context() as patch:
            patch.setattr(database.sqlite3, "connect", small)
            with pytest.raises(FileError, match=r"disk is full\).* free at least [\d,]+ bytes"):
                study.set_result({"text": "x" * 100_000})
        assert study.result() is None
        assert len(study.trials()) == 3
        study.set_result({"text": "x"})


def test_a_database_that_vanishes_is_not_made_anew(folder: Path) -> None:
    with Study.open(folder) as study:
        (folder / "study.db").unlink()
        with pytest.raises(FileError, match="unable to open database file"):
            study.set_result({})
        assert not (folder / "study.db").exists()


def test_the_systems_errors_are_file_errors(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No space left"), storage_errors(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    with pytest.raises(ZeroDivisionError), storage_errors(tmp_path / "x"):
        raise ZeroDivisionError


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/local\\040disk xfs rw 0 0
host /mnt/ssh fuse.sshfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/studies", None),
        ("/home/me/studies", "nfs4"),
        ("/home", "nfs4"),
        ("/homework", None),
        ("/home/local disk/studies", None),
        ("/mnt/ssh/x", "fuse.sshfs"),
    ],
)
def test_network_file_systems_are_recognised(path: str, kind: str | None) -> None:
    assert network_filesystem(Path(path), MOUNTS) == kind


def test_no_mounts_no_warning() -> None:
    assert network_filesystem(Path("/x"), "") is None
    assert network_filesystem(Path("/x"), "odd line\n") is None

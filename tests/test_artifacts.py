from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from autorank import artifacts
from autorank.artifacts import ArtifactStore, check_writable, read_json, write_json
from autorank.errors import FileError, StudyError


def filler(text: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(text)
        (folder / "more").mkdir()
        (folder / "more" / "weights").write_text(text * 100)

    return fill


def content(folder: Path) -> tuple[str, str]:
    return (folder / "adapter_config.json").read_text(), (folder / "more" / "weights").read_text()


def is_version(folder: Path, text: str) -> bool:
    return content(folder) == (text, text * 100)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_folder_is_written_read_replaced_and_removed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    assert not store.exists("trial-1")
    place = store.write_folder("trial-1", filler("old"))
    assert place == store.path("trial-1") == tmp_path / "artifacts" / "trial-1"
    assert is_version(place, "old")
    store.write_folder("trial-1", filler("new"))
    assert is_version(store.path("trial-1"), "new")
    assert hidden(store.folder) == []
    store.remove("trial-1")
    store.remove("trial-1")
    assert not store.exists("trial-1")
    assert list(store.folder.iterdir()) == []


def test_a_fill_that_fails_changes_nothing(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.write_folder("a", filler("old"))

    def fail(folder: Path) -> None:
        filler("new")(folder)
        raise KeyError("half-way")

    with pytest.raises(KeyError):
        store.write_folder("a", fail)
    with pytest.raises(KeyError):
        store.write_folder("b", fail)
    assert is_version(store.path("a"), "old")
    assert not store.exists("b")
    assert hidden(tmp_path) == []


class Killed(BaseException):
    """Stands for a process that ends here: nothing after it may run, no clean-up either."""


@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_before_any_call_leaves_the_old_or_the_new_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacing: bool
) -> None:
    countdown, done, step = 0, False, 0

    def or_die(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal countdown
            countdown -= 1
            if countdown < 0:
                raise Killed
            return real(*arguments)

        return call

    while not done:
        folder = tmp_path / str(step)
        store = ArtifactStore(folder)
        if replacing:
            store.write_folder("a", filler("old"))
        countdown = step
        with monkeypatch.context() as patch:
            for name in ("rename", "fsync"):
                patch.setattr(artifacts.os, name, or_die(getattr(os, name)))
            # A killed process cleans nothing up.
            patch.setattr(artifacts.shutil, "rmtree", lambda *_, **__: None)
            try:
                store.write_folder("a", filler("new"))
                done = True
            except Killed:
                pass
        before = "old" if replacing else None
        for read_only in (True, False):
            seen = ArtifactStore(folder, read_only=read_only)
            found = (seen.path("a") / "adapter_config.json").read_text() if seen.exists("a") else None
            assert found in (("new",) if done else (before, "new"))
            assert found is None or is_version(seen.path("a"), found)
        assert hidden(folder) == []
        step += 1
    # Four files and folders are flushed, and the listing; the rename is one more call.
    assert step > 6


def test_a_reader_sweeps_and_creates_nothing(tmp_path: Path) -> None:
    reader = ArtifactStore(tmp_path / "none", read_only=True)
    assert not reader.exists("a")
    assert not (tmp_path / "none").exists()
    (tmp_path / ".tmp-a-1-0").mkdir()
    ArtifactStore(tmp_path, read_only=True)
    assert hidden(tmp_path) == [".tmp-a-1-0"]
    ArtifactStore(tmp_path)
    assert hidden(tmp_path) == []


WRITER = """
import sys
from pathlib import Path
from autorank.artifacts import ArtifactStore

store = ArtifactStore(Path(sys.argv[1]))
for version in range(1, 10_000):
    def fill(folder):
        for name in "abcd":
            (folder / name).write_text(str(version) * 1000)
    store.write_folder("artifact", fill)
    if version == 1:
        print("begun", flush=True)
"""


@pytest.mark.parametrize("delay_ms", [1, 4, 7])
def test_an_artifact_is_whole_after_a_real_kill(tmp_path: Path, delay_ms: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay_ms / 1000)
        process.send_signal(signal.SIGKILL)
    for read_only in (True, False):
        store = ArtifactStore(tmp_path, read_only=read_only)
        texts = {path.read_text() for path in store.path("artifact").iterdir()}
        assert len(texts) == 1
        assert len(list(store.path("artifact").iterdir())) == 4
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("key", ["", "..", "../up", "a/b", ".hidden", "a\n", "x" * 101, "/etc", "a\\b", "é"])
def test_keys_cannot_lead_anywhere_else(tmp_path: Path, key: str) -> None:
    store = ArtifactStore(tmp_path / "store")
    calls: list[Callable[[str], object]] = [
        store.path,
        store.exists,
        store.remove,
        store.digest,
        lambda key: store.write_folder(key, filler("x")),
        lambda key: store.write_json(key, {}),
    ]
    for call in calls:
        with pytest.raises(StudyError, match="no key of an artifact"):
            call(key)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_digest_tells_missing_changed_and_new_files(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.write_folder("a", filler("x"))
    digest = store.digest("a")
    assert set(digest) == {"adapter_config.json", "more/weights"}
    assert store.check("a", digest) == store.path("a")
    (store.path("a") / "adapter_config.json").write_text("y")
    (store.path("a") / "new").touch()
    (store.path("a") / "more" / "weights").unlink()
    with pytest.raises(StudyError, match=r"\(adapter_config.json, more/weights, new\)"):
        store.check("a", digest)
    with pytest.raises(StudyError, match="is missing"):
        store.check("b", digest)


def test_a_link_is_no_part_of_an_artifact(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.write_folder("a", filler("x"))
    digest = store.digest("a")
    weights = store.path("a") / "more" / "weights"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StudyError, match="more/weights"):
        store.check("a", digest)


def test_json_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"name": "größer", "list": [1, 2.5, None]})
    assert read_json(path) == {"name": "größer", "list": [1, 2.5, None]}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "replace", fail)
        with pytest.raises(FileError, match="No space left on device; 8 bytes are needed"):
            write_json(path, [1])
    assert read_json(path)["name"] == "größer"
    assert os.listdir(tmp_path) == ["x.json"]


def test_json_holds_no_nan_and_what_is_no_json_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert os.listdir(tmp_path) == []
    for text in ('{"a": ', "", "\x00", "b\xff"):
        (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(StudyError, match="damaged"):
            read_json(tmp_path / "x.json")
    with pytest.raises(StudyError, match="missing"):
        read_json(tmp_path / "y.json")


def test_a_store_keeps_json_under_a_key(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    assert store.write_json("plan.json", {"a": 1}) == tmp_path / "plan.json"
    assert json.loads((tmp_path / "plan.json").read_text()) == store.read_json("plan.json") == {"a": 1}
    store.remove("plan.json")
    assert not store.exists("plan.json")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file", "file is a file: --flag must be a folder"),
        ("file/below/it", "file is a file: --flag must be a folder"),
        ("dangling", "dangling is a link that leads nowhere"),
        ("dangling/below", "dangling is a link that leads nowhere"),
        ("loop", "symbolic links"),
        ("loop/below", "symbolic links"),
        ("x" * 300, "File name too long"),
        ("/".join(["y" * 200] * 30), "File name too long"),
    ],
)
def test_a_folder_that_can_never_be_made_is_refused_beforehand(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileError, match=said) as refused:
        check_writable(tmp_path / name, "--flag")
    assert "--flag" in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_can_be_made_is_not_made_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for name in (".", "new", "new/and/deeper", "link", "link/new"):
        check_writable(tmp_path / name, "--flag")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(FileError, match=f"{tmp_path} cannot be written: choose another folder with --flag"):
        check_writable(tmp_path / "new", "--flag")


def test_a_folder_that_cannot_be_made_is_a_file_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot be made"):
        ArtifactStore(tmp_path / "file" / "store")


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from autorank.artifacts import ArtifactStore
from autorank.errors import FileError

store = ArtifactStore(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for fill in (
    lambda folder: (folder / "weights").write_bytes(bytes(5000)) and None,
    lambda folder: save_file({"x": torch.zeros(1250)}, folder / "weights"),
):
    try:
        store.write_folder("a", fill, 5000)
    except FileError as error:
        print(error)
"""


def test_a_file_that_the_system_refuses_to_grow_leaves_the_last_version(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.write_folder("a", filler("x"))
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    place = store.path("a")
    assert run.stdout == f"{place} cannot be written: File too large; 5,000 bytes are needed\n" * 2
    assert is_version(store.path("a"), "x")
    assert hidden(tmp_path) == []


def test_a_full_disk_is_recognised_in_another_librarys_words(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)

    def fill(folder: Path) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(FileError, match="No space left on device"):
        store.write_folder("a", fill)

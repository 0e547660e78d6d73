"""What many tests need: small worlds made from scratch, and quiet, repeatable surroundings.

Models and tokenizers are real, tiny and random; they are made once per run from fixed seeds and
are read-only. No fixture touches the caller's random state.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Set before any library reads them: no test may reach for a hub or start threads of its own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No folder can be there: what is kept between runs is a user's, and no test's.
os.environ["HF_ASSETS_CACHE"] = os.path.join(os.devnull, "none")
# Processes that a test starts find this checkout wherever they run, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import hypothesis
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.set_num_threads(1)
hypothesis.settings.register_profile("autorank", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("autorank")

_WORDS = {
    "animal": ("cat", "dog", "horse", "mouse", "bear", "wolf"),
    "colour": ("red", "green", "blue", "yellow", "black", "white"),
    "food": ("bread", "cheese", "apple", "soup", "rice", "cake"),
}
_FILLERS = ("the", "a", "one", "we", "saw", "had", "some", "more", "of", "it", "today", "again")


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Torch's global random stream set to `seed` inside, put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@pytest.fixture
def generator() -> torch.Generator:
    """A random stream of the test's own."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU, and a CUDA device where there is one.

    Two runs there are the same in every bit, as on a CPU: attention's faster kernels add up in any order.
    """
    with sdpa_kernel(SDPBackend.MATH) if request.param == "cuda" else nullcontext():
        yield request.param


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the shared data sets and models; the test is skipped where there is none."""
    folder = Path(os.environ.get("AUTORANK_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder} (set AUTORANK_SHARED)")
    return folder


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _sentence(stream: random.Random, label: str) -> str:
    words = [*stream.sample(_FILLERS, 4), *stream.sample(_WORDS[label], 2)]
    stream.shuffle(words)
    return " ".join(words)


def _classification_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Distinct texts whose label a bag of words tells; the labels take turns."""
    stream = random.Random(seed)
    labels = sorted(_WORDS)
    return [
        {"text": f"{_sentence(stream, label)} n{seed}x{index}", "label": label}
        for index, label in ((index, labels[index % len(labels)]) for index in range(count))
    ]


def _completion_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Each prompt is completed by the kind of thing that it speaks of."""
    return [
        {"prompt": row["text"], "completion": f" {row['label']}"} for row in _classification_rows(seed, count)
    ]


def _passage_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Asked for a kind of thing, the passage names one; every sixth passage names none."""
    stream = random.Random(seed)
    kinds = sorted(_WORDS)
    rows = []
    for index in range(count):
        kind, lacks = kinds[index % 3], index % 6 == 5
        named = {other: stream.choice(_WORDS[other]) for other in kinds if not (lacks and other == kind)}
        words = [*stream.sample(_FILLERS, stream.randint(3, 6)), *named.values()]
        stream.shuffle(words)
        context = " ".join(words)
        answers = {"text": [], "answer_start": []}
        if not lacks:
            start = len(" ".join([*words[: words.index(named[kind])], ""]))
            answers = {"text": [named[kind]], "answer_start": [start]}
        rows.append({"question": kind, "context": f"{context} n{seed}x{index}", "answers": answers})
    return rows


def _write_splits(folder: Path, rows: Callable[[int, int], list[dict[str, Any]]]) -> Path:
    for seed, (split, count) in enumerate((("train", 96), ("validation", 36), ("test", 36))):
        write_jsonl(folder / f"{split}.jsonl", rows(seed, count))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL classification folder: 96/36/36 rows, `text` and `label` of three classes."""
    return _write_splits(tmp_path_factory.mktemp("data") / "tiny-things", _classification_rows)


@pytest.fixture(scope="session")
def tiny_completions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL folder of `prompt` and `completion`: 96/36/36 rows."""
    return _write_splits(tmp_path_factory.mktemp("data") / "tiny-completions", _completion_rows)


@pytest.fixture(scope="session")
def tiny_passages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL folder of `question`, `context` and `answers`: 96/36/36 rows, in SQuAD's form."""
    return _write_splits(tmp_path_factory.mktemp("data") / "tiny-passages", _passage_rows)


def save_tokenizer(folder: Path, specials: dict[str, str], template: bool) -> int:
    """A word-level tokenizer over the words above; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*specials.values(), *_FILLERS, *(word for kind in _WORDS for word in (kind, *_WORDS[kind]))]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
        )
    inputs = ["input_ids", *(["token_type_ids"] if template else []), "attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **specials
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT encoder (hidden 32) with tokenizer; a classifier on it is fresh.

    Every linear layer inside a block: attention 4 x 32-32, MLP 32-64 and 64-32.
    """
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    specials = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    size = save_tokenizer(folder, specials, template=True)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    with seeded(0):
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama language model (hidden 32, two key-value heads) without a pad token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    size = save_tokenizer(folder, specials, template=False)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    with seeded(0):
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_cli(*arguments: object) -> Outcome:
    """Run one `autorank` command in this process: `run_cli("show", "--json").json`."""
    from autorank.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Callable[..., Outcome]:
    """`run_cli`, for tests that cannot import it."""
    return run_cli

"""Searches killed at random instants, gone on with until they end, and compared with one left alone.

    python studies/experiments/kills/run.py --kills 50 --out result.json

One search of a tiny model runs undisturbed. Then searches with the same seed run in processes of their
own, each of which is sent SIGKILL, SIGTERM or Ctrl-C at a random time after it took the study's lease;
`autorank resume` goes on, is killed in turn, and so on. When a study has come to its end it is compared,
trial by trial, value for value and rank for rank, and the next one starts, until there were so many kills.
A kill counts where it came before the study's result was there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from autorank.study import Study

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FILLERS = ["the", "a", "my", "old", "new"]
WORDS = {"food": ["soup", "bread", "apple"], "tool": ["saw", "nail", "drill"], "pet": ["cat", "dog", "hen"]}
NAME = "killed"


def make_world(folder: Path) -> list[str]:
    """A tiny model and data set; returns the flags of the search."""
    words = ["[PAD]", "[UNK]", *FILLERS, *(word for group in WORDS.values() for word in group)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    model = folder / "model"
    torch.manual_seed(0)
    BertModel(config).save_pretrained(model)
    fast.save_pretrained(model)
    data = folder / "data"
    data.mkdir()
    draw = random.Random(0)
    for split, count in (("train", 96), ("validation", 60), ("test", 30)):
        rows = []
        for _ in range(count):
            label = draw.choice(list(WORDS))
            text = " ".join([*draw.choices(FILLERS, k=3), draw.choice(WORDS[label])])
            rows.append(json.dumps({"text": text, "label": label}))
        (data / f"{split}.jsonl").write_text("\n".join(rows))
    settings = {"model": model, "data": data, "budget": "3k", "trials": 7, "steps": 60, "batch-size": 8}
    settings |= {"max-length": 16, "name": NAME, "device": "cpu"}
    settings["set"] = "space.learning_rate={low: 1.0e-4, high: 3.0e-2}"  # wide, so that some are given up
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """One `autorank` command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "autorank", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
    )


def outline(studies: Path) -> list[Any] | None:
    """Everything about the trials but the time they took, and the references; None where it goes on."""
    if not (studies / NAME).is_dir():
        return None
    with Study.open_read_only(studies / NAME) as study:
        facts = study.to_json()
    if facts["result"] is None:
        return None
    trials = [{k: v for k, v in trial.items() if k != "seconds"} for trial in facts["trials"]]
    return json.loads(json.dumps([trials, facts["references"], facts["cost"]]))


def first_difference(one: Any, two: Any, path: str = "") -> str:
    """Where two JSON values part."""
    if type(one) is type(two) and isinstance(one, (dict, list)):
        pairs = one.keys() | two.keys() if isinstance(one, dict) else range(max(len(one), len(two)))
        for key in sorted(pairs) if isinstance(one, dict) else pairs:
            inside = [_item(side, key) for side in (one, two)]
            if inside[0] != inside[1]:
                return first_difference(*inside, f"{path}/{key}")
    return f"{path}: {one!r} and {two!r}"


def _item(value: Any, key: Any) -> Any:
    try:
        return value[key]
    except (KeyError, IndexError):
        return None


def wait_for_lease(process: subprocess.Popen[bytes], studies: Path) -> float:
    """Wait until the process has the study, or has ended; the time then."""
    note = studies / NAME / "lease.json"
    while process.poll() is None:
        try:
            if json.loads(note.read_text())["pid"] == process.pid:
                break
        except (OSError, ValueError):
            time.sleep(0.01)
    return time.monotonic()


def main() -> None:
    """Kill, go on, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        world = Path(place)
        flags = make_world(world)
        whole = world / "whole"
        process = start("search", *flags, "--studies-dir", str(whole))
        began = wait_for_lease(process, whole)
        _, said = process.communicate()
        seconds = time.monotonic() - began
        expected = outline(whole)
        if process.returncode or expected is None:
            raise SystemExit(f"the undisturbed search failed: {said.decode()}")
        kills: Counter[str] = Counter()
        studies, differing, codes = 0, 0, Counter[str]()
        while sum(kills.values()) < options.kills:
            folder = world / f"studies-{studies}"
            while outline(folder) is None:
                stored = (folder / NAME).is_dir()
                where = ["--studies-dir", str(folder)]
                process = start("resume", NAME, *where) if stored else start("search", *flags, *where)
                number = draw.choice(SIGNALS)
                began = wait_for_lease(process, folder)
                try:
                    _, said = process.communicate(timeout=draw.uniform(0, 0.95 * seconds))
                except subprocess.TimeoutExpired:
                    process.send_signal(number)
                    _, said = process.communicate()
                    if (folder / NAME).is_dir() and outline(folder) is None:
                        kills[number.name] += 1
                    codes[f"{number.name} {process.returncode}"] += 1
                else:
                    if process.returncode:
                        raise SystemExit(f"`autorank` failed by itself: {said.decode()}")
                    if not stored:  # the machine may be faster or slower now
                        seconds = time.monotonic() - began
            studies += 1
            same = outline(folder) == expected
            differing += not same
            if not same:
                print(first_difference(expected, outline(folder)))
            print(
                f"study {studies}: {sum(kills.values())} kills so far, {'the same' if same else 'DIFFERENT'}"
            )
        result = {
            "kills": sum(kills.values()),
            "by_signal": dict(kills),
            "exit_codes": dict(codes),
            "studies": studies,
            "differing": differing,
            "seconds_under_the_lease": round(seconds, 1),
        }
    print(json.dumps(result, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    raise SystemExit(1 if differing else 0)


if __name__ == "__main__":
    main()

"""Languages: NLLB's, mBART's of 2020 and mBART-50's, each as transformers trains it and lets it write."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from card_code import assert_card_predicts
from conftest import seeded
from seq2seq_world import BART, LETTERS, T5, save_seq2seq, write_reversals

from autorank.errors import ModelError
from autorank.model import Base, load_base
from autorank.tasks import Batch, Metric, Seq2Seq, for_model

TASK = Seq2Seq(("source", "target"), Metric("loss", "minimize"))
ROWS = [{"source": "a b c", "target": "h g"}, {"source": "d", "target": "e f a b"}]
# The tokenizer, the model, and what its languages are called.
KINDS = {
    "nllb": ("NllbTokenizer", "M2M100ForConditionalGeneration", "eng_Latn", "deu_Latn"),
    "mbart50": ("MBart50Tokenizer", "MBartForConditionalGeneration", "en_XX", "de_DE"),
    "mbart": ("MBartTokenizer", "MBartForConditionalGeneration", "en_XX", "de_DE"),
}


def save_translator(folder: Path, kind: str, **values: Any) -> Path:
    """A random translator of that kind over the letters, and its tokenizer."""
    name, model_name, *_ = KINDS[kind]
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [f"\u2581{letter}" for letter in LETTERS]
    if kind == "nllb":
        words = [*specials, "\u2581", *LETTERS, *pieces]
        merges = [("\u2581", letter) for letter in LETTERS]
        vocab: Any = {word: index for index, word in enumerate(words)}
        given = {"merges": merges, "extra_special_tokens": ["deu_Latn", "eng_Latn", "fra_Latn"]}
    else:
        vocab, given = [*((word, 0.0) for word in specials), *((piece, -1.0) for piece in pieces)], {}
    tokenizer = getattr(transformers, name)(vocab=vocab, model_max_length=32, **given)
    tokenizer.save_pretrained(folder)
    start = {} if kind == "mbart" else {"decoder_start_token_id": 2}
    config = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "init_std": 0.1, **start, **values}
    model = getattr(transformers, model_name)
    with seeded(0):
        built = model(model.config_class(vocab_size=len(tokenizer), **{**BART, **config}))
    with torch.no_grad(), seeded(1):  # letters are likelier than anything else, and depend on the source
        head = torch.randn(len(tokenizer), 32) / 8
        head[tokenizer(" ".join(LETTERS), add_special_tokens=False)["input_ids"]] *= 12
        built.get_output_embeddings().weight.copy_(head)
        for key, parameter in built.named_parameters():
            if "encoder_attn" in key and parameter.ndim == 2:
                parameter.mul_(8)
    built.generation_config.forced_eos_token_id = None
    built.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_translator(tmp_path_factory.mktemp("models") / kind, kind)
        return made[kind]

    return make


def load(folder: Path, **settings: Any) -> Base:
    return load_base(
        str(folder), auto_class="AutoModelForSeq2SeqLM", model_kwargs={}, device="cpu", **settings
    )


def translator(folder: Path, kind: str) -> Base:
    _, _, source, target = KINDS[kind]
    return load(folder, source_language=source, target_language=target)


def batch_of(base: Base, task: Seq2Seq) -> Batch:
    return task.collate(task.encode(ROWS, base.processor, 16).examples, base.pad_token_id)


def settled(base: Base) -> Seq2Seq:
    task = for_model(TASK, base.decoder_start)
    assert isinstance(task, Seq2Seq)
    return task


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_transformers_trains(folders: Callable[[str], Path], kind: str) -> None:
    folder = folders(kind)
    base, (*_, source, target) = translator(folder, kind), KINDS[kind]
    assert str(base.languages) == f"{source} to {target}"
    batch = batch_of(base, settled(base))
    plain = transformers.AutoTokenizer.from_pretrained(folder, src_lang=source, tgt_lang=target)
    texts = {"text": [row["source"] for row in ROWS], "text_target": [row["target"] for row in ROWS]}
    given = plain(**texts, padding=True, return_tensors="pt")
    labels = given["labels"].masked_fill(given["labels"] == plain.pad_token_id, -100)
    assert torch.equal(batch.inputs["input_ids"], given["input_ids"])
    seen: list[torch.Tensor] = []
    hook = base.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    base.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], labels=labels)
    hook.remove()
    width = batch.labels.shape[1]
    assert width == labels.shape[1] - (kind == "mbart")
    for row, (mine, theirs) in enumerate(zip(batch.inputs["decoder_input_ids"], seen[0], strict=True)):
        count = int((batch.labels[row] != -100).sum())
        assert torch.equal(mine[:count], theirs[:count])
        assert torch.equal(batch.labels[row, :count], labels[row, :count])
    language = plain.convert_tokens_to_ids(target)
    where = batch.inputs["decoder_input_ids"][:, 0] if kind == "mbart" else batch.labels[:, 0]
    assert (where == language).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_transformers_writes(folders: Callable[[str], Path], kind: str) -> None:
    base = translator(folders(kind), kind)
    batch = batch_of(base, settled(base))
    key = "decoder_start_token_id" if kind == "mbart" else "forced_bos_token_id"
    language = base.tokenizer.convert_tokens_to_ids(KINDS[kind][3])
    found = base.model.generate(  # type: ignore[operator]
        input_ids=batch.inputs["input_ids"],
        attention_mask=batch.inputs["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
        num_beams=1,
        **{key: language},
    )
    assert found[:, 0 if kind == "mbart" else 1].tolist() == [language] * 2
    expected = base.tokenizer.batch_decode(found, skip_special_tokens=True)
    writer = base.writer
    assert writer is not None and len(set(expected)) == 2 and all(expected)
    prompts = [settled(base).prompt(one) for one in settled(base).encode(ROWS, base.processor, 16).examples]
    assert writer.write(prompts, 6) == expected


def test_languages_are_those_that_tokenizer_or_model_name(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ModelError,
        match=r"nllb writes in one of many languages .* --set target_language=CODE, and --set "
        r"source_language=CODE unless it is eng_Latn \(codes are such as deu_Latn, eng_Latn, fra_Latn\)",
    ):
        load(folders("nllb"))
    assert str(load(folders("nllb"), target_language="fra_Latn").languages) == "eng_Latn to fra_Latn"
    saved = save_translator(tmp_path / "saved", "nllb")
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved, src_lang="fra_Latn", tgt_lang="deu_Latn")
    tokenizer.save_pretrained(saved)
    assert str(load(saved).languages) == "fra_Latn to deu_Latn"
    german = transformers.AutoTokenizer.from_pretrained(folders("mbart")).convert_tokens_to_ids("de_DE")
    told = save_translator(tmp_path / "told", "mbart", decoder_start_token_id=german)
    assert str(load(told).languages) == "en_XX to de_DE" and load(told).decoder_start == german
    french = load(told, target_language="fr_XX")
    assert french.decoder_start == french.tokenizer.convert_tokens_to_ids("fr_XX")
    forced = save_translator(tmp_path / "forced", "mbart50")
    german = transformers.AutoTokenizer.from_pretrained(forced).convert_tokens_to_ids("de_DE")
    config = transformers.GenerationConfig.from_pretrained(forced)
    config.forced_bos_token_id = german
    config.save_pretrained(forced)
    assert str(load(forced).languages) == "en_XX to de_DE"


@pytest.mark.parametrize("given", [{"target_language": "ger_Latn"}, {"source_language": "a"}])
def test_a_language_that_is_not_known_is_refused(
    folders: Callable[[str], Path], given: dict[str, str]
) -> None:
    (language,) = given.values()
    message = f"does not know the language '{language}': do you mean "
    with pytest.raises(ModelError, match=re.escape(message)):
        load(folders("nllb"), **{"target_language": "deu_Latn", **given})


def test_languages_mean_nothing_to_other_models(tmp_path: Path, tiny_bert: Path) -> None:
    save_seq2seq(tmp_path / "t5")
    assert load(tmp_path / "t5").languages is None
    with pytest.raises(ModelError, match="t5 knows no languages: leave source_language and target_language"):
        load(tmp_path / "t5", target_language="deu_Latn")
    with pytest.raises(ModelError, match="for an encoder-decoder that translates, not for sequence class"):
        load_base(
            str(tiny_bert),
            auto_class="AutoModelForSequenceClassification",
            model_kwargs={"num_labels": 2},
            source_language="eng_Latn",
        )


def test_a_checkpoint_s_own_first_token_is_written_first(tmp_path: Path) -> None:
    """As BART's for summaries, whose texts all begin with `<s>`."""
    base = load(save_seq2seq(tmp_path / "t5", **{**T5, "decoder_start_token_id": 0}))
    writer = base.writer
    assert writer is not None
    base.model.generation_config.forced_bos_token_id = 7
    assert all(text.split()[0] == base.tokenizer.decode([7]) for text in writer.write([[3, 1], [4, 1]], 3))


def test_a_translation_is_searched_exported_and_written(
    cli: Any, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    data, studies, out = write_reversals(tmp_path / "data", rows=30), tmp_path / "studies", tmp_path / "out"
    what = ("--model", folders("nllb"), "--data", data, "--budget", "8k", "--metric", "exact_match")
    how = ("--trials", 1, "--steps", 20, "--batch-size", 8, "--name", "words", "--studies-dir", studies)
    report = cli("search", *what, *how, "--set", "target_language=fra_Latn", "--json")
    assert report.code == 0, report.err
    assert "languages: eng_Latn to fra_Latn" in report.err
    assert cli("export", "words", "--studies-dir", studies, "--out", out).code == 0
    assert (
        'AutoTokenizer.from_pretrained(folder, config=base.config, tgt_lang="fra_Latn")'
        in (out / "README.md").read_text()
    )
    assert_card_predicts(out, {"source": "the red cat"}, tmp_path)
    scored = cli("evaluate", out, "--data", data, "--split", "validation", "--json").json
    assert scored["scores"] == pytest.approx({**scored["scores"], **report.json["best"]["metrics"]}, abs=1e-5)

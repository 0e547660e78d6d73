from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.config import (
    QUICKSTART,
    Dimension,
    StudyConfig,
    build_config,
    config_from_json,
    config_to_json,
    default_name,
    is_quickstart,
    load_config,
    merge_settings,
    parse_time,
)
from autorank.errors import CommandError, StudyError

BASE_SOURCES = {"model": "models/bert", "data": "data/rows"}
BASE = {**BASE_SOURCES, "budget": "170k"}


def load(*sets: str, **flags: Any) -> StudyConfig:
    return load_config(None, {**BASE, **flags}, sets)


def refusal(*sets: str, **flags: Any) -> str:
    with pytest.raises(CommandError) as caught:
        load(*sets, **flags)
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# -- layers of settings --------------------------------------------------------------------------


def test_sets_override_flags_and_flags_override_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\ndata: b\nbudget: 1M\ntrials: 3\nseed: 5\nbatch_size: 8\n")
    config = load_config(path, {"trials": 4, "seed": 6, "batch_size": None}, ["seed=7"])
    assert (config.batch_size, config.trials, config.seed, config.budget) == (8, 4, 7, 1_000_000)


@pytest.mark.parametrize(
    ("value", "template"),
    [
        (r"Question: {question}\nAnswer: ", "Question: {question}\nAnswer: "),
        ("{question}", "{question}"),
        ("# {title}\n\t- {first}, [x]", "# {title}\n\t- {first}, [x]"),
        (r"\t{a} = {b}", "\t{a} = {b}"),
        ('"{a}" means', '"{a}" means'),
        (r'"Say: {a}\n"', "Say: {a}\n"),
        ("'{a}: '", "{a}: "),
        ("null", None),
        ("", None),
    ],
)
def test_a_template_is_text_whatever_it_looks_like_to_yaml(value: str, template: str | None) -> None:
    assert load(f"template={value}").template == template


def test_tables_are_laid_over_one_another_key_by_key(tmp_path: Path) -> None:
    path = write(tmp_path, "schedule: {moves: 3, share: 0.5}\nspace: {rank: 4}\n")
    config = load_config(path, BASE, ["schedule.moves=9", "space.scaling=2"])
    assert (config.schedule.moves, config.schedule.share) == (9, 0.5)
    assert config.space.rank == Dimension(choices=(4,))
    assert config.space.scaling == Dimension(choices=(2,))


def test_a_null_stands_for_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, "trials:\nmax_rank: 4\n")
    config = load_config(path, BASE, ["max_rank="])
    assert config.trials == 12
    assert config.max_rank is None


def test_a_length_in_a_higher_layer_replaces_the_other_length_below(tmp_path: Path) -> None:
    path = write(tmp_path, "epochs: 2\n")
    assert load_config(path, {**BASE, "steps": 50}).epochs is None
    assert load_config(path, {**BASE, "steps": 50}, ["epochs=1"]).steps is None
    quick = load_config(None, {"epochs": 1.0})
    assert (quick.epochs, quick.steps) == (1.0, None)


def test_steps_and_epochs_together_are_refused(tmp_path: Path) -> None:
    assert "steps 5 and epochs 1.0 exclude each other" in refusal(steps=5, epochs=1.0)
    for other, told in (({"lanes": 2}, "lanes 2"), ({"space": {"dropout": 0.1}}, "space.dropout")):
        said = refusal(gradient_checkpointing=True, **other)
        assert f"gradient_checkpointing and {told} exclude each other" in said
    path = write(tmp_path, "epochs: 2\nsteps: 5\n")
    with pytest.raises(CommandError, match="exclude each other"):
        load_config(path, BASE)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n"), BASE) == load()


# -- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("budget: [1", "study.yaml:1: not YAML"),
        ("trials: 3\ntrials: 4\n", "study.yaml:2: not YAML: 'trials' stands here twice"),
        ("space: {rank: 4, rank: 5}\n", "'rank' stands here twice"),
        ("- a\n- b\n", "a study file is a table of settings"),
        ("just words", "a study file is a table of settings"),
        ("1: 2\n", "a study file is a table of settings"),
        ("budget: !!python/object/apply:os.getcwd []\n", "not YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_study_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(CommandError) as caught:
        load_config(write(tmp_path, text), BASE)
    assert said in str(caught.value)


def test_a_missing_file_names_the_way_to_a_stored_study(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"no such file.*autorank resume"):
        load_config(tmp_path / "minilm", BASE)


def test_a_folder_and_bytes_are_no_study_file(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="cannot be read as a study file"):
        load_config(tmp_path, BASE)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: café\n".encode("latin-1"))
    with pytest.raises(CommandError, match="not UTF-8"):
        load_config(latin, BASE)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "space:\n  learning_rate: {low: 1e-4, high: 1E-2}\n  scaling: [2, .5, 1.5e+1]\nbudget: 2_000\n",
    )
    config = load_config(path, {"model": "a", "data": "b"})
    assert config.space.learning_rate == Dimension(low=1e-4, high=1e-2)
    assert config.space.scaling == Dimension(choices=(2, 0.5, 15.0))
    assert config.budget == 2000


# -- bad settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("trails", "do you mean trials?"),
        ("learning_rate", "do you mean space.learning_rate?"),
        ("lr", "do you mean space.learning_rate?"),
        ("timeout", "do you mean time?"),
        ("dropout", "do you mean space.dropout?"),
        ("lora_dropout", "do you mean space.dropout?"),
        ("wd", "do you mean space.weight_decay?"),
        ("label_smoothing_factor", "do you mean space.label_smoothing?"),
        ("early_stopping_patience", "do you mean patience?"),
        ("space.rnak", "do you mean space.rank?"),
        ("schedule.warm_up", "do you mean schedule.warmup?"),
        ("moves", "do you mean schedule.moves?"),
        ("batch-size", "do you mean batch_size?"),
        ("space.rank.lowest", "the keys here are choices, low, high, log"),
        ("zzzzzz", "the keys here are name, model, data"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key: str, meant: str) -> None:
    message = refusal(f"{key}=1")
    assert message.startswith(f"{key} is not a setting")
    assert meant in message


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("trials=0", "trials is 0: it must be at least 1"),
        ("trials=-3", "trials is -3: it must be at least 1"),
        ("trials=2.5", "trials is 2.5: it must be a whole number"),
        ("trials=true", "trials is True: it must be a whole number"),
        ("trials='3'", "trials is '3': it must be a whole number"),
        ("steps=0", "steps is 0: it must be at least 1"),
        ("epochs=0", "epochs is 0: it must be above 0"),
        ("epochs=.nan", "epochs is nan: it must be"),
        ("epochs=1e300", "epochs is 1e+300: it must be at most 1000000000"),
        ("device=''", "device is '': it must be text that is not empty"),
        ("epochs=.inf", "epochs is inf: it must be a finite number"),
        ("batch_size=0", "batch_size is 0"),
        ("max_length=0", "max_length is 0"),
        ("eval_fraction=0", "eval_fraction is 0"),
        ("eval_fraction=1", "eval_fraction is 1: it must be below 1"),
        ("time=0", "time 0 cannot be used"),
        ("time=-5", "time -5 cannot be used"),
        ("time=soon", "time 'soon' cannot be used"),
        ("seed=-1", "seed is -1"),
        ("keep=0", "keep is 0: it must be at least 1"),
        ("plateau=0", "plateau is 0: it must be at least 1"),
        ("patience=0", "patience is 0: it must be at least 1"),
        ("patience=1.5", "patience is 1.5: it must be a whole number"),
        ("samples=0", "samples 0 cannot be used: it is a count such as 40000, 40k or 1.5M"),
        ("samples=many", "samples 'many' cannot be used"),
        ("target=.nan", "target is nan: it must be a finite number"),
        ("gradient_clip=0", "gradient_clip is 0"),
        ("evaluations=0", "evaluations is 0"),
        (
            "task=ranking",
            "task is 'ranking': it must be 'auto', 'text-classification', 'multi-label-classification', 'reg",
        ),
        ("task=text-clasification", "or 'seq2seq'; do you mean text-classification?"),
        ("importance=gradient", "or 'random'; do you mean gradient_norm?"),
        ("importance=magic", "'gradient_norm', 'singular_value', 'sensitivity' or 'random'"),
        ("dtype=int8", "dtype is 'int8'"),
        ("trust_remote_code=1", "trust_remote_code is 1: it must be true or false"),
        ("space=3", "space is 3: it must be a table of settings"),
        ("schedule=[1]", "schedule is [1]: it must be a table of settings"),
        ("model=[1]", "model is [1]: it must be text"),
        ("name=2024", "name is 2024: it must be text, in quotes"),
        ("budget={a: 1}", "a budget is a number of trainable parameters"),
        ("target_modules=[1]", "target_modules is 1: it must be text"),
        ("target_modules=[]", "target_modules is empty"),
        ("target_modules=['']", "target_modules is empty"),
        ("columns={txt: a}", "columns: 'txt' is no role: do you mean text?"),
        ("columns.text=1", "columns.text is 1: it must be the name of a column"),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_rule(setting: str, said: str) -> None:
    assert said in refusal(setting)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("space.learning_rate={low: 1e-2, high: 1e-3}", "low 0.01 is above high 0.001: swap them"),
        ("space.learning_rate={low: 0, high: 1e-3}", "space.learning_rate 0, 0.001 must be above 0"),
        ("space.learning_rate=-1e-3", "learning_rate -0.001 must be above 0"),
        ("space.head_learning_rate=0", "head_learning_rate 0 must be above 0"),
        ("space.scaling=0", "scaling 0 must be above 0"),
        ("space.scaling=1e300", "scaling 1e+300 must be above 0 and at most a million"),
        ("space.dropout=1", "space.dropout 1 must be at least 0 and below 1"),
        ("space.dropout=-0.1", "space.dropout -0.1 must be at least 0 and below 1"),
        ("space.dropout=.nan", "space.dropout: nan cannot be used: a number must be finite"),
        ("space.label_smoothing=[0, 1.5]", "label_smoothing 0, 1.5 must be at least 0 and below 1"),
        ("space.label_smoothing={low: 0, high: 0.2, log: true}", "low 0 must be above 0 on a log scale"),
        ("space.weight_decay={low: -1, high: 1}", "space.weight_decay -1, 1 must be at least 0"),
        ("space.weight_decay=[0, .inf]", "space.weight_decay: inf cannot be used: a number must be finite"),
        ("space.weight_decay=much", "space.weight_decay is a number, a list of numbers or a range"),
        ("space.scaling=[1, a]", "space.scaling is a number"),
        ("space.scaling=[]", "needs at least one"),
        ("space.scaling=[1, 1]", "holds each one once"),
        ("space.rank=0", "space.rank 0 must be whole numbers from 1"),
        ("space.rank=[1, 2.5]", "rank 1, 2.5 must be whole numbers from 1"),
        ("space.rank={low: 1}", "a range needs both low and high"),
        ("space.rank={low: 1, high: x}", "space.rank.high is 'x': it must be a number"),
        ("space.rank={low: 1, high: 2, choices: [1]}", "choices or a range, not both"),
        ("space.rank=[true]", "space.rank.choices is True"),
        ("space.allocation=random", "space.allocation 'random' is not known: it is uniform or adaptive"),
        ("space.allocation={low: 1, high: 2}", "space.allocation is a word or a list of words"),
        ("space.start=probe", "space.start 'probe' is not known: it is uniform or gradient"),
        ("space.start=1", "space.start is a word or a list of words"),
        ("space.target_modules=[3]", "target_modules is a word or a list of words"),
        ("schedule.warmup=0.5", "warmup 0.5 leaves no time for moves"),
        ("schedule.warmup=-0.1", "schedule.warmup is -0.1: it must be at least 0"),
        ("schedule.until=0.9", "schedule.until is 0.9"),
        ("schedule.moves=0", "schedule.moves is 0: it must be at least 1"),
        ("schedule.share=0", "schedule.share is 0"),
        ("schedule.share=1.5", "schedule.share is 1.5"),
    ],
)
def test_a_bad_space_or_schedule_is_refused(setting: str, said: str) -> None:
    assert said in refusal(setting)


def test_several_faults_are_told_at_once() -> None:
    message = refusal("trials=0", "steps=-1", "trails=3")
    assert all(word in message for word in ("trials is 0", "steps is -1", "trails is not a setting"))


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert "min_rank 3 is above max_rank 2" in refusal("min_rank=3", "max_rank=2")
    assert "space.rank 2, 4 goes below min_rank 3" in refusal("min_rank=3", "space.rank=[2, 4]")
    said = refusal("space.rank=4", "space.start=gradient")
    assert "space.rank and space.start gradient exclude each other" in said
    assert load("space.rank=4", "space.start=[uniform, gradient]").space.rank == Dimension(choices=(4,))
    for start in ("gradient", "[uniform, gradient]"):
        said = refusal("min_rank=1", f"space.start={start}")
        assert "min_rank 1 and space.start gradient exclude each other" in said
    said = refusal("target_modules=[q]", "space.target_modules=[mlp]")
    assert "target_modules and space.target_modules exclude each other" in said


@pytest.mark.parametrize("text", ["trials", "=3", "space..rank=1", ".rank=1", ""])
def test_a_set_without_key_and_value_is_refused(text: str) -> None:
    assert "write key=value" in refusal(text)


def test_a_set_cannot_go_below_a_value() -> None:
    assert "has no keys" in refusal("trials=3", "trials.low=1")


# -- names and times -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "minilm-stdlib-docs", "A.b_c-1", "_x", "x" * 64])
def test_a_name_of_plain_characters_is_kept(name: str) -> None:
    assert load(name=name).name == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-x", "a/b", "../a", "a b", "é", "x" * 65, "a\n"])
def test_a_name_that_could_be_a_path_or_a_flag_is_refused(name: str) -> None:
    assert "name" in refusal(name=name)


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("builtin:minilm", "builtin:stdlib-docs", "minilm-stdlib-docs"),
        ("org/Some Model", "/data/banking77/", "Some-Model-banking77"),
        ("./m", "rows.jsonl", "m-rows"),
        ("C:\\models\\bert", "x.CSV", "bert-x"),
        ("m", "rows.tsv.gz", "m-rows"),
        ("..", "ü", "study"),
    ],
)
def test_the_default_name_tells_model_and_data(model: str, data: str, name: str) -> None:
    assert default_name(model, data) == name


@given(st.text(max_size=80), st.text(max_size=80))
def test_a_default_name_can_always_be_used(model: str, data: str) -> None:
    name = default_name(model, data)
    assert load(name=name).name == name


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1h5s", 3605), ("45", 45), ("1.5h", 5400),
     (" 2H ", 7200), (12, 12), (0.5, 0.5)],
)  # fmt: skip
def test_a_time_is_read_in_seconds(text: str | float, seconds: float) -> None:
    assert parse_time(text) == seconds
    assert load(time=text).time_s == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0h0m", "-1", "1d", "m", "1m1h", "nan", "inf", "1e3", True, 0, -1.0]
)
def test_what_is_no_time_is_refused_with_the_rule(text: Any) -> None:
    with pytest.raises(CommandError, match="such as 90s, 30m, 2h or 1h30m"):
        parse_time(text)


# -- what is named and what is not ---------------------------------------------------------------


def test_the_quickstart_needs_nothing() -> None:
    config = load_config()
    assert (config.model, config.data) == (QUICKSTART["model"], QUICKSTART["data"])
    assert (config.budget, config.max_length) == (100_000, 48)
    assert (config.trials, config.steps) == (QUICKSTART["trials"], QUICKSTART["steps"])
    assert config.name == "minilm-stdlib-docs"


def test_the_quickstarts_values_give_way_and_are_its_own() -> None:
    config = load_config(None, {"budget": "2M", "trials": 2}, ["steps=9"])
    assert (config.budget, config.trials, config.steps, config.max_length) == (2_000_000, 2, 9, 48)
    named = load_config(None, {"model": "builtin:minilm", "data": "builtin:stdlib-docs", "budget": 1})
    assert (named.trials, named.steps, named.max_length) == (12, None, 128)


def test_whether_it_is_the_quickstart_is_told_by_what_is_named() -> None:
    assert is_quickstart(merge_settings(None, {"budget": "1k", "model": None}, []))
    assert not is_quickstart(merge_settings(None, {"model": "a"}, []))


def test_naming_only_one_of_model_and_data_says_what_is_missing() -> None:
    with pytest.raises(CommandError, match=r"model is 'a' but no data is named: add --data"):
        build_config({"model": "a", "budget": 1})
    with pytest.raises(CommandError, match=r"data is 'b' but no model is named: add --model"):
        build_config({"data": "b", "budget": 1})


def test_a_study_of_ones_own_needs_a_budget() -> None:
    with pytest.raises(CommandError, match=r"no budget is named: add --budget"):
        build_config({"model": "a", "data": "b"})


@pytest.mark.parametrize("key", ["model", "data"])
def test_a_path_is_kept_whole_so_that_any_working_directory_will_do(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "linked.jsonl").symlink_to("rows.jsonl")
    (tmp_path / "builtin:minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source, kept in (
        ("folder", tmp_path / "folder"),
        ("./linked.jsonl", tmp_path / "linked.jsonl"),
        ("~/folder", tmp_path / "folder"),
        ("org/name", "org/name"),
        ("./missing", "./missing"),
        ("builtin:minilm", "builtin:minilm"),
    ):
        assert getattr(load(**{key: source}), key) == str(kept)
    assert load(**{key: "folder"}).name == default_name(**{**BASE_SOURCES, key: "folder"})


# -- storing -------------------------------------------------------------------------------------


def test_limits_are_read_as_counts_and_numbers() -> None:
    config = load_config(None, {**BASE, "samples": "40k", "target": 1, "plateau": 5, "keep": 2})
    assert (config.samples, config.target, config.plateau, config.keep) == (40_000, 1.0, 5, 2)
    plain = load_config(None, BASE)
    assert (plain.samples, plain.target, plain.plateau, plain.keep) == (None, None, None, 3)
    assert config_from_json(config_to_json(config)) == config


def test_columns_are_laid_over_one_another_role_by_role_and_stored(tmp_path: Path) -> None:
    path = write(tmp_path, "columns: {text: question, label: intent}\n")
    config = load_config(path, {**BASE, "columns": {"label": "topic"}}, ["columns.score=grade"])
    assert config.columns == {"text": "question", "label": "topic", "score": "grade"}
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    assert load().columns is None
    with pytest.raises(CommandError, match="text and label both name 'question'"):
        load_config(path, {**BASE, "columns": {"label": "question"}})


def test_a_configuration_reads_back_from_json() -> None:
    config = load(
        "space.rank={low: 1, high: 16, log: true}",
        "space.scaling=[1, 2.5]",
        "space.learning_rate=1e-3",
        "space.target_modules=[mlp, all-linear]",
        "time=1h",
        "epochs=1.5",
        "schedule.moves=3",
    )
    stored = json.loads(json.dumps(config_to_json(config)))
    assert stored["time"] == 3600
    assert stored["space"]["rank"] == {"low": 1, "high": 16, "log": True}
    assert stored["space"]["scaling"] == [1, 2.5]
    assert stored["space"]["learning_rate"] == 0.001
    assert config_from_json(stored) == config


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_dropout_that_was_stored_for_a_whole_study_is_of_its_space(dropout: float) -> None:
    stored = config_to_json(load("space.rank=2")) | {"dropout": dropout}
    config = config_from_json(stored)
    assert config.space.dropout == Dimension(choices=(dropout,))
    assert config.space.rank == Dimension(choices=(2,))
    assert config_from_json(config_to_json(config)) == config


def test_a_study_from_before_packing_was_a_setting_packs_nothing() -> None:
    stored = config_to_json(load("packing=true"))
    assert config_from_json(stored).packing is True
    del stored["packing"]
    assert config_from_json(stored).packing is False


@pytest.mark.parametrize("targets", [["q_proj", "mlp"], r".*\.q_proj", "attention"])
def test_target_modules_are_a_list_or_a_text_and_stay_so(targets: Any) -> None:
    config = load(target_modules=targets)
    assert config.target_modules == (tuple(targets) if isinstance(targets, list) else targets)
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


@pytest.mark.parametrize(
    "change",
    [
        {"trials": 0},
        {"name": "../x"},
        {"surprise": 1},
        {"budget": "2X"},
        {"name": None},
        {"columns": {"x": "y"}},
    ],
)
def test_a_stored_configuration_that_was_changed_is_a_study_error(change: dict[str, Any]) -> None:
    with pytest.raises(StudyError, match=r"stored configuration.*--name"):
        config_from_json({**config_to_json(load()), **change})


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().trials = 3  # type: ignore[misc]

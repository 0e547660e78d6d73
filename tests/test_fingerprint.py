from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autorank.errors import StudyError
from autorank.fingerprint import check_fingerprint, derive_seed, make_fingerprint

FACTS = {
    "model": "sha256:1",
    "data": "d1",
    "task": "text-classification",
    "metric": "accuracy",
    "direction": "maximize",
    "budget": 1000,
    "seed": 3,
    "version": "0.1.0",
    "space": {"space.rank": "1..4, log"},
}


def make(**changes: object) -> dict[str, str]:
    return make_fingerprint(**{**FACTS, **changes})  # type: ignore[arg-type]


def test_the_same_facts_agree_and_only_the_major_version_counts() -> None:
    check_fingerprint("s", make(), make())
    check_fingerprint("s", make(), make(version="0.9.3"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "sha256:2"}, "model (stored sha256:1, given sha256:2)"),
        ({"data": "d2"}, "data (stored d1, given d2)"),
        ({"task": "causal-lm"}, "task (stored text-classification, given causal-lm)"),
        ({"metric": "f1_macro"}, "metric (stored accuracy, given f1_macro)"),
        ({"direction": "minimize"}, "direction (stored maximize, given minimize)"),
        ({"budget": 2000}, "budget (stored 1000, given 2000)"),
        ({"seed": 4}, "seed (stored 3, given 4)"),
        ({"version": "1.0.0"}, "autorank (stored 0, given 1)"),
        ({"space": {"space.rank": "1..8, log"}}, "space.rank (stored 1..4, log, given 1..8, log)"),
        ({"space": {}}, "space.rank (stored 1..4, log, given -)"),
        ({"settings": {"steps": 20}}, "steps (stored -, given 20)"),
    ],
)
def test_each_fact_that_differs_is_named_with_both_values(change: dict[str, object], said: str) -> None:
    with pytest.raises(StudyError) as caught:
        check_fingerprint("minilm", make(), make(**change))
    assert said in str(caught.value)
    assert str(caught.value).count("(stored") == 1
    assert "'minilm'" in str(caught.value)
    assert "--name" in str(caught.value)


def test_all_differences_are_listed_at_once() -> None:
    with pytest.raises(StudyError, match=r"budget .*; seed "):
        check_fingerprint("s", make(), make(budget=1, seed=1))


def test_a_seed_is_the_first_31_bits_of_the_documented_hash() -> None:
    assert derive_seed(5, 2) == int(hashlib.sha256(b"5/2").hexdigest()[:8], 16) >> 1
    assert derive_seed(5, 2, "sampler") == int(hashlib.sha256(b"5/2/sampler").hexdigest()[:8], 16) >> 1


@given(st.integers(0, 2**63 - 1), st.integers(0, 10_000))
def test_seeds_fit_31_bits_and_differ_by_purpose(study_seed: int, slot: int) -> None:
    seed = derive_seed(study_seed, slot)
    assert 0 <= seed < 2**31
    assert seed != derive_seed(study_seed, slot, "sampler")


def test_the_slots_of_neighbouring_studies_have_different_seeds() -> None:
    seeds = [derive_seed(study_seed, slot) for study_seed in range(20) for slot in range(50)]
    assert len(set(seeds)) == len(seeds)

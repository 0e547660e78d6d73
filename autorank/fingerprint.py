"""What makes two studies the same: the facts that must not change between start and resume.

Pure text; the facts are gathered where they are known. Seeds come from here too, because a
study that draws other seeds is another study.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from autorank.errors import StudyError

__all__ = ["check_fingerprint", "derive_seed", "make_fingerprint"]


def make_fingerprint(
    *,
    model: str,
    data: str,
    task: str,
    metric: str,
    direction: str,
    budget: int,
    seed: int,
    version: str,
    space: Mapping[str, str],
    settings: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """Gather the facts of a study.

    `model` is the base model's revision, `data` the sha256 of all splits, `version` that of
    autorank, whose major part counts, `space` what `Space.fingerprint` says. `settings` are
    further ones that change what a trial trains, such as steps and batch size.
    """
    facts = {
        "model": model,
        "data": data,
        "task": task,
        "metric": metric,
        "direction": direction,
        "budget": str(budget),
        "seed": str(seed),
        "autorank": version.split(".", 1)[0],
        **space,
    }
    return facts | {name: str(value) for name, value in (settings or {}).items()}


def check_fingerprint(name: str, stored: Mapping[str, str], given: Mapping[str, str]) -> None:
    """Compare the facts of a stored study with those of today.

    Raises:
        StudyError: some differ; the message lists each, stored against given.
    """
    differing = [key for key in {**stored, **given} if stored.get(key) != given.get(key)]
    if differing:
        facts = [f"{key} (stored {stored.get(key, '-')}, given {given.get(key, '-')})" for key in differing]
        raise StudyError(
            f"study {name!r} cannot go on, for these differ: {'; '.join(facts)}. "
            "Restore them, or start a new study with --name"
        )


def derive_seed(study_seed: int, slot: int, purpose: str = "") -> int:
    """The seed of a slot: the first 31 bits of sha256("study_seed/slot").

    With a purpose, of sha256("study_seed/slot/purpose"), so that what a trial draws and what
    proposed it are independent.
    """
    text = f"{study_seed}/{slot}" + (f"/{purpose}" if purpose else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

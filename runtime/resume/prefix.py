"""Going on with other passes: a kept run serves a changed pipeline as far as both begin alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.passes import Pipeline
from secateur.runtime.resume.fingerprint import list_differences

JSON = dict[str, Any]
NOTHING = "nothing"


def count_common_passes(then: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """How many passes, from the first, two fingerprints share with all their options.

    Args:
        then: fingerprint of the kept run.
        now: fingerprint of the run that is asked for.
    """
    before = _ordered_passes(then)
    after = _ordered_passes(now)
    count = 0
    while count < min(len(before), len(after)) and before[count] == after[count]:
        count += 1
    return count


def list_prefix_differences(
    then: Mapping[str, Any], now: Mapping[str, Any], pipeline: Pipeline, count: int
) -> list[str]:
    """What differs of all that the first passes depend on, one line each; empty where they leave
    the same bits in both runs.

    Args:
        then: fingerprint of the kept run.
        now: fingerprint of the run that is asked for.
        pipeline: that is asked for.
        count: passes that both share.
    """
    shared = pipeline.passes[:count]
    left_out = {"passes", "stop after", "files"}
    if not any(step.needs_data for step in shared):
        left_out.add("calibration data")
    names = {str(file) for step in shared for file in step.files}
    return list_differences(
        _without(then, left_out) | {"files": _only(then.get("files"), names)},
        _without(now, left_out) | {"files": _only(now.get("files"), names)},
    )


def describe_change(then: Mapping[str, Any], now: Mapping[str, Any], count: int) -> str:
    """Which passes go on from the kept ones, and which of the kept run are given up.

    Args:
        then: fingerprint of the kept run.
        now: fingerprint of the run that is asked for.
        count: passes that both share.
    """
    added = _name_passes(_ordered_passes(now)[count:])
    gone = _name_passes(_ordered_passes(then)[count:])
    if gone != NOTHING:
        return f"the first {count} passes are as before; {gone} gives way to {added}"
    return f"the passes are as before, and {added} comes after them"


def _ordered_passes(fingerprint: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names with positions, and options, in order."""
    passes = fingerprint.get("passes")
    if not isinstance(passes, Mapping):
        return []
    return sorted(passes.items(), key=lambda item: int(item[0].partition(" ")[0]))


def _name_passes(passes: list[tuple[str, Any]]) -> str:
    """Passes by name, or that there are none."""
    return ", ".join(name.partition(" ")[2] for name, _ in passes) or NOTHING


def _without(fingerprint: Mapping[str, Any], keys: set[str]) -> JSON:
    return {key: value for key, value in fingerprint.items() if key not in keys}


def _only(files: Any, names: set[str]) -> JSON:
    """The hashes of some files."""
    if not isinstance(files, Mapping):
        return {}
    return {name: value for name, value in files.items() if name in names}

"""Choosing weights by name: plain names, globs, or regular expressions."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from secateur.graph import Program
from secateur.passes.language.options import did_you_mean

PREFIX = "re:"


def check_names(patterns: Sequence[str]) -> Sequence[str]:
    """The patterns, where each can be read.

    Args:
        patterns: names, globs or ``re:...``.

    Raises:
        ValueError: a regular expression that does not compile.
    """
    for pattern in patterns:
        if pattern.startswith(PREFIX):
            try:
                re.compile(pattern.removeprefix(PREFIX))
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return patterns


def matches_name(pattern: str, name: str) -> bool:
    """Whether a pattern means a parameter.

    ``re:...`` searches the name; anything else is a name or a glob (``*``, ``?``) of the parameter,
    of its module, or
    of any run of dotted parts: ``mlp``, ``layers.3`` and ``self_attn.[qk]_proj`` all mean what they
        look like.

    Args:
        pattern: name, glob or ``re:...``.
        name: of a parameter.
    """
    if pattern.startswith(PREFIX):
        return re.search(pattern.removeprefix(PREFIX), name) is not None
    return any(fnmatch.fnmatchcase(run, pattern) for run in _dotted_runs(name))


def matching_names(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that a pattern means.

    Args:
        patterns: names, globs or ``re:...``.
        names: of parameters.
    """
    wanted = list(patterns)
    matching: set[str] = set()
    for name in names:
        if any(matches_name(pattern, name) for pattern in wanted):
            matching.add(name)
    return matching


def parameter_aliases(program: Program) -> Mapping[str, list[str]]:
    """By parameter, all its names in the source model: a tied one has several.

    Args:
        program: the model.
    """
    owned = {name for name, _ in program.named_parameters()}
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {name: [name] for name in owned}
    for name, parameter in program.source.model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original in owned and name != original:
            aliases[original].append(name)
    return aliases


def describe_unmatched(patterns: Iterable[str], names: Sequence[str], option: str) -> list[str]:
    """What is wrong with patterns that mean none of the names.

    Args:
        patterns: names, globs or ``re:...``.
        names: of parameters.
        option: name of the option, for messages.

    Returns:
        one sentence for each pattern without a match.
    """
    faults = []
    for pattern in patterns:
        if not any(matches_name(pattern, name) for name in names):
            parts = set()
            for name in names:
                for run in _dotted_runs(name):
                    if not run.split(".")[-1].isdigit():
                        parts.add(run)
            if len(parts):
                hint = did_you_mean(pattern.removeprefix(PREFIX), parts)
            else:
                hint = "the model has no weights"
            faults.append(f"{option}: {pattern!r} matches no weight; {hint}")
    return faults


def _dotted_runs(name: str) -> list[str]:
    """All runs of dotted parts of a name."""
    parts = name.split(".")
    runs: list[str] = []
    for a in range(len(parts)):
        for b in range(a + 1, len(parts) + 1):
            runs.append(".".join(parts[a:b]))
    return runs

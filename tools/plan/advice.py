"""What practice warns of, as a table: a row looks at a plan and says what may go wrong, what to do,
and who says so."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.graph import Program, coupled_groups
from secateur.passes import Pipeline, PlannedEdit, Score
from secateur.passes.importance import Magnitude

RETRAIN = frozenset({"distill", "adapt-lora", "retrain-sparse"})
UNTRAINED = 0.25
ONE_STEP = 0.5
WAYS = (2, 4, 8)
K_QUANTS = 256
TENSOR_CORES = 64
HELD_BACK = 5
SHARE_TOLERANCE = 0.05
DIGEST_CHARACTERS = 16


@dataclass(frozen=True)
class Situation:
    """What the rows look at.

    before, after: Programs of the shapes; values mean nothing.
    edits: units kept by each group.
    tokens: of calibration, 0 where the pipeline needs none.
    removed: fraction of parameters removed between one retraining and the next, and after the last
        (or without any).
    """

    pipeline: Pipeline
    before: Program
    after: Program
    edits: Sequence[PlannedEdit]
    tokens: int
    removed: tuple[float, ...]


@dataclass(frozen=True)
class Advice:
    """A warning: the row that gave it, what it says, and its source."""

    name: str
    says: str
    source: str


@dataclass(frozen=True)
class AdviceRow:
    """check: what is wrong, or None."""

    check: Callable[[Situation], str | None]
    source: str


def advise(
    pipeline: Pipeline, stages: Sequence[Program], edits: Sequence[PlannedEdit], tokens: int
) -> list[Advice]:
    """Return the warnings of all rows about a planned pipeline.

    Args:
        pipeline: the passes.
        stages: shapes of the Program before the first pass and after each.
        edits: units kept by each group.
        tokens: of calibration, 0 where the pipeline needs none.
    """
    situation = Situation(
        pipeline, stages[0], stages[-1], edits, tokens, fractions_removed(pipeline, stages)
    )
    advice = list[Advice]()
    for name, row in ROWS.items():
        warning = row.check(situation)
        if warning is not None:
            advice.append(Advice(name, warning, row.source))
    return advice


def fractions_removed(pipeline: Pipeline, stages: Sequence[Program]) -> tuple[float, ...]:
    """Fractions of parameters removed before each retraining, and after the last one."""
    start = stages[0].num_parameters
    removed = list[float]()
    for step, stage in zip(pipeline.passes, stages[1:], strict=True):
        if step.name in RETRAIN:
            removed.append(1 - stage.num_parameters / start)
            start = stage.num_parameters
    return (*removed, 1 - stages[-1].num_parameters / start)


def _warn_untrained(s: Situation) -> str | None:
    last = s.removed[-1]
    if last <= UNTRAINED:
        return None
    return (
        f"{last:.0%} of the parameters go and no retraining follows: add distill (or "
        "adapt-lora), or remove less"
    )


def _one_step(s: Situation) -> str | None:
    most = max(s.removed)
    if most <= ONE_STEP:
        return None
    return (
        f"{most:.0%} of the parameters go in one step: prune and distill in stages, of a third "
        "or less each"
    )


def _tensor_parallel(s: Situation) -> str | None:
    loss = _first_loss(s, ("kv_heads",), _servable_devices)
    if loss is None:
        return None
    edit, devices = loss
    several = ", ".join(map(str, sorted(devices)))
    return (
        f"{edit.kept} key/value heads cannot be served on {several} devices, and {edit.units} could"
    )


def _servable_devices(heads: int) -> set[int]:
    """The numbers of devices among which so many heads can be divided."""
    return {ways for ways in WAYS if heads % ways == 0 or ways % heads == 0}


def _k_quants(s: Situation) -> str | None:
    edit = _first_uneven(s, K_QUANTS)
    if edit is None:
        return None
    return (
        f"{edit.kept} is no multiple of 256, as llama.cpp's k-quants want: "
        f"{_advise_multiple(edit, (K_QUANTS,))}"
    )


def _tensor_cores(s: Situation) -> str | None:
    edit = _first_uneven(s, TENSOR_CORES)
    if edit is None:
        return None
    return (
        f"{edit.kept} is no multiple of 64, which is slow on tensor cores: "
        f"{_advise_multiple(edit, (2 * TENSOR_CORES, TENSOR_CORES))}"
    )


def _first_uneven(s: Situation, multiple: int) -> PlannedEdit | None:
    """The first edit of a width that was a multiple of a number and is none any more."""

    def divisors(width: int) -> set[int]:
        if width % multiple == 0:
            return {multiple}
        return set()

    loss = _first_loss(s, ("mlp", "hidden"), divisors)
    if loss is None:
        return None
    return loss[0]


def _advise_multiple(edit: PlannedEdit, multiples: Sequence[int]) -> str:
    """How to get a multiple that is still smaller than the group is now: by rounding where a
    fraction was asked for, else by a number."""
    for multiple in multiples:
        nearest = multiple * math.floor(edit.kept / multiple + 0.5)
        if edit.asked is not None and 0 < nearest < edit.units:
            return f"round_to={{{edit.family}={multiple}}} keeps {nearest}"
    multiple = multiples[-1]
    below = edit.kept - edit.kept % multiple
    if below:
        return f"{edit.family}={below} keeps as many"
    return (
        f"no smaller multiple of {multiple} is left of its {edit.units}: leave {edit.family} "
        "whole, or do without"
    )


def _warn_magnitude(s: Situation) -> str | None:
    for step in s.pipeline.passes:
        if isinstance(step, Score) and isinstance(step.metric, Magnitude):
            return (
                "magnitude ranks units of language models worse than chance: "
                "score{metric=wanda} or taylor"
            )
    return None


def _solve_rounding(s: Situation) -> str | None:
    if not any(step.name == "repair" for step in s.pipeline.passes):
        return None
    width = widest_input(s.after, s.edits)
    fitted = s.tokens * (HELD_BACK - 1) // HELD_BACK
    if fitted >= width:
        return None
    return (
        f"repair fits {width:,} inputs on {fitted:,} tokens (a fifth of --tokens is held "
        "back): give "
        f"--tokens {2 * width * HELD_BACK // (HELD_BACK - 1)} or more"
    )


ROWS: Mapping[str, AdviceRow] = {
    "much removed without retraining": AdviceRow(
        _warn_untrained,
        "Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627, table 1: perplexity 12.6, untrained 19 at "
        "20 %, 112 at 50 %",
    ),
    "more than half in one step": AdviceRow(
        _one_step,
        "Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, table 14; NVIDIA ModelOpt's "
        "pruning guide",
    ),
    "heads do not divide": AdviceRow(
        _tensor_parallel, "vLLM: tensor parallelism needs heads that its size divides"
    ),
    "k-quants do not fit": AdviceRow(_k_quants, "llama.cpp: k-quants pack rows in blocks of 256"),
    "tensor cores idle": AdviceRow(
        _tensor_cores, "NVIDIA, matrix multiplication guide: multiples of 64, better 128, elements"
    ),
    "magnitude is worse than chance": AdviceRow(
        _warn_magnitude,
        "Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627, table 1: perplexity 582 by L2, 27.5 at "
        "random, at 20 %",
    ),
    "too few calibration tokens": AdviceRow(
        _solve_rounding,
        "Meng et al. 2024 (OSSCAR), arXiv:2403.12983: least squares on fewer rows than "
        "columns fits noise",
    ),
}


def widest_input(smaller: Program, edits: Iterable[PlannedEdit]) -> int:
    """Inputs of the widest op that consumes units of which some are gone."""
    edited = set()
    for edit in edits:
        if edit.kept < edit.units:
            edited.add(edit.group)
    shapes = {name: p.shape for name, p in smaller.named_parameters()}
    widest = 0
    for group in coupled_groups(smaller):
        if group.name not in edited:
            continue
        for member in group.members:
            if member.role == "consumes":
                widest = max(widest, shapes[member.parameter][member.dim])
    return widest


def _first_loss(
    s: Situation, families: Iterable[str], good: Callable[[int], set[int]]
) -> tuple[PlannedEdit, set[int]] | None:
    """The first edit of a group of the families that loses something good about its number, and
    what it loses."""
    for edit in s.edits:
        if edit.family not in families or not edit.exact:
            continue
        lost = good(edit.units) - good(edit.kept)
        if lost:
            return edit, lost
    return None


def warn_shares(edits: Iterable[PlannedEdit]) -> Advice | None:
    """The warning that whole heads, experts or layers make another share than was asked for.

    Args:
        edits: planned.
    """
    said = []
    for edit in edits:
        gone = 1 - edit.kept / edit.units
        if edit.exact and edit.asked is not None and abs(gone - edit.asked) > SHARE_TOLERANCE:
            said.append(
                f"{edit.family}: {edit.asked:.0%} was asked for and {gone:.0%} goes "
                f"({edit.units - edit.kept} of {edit.units})"
            )
    if not said:
        return None
    return Advice(
        "another share than asked for",
        "; ".join(dict.fromkeys(said)),
        "units are whole, and rounded as round_to asks",
    )


# Calibrating and evaluating on the same text
def document_digests(documents: Iterable[str]) -> list[str]:
    """What a manifest remembers of the documents that a model was calibrated on."""
    return sorted({_digest(text) for text in documents})


def warn_same_text(figures: Mapping[str, Any], documents: Sequence[str]) -> Advice | None:
    """The warning that a model is evaluated on documents it was calibrated on.

    Args:
        figures: of its manifest (``runtime.read_manifest(folder).figures``).
        documents: what it is evaluated on.
    """
    calibrated = set((figures.get("calibration") or {}).get("documents", ()))
    shared = sum(_digest(text) in calibrated for text in documents)
    if not shared:
        return None
    says = (
        f"{shared} of {len(documents)} documents were calibrated on: what is measured on "
        "them is too good"
    )
    return Advice(
        "calibrated on the same text",
        says,
        "FLAP, issue 13 of its repository: WikiText2 on both sides",
    )


def _digest(document: str) -> str:
    return hashlib.sha256(document.encode()).hexdigest()[:DIGEST_CHARACTERS]

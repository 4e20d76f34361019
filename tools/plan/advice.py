"""What practice warns of, as a table: a row looks at a plan and says what may go wrong, what to do,
and who says so."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.graph import Program, coupled_groups
from secateur.passes import Pipeline, PlannedEdit, Score
from secateur.passes.importance import Magnitude

RETRAIN = frozenset({"distill", "adapt-lora", "retrain-sparse"})
UNTRAINED, ONE_STEP = 0.25, 0.5
WAYS = (2, 4, 8)
K_QUANTS, TENSOR_CORES = 256, 64
HELD_BACK = 5
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
    """The warnings of all rows about a planned pipeline.

    Args:
        stages: shapes of the Program before the first pass and after each.
        edits, tokens: see Situation.
    """
    situation = Situation(
        pipeline, stages[0], stages[-1], edits, tokens, fractions_removed(pipeline, stages)
    )
    found = ((name, row.check(situation), row.source) for name, row in ROWS.items())
    return [Advice(name, says, source) for name, says, source in found if says is not None]


def fractions_removed(pipeline: Pipeline, stages: Sequence[Program]) -> tuple[float, ...]:
    """Fractions of parameters removed before each retraining, and after the last one."""
    start = stages[0].num_parameters
    removed = list[float]()
    for one, stage in zip(pipeline.passes, stages[1:], strict=True):
        if one.name in RETRAIN:
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
    lost = _first_loss(
        s, ("kv_heads",), lambda n: {ways for ways in WAYS if n % ways == 0 or ways % n == 0}
    )
    if lost is None:
        return None
    several = ", ".join(map(str, sorted(lost[1])))
    return (
        f"{lost[0].kept} key/value heads cannot be served on {several} devices, and "
        f"{lost[0].units} could"
    )


def _k_quants(s: Situation) -> str | None:
    lost = _first_loss(s, ("mlp", "hidden"), lambda n: {K_QUANTS} if n % K_QUANTS == 0 else set())
    return (
        lost
        and f"{lost[0].kept} is no multiple of 256, as llama.cpp's k-quants want: "
        f"{_rounding_advice(lost[0], 256)}"
    )


def _tensor_cores(s: Situation) -> str | None:
    lost = _first_loss(
        s, ("mlp", "hidden"), lambda n: {TENSOR_CORES} if n % TENSOR_CORES == 0 else set()
    )
    return (
        lost
        and f"{lost[0].kept} is no multiple of 64, which is slow on tensor cores: "
        f"{_rounding_advice(lost[0], 128)}"
    )


def _rounding_advice(edit: PlannedEdit, multiple: int) -> str:
    return f"round_to={{{edit.family}={multiple}}}"


def _warn_magnitude(s: Situation) -> str | None:
    used = any(
        isinstance(one, Score) and isinstance(one.metric, Magnitude) for one in s.pipeline.passes
    )
    if used:
        return (
            "magnitude ranks units of language models worse than chance: "
            "score{metric=wanda} or taylor"
        )
    return None


def _solve_rounding(s: Situation) -> str | None:
    if not any(one.name == "repair" for one in s.pipeline.passes):
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
    reading = (
        m
        for g in coupled_groups(smaller)
        if g.name in edited
        for m in g.members
        if m.role == "consumes"
    )
    return max((shapes[m.parameter][m.dim] for m in reading), default=0)


def _first_loss(
    s: Situation, families: Iterable[str], good: Callable[[int], set[int]]
) -> tuple[PlannedEdit, set[int]] | None:
    """The first edit of a group of the families that loses something good about its number, and
    what it loses."""
    exact = (edit for edit in s.edits if edit.family in families and edit.exact)
    return next(
        ((edit, lost) for edit in exact if (lost := good(edit.units) - good(edit.kept))), None
    )


# Calibrating and evaluating on the same text
def document_digests(documents: Iterable[str]) -> list[str]:
    """What a manifest remembers of the documents that a model was calibrated on."""
    return sorted(
        {hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS] for text in documents}
    )


def warn_same_text(figures: Mapping[str, Any], documents: Sequence[str]) -> Advice | None:
    """The warning that a model is evaluated on documents it was calibrated on.

    Args:
        figures: of its manifest (``runtime.read_manifest(folder).figures``).
        documents: what it is evaluated on.
    """
    calibrated = set((figures.get("calibration") or {}).get("documents", ()))
    shared = sum(digest in calibrated for digest in _iterate_documents(documents))
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


def _iterate_documents(documents: Iterable[str]) -> Iterator[str]:
    return (document_digests([text])[0] for text in documents)

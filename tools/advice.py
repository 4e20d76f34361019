"""What practice warns of, as a table: a row looks at a plan and says what may go wrong, what to do, and who says so."""

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

    before, after: Programs of the shapes; values mean nothing.   edits: units kept by each group.
    tokens: of calibration, 0 where the pipeline needs none.
    removed: fraction of parameters removed between one retraining and the next, and after the last (or without any).
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
class Row:
    """check: what is wrong, or None."""

    check: Callable[[Situation], str | None]
    source: str


def advise(pipeline: Pipeline, stages: Sequence[Program], edits: Sequence[PlannedEdit], tokens: int) -> list[Advice]:
    """The warnings of all rows about a planned pipeline.

    Args: stages: shapes of the Program before the first pass and after each.   edits, tokens: see Situation.
    """
    situation = Situation(pipeline, stages[0], stages[-1], edits, tokens, removed_between(pipeline, stages))
    found = ((name, row.check(situation), row.source) for name, row in ROWS.items())
    return [Advice(name, says, source) for name, says, source in found if says is not None]


def removed_between(pipeline: Pipeline, stages: Sequence[Program]) -> tuple[float, ...]:
    """Fractions of parameters removed before each retraining, and after the last one."""
    start, removed = stages[0].num_parameters, list[float]()
    for one, stage in zip(pipeline.passes, stages[1:], strict=True):
        if one.name in RETRAIN:
            removed.append(1 - stage.num_parameters / start)
            start = stage.num_parameters
    return (*removed, 1 - stages[-1].num_parameters / start)


def _untrained(s: Situation) -> str | None:
    last = s.removed[-1]
    if last <= UNTRAINED:
        return None
    return f"{last:.0%} of the parameters go and no retraining follows: add distill (or adapt-lora), or remove less"


def _one_step(s: Situation) -> str | None:
    most = max(s.removed)
    if most <= ONE_STEP:
        return None
    return f"{most:.0%} of the parameters go in one step: prune and distill in stages, of a third or less each"


def _tensor_parallel(s: Situation) -> str | None:
    lost = _lost(s, ("kv_heads",), lambda n: {ways for ways in WAYS if n % ways == 0 or ways % n == 0})
    if lost is None:
        return None
    several = ", ".join(map(str, sorted(lost[1])))
    return f"{lost[0].kept} key/value heads cannot be served on {several} devices, and {lost[0].units} could"


def _k_quants(s: Situation) -> str | None:
    lost = _lost(s, ("mlp", "hidden"), lambda n: {K_QUANTS} if n % K_QUANTS == 0 else set())
    return lost and f"{lost[0].kept} is no multiple of 256, as llama.cpp's k-quants want: {_rounded(lost[0], 256)}"


def _tensor_cores(s: Situation) -> str | None:
    lost = _lost(s, ("mlp", "hidden"), lambda n: {TENSOR_CORES} if n % TENSOR_CORES == 0 else set())
    return lost and f"{lost[0].kept} is no multiple of 64, which is slow on tensor cores: {_rounded(lost[0], 128)}"


def _rounded(edit: PlannedEdit, multiple: int) -> str:
    return f"round_to={{{edit.family}={multiple}}}"


def _magnitude(s: Situation) -> str | None:
    used = any(isinstance(one, Score) and isinstance(one.metric, Magnitude) for one in s.pipeline.passes)
    return "magnitude ranks units of language models worse than chance: score{metric=wanda} or taylor" if used else None


def _solve(s: Situation) -> str | None:
    if not any(one.name == "repair" for one in s.pipeline.passes):
        return None
    width, fitted = widest_input(s.after, s.edits), s.tokens * (HELD_BACK - 1) // HELD_BACK
    if fitted >= width:
        return None
    return (
        f"repair fits {width:,} inputs on {fitted:,} tokens (a fifth of --tokens is held back): give "
        f"--tokens {2 * width * HELD_BACK // (HELD_BACK - 1)} or more"
    )


ROWS: Mapping[str, Row] = {
    "much removed without retraining": Row(
        _untrained,
        "Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627, table 1: perplexity 12.6, untrained 19 at 20 %, 112 at 50 %",
    ),
    "more than half in one step": Row(
        _one_step, "Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, table 14; NVIDIA ModelOpt's pruning guide"
    ),
    "heads do not divide": Row(_tensor_parallel, "vLLM: tensor parallelism needs heads that its size divides"),
    "k-quants do not fit": Row(_k_quants, "llama.cpp: k-quants pack rows in blocks of 256"),
    "tensor cores idle": Row(
        _tensor_cores, "NVIDIA, matrix multiplication guide: multiples of 64, better 128, elements"
    ),
    "magnitude is worse than chance": Row(
        _magnitude,
        "Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627, table 1: perplexity 582 by L2, 27.5 at random, at 20 %",
    ),
    "too few calibration tokens": Row(
        _solve, "Meng et al. 2024 (OSSCAR), arXiv:2403.12983: least squares on fewer rows than columns fits noise"
    ),
}


def widest_input(smaller: Program, edits: Iterable[PlannedEdit]) -> int:
    """Inputs of the widest op that consumes units of which some are gone."""
    edited = {edit.group for edit in edits if edit.kept < edit.units}
    shapes = {name: p.shape for name, p in smaller.named_parameters()}
    reading = (m for g in coupled_groups(smaller) if g.name in edited for m in g.members if m.role == "consumes")
    return max((shapes[m.parameter][m.dim] for m in reading), default=0)


def _lost(
    s: Situation, families: Iterable[str], good: Callable[[int], set[int]]
) -> tuple[PlannedEdit, set[int]] | None:
    """The first edit of a group of the families that loses something good about its number, and what it loses."""
    exact = (edit for edit in s.edits if edit.family in families and edit.exact)
    return next(((edit, lost) for edit in exact if (lost := good(edit.units) - good(edit.kept))), None)


# ---------------------------------------------------------------------- calibrating and evaluating on the same text
def document_digests(documents: Iterable[str]) -> list[str]:
    """What a manifest remembers of the documents that a model was calibrated on."""
    return sorted({hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS] for text in documents})


def same_text(figures: Mapping[str, Any], documents: Sequence[str]) -> Advice | None:
    """The warning that a model is evaluated on documents it was calibrated on.

    Args: figures: of its manifest (``runtime.read_manifest(folder).figures``).   documents: what it is evaluated on.
    """
    calibrated = set((figures.get("calibration") or {}).get("documents", ()))
    shared = sum(digest in calibrated for digest in _each(documents))
    if not shared:
        return None
    says = f"{shared} of {len(documents)} documents were calibrated on: what is measured on them is too good"
    return Advice("calibrated on the same text", says, "FLAP, issue 13 of its repository: WikiText2 on both sides")


def _each(documents: Iterable[str]) -> Iterator[str]:
    return (document_digests([text])[0] for text in documents)

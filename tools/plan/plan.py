"""What a pipeline would make of a model, and what the job itself would take: told before any work
is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, fx, nn

from secateur.graph import Program
from secateur.graph.capture.calls import accept_calls_of
from secateur.graph.program import JSON
from secateur.passes import Pass, Pipeline, PlannedEdit
from secateur.runtime import ConfigPlan
from secateur.runtime.stock.constants import describe_changes
from secateur.runtime.stock.incompatibility import UnseenParametersError
from secateur.tools.machine import resident_bytes
from secateur.tools.plan.advice import Advice, advise, widest_input
from secateur.tools.plan.footprint import Footprint, measure_footprint

PROBE = 768
DISK_BYTES_PER_SECOND = 300e6
Stock = Callable[[Program], ConfigPlan | None]


@dataclass(frozen=True)
class PassShare:
    """One pass's share of the job: seconds, and bytes beside the weights."""

    name: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Job:
    """Rough needs of the job itself.

    peak_bytes: this process and its libraries, the weights before and after, and what the hungriest
        pass holds beside
        them: parameters and their gradients or moments, the activations of one sequence (kept for
        the backward pass where there is one) or of all calibration tokens at one place of the
        graph, and products of inputs.
    seconds: from the counted FLOPs and the speed of a short matrix product on this machine, half of
        which is taken to be reached; plus capture and disk.  Rough: expect a factor of two either
        way.
    gflops: the measured speed of that product, 1e9 a second, float32.
    passes: what each takes.
    """

    tokens: int
    peak_bytes: int
    seconds: float
    gflops: float
    passes: tuple[PassShare, ...] = ()


@dataclass(frozen=True)
class SparseShare:
    """Weights of one pattern: how many, their entries, and how many of these are zero at least."""

    pattern: str
    weights: int
    entries: int
    zeros: int


@dataclass(frozen=True)
class Plan:
    """What would come out.

    before, after: footprints.
    edits: units kept by each group.
    job: what the run would take.
    sparse: weights with a pattern; under a budget some of them stay dense.
    misfit: why no stock class can hold the result and what would make it fit, or None.
    doubt: why one that holds it may compute something else, which only outputs can tell; or None.
    rounding_helps: whether other unit counts could make the misfit fit.
    advice: what practice warns of.
    """

    pipeline: str
    before: Footprint
    after: Footprint
    edits: tuple[PlannedEdit, ...]
    job: Job
    misfit: str | None
    advice: tuple[Advice, ...] = ()
    sparse: tuple[SparseShare, ...] = ()
    doubt: str | None = None
    rounding_helps: bool = True

    def to_json(self) -> JSON:
        """As JSON values."""
        return asdict(self)


def make_plan(
    program: Program,
    pipeline: Pipeline,
    stock: Stock,
    *,
    tokens: int = 0,
    window: int = 0,
    capture_seconds: float = 0.0,
) -> Plan:
    """Plan a pipeline on a Program; weights are not needed and not touched.

    Args:
        stock: the plan of a Program's stock class; raises where it fits none
            (``runtime.plan_config``).
        tokens, window: calibration tokens in all, and in one sequence.
        capture_seconds: what capturing took here.

    Raises:
        PipelineError, EditError: the pipeline cannot run on this model; says why.
    """
    stages = [on_meta(program)]
    edits = list[PlannedEdit]()
    for step in pipeline.passes:
        edits += step.plan(stages[-1])
        stages.append(step.preview(stages[-1]))
    light = stages[0]
    smaller = stages[-1]
    before = measure_footprint(light)
    after = measure_footprint(smaller)
    if any(p.is_meta for _, p in program.named_parameters()):
        loaded = 0
    else:
        loaded = program.num_bytes
    job = estimate_job(
        pipeline,
        before,
        after,
        tokens=tokens,
        window=window,
        capture_seconds=capture_seconds,
        process_bytes=max(0, resident_bytes() - loaded),
        width=widest_input(smaller, edits),
    )
    advice = advise(pipeline, stages, edits, job.tokens)
    misfit, doubt, rounding_helps = _plan_stock(smaller, stock)
    sparse = count_sparse(smaller)
    return Plan(
        pipeline.to_text(),
        before,
        after,
        tuple(edits),
        job,
        misfit,
        tuple(advice),
        sparse,
        doubt,
        rounding_helps,
    )


def count_sparse(program: Program) -> tuple[SparseShare, ...]:
    """The sparse weights of a Program, by pattern."""
    parameters = dict(program.named_parameters())
    shares = dict[str, SparseShare]()
    for name, weight in program.sparse.items():
        pattern = str(weight.pattern)
        rows, columns = parameters[name].shape
        width = weight.pattern.group_size(columns)
        zeros = rows * (columns // width) * (width - weight.pattern.kept_per_group(columns))
        share = shares.get(pattern, SparseShare(pattern, 0, 0, 0))
        shares[pattern] = replace(
            share,
            weights=share.weights + 1,
            entries=share.entries + parameters[name].numel(),
            zeros=share.zeros + zeros,
        )
    return tuple(shares.values())


def estimate_job(
    pipeline: Pipeline,
    before: Footprint,
    after: Footprint,
    *,
    tokens: int,
    window: int,
    capture_seconds: float = 0.0,
    process_bytes: int = 0,
    width: int = 0,
) -> Job:
    """Rough memory and time of running a pipeline.

    Args:
        process_bytes: what this process holds without the weights.
        width: inputs of the widest op that is refitted.
    """
    speed = probe_gflops()
    if not pipeline.needs_data:
        tokens = 0
    shares = list[PassShare]()
    for step in pipeline.passes:
        shares.append(_estimate_pass(step, before, tokens, window, width, speed))
    hungriest = max((share.bytes for share in shares), default=0)
    if after.parameters < before.parameters:
        smaller = after.bytes
    else:
        smaller = 0
    peak = process_bytes + before.bytes + max(smaller + hungriest, after.bytes)
    disk = (before.bytes + 3 * after.bytes) / DISK_BYTES_PER_SECOND
    seconds = sum(share.seconds for share in shares) + disk + capture_seconds
    return Job(tokens, round(peak), round(seconds, 1), round(speed, 1), tuple(shares))


def _estimate_pass(
    step: Pass, before: Footprint, tokens: int, window: int, width: int, speed: float
) -> PassShare:
    """What one pass takes; speed: 1e9 FLOPs a second, half of which it is taken to reach."""
    cost = step.cost
    if cost.tokens is not None:
        run_tokens = cost.tokens
    elif step.needs_data:
        run_tokens = tokens
    else:
        run_tokens = 0
    extra_bytes = cost.bytes_per_parameter * before.parameters + cost.solves * 8 * width**2
    if cost.holds:
        extra_bytes += cost.holds * tokens * before.live_bytes_per_token
    elif run_tokens:
        token_bytes = 3 * before.largest_bytes_per_token
        if cost.bytes_per_parameter:
            token_bytes += before.activation_bytes_per_token
        extra_bytes += window * token_bytes
    seconds = cost.flops * before.flops_per_token * run_tokens / (0.5e9 * speed)
    return PassShare(step.name, round(seconds, 1), round(extra_bytes))


def probe_gflops(seconds: float = 0.2) -> float:
    """Measured speed of a float32 matrix product on this machine, 1e9 FLOPs a second."""
    a = torch.randn(PROBE, PROBE)
    count = 0
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or count < 2:
        a @ a
        count += 1
    return 2 * PROBE**3 * count / spent / 1e9


def on_meta(program: Program) -> Program:
    """A copy of a Program without weights: the same graph over parameters of the same shapes on the
    meta device."""
    old = program.gm
    copies = dict[fx.Node, fx.Node]()
    graph = fx.Graph()
    output = graph.output(graph.graph_copy(old.graph, copies))
    output.meta = dict(next(iter(reversed(old.graph.nodes))).meta)
    graph.set_codegen(old.graph._codegen)
    light: dict[str, Tensor] = dict(old.named_buffers(remove_duplicate=False))
    for name, parameter in old.named_parameters(remove_duplicate=False):
        light[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    gm = fx.GraphModule(light, graph, class_name=old._get_name())
    gm.meta = dict(old.meta)
    accept_calls_of(gm, old)
    return program.replace(gm=gm)


def _plan_stock(program: Program, stock: Stock) -> tuple[str | None, str | None, bool]:
    """Misfit, doubt and whether rounding helps, as in Plan."""
    if program.source.config is None:
        return None, None, True
    try:
        plan = stock(program)
    except ValueError as error:
        return str(error), None, not isinstance(error, UnseenParametersError)
    if plan is None:
        return None, None, True
    return None, describe_changes(plan.constants).strip() or None, True

"""What a pipeline would make of a model, and what the job itself would take: told before any work
is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor, fx, nn

from secateur.graph import Program
from secateur.graph.capture.calls import accept_calls_of
from secateur.graph.program import JSON
from secateur.passes import Pipeline, PlannedEdit
from secateur.tools.machine import memory_bytes, resident_bytes
from secateur.tools.plan.advice import Advice, advise, warn_shares, widest_input
from secateur.tools.plan.footprint import Footprint, measure_footprint
from secateur.tools.plan.job import Job, describe_excess, describe_full_disk, estimate_job
from secateur.tools.plan.offers import offer_counts
from secateur.tools.plan.stock import Stock, plan_fit


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
    depends: what is measured decides whether a stock class holds the result; or None.
    offers: counts near the planned ones that the stock class takes, as a sentence.
    advice: what practice warns of.
    warnings: what of the job this machine does not have, and what the plan cannot tell.
    refused: why the run would be refused; empty where it would begin.
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
    depends: str | None = None
    offers: str = ""
    warnings: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

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
    disk_free: int | None = None,
) -> Plan:
    """Plan a pipeline on a Program; weights are not needed and not touched.

    Args:
        stock: the plan of a Program's stock class; raises where it fits none
            (``runtime.plan_config``).
        tokens, window: calibration tokens in all, and in one sequence.
        capture_seconds: what capturing took here.
        disk_free: bytes free where the output goes, where that is known.

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
    sparse = count_sparse(smaller)
    job = estimate_job(
        pipeline,
        (before, after),
        tokens=tokens,
        window=window,
        capture_seconds=capture_seconds,
        process_bytes=max(0, resident_bytes() - loaded),
        width=widest_input(smaller, edits),
        packed_bytes=packed_bytes(smaller),
    )
    fit = plan_fit(pipeline, stages, edits, stock)
    odd_shares = warn_shares(edits)
    offers = ""
    if odd_shares or fit.doubt or (fit.misfit and fit.rounding_helps):
        offers = offer_counts(light, edits, stock)
    advice = advise(pipeline, stages, edits, job.tokens)
    if odd_shares:
        advice.append(replace(odd_shares, says=f"{odd_shares.says}. {offers}".strip()))
    warnings = describe_excess(pipeline, job, memory_bytes=memory_bytes())
    warnings += describe_filling(pipeline, edits)
    refused = describe_full_disk(pipeline, job, disk_free)
    if fit.misfit:
        refused.append(f"no stock class holds the result: {fit.misfit}")
    return Plan(
        pipeline.to_text(),
        before,
        after,
        tuple(edits),
        job,
        fit.misfit,
        tuple(advice),
        sparse,
        fit.doubt,
        fit.rounding_helps,
        fit.depends,
        offers,
        tuple(warnings),
        tuple(refused),
    )


def describe_filling(pipeline: Pipeline, edits: Sequence[PlannedEdit]) -> list[str]:
    """What a plan cannot tell where layers of different sizes are brought to one again."""
    names = [one.name for one in pipeline.passes]
    uneven = any(not edit.exact and edit.family != "blocks" for edit in edits)
    if "fill-widths" not in names or not uneven:
        return []
    return [
        "the scores give each layer a size of its own, and fill-widths brings all to the widest: "
        "the result is as large as that one, and larger than the average that is counted here"
    ]


def packed_bytes(program: Program) -> int:
    """Bytes of the packed weights that would lie beside the result: of each 2:4 weight half the
    values, and two bits for each of them."""
    known = dict(program.named_parameters())
    total = 0.0
    for name, one in program.sparse.items():
        if str(one.pattern) == "2:4":
            kept = known[name].numel() / 2
            total += kept * (known[name].element_size() + 0.25)
    return round(total)


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

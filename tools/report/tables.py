"""Tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from rich.markup import escape
from rich.table import Table

from secateur.graph import Program
from secateur.passes import IMPORTANCES, PASSES, PlannedEdit
from secateur.passes.language.options import Options, options_table
from secateur.passes.lowering.lower import last_lowering
from secateur.tools.inspect import Inspection
from secateur.tools.plan.advice import Advice
from secateur.tools.plan.footprint import Footprint
from secateur.tools.plan.plan import Plan
from secateur.tools.report.lowering import plan_table
from secateur.tools.report.units import format_bytes, format_change, format_count, format_duration


def inspection_tables(found: Inspection) -> list[Table]:
    """Sizes, and the groups by family."""
    sizes = _make_table(f"{found.model}", "", "")
    sizes.add_row(
        "parameters",
        f"{format_count(found.footprint.parameters)}  ({found.footprint.parameters:,})",
    )
    sizes.add_row("bytes", f"{format_bytes(found.footprint.bytes)}  ({', '.join(found.dtypes)})")
    sizes.add_row(
        "FLOPs a token",
        f"{format_count(found.footprint.flops_per_token)}  ({_protocol_line(found.footprint)})",
    )
    sizes.add_row("KV cache a token", _cache_text(found.footprint))
    sizes.add_row("residual layers", str(len(found.blocks)))
    if found.sparse:
        sizes.add_row(
            "sparse weights",
            ", ".join(f"{times} x {pattern}" for pattern, times in found.sparse.items()),
        )
    families = _make_table(
        "coupled groups",
        "family",
        "groups",
        "units in each",
        "parameters touched",
        "locked, and why",
    )
    for family in found.families:
        units = ", ".join(
            f"{n}" if times == family.groups else f"{times} x {n}"
            for n, times in family.units.items()
        )
        locked = (
            "\n".join(f"{times} x {reason}" for reason, times in family.locked.items()) or "none"
        )
        families.add_row(
            family.family, str(family.groups), units, format_count(family.parameters), locked
        )
    return [sizes, families]


def plan_tables(plan: Plan) -> list[Table]:
    """Before and after, the edits, and what the job would take."""
    sizes = footprint_table(plan.before, plan.after, "what would come out")
    edits = _make_table("what would be cut", "family", "groups", "units", "kept")
    for row in edit_rows(plan.edits):
        edits.add_row(*row)
    job = _make_table("the job itself, roughly", "", "")
    job.add_row("calibration tokens", f"{plan.job.tokens:,}")
    job.add_row("peak memory", format_bytes(plan.job.peak_bytes))
    job.add_row(
        "time",
        f"{format_duration(plan.job.seconds)}  (this machine multiplies at "
        f"{plan.job.gflops:g} GFLOP/s)",
    )
    for share in plan.job.passes:
        job.add_row(
            f"- {share.name}",
            f"{format_duration(share.seconds)}, {format_bytes(share.bytes)} beside the weights",
        )
    disk = f"{format_bytes(plan.job.disk_bytes)} at most, the result "
    job.add_row("disk", disk + format_bytes(plan.job.result_bytes))
    job.add_row("stock checkpoint", escape(_stock_text(plan)))
    for warning in plan.warnings:
        job.add_row("warning", escape(warning))
    if plan.refused:
        job.add_row("the run would be refused", escape("; ".join(plan.refused)))
    shown = []
    for table in (edits, sparse_table(plan)):
        if table.row_count:
            shown.append(table)
    return [sizes, *shown, job, *advice_tables(plan.advice)]


def _stock_text(plan: Plan) -> str:
    """Whether a stock class will hold the result, and what would make it fit."""
    if plan.misfit is not None:
        return f"no: {plan.misfit}. {plan.offers}".rstrip()
    if plan.doubt is not None:
        return f"perhaps: {plan.doubt} The run compares outputs first. {plan.offers}".rstrip()
    if plan.depends is not None:
        return f"it depends: {plan.depends}"
    return "yes"


def sparse_table(plan: Plan) -> Table:
    """The weights that would be sparse; they keep their shapes, so that sizes do not change."""
    table = _make_table(
        "what would be sparse", "pattern", "weights", "parameters in them", "of these zero"
    )
    for one in plan.sparse:
        table.add_row(
            one.pattern, str(one.weights), format_count(one.entries), format_count(one.zeros)
        )
    return table


def advice_tables(advice: Iterable[Advice]) -> list[Table]:
    """What practice warns of; no table where it warns of nothing."""
    table = _make_table("what practice warns of", "", "", "source")
    for one in advice:
        table.add_row(one.name, escape(one.says), escape(one.source))
    if table.row_count:
        return [table]
    return []


def footprint_table(before: Footprint, after: Footprint, title: str) -> Table:
    """Two footprints side by side."""
    table = _make_table(title, "", "before", "after", "change")
    rows = (
        ("parameters", before.parameters, after.parameters, format_count),
        ("bytes", before.bytes, after.bytes, format_bytes),
        (
            f"FLOPs a token ({_protocol_line(before)})",
            before.flops_per_token,
            after.flops_per_token,
            format_count,
        ),
        (
            "KV cache bytes a token",
            before.kv_bytes_per_token,
            after.kv_bytes_per_token,
            format_bytes,
        ),
    )
    for name, a, b, show in rows:
        if a is not None and b is not None:
            table.add_row(name, show(a), show(b), format_change(a, b))
    return table


def edit_rows(edits: Iterable[PlannedEdit]) -> list[tuple[str, str, str, str]]:
    """Edits that are alike, as one row: family, groups, units, kept."""
    alike = Counter((edit.family, edit.units, edit.kept, edit.exact) for edit in edits)
    return [
        (family, str(times), str(units), f"{kept}" if exact else f"{kept} on average")
        for (family, units, kept, exact), times in alike.items()
    ]


def run_tables(before: Program, after: Program, old: Footprint, new: Footprint) -> list[Table]:
    """What each pass did, in order, and what came out."""
    table = _make_table("what was done", "pass", "seconds", "parameters after", "left alone")
    for step in after.history[len(before.history) :]:
        parameters = step.figures.get("parameters_after")
        locked = "\n".join(
            f"{times} x {reason}" for reason, times in step.figures.get("locked", {}).items()
        )
        seconds = f"{step.figures['seconds']:.2f}"
        table.add_row(step.name, seconds, "" if parameters is None else f"{parameters:,}", locked)
    plan = last_lowering(after.history[len(before.history) :])
    return [
        table,
        footprint_table(old, new, "what came out"),
        *([plan_table(plan)] if plan else []),
    ]


def pass_tables() -> list[Table | str]:
    """All passes and importances with their options."""
    return [piece for table in (PASSES, IMPORTANCES) for cls in table for piece in _options_of(cls)]


def recipe_tables(listed: Iterable[Mapping[str, str]]) -> list[Table]:
    """Recipes by name, with what they are for and their source."""
    table = _make_table("recipes", "name", "what it does", "source")
    for one in listed:
        table.add_row(one["name"], escape(one["about"]), escape(one["source"]))
    return [table]


def _options_of(cls: type[Options]) -> list[Table | str]:
    table = _make_table("", "option", "default", "meaning")
    for row in options_table(cls):
        table.add_row(*row)
    return [
        f"[bold]{cls.name}[/bold]: {escape(cls.summary())}",
        *([table] if table.row_count else []),
        "",
    ]


def _make_table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _protocol_line(found: Footprint) -> str:
    return f"batch {found.batch}, sequence {found.sequence}"


def _cache_text(found: Footprint) -> str:
    if found.kv_bytes_per_token is None:
        return "none, or not seen"
    return format_bytes(found.kv_bytes_per_token)

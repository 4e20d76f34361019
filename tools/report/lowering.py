"""Tables of plans for linear layers, and of what they run on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from secateur.passes.lowering.lower import LayerPlan, Lowering
from secateur.runtime.packed.store import LayerReport
from secateur.tools.report.units import format_bytes


def layer_tables(layers: Sequence[LayerReport]) -> list[Table]:
    """What runs where: layers that are alike in one row."""
    table = Table(title="what runs where", title_justify="left")
    for column in ("layers", "form", "op", "kernel", "bytes", "dense", "why"):
        table.add_column(column, overflow="fold")
    alike: dict[tuple[str, str, str, str], list[LayerReport]] = {}
    for row in layers:
        key = (row.kind, row.op, row.backend, _short_reason(row.reason))
        alike.setdefault(key, []).append(row)
    for (kind, op, backend, why), rows in alike.items():
        packed_bytes = sum(row.bytes for row in rows)
        dense_bytes = sum(row.dense_bytes for row in rows)
        table.add_row(
            f"{len(rows)} x {_last_part(rows[0].layer)}",
            kind,
            op,
            backend,
            format_bytes(packed_bytes),
            format_bytes(dense_bytes),
            why,
        )
    if layers:
        return [table]
    return []


def plan_table(plan: Lowering) -> Table:
    """The plan of ``lower``: layers that are alike in one row, times and bytes summed."""
    title = f"lowered for {plan.machine} ({plan.source}), batch {plan.batch}, {plan.dtype}"
    table = Table(title=title, title_justify="left")
    for column in ("layers", "shape", "form", "ms", "dense ms", "bytes", "dense", "why"):
        table.add_column(column, overflow="fold")
    groups: dict[tuple[str, tuple[int, ...], str], list[LayerPlan]] = {}
    for row in plan.layers:
        groups.setdefault((row.kind, tuple(row.shape), _last_part(row.layer)), []).append(row)
    for (kind, shape, name), rows in groups.items():
        table.add_row(
            f"{len(rows)} x {name}",
            str(list(shape)),
            kind,
            f"{_sum_field(rows, 'ms'):.3f}",
            f"{_sum_field(rows, 'dense_ms'):.3f}",
            format_bytes(_sum_field(rows, "bytes")),
            format_bytes(_sum_field(rows, "dense_bytes")),
            _short_reason(rows[0].reason),
        )
    return table


def _sum_field(rows: Iterable[LayerPlan], field: str) -> float:
    return float(sum(getattr(row, field) for row in rows))


def _last_part(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return parts[-1]


def _short_reason(reason: str) -> str:
    """A reason without the numbers of a single layer."""
    if " ms " in reason:
        if not reason.startswith("no packed form"):
            return "least time"
        return reason.split(":")[0]
    if reason.startswith("not 2:4"):
        return "not 2:4"
    return reason

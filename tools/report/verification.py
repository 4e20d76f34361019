"""Tables of what was found in a model folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from secateur.runtime.verify import Level, Verification
from secateur.runtime.verify.census import Census, group_by_family
from secateur.tools.report.units import format_bytes, format_count

COLOURS: Mapping[Level, str] = {"ok": "green", "note": "dim", "warning": "yellow", "fault": "red"}


def verification_tables(found: Verification) -> list[Table | str]:
    """What is stored, what each check found, and one line for it all."""
    if any(one.over for one in found.tensors):
        tables = [_tensor_table(found.tensors)]
    else:
        tables = []
    table = Table(title=escape(str(found.folder)), title_justify="left")
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for outcome in found.outcomes:
        for at, one in enumerate(outcome.findings):
            level = f"[{COLOURS[one.level]}]{one.level}[/]"
            if one.level in ("warning", "fault"):
                mend = escape(one.mend)
            else:
                mend = ""
            table.add_row(outcome.check if at == 0 else "", level, escape(one.says), mend)
    return [*tables, table, _summary_line(found)]


def _tensor_table(tensors: Sequence[Census]) -> Table:
    """Matrices that are alike in one row."""
    table = Table(title="matrices", title_justify="left")
    for column in ("", "name", "shape", "type", "zeros", "pattern"):
        table.add_column(column, overflow="fold")
    for name, ones in group_by_family(one for one in tensors if one.over).items():
        shapes = Counter(str(list(one.shape)) for one in ones)
        held = Counter(one.pattern or "none" for one in ones)
        zeros = sum(one.zeros for one in ones) / max(sum(one.numel for one in ones), 1)
        if len(shapes) == 1:
            shape = next(iter(shapes))
        else:
            shape = f"{len(shapes)} shapes"
        patterns = ", ".join(
            f"{times} x {pattern}" if len(held) > 1 else pattern for pattern, times in held.items()
        )
        dtypes = ", ".join(dict.fromkeys(one.dtype for one in ones))
        table.add_row(f"{len(ones)} x", escape(name), shape, dtypes, f"{zeros:.2%}", patterns)
    return table


def _summary_line(found: Verification) -> str:
    faults = len(found.faults)
    if found.green:
        verdict = "[green]green[/]"
    else:
        verdict = f"[red]red: {faults} fault{'s' if faults > 1 else ''}[/]"
    numbers = sum(one.numel for one in found.tensors)
    read = (
        f"{format_count(numbers)} numbers, {format_bytes(found.num_bytes)} read and counted at "
        f"{found.gbps:.2f} GB/s"
    )
    return f"{verdict}; {read}, {found.seconds:.1f} s in all"

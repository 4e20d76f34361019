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


def verification_tables(verification: Verification) -> list[Table | str]:
    """What is stored, what each check found, and one line for it all."""
    tables: list[Table | str] = []
    if any(census.over for census in verification.tensors):
        tables.append(_tensor_table(verification.tensors))
    table = Table(title=escape(str(verification.folder)), title_justify="left")
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for outcome in verification.outcomes:
        check = outcome.check
        for finding in outcome.findings:
            level = f"[{COLOURS[finding.level]}]{finding.level}[/]"
            mend = ""
            if finding.level in ("warning", "fault"):
                mend = escape(finding.mend)
            table.add_row(check, level, escape(finding.says), mend)
            check = ""  # stands in the first row of its findings alone
    return [*tables, table, _summary_line(verification)]


def _tensor_table(tensors: Sequence[Census]) -> Table:
    """Matrices that are alike in one row."""
    table = Table(title="matrices", title_justify="left")
    for column in ("", "name", "shape", "type", "zeros", "pattern"):
        table.add_column(column, overflow="fold")
    for name, family in group_by_family(census for census in tensors if census.over).items():
        shapes = dict[str, None]()
        dtypes = dict[str, None]()
        patterns = Counter[str]()
        zeros = 0
        numbers = 0
        for census in family:
            shapes[str(list(census.shape))] = None
            dtypes[census.dtype] = None
            patterns[census.pattern or "none"] += 1
            zeros += census.zeros
            numbers += census.numel
        shape = f"{len(shapes)} shapes"
        if len(shapes) == 1:
            shape = next(iter(shapes))
        listed = next(iter(patterns))
        if len(patterns) > 1:
            listed = ", ".join(f"{times} x {pattern}" for pattern, times in patterns.items())
        table.add_row(
            f"{len(family)} x",
            escape(name),
            shape,
            ", ".join(dtypes),
            f"{zeros / max(numbers, 1):.2%}",
            listed,
        )
    return table


def _summary_line(verification: Verification) -> str:
    faults = len(verification.faults)
    if verification.green:
        verdict = "[green]green[/]"
    else:
        noun = "fault"
        if faults > 1:
            noun = "faults"
        verdict = f"[red]red: {faults} {noun}[/]"
    numbers = sum(census.numel for census in verification.tensors)
    size = format_bytes(verification.num_bytes)
    speed = f"{verification.gbps:.2f} GB/s"
    counting = f"{format_count(numbers)} numbers, {size} read and counted at {speed}"
    return f"{verdict}; {counting}, {verification.seconds:.1f} s in all"

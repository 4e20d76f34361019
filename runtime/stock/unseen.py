"""Parameters that the captured computation never used: another modality's, mostly.

What is not in the graph is not cut with it.  So a cut may not touch what those parameters share,
read or feed; where that cannot be ruled out, it is refused before any work.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

from torch import nn

from secateur.graph import coupled_groups
from secateur.graph.program import Program
from secateur.runtime.stock.incompatibility import UnseenParametersError

SHOWN = 3
OTHER_MODALITY = re.compile(
    r"pixel|image|video|audio|vision|visual|speech|frame|input_features|input_values|spatial|bbox"
)
"""Names of arguments that bring in something else than text."""


def unseen_parameters(program: Program) -> dict[str, nn.Parameter]:
    """Parameters of the source model that the captured computation does not use.

    Args:
        program: also an edited one; what edits removed was used, so it is not counted.

    Returns:
        Name in the source model (a tied parameter goes by its first) -> parameter.
    """
    if program.cut:
        dense = program.cut.dense
    else:
        dense = program
    captured = {name for name, _ in dense.named_parameters()}
    every = program.source.model.named_parameters(remove_duplicate=False)
    names: dict[int, list[str]] = {}
    values: dict[int, nn.Parameter] = {}
    for name, parameter in every:
        names.setdefault(id(parameter), []).append(name)
        values[id(parameter)] = parameter
    return {alike[0]: values[key] for key, alike in names.items() if captured.isdisjoint(alike)}


def unused_inputs(program: Program) -> list[str]:
    """Arguments of the model that bring in another modality and were not given at capture."""
    given_names = {
        name for name, value in program.source.example_inputs.items() if value is not None
    }
    arguments = inspect.signature(program.source.model.forward).parameters
    return [name for name in arguments if OTHER_MODALITY.search(name) and name not in given_names]


def check_unseen(program: Program) -> None:
    """Refuse a cut through several layers where another modality's parameters were not captured.

    Units inside one layer never leave it.  Those that run through several layers (the channels of
    the residual stream) can also be written or read by modules that the captured call did not run,
    and no shape tells: a class may hold both widths as numbers of their own.

    Args:
        program: an edited program.

    Raises:
        UnseenParametersError: names the group, the parameters that were not seen, and the way out.
    """
    if program.cut is None or not program.cut.kept or not (inputs := unused_inputs(program)):
        return
    unseen = unseen_parameters(program)
    if not unseen:
        return
    groups = coupled_groups(program.cut.dense)
    crossing = []
    for group in groups:
        if group.name in program.cut.kept and not group.block:
            crossing.append(group)
    if crossing:
        families = ", ".join(sorted({group.family for group in crossing}))
        raise UnseenParametersError(
            f"{type(program.source.model).__name__}: {crossing[0].name} runs through all layers "
            f"(family {families}), and {describe(unseen)} were not in the captured computation, "
            f"which ran without {' and '.join(inputs[:SHOWN])}: they may read or feed what would "
            "go, and would keep their old width. Leave that width as it is, and prune widths "
            "inside the layers (mlp, kv_heads) or whole layers instead; or cut the text model alone"
        )


def describe(unseen: Mapping[str, nn.Parameter]) -> str:
    """How many, and the first few names."""
    listed = ", ".join(list(unseen)[-SHOWN:])
    elements = sum(parameter.numel() for parameter in unseen.values())
    return f"{len(unseen)} parameters with {elements:,} numbers ({listed})"

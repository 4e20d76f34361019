"""What a raised model computes from a picture, which the captured computation may never have
seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from secateur.graph import coupled_groups
from secateur.graph.program import Program
from secateur.runtime.open.classes import BUILD_FAILURES
from secateur.runtime.stock.incompatibility import UnseenParametersError
from secateur.runtime.stock.to_transformers import (
    TransformersModel,
    accepted_difference,
    comparable_outputs,
    largest_difference,
    probe_inputs,
)
from secateur.runtime.stock.unseen import unseen_parameters, unused_inputs
from secateur.runtime.verify.modalities import NoExample, picture_inputs
from secateur.runtime.verify.proof import Call

WHAT = "a picture"


def picture_calls(
    program: Program, raised: TransformersModel
) -> tuple[tuple[Call, ...], dict[str, Any]]:
    """The calls with a picture that a saved model must answer, and figures of what they proved
    here.

    The result is compared with the source class at its own size, into which the program's weights
    are put back, with zeros for what was removed.  Zeros are what was removed only where no norm
    or router reads them; where that class does not answer a text as the program does, nothing is
    compared, and the picture has to run.

    Returns:
        Calls for the fresh process; figures, empty where every parameter was captured.

    Raises:
        UnseenParametersError: the result cannot read the picture, or answers it otherwise.
    """
    unseen = unseen_parameters(program)
    inputs = unused_inputs(program)
    if not unseen or not inputs:
        return (), {}
    figures: dict[str, Any] = {
        "parameters": len(unseen),
        "numbers": sum(parameter.numel() for parameter in unseen.values()),
    }
    source = program.source.model
    assert isinstance(source, PreTrainedModel)
    try:
        picture = picture_inputs(source)
    except NoExample as reason:
        return (), {**figures, "picture": f"not run: {reason}"}
    if picture is None:
        return (), {**figures, "picture": f"not run: {', '.join(inputs)} need an example"}
    name = raised.plan.cls.__name__
    try:
        with torch.no_grad():
            found = comparable_outputs(raised.model(**picture))
    except BUILD_FAILURES as error:
        raise UnseenParametersError(
            f"{name} reads a picture before the cut and not after it ({str(error)[:200]}): "
            "leave the widths that its encoder shares with the text model as they are"
        ) from error
    gap = _gap(program, picture, found)
    if gap is not None and not gap <= accepted_difference(program):
        raise UnseenParametersError(
            f"{name} answers a picture otherwise than the program would: outputs differ "
            f"by {gap:.3g}"
        )
    if gap is None:
        figures["picture"] = "runs"
    else:
        figures["picture"] = "agrees"
    if gap is not None:
        figures["picture_difference"] = gap
    return (Call(WHAT, picture, found),), figures


def _gap(program: Program, picture: Mapping[str, Any], found: Mapping[str, Tensor]) -> float | None:
    """The difference to the source class with zeros; None where zeros are not what was removed."""
    source = program.source.model
    parameters = zero_filled(program)
    if parameters is None:
        return None
    text = probe_inputs(program)
    with torch.no_grad():
        ours = comparable_outputs(functional_call(source, parameters, (), dict(text)))
        if not largest_difference(comparable_outputs(program(**text)), ours) <= accepted_difference(
            program
        ):
            return None
        return largest_difference(
            comparable_outputs(functional_call(source, parameters, (), dict(picture))), found
        )


def zero_filled(program: Program) -> dict[str, Tensor] | None:
    """The program's parameters in the shapes of its source, with zeros where something was removed.

    None where the edits do not say from which places a weight came.
    """
    dense = dict((program.cut.dense if program.cut else program).named_parameters())
    now = dict(program.named_parameters())
    places = _remaining(program)
    filled: dict[str, Tensor] = {}
    for name, parameter in dense.items():
        if name in now and now[name].shape == parameter.shape:
            filled[name] = now[name].detach()
            continue
        filled[name] = torch.zeros_like(parameter)
        if name in now:
            rows = []
            for dim, size in enumerate(parameter.shape):
                rows.append(places[name].get(dim, torch.arange(size)))
            if tuple(len(row) for row in rows) != tuple(now[name].shape):
                return None
            where = torch.meshgrid(*rows, indexing="ij")
            filled[name][where] = now[name].detach()
    return filled


def _remaining(program: Program) -> dict[str, dict[int, Tensor]]:
    """Of each parameter that was cut: dim -> positions that stayed, in the numbering of the
    source."""
    gone: dict[tuple[str, int], set[int]] = {}
    cut = program.cut
    for group in coupled_groups(cut.dense) if cut else ():
        assert cut is not None
        if group.name not in cut.kept:
            continue
        removed = torch.ones(group.units, dtype=torch.bool)
        removed[cut.kept[group.name]] = False
        for member in group.members:
            place = member.parameter, member.dim
            gone.setdefault(place, set()).update(member.positions[removed].flatten().tolist())
    if cut:
        shapes = {name: p.shape for name, p in cut.dense.named_parameters()}
    else:
        shapes = {}
    places: dict[str, dict[int, Tensor]] = {name: {} for name in shapes}
    for (name, dim), positions in gone.items():
        if name in shapes:
            stays = []
            for i in range(shapes[name][dim]):
                if i not in positions:
                    stays.append(i)
            places[name][dim] = torch.tensor(stays)
    return places

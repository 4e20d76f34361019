"""What a raised model computes from a picture, which the captured computation may never have
seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from secateur.graph import coupled_groups
from secateur.graph.program import JSON, Program
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
from secateur.runtime.verify.modalities import Inputs, NoExample, picture_inputs
from secateur.runtime.verify.proof import Call

WHAT = "a picture"


def picture_calls(program: Program, raised: TransformersModel) -> tuple[tuple[Call, ...], JSON]:
    """The calls with a picture that a saved model must answer, and figures of what they proved
    here.

    The result is compared with the source class at its own size, into which the program's weights
    are put back, with zeros for what was removed.  Zeros are what was removed only where no norm
    or router reads them; where that class does not answer a text as the program does, nothing is
    compared, and the picture has to run.

    Args:
        program: that is saved.
        raised: its stock model.

    Returns:
        Calls for the fresh process; figures, empty where every parameter was captured.

    Raises:
        UnseenParametersError: the result cannot read the picture, or answers it otherwise.
    """
    unseen = unseen_parameters(program)
    inputs = unused_inputs(program)
    if not unseen or not inputs:
        return (), {}
    figures: JSON = {
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
            outputs = comparable_outputs(raised.model(**picture))
    except BUILD_FAILURES as error:
        raise UnseenParametersError(
            f"{name} reads a picture before the cut and not after it ({str(error)[:200]}): "
            "leave the widths that its encoder shares with the text model as they are"
        ) from error
    gap = _gap(program, picture, outputs)
    if gap is not None and not gap <= accepted_difference(program):
        raise UnseenParametersError(
            f"{name} answers a picture otherwise than the program would: outputs differ "
            f"by {gap:.3g}"
        )
    if gap is None:
        figures["picture"] = "runs"
    else:
        figures["picture"] = "agrees"
        figures["picture_difference"] = gap
    return (Call(WHAT, picture, outputs),), figures


def _gap(program: Program, picture: Inputs, outputs: Mapping[str, Tensor]) -> float | None:
    """The difference to the source class with zeros; None where zeros are not what was removed."""
    source = program.source.model
    parameters = zero_filled(program)
    if parameters is None:
        return None
    text = probe_inputs(program)
    with torch.no_grad():
        filled = comparable_outputs(functional_call(source, parameters, (), dict(text)))
        text_gap = largest_difference(comparable_outputs(program(**text)), filled)
        if not text_gap <= accepted_difference(program):
            return None
        expected = comparable_outputs(functional_call(source, parameters, (), dict(picture)))
        return largest_difference(expected, outputs)


def zero_filled(program: Program) -> dict[str, Tensor] | None:
    """The program's parameters in the shapes of its source, with zeros where something was removed.

    None where the edits do not say from which places a weight came.

    Args:
        program: edited.
    """
    source = program
    if program.cut:
        source = program.cut.dense
    dense = dict(source.named_parameters())
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
    if cut is None:
        return {}
    for group in coupled_groups(cut.dense):
        if group.name not in cut.kept:
            continue
        removed = torch.ones(group.units, dtype=torch.bool)
        removed[cut.kept[group.name]] = False
        for member in group.members:
            place = member.parameter, member.dim
            gone.setdefault(place, set()).update(member.positions[removed].flatten().tolist())
    places: dict[str, dict[int, Tensor]] = {}
    shapes: dict[str, torch.Size] = {}
    for name, parameter in cut.dense.named_parameters():
        places[name] = {}
        shapes[name] = parameter.shape
    for (name, dim), positions in gone.items():
        if name in shapes:
            stays = [place for place in range(shapes[name][dim]) if place not in positions]
            places[name][dim] = torch.tensor(stays)
    return places

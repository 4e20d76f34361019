"""Whether a fresh process with plain transformers computes from a folder what is computed here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from secateur.graph.capture.export import name_inputs
from secateur.graph.errors import CaptureError
from secateur.graph.program import JSON
from secateur.passes.lowering.lower import DTYPES
from secateur.runtime.open.source import REFUSED_FIELDS, open_model
from secateur.runtime.packed.store import FOLDER, has_packed, load_lowered, read_plan
from secateur.runtime.stock.to_transformers import TOLERANCE, comparable_outputs, largest_difference
from secateur.runtime.verify import proof, reload
from secateur.runtime.verify.census import Census
from secateur.runtime.verify.findings import Finding
from secateur.runtime.verify.modalities import NoExample, WrongWidth, picture_inputs
from secateur.runtime.verify.subject import Subject

REORDERED = 1e-3
"""What another order of summation may change in float32; that the weights are the same is another
check."""
MEND = (
    "Do not use the folder; save the model again, and tell the versions of both libraries if "
    "it happens again"
)


def check_reload(subject: Subject) -> Iterator[Finding]:
    """Parameters and outputs of a fresh process, and outputs on the packed weights.

    Args:
        subject: the folder.
    """
    if subject.model is None:
        yield Finding("note", "no stock class, so nothing was run")
        return
    if fields := [name for name in REFUSED_FIELDS if subject.config.get(name)]:
        yield Finding(
            "note",
            f"not run: {', '.join(fields)} in the configuration needs the library that wrote it",
        )
        return
    model = open_model(subject.folder)
    try:
        inputs = name_inputs(model)
    except CaptureError as error:
        yield Finding("note", f"not run: {error}")
        return
    with torch.no_grad():
        outputs = comparable_outputs(model(**inputs))
    calls = list[proof.Call]()
    yield from _picture(subject, model, calls)
    bound = TOLERANCE.get(model.dtype, TOLERANCE[torch.float32])
    expected = proof.ExpectedFolder(
        loader=proof.loader_name(model.config, type(model)),
        inputs=inputs,
        outputs=outputs,
        parameters=_parameter_hashes(subject, model),
        tolerance=bound,
        generate=False,
        calls=tuple(calls),
    )
    del model
    faults, figures = proof.prove_folder(subject.folder, expected)
    yield from (Finding("fault", fault, MEND) for fault in faults)
    if not faults:
        says = (
            f"{len(expected.parameters):,} parameters bit-equal, outputs differ by "
            f"{figures['difference']:.3g}"
        )
        for call in calls:
            says += f", with {call.what} by {figures[f'difference with {call.what}']:.3g}"
        yield Finding("ok", f"a fresh process ({figures['loader']}): {says}")
    yield from _compare_packed(subject, inputs, outputs)


def _picture(
    subject: Subject, model: PreTrainedModel, calls: list[proof.Call]
) -> Iterator[Finding]:
    """Add the call with a picture, or say why there is none."""
    try:
        picture = picture_inputs(model)
    except WrongWidth as error:
        yield Finding("fault", str(error), "Do not use the folder")
        return
    except NoExample as error:
        says = f"pictures were not looked at: {error}"
        if subject.manifest is not None and _ran(subject.manifest.figures):
            yield Finding("fault", says, MEND)
        else:
            yield Finding("note", says)
        return
    if picture is not None:
        with torch.no_grad():
            calls.append(proof.Call("a picture", picture, comparable_outputs(model(**picture))))


def _ran(figures: JSON) -> bool:
    """Whether the manifest says that a picture ran when the model was saved."""
    return figures.get("unseen", {}).get("picture") in ("runs", "agrees")


def _parameter_hashes(subject: Subject, model: torch.nn.Module) -> dict[str, str]:
    """Of every parameter: that of the stored tensor of its name, taken from the file, or else of
    what was loaded."""
    hashes = {}
    for name, parameter in model.named_parameters():
        census = subject.tensors.get(subject.stored_name(name) or "")
        if census is not None and census.digest and _is_alike(census, parameter):
            hashes[name] = census.digest
        else:
            hashes[name] = reload.hash_tensor(parameter)
    return hashes


def _is_alike(census: Census, parameter: torch.Tensor) -> bool:
    """Whether a stored tensor has the shape and the dtype of a parameter."""
    same_dtype = f"torch.{census.dtype}" == str(parameter.dtype)
    return same_dtype and census.shape == tuple(parameter.shape)


def _compare_packed(
    subject: Subject, inputs: dict[str, object], outputs: dict[str, torch.Tensor]
) -> Iterator[Finding]:
    if not has_packed(subject.folder):
        return
    plan = read_plan(subject.folder / FOLDER)
    if any(row.rounds for row in plan.packed_layers):
        yield Finding(
            "note",
            "packed weights with rounded copies compute something else by design: not compared",
        )
        return
    with torch.no_grad():
        on_packed = comparable_outputs(load_lowered(subject.folder)(**inputs))
    gap = largest_difference(outputs, on_packed)
    bound = max(REORDERED, TOLERANCE[DTYPES[plan.dtype]])
    if gap <= bound:
        yield Finding(
            "ok",
            f"on packed weights ({plan.dtype}): outputs differ by {gap:.3g}, allowed {bound:.3g}",
        )
    else:
        yield Finding(
            "fault", f"on packed weights outputs differ by {gap:.3g}, allowed {bound:.3g}", MEND
        )

"""From a Program back to a stock Hugging Face model over the same Parameter objects."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.graph.program import JSON, Program
from secateur.passes.sparsity.boost import branch_parameters, remove_branches
from secateur.runtime.open.classes import BUILD_FAILURES, build_on_meta, build_with_buffers
from secateur.runtime.save.branches import attach_branches, branches_of, gap_to
from secateur.runtime.stock.config_search import (
    ConfigPlan,
    UnsupportedConfigError,
    first_names,
    iterate_plans,
)
from secateur.runtime.stock.constants import describe_changes
from secateur.runtime.stock.incompatibility import describe_refusals

log = logging.getLogger(__name__)

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}
"""Largest accepted difference of an output, relative to its largest magnitude where that is above
one."""
SURE = 1e-2
"""A difference below this part of the tolerance is rounding: no other configuration has to be
tried."""
MAX_TRIED = 24


@dataclass(frozen=True)
class TransformersModel:
    """A stock model, the plan behind it, and the largest difference of its outputs to the Program's
    (None on meta)."""

    model: PreTrainedModel
    plan: ConfigPlan
    difference: float | None


def to_transformers(program: Program) -> PreTrainedModel:
    """The stock model of a program, in eval mode, over the same Parameter objects; training it
    trains the program.

    On the meta device there are no outputs to compare, and a warning says so.
    Branches beside sparse weights are put into its linear modules, which are then stock ones no
    more.

    Raises:
        UnsupportedConfigError: no configuration fits, or the stock class computes something
            else from these weights.
    """
    return to_transformers_with_plan(program).model


def to_transformers_with_plan(program: Program) -> TransformersModel:
    """The same with the plan and the difference; where several plans fit, the one whose outputs
    agree."""
    if branch_parameters(program):
        plain = to_transformers_with_plan(remove_branches(program))
        attach_branches(plain.model, branches_of(program, plain.model))
        gap = None
        if plain.difference is not None:
            gap = gap_to(program, plain.model)
        if gap is not None and not gap <= accepted_difference(program):
            raise UnsupportedConfigError(
                f"the stock class with branches computes something else: outputs differ by {gap:g}"
            )
        return TransformersModel(plain.model, plain.plan, gap)
    if is_on_meta(program):
        plan = next(iterate_plans(program))
        log.warning(
            "on the meta device: the outputs of the raised model were not compared. %s",
            describe_changes(plan.constants),
        )
        return TransformersModel(_assemble_model(program, plan), plan, None)
    inputs = probe_inputs(program)
    with torch.no_grad():
        expected = comparable_outputs(program(**inputs))
    tried: list[tuple[float, ConfigPlan]] = []
    for plan in islice(iterate_plans(program), MAX_TRIED):
        model = _assemble_model(program, plan)
        gap = _compare_outputs(model, inputs, expected)
        log.debug("configuration %s: outputs differ by %.3g", dict(plan.changes), gap)
        if gap <= SURE * accepted_difference(program):
            return TransformersModel(model, plan, gap)
        tried.append((gap, plan))
    gap, plan = min(tried, key=lambda pair: pair[0])  # plans() raises if there is none
    if not gap <= accepted_difference(program):
        raise UnsupportedConfigError(_describe_difference(*tried[0]))
    return TransformersModel(_assemble_model(program, plan), plan, gap)


def probe_inputs(program: Program) -> JSON:
    """The example inputs of the capture, token numbers folded into a vocabulary that may have
    shrunk."""
    vocabulary = min((table.shape[0] for table in _lookup_tables(program)), default=0)
    inputs = dict(program.source.example_inputs)
    if vocabulary:
        for name, value in inputs.items():
            inputs[name] = _fold_ids(value, vocabulary)
    return inputs


def comparable_outputs(output: Any) -> dict[str, torch.Tensor]:
    """The floating tensors of a model's output by name, caches left out.

    Args:
        output: a tensor, or a mapping or sequence with tensors.
    """
    if isinstance(output, torch.Tensor):
        return {"output": output}
    named = output
    if not isinstance(output, Mapping):
        named = dict(enumerate(output))
    outputs = {}
    for name, value in named.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            outputs[str(name)] = value
    return outputs


def largest_difference(
    expected: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> float:
    """Largest absolute difference of the shared outputs, relative to the largest magnitude where
    that is above one. Infinite if they share none, or if shapes or finiteness differ.

    Args:
        expected: outputs by name; their magnitude is the scale.
        outputs: to be compared with them.
    """
    shared = expected.keys() & outputs.keys()
    gaps = [_relative_difference(expected[name], outputs[name]) for name in shared]
    return max(gaps, default=float("inf"))


def accepted_difference(program: Program) -> float:
    """The accepted difference in the program's widest parameter dtype's row of TOLERANCE."""
    accepted = []
    for _, parameter in program.named_parameters():
        if parameter.dtype in TOLERANCE:
            accepted.append(TOLERANCE[parameter.dtype])
    return max(accepted, default=TOLERANCE[torch.float32])


def is_on_meta(program: Program) -> bool:
    """Whether the program has shapes but no weights."""
    return any(parameter.device.type == "meta" for _, parameter in program.named_parameters())


def _compare_outputs(
    model: PreTrainedModel, inputs: Mapping[str, object], expected: Mapping[str, torch.Tensor]
) -> float:
    """The difference of a model's outputs; infinite if it cannot run with these numbers."""
    try:
        with torch.no_grad():
            return largest_difference(expected, comparable_outputs(model(**inputs)))
    except BUILD_FAILURES as error:
        log.debug("the raised model does not run: %s", error)
        return float("inf")


def _assemble_model(program: Program, plan: ConfigPlan) -> PreTrainedModel:
    """The class built from the plan, with the program's parameters and persistent buffers put
    in."""
    first_name = first_names(program.source.model)
    parameters = {}
    for name, parameter in program.named_parameters():
        parameters[first_name.get(name, name)] = parameter
    first = next(iter(parameters.values()))
    config = plan.config
    config.dtype = first.dtype
    if first.device.type == "meta":
        model = build_on_meta(plan.cls, config)
    else:
        model = build_with_buffers(plan.cls, config)
    source_name = {new: old for old, new in plan.names.items()}
    for name, empty in list(model.named_parameters(remove_duplicate=False)):
        old = source_name.get(name, name)
        traced = parameters.get(first_name.get(old, old))
        _put_parameter(model, name, _check_parameter(traced, program.source.model, old, empty))
    _put_buffers(model, program, source_name, first.device)
    generation: Any = getattr(program.source.model, "generation_config", None)
    if model.can_generate() and generation is not None:
        model.generation_config = copy.deepcopy(generation)
    return model


def _check_parameter(
    traced: nn.Parameter | None, source: nn.Module, name: str, empty: nn.Parameter
) -> nn.Parameter:
    """The program's parameter, or the source's where the computation never used it."""
    if traced is None:
        parameter = source.get_parameter(name)
    else:
        parameter = traced
    if parameter.shape != empty.shape:
        raise UnsupportedConfigError(
            f"{name} has shape {list(parameter.shape)} and the pruned stock class wants "
            f"{list(empty.shape)}: the "
            "captured computation does not use it, so it was not pruned along. Leave "
            "that width as it is, or in Python capture with example_inputs that use it"
        )
    return parameter


def _put_buffers(
    model: PreTrainedModel, program: Program, source_name: Mapping[str, str], device: torch.device
) -> None:
    """Persistent buffers from the program; the others are what the constructor computes."""
    persistent = model.state_dict().keys()
    buffers = dict(program.source.model.named_buffers()) | dict(program.gm.named_buffers())
    for name, computed in list(model.named_buffers()):
        stored = None
        if name in persistent:
            stored = buffers.get(source_name.get(name, name))
        owner, leaf = _owner_module(model, name)
        if stored is not None and stored.shape == computed.shape:
            owner._buffers[leaf] = stored
        else:
            owner._buffers[leaf] = computed.to(device)


def _put_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, leaf = _owner_module(model, name)
    owner._parameters[leaf] = parameter


def _owner_module(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _lookup_tables(program: Program) -> list[torch.Tensor]:
    """Tables that inputs are looked up in (not those of positions or of kinds, which the graph
    computes)."""
    names = dict(program.named_parameters())
    tables: list[torch.Tensor] = []
    for node in program.gm.graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            table, indices = node.args[:2]
            if indices.op == "placeholder" and str(table.target) in names:
                tables.append(names[str(table.target)])
    return tables


def _fold_ids(value: object, vocabulary: int) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point() or value.dtype is torch.bool:
        return value
    return value % vocabulary


def _relative_difference(expected: torch.Tensor, output: torch.Tensor) -> float:
    finite = expected.isfinite()
    if expected.shape != output.shape or not torch.equal(finite, output.isfinite()):
        return float("inf")
    gap = (expected[finite].double() - output[finite].double()).abs()
    if not gap.numel():
        return 0.0
    scale = expected[finite].abs().max().item()
    return gap.max().item() / max(1.0, scale)


def _describe_difference(gap: float, plan: ConfigPlan) -> str:
    changes = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in plan.changes.items())
    if not changes:
        changes = "nothing changed"
    reason = describe_refusals(plan.refused) + describe_changes(plan.constants)
    if not reason:
        reason = (
            "The class derives a constant from one of these numbers (a scale, slopes of heads, "
            "rotary frequencies). "
        )
    return (
        f"{plan.cls.__name__} has room for these weights ({changes}), but computes something else "
        "from them: outputs "
        f"differ by {gap:.3g}. {reason}Pruning keeps what was trained: leave that width as it is, "
        "or prune the widths "
        "that belong to it in proportion"
    )


def as_history(program: Program) -> list[JSON]:
    """The passes applied so far, as JSON."""
    return [dataclasses.asdict(step) for step in program.history]

"""Room for biases: what pruned units gave on average can move into a bias, and many models are
stored without any.

Nothing here knows a model: a switch of the configuration is one for biases if turning it on adds
    parameters named
``bias``, of one dim, and changes no other shape; that they change nothing while they are zero is
checked.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from secateur.runtime.open.classes import build_with_buffers
from secateur.runtime.stock.blueprint import Blueprint, Field, Shapes, dotted_name
from secateur.runtime.stock.config_search import UnsupportedConfigError, first_names
from secateur.runtime.stock.to_transformers import TOLERANCE, comparable_outputs, largest_difference

log = logging.getLogger(__name__)


def with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """The same stock model with a bias of zeros wherever its class can have one; parameters are
    shared, not copied.

    Open a model so before ``capture`` where ``compensate`` or ``repair`` shall have biases to fit.

    Raises:
        UnsupportedConfigError: no switch of the configuration adds biases, or the class then
            computes something else.
    """
    blueprint = Blueprint(type(model), model.config)
    before = blueprint.parameter_shapes({}) or {}
    settings: dict[Field, int] = {}
    for field in find_switches(model.config, blueprint.data):
        shapes = blueprint.parameter_shapes(settings) or before
        if adds_biases(shapes, blueprint.parameter_shapes({**settings, field: True})):
            settings[field] = True
    if not settings:
        name = type(model).__name__
        raise UnsupportedConfigError(
            f"no switch in the configuration of {name} adds biases: use repair, which needs none"
        )
    log.info("biases: %s", ", ".join(f"{dotted_name(field)} = true" for field in settings))
    empty = build_with_buffers(type(model), blueprint.make_config(settings))
    larger = _with_parameters_of(model, empty)
    _check_larger(model, larger)
    return larger


def find_switches(
    config: PretrainedConfig, data: Mapping[str, object], prefix: Field = ()
) -> Iterator[Field]:
    """Fields that are false, of a configuration and of those nested in it.

    Args:
        config: of the stock class.
        data: its values.
        prefix: of the fields, where it is nested in another.
    """
    for key, value in data.items():
        nested = None
        if key in (config.sub_configs or {}):
            nested = getattr(config, key, None)
        if isinstance(nested, PretrainedConfig) and isinstance(value, dict):
            yield from find_switches(nested, value, (*prefix, key))
        elif value is False:
            yield (*prefix, key)


def adds_biases(before: Shapes, after: Shapes | None) -> bool:
    """Whether all that differs is new parameters of one dim named ``bias``.

    Args:
        before: shapes by parameter name.
        after: the same with a switch on; None where the class refuses it.
    """
    if after is None or any(after.get(name) != shape for name, shape in before.items()):
        return False
    new_names = after.keys() - before.keys()
    for name in new_names:
        if name.rpartition(".")[2] != "bias" or len(after[name]) != 1:
            return False
    return bool(new_names)


def _with_parameters_of(model: PreTrainedModel, larger: PreTrainedModel) -> PreTrainedModel:
    """The larger model on the parameters and buffers of the smaller one, zeros where that has
    none."""
    owned = dict(model.named_parameters(remove_duplicate=False))
    first = first_names(larger)
    like = next(iter(owned.values()))
    biases: dict[str, nn.Parameter] = {}
    for name, empty in list(larger.named_parameters(remove_duplicate=False)):
        parameter = owned.get(name)
        if parameter is None and first[name] not in biases:
            zeros = torch.zeros(empty.shape, dtype=like.dtype, device=like.device)
            biases[first[name]] = nn.Parameter(zeros)
        if parameter is None:
            parameter = biases[first[name]]
        _put_parameter(larger, name, "_parameters", parameter)
    for name, buffer in model.named_buffers():
        _put_parameter(larger, name, "_buffers", buffer)
    larger.name_or_path = model.name_or_path
    if larger.can_generate() and getattr(model, "generation_config", None) is not None:
        larger.generation_config = copy.deepcopy(model.generation_config)
    larger.eval()
    return larger


def _put_parameter(model: nn.Module, name: str, kind: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    getattr(model.get_submodule(path), kind)[leaf] = value


@torch.no_grad()
def _check_larger(model: PreTrainedModel, larger: PreTrainedModel) -> None:
    if next(model.parameters()).is_meta:
        log.warning("on the meta device: that biases of zero change nothing was not checked")
        return
    inputs = {name: value.to(model.device) for name, value in model.dummy_inputs.items()}
    expected = comparable_outputs(model(**inputs))
    gap = largest_difference(expected, comparable_outputs(larger(**inputs)))
    if not gap <= TOLERANCE.get(model.dtype, 1e-4):
        raise UnsupportedConfigError(
            f"{type(model).__name__} with biases of zero computes something else: outputs "
            f"differ by {gap:g}"
        )

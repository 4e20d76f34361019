"""Model + example input -> Program: torch.export without decomposition, flattened, over the same
Parameter objects."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim

from secateur.graph.capture.calls import OFF, accept_any_call, get_attribute
from secateur.graph.capture.repeat import (
    NotRepeated,
    check_alike_when_run,
    extend_stack,
    find_stack,
    shorten_stack,
)
from secateur.graph.errors import CaptureError
from secateur.graph.program import Program, Source

log = logging.getLogger(__name__)

# Two distinct primes: even where a model fixes a size at trace time, no product of other sizes
# equals it by accident.
BATCH, SEQUENCE, DECODER_SEQUENCE = 2, 11, 7


def capture(model: nn.Module, example_inputs: Any = None, *, folder: Path | None = None) -> Program:
    """A module as a Program over the same Parameter objects.

    Args:
        model: a PreTrainedModel or any nn.Module, on any device, the meta device included (no
            weights are needed then).
        example_inputs: a tensor, a tuple of positional inputs, or a dict by argument name.  None:
            made from the configuration of a PreTrainedModel.  Batch (dim 0) and sequence (dim 1 of
            integer inputs) become dynamic where the model allows it.
        folder: the checkpoint folder the model was read from, remembered in the Source.

    Raises:
        CaptureError: names the module and the reason.
    """
    was_training = model.training
    model.eval()
    try:
        inputs = name_inputs(model, example_inputs)
        with _without_cache(model):
            gm = _export_repeated(model, inputs) or _export_whole(model, inputs)
        accept_any_call(gm, model, inputs)
    finally:
        model.train(was_training)
    source = Source(
        model=model, example_inputs=inputs, folder=folder, config=getattr(model, "config", None)
    )
    return Program(gm=gm, source=source)


def _export_whole(model: nn.Module, inputs: dict[str, Any]) -> fx.GraphModule:
    gm = _export_program(model, inputs).module(check_guards=False)
    _name_parameters(gm, model)
    return _flatten_graph(gm)


def _export_repeated(model: nn.Module, inputs: dict[str, Any]) -> fx.GraphModule | None:
    """The graph of a deep stack, from a few of its layers; None when its layers are not copies of
    each other."""
    stack = find_stack(model)
    if stack is None:
        return None
    try:
        with shorten_stack(model, stack):
            gm = _export_whole(model, inputs)
        extend_stack(gm, model, stack)
        if any(p.is_meta for p in model.parameters()):
            check_alike_when_run(model, stack, inputs)
        else:
            _check_equal(gm, model, inputs)
    except (NotRepeated, CaptureError) as reason:
        log.info("%s is exported whole: %s", stack.path, reason)
        return None
    return gm


def _check_equal(gm: fx.GraphModule, model: nn.Module, inputs: dict[str, Any]) -> None:
    """The laid layers compute what the model computes, bit for bit."""
    with torch.no_grad():
        pairs = zip(
            pytree.tree_leaves(gm(**inputs)), pytree.tree_leaves(model(**inputs)), strict=True
        )
        for ours, theirs in pairs:
            if isinstance(ours, torch.Tensor) and not torch.equal(ours, theirs):
                raise NotRepeated("the laid layers do not compute what the model computes")


# Inputs
def name_inputs(model: nn.Module, given: Any = None) -> dict[str, Any]:
    """Inputs of one call by argument name: those given, or made from the configuration of a
    PreTrainedModel.

    Raises:
        CaptureError: the model does not say what it takes, or takes no such argument.
    """
    parameters = inspect.signature(model.forward).parameters
    if given is None:
        inputs = _example_inputs(model, parameters)
    elif isinstance(given, Mapping):
        inputs = dict(given)
    else:
        if isinstance(given, (tuple, list)):
            values = given
        else:
            values = (given,)
        inputs = dict(zip(parameters, values, strict=False))
    unknown = [n for n in inputs if n not in parameters and not _takes_anything(parameters)]
    if unknown:
        raise CaptureError(
            f"example_inputs name {unknown}, but {type(model).__name__}.forward takes "
            f"{list(parameters)}"
        )
    return _grow_unit_dims(inputs) | {
        n: False for n in OFF[:1] if n in parameters and n not in inputs
    }


def _grow_unit_dims(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch or sequence of one is doubled: a size of one is traced as a constant and would hold
    for ever."""
    tensors = {n: v for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.dim()}
    for dim in (0, 1):
        alike = {
            n: v
            for n, v in tensors.items()
            if dim == 0 or (v.dim() == 2 and not v.is_floating_point())
        }
        if alike and all(v.shape[dim] == 1 for v in alike.values()):
            tensors |= {n: torch.cat([v, v], dim) for n, v in alike.items()}
    return inputs | tensors


def _takes_anything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _example_inputs(
    model: nn.Module, parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main not in ("input_ids", "pixel_values"):
        raise CaptureError(
            f"{type(model).__name__} does not say what it takes (main input {main!r}): in "
            "Python, give capture example_inputs, "
            f"a dict by argument name out of {list(parameters)}"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if main == "pixel_values":
        if isinstance(config.image_size, (tuple, list)):
            size = config.image_size
        else:
            size = (config.image_size,) * 2
        return {main: torch.zeros(BATCH, config.num_channels, *size, device=device)}
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 16
    ids = (
        torch.arange(BATCH * SEQUENCE).reshape(BATCH, SEQUENCE) % max(vocabulary - 4, 1) + 3
    ) % vocabulary
    inputs = {main: ids.to(device)}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = ids[:, :DECODER_SEQUENCE].flip(1).contiguous().to(device)
    return inputs


# Export
def _export_program(model: nn.Module, inputs: dict[str, Any]) -> torch.export.ExportedProgram:
    """Dynamic batch and sequence if the model allows it, then whatever it allows, then the
    example's own sizes."""
    first: Exception | None = None
    for dim in (Dim.DYNAMIC, Dim.AUTO, None):
        try:
            with torch.no_grad(), _use_grouped_experts(model), _set_torch_up():
                return torch.export.export(
                    model,
                    (),
                    dict(inputs),
                    dynamic_shapes=_dynamic_shapes(inputs, dim),
                    strict=False,
                )
        except Exception as error:
            first = first or error
            log.debug("export with %s dims failed: %s", dim, error)
    raise CaptureError(_explain_failure(model, first)) from first


@contextmanager
def _set_torch_up() -> Iterator[None]:
    """Settings of torch while it exports.

    It prints a traceback for each trial that fails; the reason is in the exception. Its cache of
    operator results pays where shapes are numbers: with symbols, keys and copies of entries cost
    more than what they save (2.5 s with it and 1.4 s without for two layers of a Llama).
    """
    loggers = []
    for n in ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes"):
        loggers.append(logging.getLogger(n))
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with dynamo_config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _dynamic_shapes(inputs: Mapping[str, Any], dim: Any) -> dict[str, Any] | None:
    if dim is None:
        return None
    dims: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            integer = not value.is_floating_point() and value.dim() > 1
            if integer:
                dims[name] = {0: dim, 1: dim}
            elif value.dim():
                dims[name] = {0: dim}
            else:
                dims[name] = {}
        else:
            dims[name] = pytree.tree_map(lambda _: None, value)
    return dims


@contextmanager
def _use_grouped_experts(model: nn.Module) -> Iterator[None]:
    """Experts as one grouped product: a Python loop over the experts hit depends on data and cannot
    be traced."""
    config = getattr(model, "config", None)
    name = "_experts_implementation"
    before = getattr(config, name, None)
    if before == "eager":
        setattr(config, name, "grouped_mm")
    try:
        yield
    finally:
        if before == "eager":
            setattr(config, name, before)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Switch the key/value cache off in every configuration of the model while it is captured.

    A cache in the output is no tensor and cannot be traced, and many classes read `use_cache` from
    a configuration alone: their forward has no argument of that name.
    """
    configs = {id(c): c for m in model.modules() for c in _nested(getattr(m, "config", None))}
    before = [(c, c.use_cache) for c in configs.values() if getattr(c, "use_cache", None)]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value


def _nested(config: Any) -> Iterator[Any]:
    """A configuration and all those inside it."""
    if config is None:
        return
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        yield from _nested(getattr(config, name, None))


def _explain_failure(model: nn.Module, error: Exception | None) -> str:
    """The innermost module on the traceback, and the reason."""
    where = type(model).__name__
    trace = None
    if error:
        trace = error.__traceback__
    names = {id(m): n for n, m in model.named_modules()}
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and names.get(id(owner)):
            where = f"{names[id(owner)]} ({type(owner).__name__})"
        trace = trace.tb_next
    if error and str(error).strip():
        reason = str(error).strip().splitlines()[0][:300]
    else:
        reason = "no reason given"
    return (
        f"{type(model).__name__} cannot be captured: in {where}: {type(error).__name__}: {reason}"
    )


# Clean-up of the exported module
def _flatten_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Inline the subgraphs that only switch autograd or autocast; drop shape guards' hooks and dead
    nodes."""
    gm._forward_pre_hooks.clear()
    gm._forward_pre_hooks_with_kwargs.clear()
    for node in list(gm.graph.nodes):
        name = str(getattr(node.target, "_name", node.target))
        if node.op == "call_function" and name in (
            "wrap_with_set_grad_enabled",
            "wrap_with_autocast",
        ):
            _inline_submodule(gm, node)
        elif (
            node.target is torch.ops.aten._assert_tensor_metadata.default
        ):  # holds the traced dtype and device
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()
    return gm


def _inline_submodule(gm: fx.GraphModule, node: fx.Node) -> None:
    at, body = next(
        (i, a) for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"
    )
    inner = gm.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    inner = _flatten_graph(inner)
    for name, tensor in inner.named_buffers():
        if not hasattr(gm, name):
            gm.register_buffer(name, tensor, persistent=False)
    operands = iter(node.args[at + 1 :])
    copies: dict[fx.Node, Any] = {}
    for n in inner.graph.nodes:
        if n.op == "placeholder":
            copies[n] = next(operands)
    with gm.graph.inserting_before(node):
        result = gm.graph.graph_copy(inner.graph, copies)
    if isinstance(result, (tuple, list)):
        for user in list(node.users):  # operator.getitem(node, i)
            picked: Any = result[user.args[1]]  # type: ignore[index]
            user.replace_all_uses_with(picked)
            gm.graph.erase_node(user)
    else:
        assert isinstance(result, fx.Node)
        node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _name_parameters(gm: fx.GraphModule, model: nn.Module) -> None:
    """Read a tied parameter under its first name in the source model."""
    first = {id(p): n for n, p in model.named_parameters()}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            node.target = first.get(id(get_attribute(gm, node.target)), node.target)

"""How a captured graph is called: like its model, by position or by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from secateur.graph.errors import CaptureError

OFF = ("use_cache", "output_attentions", "output_hidden_states")


def get_attribute(gm: nn.Module, path: str) -> Any:
    """What a dotted path names in a module tree."""
    owner: Any = gm
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def op_name(node: fx.Node) -> str:
    """``aten.linear`` for any overload of that op, or the empty string."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is not None and node.op == "call_function":
        return str(packet)
    return ""


def is_mutable(node: fx.Node) -> bool:
    """Whether an op writes into an operand."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def trace_alias(node: fx.Node) -> fx.Node:
    """The value whose memory a node may share: itself, or what it is a view of."""
    while isinstance(node.target, torch._ops.OpOverload) and _may_share_memory(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _may_share_memory(node: fx.Node) -> bool:
    """Whether the first result may be the first operand's memory."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    takes = bool(node.args) and isinstance(node.args[0], fx.Node) and bool(arguments)
    may = op_name(node) in ("aten.to", "aten.contiguous", "aten.reshape", "aten.dropout")
    return takes and (may or arguments[0].alias_info is not None)


def _call_signature(gm: nn.Module) -> dict[str, Any]:
    meta: dict[str, Any] = gm.meta  # type: ignore[assignment]
    found: dict[str, Any] = meta["call"]
    return found


def accept_any_call(gm: fx.GraphModule, model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Call the graph like the model: positional or by name; what was fixed at capture may be left
    out or repeated."""
    order = list(inspect.signature(model.forward).parameters)
    sizes = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            sizes[str(node.target)] = [_static_size(s) for s in node.meta["val"].shape]
    gm.meta["call"] = {"order": order, "inputs": dict(inputs), "sizes": sizes}
    gm.register_forward_pre_hook(_bind_arguments, with_kwargs=True)


def _static_size(size: Any) -> int | None:
    if isinstance(size, torch.SymInt):
        if size.node.expr.is_number:
            return int(size.node.expr)
        return None
    return int(size)


def _check_sizes(name: str, value: Any, fixed: list[int | None] | None) -> None:
    """Sizes that the model's own code fixed while it was captured hold for every call."""
    if fixed is not None and isinstance(value, torch.Tensor):
        wrong = []
        for d, (size, want) in enumerate(zip(value.shape, fixed, strict=False)):
            if want not in (None, size):
                wrong.append(d)
        if wrong or value.dim() != len(fixed):
            raise CaptureError(
                f"{name} has shape {tuple(value.shape)}, but this model's code fixed {fixed} when "
                "it was captured "
                "(None: free): in Python, capture it again with example_inputs of the shape to run"
            )


def accept_calls_of(gm: fx.GraphModule, other: fx.GraphModule) -> None:
    """Give a rewritten graph module the call convention of the one that it came from."""
    gm.meta["call"] = other.meta["call"]
    for name in ("_in_spec", "_out_spec"):
        if hasattr(other, name):
            setattr(gm, name, getattr(other, name))
    gm.register_forward_pre_hook(_bind_arguments, with_kwargs=True)
    gm.eval()


def bound_inputs(gm: fx.GraphModule) -> list[Any]:
    """The inputs that the graph was captured with, one a placeholder."""
    call = _call_signature(gm)
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    values = dict(
        zip(names, pytree.tree_leaves(call["inputs"], is_leaf=lambda x: x is None), strict=True)
    )
    return [values[n] for n in names]


def _bind_arguments(
    gm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    call = _call_signature(gm)
    captured = call["inputs"]
    given = dict(zip(call["order"], args, strict=False)) | kwargs
    bound = {}
    for name, example in captured.items():
        if name in given:
            bound[name] = given.pop(name)
            _check_sizes(name, bound[name], call["sizes"].get(name))
        elif isinstance(example, torch.Tensor):
            raise CaptureError(
                f"the captured call takes {name}; it was captured with {list(captured)}"
            )
        else:
            bound[name] = example
    fixed = {}
    for n, v in given.items():
        if v is not None and n not in OFF and n not in ("return_dict", "labels"):
            fixed[n] = v
    if fixed:
        raise CaptureError(
            f"captured without {list(fixed)}: in Python, capture again with example_inputs "
            "that hold them"
        )
    return (), bound

"""The oracle: run the full graph with the dropped units absent.

Independent of the axis algebra: it takes from an analysis only which positions of which
*parameters* belong to dropped units, and then carries, beside every value, a boolean tensor of
absent entries through the ops by their meaning alone. An absent entry is zero wherever it is
multiplied or summed; it does not count in a mean, a variance or a norm; it is never chosen by
softmax, top-k or an extremum.  For a unit that no such op sees this is plain zeroing of its
weights.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from secateur.graph.axes.analysis import analyse
from secateur.graph.edit.rewrite import Edit, resolve_edit
from secateur.graph.errors import UnsupportedOp
from secateur.graph.oracle.absence import (
    MEANINGS,
    Call,
    Handler,
    Masked,
    handle_pointwise,
    map_masked,
    run_plainly,
)
from secateur.graph.program import Program


def masked_call(program: Program, edit: Edit, *args: Any, **kwargs: Any) -> Any:
    """What the full Program computes with the dropped units absent; same arguments and result as
    the Program itself.

    Raises:
        EditError: as ``keep``.
        UnsupportedOp: an op whose meaning under absence is not defined here.
    """
    analyse(program)
    absent: dict[str, Tensor] = {}
    tensors = dict(program.gm.named_buffers()) | dict(program.gm.named_parameters())
    for group, keep in resolve_edit(program, edit).items():
        dropped = ~torch.from_numpy(keep)
        for member in [*group.members, *group.buffers]:
            mask = absent.setdefault(
                member.parameter, torch.zeros(tensors[member.parameter].shape, dtype=torch.bool)
            )
            mask.index_fill_(member.dim, member.positions_of(dropped), True)
    gm = program.gm
    for hook in gm._forward_pre_hooks.values():
        bind: Any = hook
        args, kwargs = bind(gm, args, kwargs)
    with torch.no_grad():
        return _Interpreter(gm, absent).run(*_order_inputs(gm, kwargs))


def _order_inputs(gm: fx.GraphModule, kwargs: dict[str, Any]) -> Sequence[Any]:
    codegen: Any = gm.graph._codegen
    info = codegen.pytree_info
    flat, _ = torch.utils._pytree.tree_flatten(
        ((), {n: kwargs[n] for n in info.in_spec.children()[1].context})
    )
    return flat


class _Interpreter(fx.Interpreter):
    """The graph over Masked values."""

    def __init__(self, gm: fx.GraphModule, absent: dict[str, Tensor]) -> None:
        super().__init__(gm)
        self._absent = absent

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An input, wholly present."""
        value = super().placeholder(target, args, kwargs)
        if isinstance(value, Tensor):
            return Masked(value)
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter with what is absent of it."""
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, Tensor):
            return Masked(value, self._absent.get(str(target)))
        return value

    def run_node(self, n: fx.Node) -> Any:
        """A call by the meaning of its op under absence."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is operator.getitem or not isinstance(n.target, torch._ops.OpOverload):
            return n.target(*args, **kwargs)  # type: ignore[operator]
        call = Call(n, args, kwargs)
        result = _find_handler(n, call)(call)
        written = (
            n.target._schema.is_mutable
            and isinstance(result, Masked)
            and bool(call.masked_operands())
        )
        if written:
            return call.masked_operands()[0].write_absence(result)
        return result

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The plain values of the outputs."""
        return map_masked(super().output(target, args, kwargs), lambda m: m.value)


def _find_handler(node: fx.Node, call: Call) -> Handler:
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.split("::")[1]
    found = MEANINGS.get(name) or MEANINGS.get(name.rstrip("_"))
    if found is None and torch.Tag.pointwise in node.target.tags:
        return handle_pointwise
    if found is None and any(m.any_absent for m in call.masked_operands()):
        raise UnsupportedOp(
            f"{node.target} ({node.name}) has no meaning with absent entries, see "
            "graph/oracle/absence.py"
        )
    return found or run_plainly

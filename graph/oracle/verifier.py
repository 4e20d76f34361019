"""What must be true of a Program, as a table of checks; run after every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from secateur.graph.axes.analysis import analyse, module_path
from secateur.graph.capture.calls import bound_inputs, get_attribute
from secateur.graph.errors import SecateurError, VerificationError
from secateur.graph.program import Program
from secateur.graph.sparse import find_faults

Check = Callable[[Program], Iterator[str]]


def verify(program: Program) -> None:
    """Run the checks of CHECKS in their order; each relies on the ones before it.

    Raises:
        VerificationError: names the first broken check and where it broke.
    """
    for name, check in CHECKS.items():
        faults = [f"{name}: {fault}" for fault in check(program)]
        if faults:
            if len(faults) > 8:
                more = f" (and {len(faults) - 8} more)"
            else:
                more = ""
            raise VerificationError(
                "the program is not sound:\n  " + "\n  ".join(faults[:8]) + more
            )


def _graph_is_well_formed(program: Program) -> Iterator[str]:
    try:
        program.gm.graph.lint()
    except (RuntimeError, ValueError) as error:
        yield str(error)


def _parameters_are_used(program: Program) -> Iterator[str]:
    """Every parameter is read by the graph, and every one that is read exists and is of the source
    model."""
    read = set()
    for n in program.gm.graph.nodes:
        if n.op == "get_attr" and n.users:
            read.add(str(n.target))
    owned = dict(program.gm.named_parameters())
    yield from (f"parameter {name} is not used by the graph" for name in owned if name not in read)
    known = {name for name, _ in program.source.model.named_parameters(remove_duplicate=False)}
    known |= {name for one in program.sparse.values() for name in one.branch or ()}
    yield from (
        f"parameter {name} is not one of the source model" for name in owned if name not in known
    )
    for name in read:
        try:
            get_attribute(program.gm, name)
        except AttributeError:
            yield f"{name} is read but missing"


def _ties_hold(program: Program) -> Iterator[str]:
    """A parameter that has several names in the source model is one parameter here, under the
    first."""
    first: dict[int, str] = {}
    owned = dict(program.gm.named_parameters(remove_duplicate=False))
    for name, parameter in program.source.model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original != name and name in owned and owned.get(original) is not owned[name]:
            yield f"{name} is tied to {original} in the source model, but not here"


def _shapes_propagate(program: Program) -> Iterator[str]:
    """Every op runs on fake tensors of the example's sizes and gives the shape that the graph
    claims."""
    mode = FakeTensorMode(
        allow_non_fake_inputs=True, shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)
    )
    runner = _Propagate(program.gm, mode)
    try:
        with mode, torch.no_grad():
            inputs = []
            for x in bound_inputs(program.gm):
                inputs.append(
                    mode.from_tensor(x, static_shapes=True) if isinstance(x, torch.Tensor) else x
                )
            runner.run(*inputs)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        if runner.at:
            where = f"{runner.at.name} ({runner.at.target}, module {module_path(runner.at)})"
        else:
            where = "start"
        yield f"{where} cannot run: {str(error).splitlines()[0][:300]}"
    yield from runner.faults


class _Propagate(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.mode, self.faults = mode, list[str]()
        self.at: fx.Node | None = None

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter as a fake tensor of static shape."""
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, torch.Tensor):
            return self.mode.from_tensor(value, static_shapes=True)
        return value

    def run_node(self, n: fx.Node) -> Any:
        """A call on fake tensors; what differs from the recorded value is noted as a fault."""
        self.at = n
        value = super().run_node(n)
        for got, claimed in zip(_list_shapes(value), _list_shapes(n.meta.get("val")), strict=False):
            wrong = []
            for d, (a, b) in enumerate(zip(got, claimed, strict=False)):
                if None not in (a, b) and a != b:
                    wrong.append(d)
            if wrong or len(got) != len(claimed):
                self.faults.append(f"{n.name} ({n.target}) gives {got}, the graph claims {claimed}")
        return value


def _list_shapes(value: Any) -> list[list[int | None]]:
    """Sizes of one or several tensors; None where a size is not known without data."""
    if isinstance(value, (tuple, list)):
        items = value
    else:
        items = (value,)
    return [
        [_static_size(s) for s in item.shape] for item in items if isinstance(item, torch.Tensor)
    ]


def _static_size(size: Any) -> int | None:
    if isinstance(size, torch.SymInt):
        if size.node.has_hint():
            return int(size.node.hint)
        return None
    return int(size)


def _groups_are_legal(program: Program) -> Iterator[str]:
    """The axes of every tensor have its sizes, and the pruned graph aligns wherever the one before
    the edit did."""
    try:
        analysis = analyse(program)
    except SecateurError as error:
        yield str(error)
        return
    for name, (axes, tensor) in analysis.tensors.items():
        if [axis.size for axis in axes] != list(tensor.shape):
            yield f"{name} has shape {tuple(tensor.shape)}, its axes are {axes}"
    before = program.gm.meta.get("conflicts", analysis.space.conflicts)
    yield from (
        f"axes no longer align at {c}"
        for c in analysis.space.conflicts
        if c.split(":")[0] not in before
    )


def _heads_divide(program: Program) -> Iterator[str]:
    """Query heads are a multiple of key/value heads, and queries are as wide as keys."""
    for node in program.gm.graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            query, key = (node.args[i].meta["val"].shape for i in (0, 1))
            if len(query) > 3:
                heads = [_static_size(s) for s in (query[-3], key[-3], query[-1], key[-1])]
            else:
                heads = [1, 1, 1, 1]
            if None not in heads and (heads[0] % heads[1] or heads[2] != heads[3]):  # type: ignore[operator]
                yield (
                    f"{node.name}: {heads[0]} query heads of {heads[2]} on {heads[1]} key/value "
                    f"heads of {heads[3]}"
                )


def _check_sparse_weights(program: Program) -> Iterator[str]:
    """Every weight that is said to be sparse holds exact zeros as its pattern says."""
    owned = dict(program.gm.named_parameters())
    for name, one in program.sparse.items():
        if name not in owned:
            yield f"{name} is said to be {one.pattern}, but is no parameter"
            continue
        yield from (f"{name} {fault}" for fault in find_faults(owned[name].detach(), one))


CHECKS: dict[str, Check] = {
    "the graph is well formed": _graph_is_well_formed,
    "parameters are used": _parameters_are_used,
    "ties hold": _ties_hold,
    "sparse weights are sparse": _check_sparse_weights,
    "heads divide": _heads_divide,
    "shapes propagate": _shapes_propagate,
    "groups are legal": _groups_are_legal,
}

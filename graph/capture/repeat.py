"""Capture a deep stack from a few of its layers.

Exporting costs about a quarter of a CPU-second a layer, and most layers of a language model differ
in weights alone.
So: export the model with its stack cut to a prefix in which every kind of layer stands at least
twice, check that equal kinds gave the same subgraph (ops, literals, shapes, wiring; only parameter
names differ), and lay the missing layers as copies.  Anything that does not fit this picture is
exported whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger(__name__)

SHORTEST = 8  # a stack of fewer layers is exported whole


class NotRepeated(Exception):
    """The stack's layers are not copies of each other; the reason is the message."""


@dataclass(frozen=True)
class Stack:
    """A list of layers: its path, the layers, their kinds (alike but for weights), and how many are
    exported."""

    path: str
    layers: nn.ModuleList
    kinds: list[int]
    prefix: int

    def layer_of_path(self, path: str) -> int | None:
        """The layer that a module path lies in."""
        head, _, rest = path.partition(self.path + ".")
        index = rest.split(".")[0]
        if head == "" and index.isdigit():
            return int(index)
        return None

    def owns_tensor(self, node: fx.Node, layer: int) -> bool:
        """Whether a node reads a tensor of a layer itself, not a constant that the export put
        beside it."""
        if node.op != "get_attr" or self.layer_of_path(str(node.target)) != layer:
            return False
        path, _, leaf = str(node.target)[len(f"{self.path}.{layer}.") :].rpartition(".")
        return hasattr(self.layers[layer].get_submodule(path), leaf)


def find_stack(model: nn.Module) -> Stack | None:
    """The longest list of layers that repeats itself, or None when none is worth it."""
    lists = []
    for n, m in model.named_modules():
        if isinstance(m, nn.ModuleList) and len(m) >= SHORTEST:
            lists.append((n, m))
    for path, layers in sorted(lists, key=lambda item: -len(item[1])):
        signatures = _layer_signatures(layers)
        kinds = [signatures.index(s) for s in signatures]
        prefix = _shortest_prefix(kinds)
        if prefix is not None and 2 * prefix <= len(layers):
            return Stack(path, layers, kinds, prefix)
    return None


def _shortest_prefix(kinds: list[int]) -> int | None:
    """The shortest prefix that holds two of every later kind, not counting the first of a kind.

    The first layer of a kind may make values that all later ones share (sizes, say), so it is no
    template.
    """
    for k in range(3, len(kinds)):
        inside = [kind for i, kind in enumerate(kinds[:k]) if kind in kinds[:i]]
        if all(inside.count(kind) >= 2 for kind in kinds[k:]):
            return k
    return None


def _layer_signatures(layers: nn.ModuleList) -> list[Any]:
    """For each layer all that could make it compute differently, but for its tensors' values and
    its own number."""
    facts = [_layer_facts(layer) for layer in layers]
    shared = set.intersection(*(set(f) for f in facts))
    numbers = {
        key for key in shared if [f[key] for f in facts] == [repr(i) for i in range(len(layers))]
    }
    return [{key: fact for key, fact in f.items() if key not in numbers} for f in facts]


def _layer_facts(layer: nn.Module) -> dict[tuple[str, str], str]:
    facts: dict[tuple[str, str], str] = {}
    for name, module in layer.named_modules():
        facts[name, ""] = type(module).__qualname__
        for key, tensor in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            facts[name, key] = (
                f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.dtype} "
                f"{tensor.requires_grad}"
            )
        facts |= {
            (name, key): _describe_fact(value)
            for key, value in vars(module).items()
            if not key.startswith("_")
        }
    return facts


def _describe_fact(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str, tuple, list, torch.dtype)):
        return repr(value)
    return f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}" + (
        "" if callable(value) else f" {id(value)}"
    )


@contextmanager
def shorten_stack(model: nn.Module, stack: Stack) -> Iterator[None]:
    """The model with its stack cut to the prefix."""
    parent = model.get_submodule(stack.path.rpartition(".")[0])
    name = stack.path.rpartition(".")[2]
    parent._modules[name] = nn.ModuleList(list(stack.layers)[: stack.prefix])
    try:
        yield
    finally:
        parent._modules[name] = stack.layers


class _Recorder(TorchDispatchMode):
    """The ops that run, with the shapes of their tensors and the values of their other
    arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shown = pytree.tree_map(
            lambda x: tuple(x.shape) if isinstance(x, torch.Tensor) else x, (args, kwargs)
        )
        self.ops.append(f"{func} {shown}")
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return (
                args[0].dtype == torch.bool or 1
            )  # a value that is not there: one answer for all layers
        return func(*args, **(kwargs or {}))


def check_alike_when_run(model: nn.Module, stack: Stack, inputs: dict[str, Any]) -> None:
    """Run the whole model and compare what each laid layer does with the last of its kind in the
    prefix, op by op.

    For models without weights, whose results cannot be compared: it finds a layer that behaves
    otherwise by its number alone.

    Raises:
        NotRepeated: such a layer.
    """
    recorder = _Recorder()
    bounds = dict[nn.Module, tuple[int, int]]()

    def enter_layer(layer: nn.Module, *_: Any) -> None:
        """Note at which call a layer begins."""
        bounds[layer] = (len(recorder.ops), len(recorder.ops))

    def leave_layer(layer: nn.Module, *_: Any) -> None:
        """Note at which call a layer ends."""
        bounds[layer] = (bounds[layer][0], len(recorder.ops))

    handles = []
    for x in stack.layers:
        for h in (x.register_forward_pre_hook(enter_layer), x.register_forward_hook(leave_layer)):
            handles.append(h)
    try:
        with recorder, torch.no_grad():
            model(**inputs)
    except (RuntimeError, NotImplementedError) as error:
        raise NotRepeated(f"the model cannot be run on the meta device: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    done = [
        recorder.ops[slice(*bounds[layer])] if layer in bounds else [] for layer in stack.layers
    ]
    for index in range(stack.prefix, len(done)):
        kinds = stack.kinds[: stack.prefix]
        like = max(i for i, kind in enumerate(kinds) if kind == stack.kinds[index])
        if not done[index] or done[index] != done[like]:
            raise NotRepeated(f"layer {index} runs other ops than layer {like}")


# Laying the missing layers
@dataclass
class _Region:
    """One layer's part of the graph: its computed nodes in order, the value it takes over, the
    value it hands on."""

    index: int
    nodes: list[fx.Node]
    carried_in: fx.Node | None
    carried_out: fx.Node


def extend_stack(gm: fx.GraphModule, model: nn.Module, stack: Stack) -> None:
    """Lay the layers that the prefix lacks, in place.

    Raises:
        NotRepeated: the prefix shows that the layers are not copies.
    """
    regions = _find_regions(gm, stack)
    templates = {}
    for kind in dict.fromkeys(stack.kinds[stack.prefix :]):
        templates[kind] = _find_template(regions, stack, kind)
    last = regions[stack.prefix - 1]
    carried = last.carried_out
    at = last.nodes[-1]
    tail = [user for user in carried.users if user not in set(last.nodes)]
    for index in range(stack.prefix, len(stack.layers)):
        copies = _copy_template(gm, model, stack, templates[stack.kinds[index]], index, carried, at)
        carried = copies[templates[stack.kinds[index]].carried_out]
        at = copies[templates[stack.kinds[index]].nodes[-1]]
    for user in tail:
        user.replace_input_with(last.carried_out, carried)
    gm.graph.lint()
    gm.recompile()


def _layer_of(node: fx.Node, stack: Stack) -> int | None:
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        found = None
        if isinstance(entry[0], str):
            found = stack.layer_of_path(str(entry[0]))
        if found is not None:
            return found
    return None


def _find_regions(gm: fx.GraphModule, stack: Stack) -> list[_Region]:
    by_layer: list[list[fx.Node]] = [[] for _ in range(stack.prefix)]
    home: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        layer = None
        if node.op == "call_function":
            layer = _layer_of(node, stack)
        if layer is not None:
            by_layer[layer].append(node)
            home[node] = layer
    order = [home[n] for n in gm.graph.nodes if n in home]
    if order != sorted(order) or not all(by_layer):
        raise NotRepeated("the layers' ops are interleaved")

    def last_user_layer(node: fx.Node) -> int:
        """The last layer that uses a value; past the prefix for the rest of the model."""
        return max((home.get(user, stack.prefix) for user in node.users), default=home[node])

    firsts = {stack.kinds.index(kind) for kind in stack.kinds}
    regions = []
    for layer, nodes in enumerate(by_layer):
        inputs = {i for n in nodes for i in n.all_input_nodes if home.get(i, layer) < layer}
        entering = [i for i in inputs if home[i] == layer - 1 and last_user_layer(i) == layer]
        if any(home[i] not in firsts for i in inputs if i not in entering):
            raise NotRepeated(f"layer {layer} reads a value of a layer before the last")
        leaving = [n for n in nodes if last_user_layer(n) == layer + 1]
        shared = layer not in firsts and any(last_user_layer(n) > layer + 1 for n in nodes)
        if layer and (len(entering) != 1 or len(leaving) != 1 or shared):
            raise NotRepeated(
                f"layer {layer} takes {len(entering)} values and hands on {len(leaving)}"
            )
        regions.append(
            _Region(layer, nodes, next(iter(entering), None), next(iter(leaving), nodes[-1]))
        )
    return regions


def _find_template(regions: list[_Region], stack: Stack, kind: int) -> _Region:
    """The last layer of a kind in the prefix, once it is shown to be a copy of the one of the kind
    before it."""
    first, second = [r for r in regions if stack.kinds[r.index] == kind][-2:]
    _check_alike(first, second, stack)
    return second


def _check_alike(a: _Region, b: _Region, stack: Stack) -> None:
    if len(a.nodes) != len(b.nodes):
        raise NotRepeated(
            f"layers {a.index} and {b.index} have {len(a.nodes)} and {len(b.nodes)} ops"
        )
    place = {x: i for i, x in enumerate(a.nodes)} | {x: i for i, x in enumerate(b.nodes)}
    for x, y in zip(a.nodes, b.nodes, strict=True):
        left, right = (_describe_call(n, r, place, stack) for n, r in ((x, a), (y, b)))
        if left != right:
            raise NotRepeated(f"{x.name} of layer {a.index} is not {y.name} of layer {b.index}")
    if place[a.carried_out] != place[b.carried_out]:
        raise NotRepeated(f"layers {a.index} and {b.index} hand on different values")


def _describe_call(node: fx.Node, region: _Region, place: dict[fx.Node, int], stack: Stack) -> str:
    """A call with its operands named by their place in the layer, and the shape of its result."""
    own = set(region.nodes)

    def describe_operand(x: fx.Node) -> Any:
        """An operand by its place in the layer, or by what it is to the layer."""
        if x in own:
            return f"%{place[x]}"
        if x is region.carried_in:
            return "%carried"
        if stack.owns_tensor(x, region.index):
            return "own " + str(x.target)[len(f"{stack.path}.{region.index}") :]
        return f"global {_constant_digest(x)}"

    arguments = fx.map_arg((node.args, node.kwargs), describe_operand)
    value: Any = node.meta.get("val")
    shapes = []
    for v in value if isinstance(value, (tuple, list)) else [value]:
        if hasattr(v, "shape"):
            shapes.append(str(tuple(v.shape)))
    return f"{node.target} {arguments} {shapes}"


def _constant_digest(node: fx.Node) -> str:
    """A lifted constant is known by its value: every layer has its own copy of it."""
    if node.op != "get_attr":
        return node.name
    tensor: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        tensor = getattr(tensor, part)
    if (
        isinstance(tensor, torch.Tensor)
        and not isinstance(tensor, nn.Parameter)
        and not tensor.is_meta
    ):
        return (
            f"{tensor.dtype} {tuple(tensor.shape)} "
            f"{tensor.tolist() if tensor.numel() < 65 else node.target}"
        )
    return str(node.target)


def _copy_template(
    gm: fx.GraphModule,
    model: nn.Module,
    stack: Stack,
    template: _Region,
    index: int,
    carried: fx.Node,
    at: fx.Node,
) -> dict[fx.Node, fx.Node]:
    """Copy a template's nodes as layer ``index``, after node ``at``."""
    old = f"{stack.path}.{template.index}"
    new = f"{stack.path}.{index}"
    if template.carried_in is None:
        copies: dict[fx.Node, fx.Node] = {}
    else:
        copies = {template.carried_in: carried}

    def map_operand(x: fx.Node) -> fx.Node:
        """What stands for an operand in the copy of the layer."""
        if x in copies:
            return copies[x]
        if stack.owns_tensor(x, template.index):
            copies[x] = _read_own_tensor(gm, model, x, str(x.target).replace(old, new, 1))
            return copies[x]
        return x

    for node in template.nodes:
        for source in node.all_input_nodes:
            map_operand(source)
        with gm.graph.inserting_after(at):
            copies[node] = at = gm.graph.node_copy(node, map_operand)
        at.meta["nn_module_stack"] = {
            key.replace(f"{template.index}", f"{index}"): (str(path).replace(old, new, 1), kind)
            for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items()
        }
    return copies


def _read_own_tensor(gm: fx.GraphModule, model: nn.Module, like: fx.Node, target: str) -> fx.Node:
    """Read the new layer's own tensor, which the graph module takes over from the model."""
    path, _, leaf = target.rpartition(".")
    source = model.get_submodule(path)
    tensor = getattr(source, leaf)
    owner: nn.Module = gm
    for part in path.split("."):
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        register: Callable[..., None] = owner.register_parameter
    else:
        register = owner.register_buffer
    register(leaf, tensor)
    with gm.graph.inserting_after(like):
        node = gm.graph.get_attr(target)
    node.meta = dict(like.meta)
    return node

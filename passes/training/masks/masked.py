"""Masked weights in training: the product takes m W, the Parameter keeps all of W.

N outputs, K inputs of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from secateur.graph import Program, Sparse
from secateur.graph.errors import PipelineError
from secateur.passes.sparsity.boost import group_sums
from secateur.passes.training.masks.choice import start_mask

SUFFIX = "_mask"  # of a mask's buffer, after the name of its weight


class _StraightThrough(torch.autograd.Function):
    """m W, whose gradient goes to all of W.

    Source:
        Bengio et al. 2013, arXiv:1308.3432.
    """

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        """m W."""
        return weight * mask.view(torch.uint8)  # three times as fast as by a bool, on a CPU

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is kept for the backward pass."""
        return None

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of all of W; none for the mask."""
        return gradient, None


def mask_straight_through(weight_NK: Tensor, mask_NK: Tensor) -> Tensor:
    """m W: [N, K] in the dtype of W.  The gradient goes to removed entries too, as if they took
    part.

    Args:
        weight_NK: W.
        mask_NK: m, bool.
    """
    masked: Tensor = _StraightThrough.apply(weight_NK, mask_NK)  # type: ignore[no-untyped-call]
    return masked


def mask_weight(weight_NK: Tensor, mask_NK: Tensor) -> Tensor:
    """m W: [N, K] in the dtype of W.  The gradient of removed entries is zero.

    Args:
        weight_NK: W.
        mask_NK: m, bool.
    """
    return weight_NK * mask_NK.view(torch.uint8)


Way = Literal["through", "kept", "dense"]
"""Of a mask into a product: m W with gradients for all entries or for kept ones; or, in training, W
itself."""


class MaskedLinear(nn.Linear):
    """A linear module whose product takes m W.

    weight: [N, K], all of W.
    weight_mask: persistent buffer [N, K] bool, changed in place between optimizer steps.
    way: see Way.
    weight_scale: [N, S], factors of S equal parts of a row's inputs, trained along, or None.
    boost_out: [N, R], a dense branch on sums of R groups of inputs, or None.
    boost_in: [R, K], what makes the sums where they are trained, too, or None: groups of
        neighbours.
    """

    weight_mask: Tensor
    way: Way
    weight_scale: nn.Parameter | None
    boost_in: nn.Parameter | None
    boost_out: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:
        """The product with the masked weight, scaled and with its branch where it has one.

        Args:
            input: [..., K].

        Returns:
            [..., N].
        """
        if self.weight_scale is None:
            weight = self.weight
        else:
            weight = scale_row_parts(self.weight, self.weight_scale)
        dense = self.way == "dense" and self.training
        if dense:
            used = weight
        else:
            used = (mask_straight_through if self.way == "through" else mask_weight)(
                weight, self.weight_mask
            )
        return F.linear(input, self._with_branch(used), self.bias)

    def _with_branch(self, used_NK: Tensor) -> Tensor:
        """m W + B A: with the branch in the weight, its cost in training is that of a few
        tokens."""
        if self.boost_out is None:
            return used_NK
        if self.boost_in is not None:
            return used_NK + self.boost_out @ self.boost_in
        parts: Tensor = used_NK.unflatten(
            1, (self.boost_out.shape[1], -1)
        ) + self.boost_out.unsqueeze(-1)
        return parts.flatten(1)


def scale_row_parts(weight_NK: Tensor, scale_NS: Tensor) -> Tensor:
    """[N, K]: each of S equal parts of a row times its factor.

    Args:
        weight_NK: W.
        scale_NS: one factor for each part of a row.
    """
    parts: Tensor = weight_NK.unflatten(1, (scale_NS.shape[1], -1)) * scale_NS.unsqueeze(-1)
    return parts.flatten(1)


def under_mask(module: nn.Module, mask_NK: Tensor, way: Way) -> None:
    """Make a linear module a masked one, in place.

    Args:
        module: nn.Linear.
        mask_NK: bool; copied.
        way: of the mask into the product.
    """
    module.__class__ = MaskedLinear
    module.way = way  # type: ignore[assignment]
    module.weight_scale = module.boost_in = module.boost_out = None  # type: ignore[assignment]
    module.register_buffer("weight" + SUFFIX, mask_NK.clone())


@dataclass(eq=False)
class MaskedWeight:
    """One weight under its mask.

    name: of the parameter in the Program.
    owner: the module that holds it as ``attribute`` and its mask as a buffer; the Parameter there
        is replaced where processes share it.
    first: [N, K] bool, the mask at the start.
    """

    name: str
    owner: nn.Module
    attribute: str
    sparse: Sparse
    first: Tensor
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def weight(self) -> nn.Parameter:
        """The Parameter that is trained: [N, K], all of W."""
        parameter: nn.Parameter = getattr(self.owner, self.attribute)
        return parameter

    @property
    def mask(self) -> Tensor:
        """The mask as it is now: [N, K] bool."""
        mask_tensor: Tensor = getattr(self.owner, self.attribute + SUFFIX)
        return mask_tensor


def put_masks(model: nn.Module, program: Program, *, way: Way) -> list[MaskedWeight]:
    """Put every sparse weight of a model under its mask, in place; ``take_masks`` undoes it.

    Args:
        model: the stock model over the program's Parameters, or the program's graph module.
        program: with sparse weights.
        way: of the masks into the products.

    Returns:
        one entry for each sparse weight.

    Raises:
        PipelineError: a weight is held by no plain linear module of a stock model, or by more than
            that.
    """
    if isinstance(model, fx.GraphModule):
        if way == "dense":
            raise PipelineError(
                "a graph has one mode: masks that count in evaluation alone need a stock model"
            )
        return [_in_graph(model, name, program, way) for name in program.sparse]
    if reason := linear_only(model, program):
        raise PipelineError(f"no mask can be put in this model: {reason}")
    holders = _holding_modules(model)
    parameters = dict(program.named_parameters())
    sites: list[MaskedWeight] = []
    for name, state in program.sparse.items():
        sites.append(
            _in_module(holders[id(parameters[name])][0], name, parameters[name], state, way)
        )
    return sites


def add_branch(
    site: MaskedWeight, width: int, trained: bool
) -> tuple[nn.Parameter | None, nn.Parameter]:
    """Give a masked module a branch that makes up, group by group of inputs, for the mean of what
    was removed.

    Args:
        site: a masked weight in a linear module.
        width: inputs of a group.
        trained: whether the sums of inputs are trained, too.

    Returns:
        (A [R, K] or None, B [N, R]).

    Raises:
        PipelineError: the width does not divide the inputs.
    """
    weight = site.weight.detach()
    gone = site.sparse.removed
    if weight.shape[1] % width:
        raise PipelineError(
            f"boost={width}: {site.name} has {weight.shape[1]} inputs, which it does not divide"
        )
    if gone is None:
        gone = torch.zeros_like(weight)
    else:
        gone = gone.to(weight.device)
    branch = nn.Parameter(gone.unflatten(1, (-1, width)).mean(-1))
    sums = None
    if trained:
        sums = nn.Parameter(group_sums(weight.shape[1], width, weight))
    site.owner.boost_in, site.owner.boost_out = sums, branch  # type: ignore[assignment]
    return sums, branch


def add_scales(sites: Iterable[MaskedWeight], parts: int = 2) -> dict[str, nn.Parameter]:
    """Give masked modules factors of parts of their rows, to make up for what a pull takes from
    all.

    Args:
        sites: masked weights in linear modules.
        parts: number of factors of a row.

    Returns:
        [N, parts] of ones by the weight's name.

    Source:
        Huang et al. 2025 (CAST), arXiv:2509.25996.
    """
    scales = {}
    for site in sites:
        weight = site.weight.detach()
        scales[site.name] = nn.Parameter(weight.new_ones(len(weight), parts))
        site.owner.weight_scale = scales[site.name]
    return scales


def linear_only(model: nn.Module, program: Program) -> str | None:
    """Why the sparse weights of a stock model cannot be put under masks there, or None.

    Args:
        model: a stock model.
        program: with sparse weights.
    """
    holders = _holding_modules(model)
    parameters = dict(program.named_parameters())
    for name in program.sparse:
        modules = holders.get(id(parameters[name]), [])
        if [type(module) for module in modules] != [nn.Linear]:
            kinds = ", ".join(type(module).__name__ for module in modules) or "no module"
            return f"{name} is held by {kinds}, expected one plain Linear"
    return None


def take_masks(model: nn.Module, sites: Iterable[MaskedWeight]) -> None:
    """Make a model plain again; the weights stay as they are.

    Args:
        model: as given to ``put_masks``.
        sites: as returned by it.
    """
    for site in sites:
        delattr(site.owner, site.attribute + SUFFIX)
        if isinstance(site.owner, MaskedLinear):
            for name in ("way", "weight_scale", "boost_in", "boost_out"):
                delattr(site.owner, name)
            site.owner.__class__ = nn.Linear  # type: ignore[assignment]
        for node in site.nodes:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            mask = node.args[1]
            node.graph.erase_node(node)
            node.graph.erase_node(mask)  # type: ignore[arg-type]
    if isinstance(model, fx.GraphModule):
        model.recompile()


def _holding_modules(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Which modules hold a parameter themselves."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(module)
    return holders


def _in_module(
    owner: nn.Module, name: str, parameter: nn.Parameter, one: Sparse, way: Way
) -> MaskedWeight:
    """Put one weight of a linear module under its mask."""
    first = start_mask(parameter, one)
    under_mask(owner, first, way)
    return MaskedWeight(name, owner, "weight", one, first)


def _in_graph(gm: fx.GraphModule, name: str, program: Program, way: Way) -> MaskedWeight:
    """Put one weight of a graph module under its mask."""
    path, _, attribute = name.rpartition(".")
    owner = gm.get_submodule(path)
    first = start_mask(gm.get_parameter(name), program.sparse[name])
    owner.register_buffer(attribute + SUFFIX, first.clone())
    site = MaskedWeight(name, owner, attribute, program.sparse[name], first)
    for node in gm.graph.find_nodes(op="get_attr", target=name):
        with gm.graph.inserting_after(node):
            mask = gm.graph.get_attr(name + SUFFIX)
        with gm.graph.inserting_after(mask):
            used = gm.graph.call_function(
                mask_straight_through if way == "through" else mask_weight, (node, mask)
            )
        node.replace_all_uses_with(used, delete_user_cb=lambda user, used=used: user is not used)
        site.nodes.append(used)
    gm.recompile()
    return site

"""Weights that are trained under a mask: the product sees m W, the Parameter keeps all of W.

N outputs, K inputs of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from secateur.graph import Program, Sparse
from secateur.graph.errors import PipelineError
from secateur.passes.boost import group_sums
from secateur.passes.sparsify_scores import METRICS

SUFFIX = "_mask"  # of a mask's buffer, after the name of its weight
ROOM = 0.99  # of the least kept score: how near a removed value may come to it, safe from rounding to bfloat16
ROUNDS = 16  # of making removed values smaller, for scores in which entries depend on each other


class _StraightThrough(torch.autograd.Function):
    """m W, whose gradient goes to all of W.  Source: Bengio et al. 2013, arXiv:1308.3432."""

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def masked(weight_NK: Tensor, mask_NK: Tensor) -> Tensor:
    """m W: [N, K] in the dtype of W.  The gradient goes to removed entries too, as if they took part."""
    found: Tensor = _StraightThrough.apply(weight_NK, mask_NK)  # type: ignore[no-untyped-call]
    return found


def kept(weight_NK: Tensor, mask_NK: Tensor) -> Tensor:
    """m W: [N, K] in the dtype of W.  The gradient of removed entries is zero."""
    return weight_NK * mask_NK


Way = Literal["through", "kept", "dense"]
"""Of a mask into a product: m W with gradients for all entries or for kept ones; or, in training, W itself."""


class MaskedLinear(nn.Linear):
    """A linear module whose product takes m W.

    weight: [N, K], all of W.   weight_mask: persistent buffer [N, K] bool, changed in place between optimizer steps.
    way: see Way.   weight_scale: [N, S], factors of S equal parts of a row's inputs, trained along, or None.
    boost_out: [N, R], a dense branch on sums of R groups of inputs, or None.   boost_in: [R, K], what makes the sums
        where they are trained, too, or None: groups of neighbours.
    """

    weight_mask: Tensor
    way: Way
    weight_scale: nn.Parameter | None
    boost_in: nn.Parameter | None
    boost_out: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight if self.weight_scale is None else scaled(self.weight, self.weight_scale)
        dense = self.way == "dense" and self.training
        used = weight if dense else (masked if self.way == "through" else kept)(weight, self.weight_mask)
        made = F.linear(input, used, self.bias)
        if self.boost_out is None:
            return made
        if self.boost_in is not None:
            sums = F.linear(input, self.boost_in)
        else:
            sums = input.unflatten(-1, (self.boost_out.shape[1], -1)).sum(-1)
        return made + F.linear(sums, self.boost_out)


def scaled(weight_NK: Tensor, scale_NS: Tensor) -> Tensor:
    """[N, K]: each of S equal parts of a row times its factor."""
    parts: Tensor = weight_NK.unflatten(1, (scale_NS.shape[1], -1)) * scale_NS.unsqueeze(-1)
    return parts.flatten(1)


def under_mask(module: nn.Module, mask_NK: Tensor, way: Way) -> None:
    """Make a linear module a masked one, in place.  Args: mask_NK: bool; copied."""
    module.__class__ = MaskedLinear
    module.way = way  # type: ignore[assignment]
    module.weight_scale = module.boost_in = module.boost_out = None  # type: ignore[assignment]
    module.register_buffer("weight" + SUFFIX, mask_NK.clone())


@dataclass(eq=False)
class Site:
    """One weight under its mask.

    name: of the parameter in the Program.   owner: the module that holds it as ``attribute`` and its mask as a buffer;
    the Parameter there is replaced where processes share it.   first: [N, K] bool, the mask at the start.
    """

    name: str
    owner: nn.Module
    attribute: str
    sparse: Sparse
    first: Tensor
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def weight(self) -> nn.Parameter:
        found: nn.Parameter = getattr(self.owner, self.attribute)
        return found

    @property
    def mask(self) -> Tensor:
        found: Tensor = getattr(self.owner, self.attribute + SUFFIX)
        return found


def start_mask(weight_NK: Tensor, sparse: Sparse) -> Tensor:
    """The mask of a sparse weight: its non-zeros, and zeros of lowest index where a group has fewer than it may."""
    return sparse.pattern.mask(weight_NK.detach().float().abs())


def put_masks(model: nn.Module, program: Program, *, way: Way) -> list[Site]:
    """Put every sparse weight of a model under its mask, in place; ``take_masks`` undoes it.

    Args:
        model: the stock model over the program's Parameters, or the program's graph module.
    Raises: PipelineError: a weight is held by no plain linear module of a stock model, or by more than that.
    """
    if isinstance(model, fx.GraphModule):
        if way == "dense":
            raise PipelineError("a graph has one mode: masks that count in evaluation alone need a stock model")
        return [_in_graph(model, name, program, way) for name in program.sparse]
    if reason := linear_only(model, program):
        raise PipelineError(f"no mask can be put in this model: {reason}")
    holders, parameters = _holders(model), dict(program.named_parameters())
    return [
        _in_module(holders[id(parameters[name])][0], name, parameters[name], one, way)
        for name, one in program.sparse.items()
    ]


def add_branch(site: Site, width: int, trained: bool) -> tuple[nn.Parameter | None, nn.Parameter]:
    """Give a masked module a branch that makes up, group by group of inputs, for the mean of what was removed.

    Args:  width: inputs of a group.   trained: whether the sums of inputs are trained, too.
    Returns: (A [R, K] or None, B [N, R]).
    Raises: PipelineError: the width does not divide the inputs.
    """
    weight, gone = site.weight.detach(), site.sparse.removed
    if weight.shape[1] % width:
        raise PipelineError(f"boost={width}: {site.name} has {weight.shape[1]} inputs, which it does not divide")
    gone = torch.zeros_like(weight) if gone is None else gone.to(weight.device)
    made = nn.Parameter(gone.unflatten(1, (-1, width)).mean(-1))
    sums = nn.Parameter(group_sums(weight.shape[1], width, weight)) if trained else None
    site.owner.boost_in, site.owner.boost_out = sums, made  # type: ignore[assignment]
    return sums, made


def add_scales(sites: Iterable[Site], parts: int = 2) -> dict[str, nn.Parameter]:
    """Give masked modules factors of parts of their rows, to make up for what a pull takes from all.

    Returns: [N, parts] of ones by the weight's name.
    Source: Huang et al. 2025 (CAST), arXiv:2509.25996.
    """
    found = {}
    for site in sites:
        weight = site.weight.detach()
        found[site.name] = nn.Parameter(weight.new_ones(len(weight), parts))
        site.owner.weight_scale = found[site.name]
    return found


def linear_only(model: nn.Module, program: Program) -> str | None:
    """Why the sparse weights of a stock model cannot be put under masks there, or None."""
    holders, parameters = _holders(model), dict(program.named_parameters())
    for name in program.sparse:
        held = holders.get(id(parameters[name]), [])
        if [type(module) for module in held] != [nn.Linear]:
            kinds = ", ".join(type(module).__name__ for module in held) or "no module"
            return f"{name} is held by {kinds}, expected one plain Linear"
    return None


def take_masks(model: nn.Module, sites: Iterable[Site]) -> None:
    """Make a model plain again; the weights stay as they are."""
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


@torch.no_grad()
def bake(weight_NK: Tensor, mask_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(m W, (1 - m) W), each [N, K] in the dtype of W, with +0.0 wherever it is zero."""
    mask_NK = mask_NK.to(weight_NK.device)
    zero = torch.zeros((), dtype=weight_NK.dtype, device=weight_NK.device)
    return torch.where(mask_NK, weight_NK, zero) + 0.0, torch.where(mask_NK, zero, weight_NK) + 0.0


@torch.no_grad()
def revived(weight_NK: Tensor, one: Sparse, score: Score) -> Tensor:
    """The weight with what was removed put back, so that the mask of its score is the mask that it has.

    Where that is not so by itself, as where kept values were changed after the choice, removed values whose score is
    above that of a kept one in their group are made smaller until it is below: they stand next in line, and no more.

    Returns: [N, K] in the dtype of the weight.
    """
    assert one.removed is not None
    mask = start_mask(weight_NK, one)
    whole = weight_NK + one.removed.to(weight_NK.device)
    for _ in range(ROUNDS):
        scores = score(whole.float(), one)
        if torch.equal(one.pattern.mask(scores), mask):
            break
        whole = torch.where(mask, whole, (whole.float() * _shrinking(scores, mask, one)).to(whole.dtype))
    return whole


def _shrinking(scores_NK: Tensor, mask_NK: Tensor, one: Sparse) -> Tensor:
    """[N, K]: what removed values are to be multiplied by to rank below the kept ones of their group."""
    width = one.pattern.group(scores_NK.shape[1])
    scores, kept_ones = (t.unflatten(-1, (-1, width)) for t in (scores_NK, mask_NK))
    least = scores.masked_fill(~kept_ones, float("inf")).amin(-1, keepdim=True)
    factor = ROOM * least / scores.clamp_min(torch.finfo(scores.dtype).tiny)
    made: Tensor = factor.clamp_max(1.0).flatten(-2)
    return made


class Score:
    """Ranks the entries of a sparse weight.

    metric: a row of METRICS, or ``match``: that by which the weight's mask was chosen.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def __call__(self, weight_NK: Tensor, one: Sparse) -> Tensor:
        """[N, K] float32, higher is kept.  Args: weight_NK: float32."""
        size_NK = weight_NK.abs()
        norms = size_NK.new_ones(size_NK.shape[1]) if one.norms is None else one.norms.to(size_NK.device, size_NK.dtype)
        made: Tensor = METRICS[self.of(one)](size_NK, norms)
        return made

    def of(self, one: Sparse) -> str:
        """The row of METRICS that a weight is ranked by."""
        if self.metric != "match":
            return self.metric
        if one.metric in METRICS and (one.norms is not None or one.metric == "magnitude"):
            return one.metric
        return "magnitude" if one.norms is None else "wanda"

    def misfit(self, sparse: Mapping[str, Sparse]) -> str | None:
        """Why these weights cannot be ranked so, or None."""
        bare = [name for name, one in sparse.items() if self.of(one) != "magnitude" and one.norms is None]
        if not bare:
            return None
        return (
            f"score={self.metric} needs the norms of inputs, and {bare[0]} has none ({len(bare)} such weights): choose "
            "score=magnitude, or put sparsify with a metric that uses calibration data before it"
        )


def _holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Which modules hold a parameter themselves."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), []).append(module)
    return found


def _in_module(owner: nn.Module, name: str, parameter: nn.Parameter, one: Sparse, way: Way) -> Site:
    first = start_mask(parameter, one)
    under_mask(owner, first, way)
    return Site(name, owner, "weight", one, first)


def _in_graph(gm: fx.GraphModule, name: str, program: Program, way: Way) -> Site:
    path, _, attribute = name.rpartition(".")
    owner = gm.get_submodule(path)
    first = start_mask(gm.get_parameter(name), program.sparse[name])
    owner.register_buffer(attribute + SUFFIX, first.clone())
    site = Site(name, owner, attribute, program.sparse[name], first)
    for node in gm.graph.find_nodes(op="get_attr", target=name):
        with gm.graph.inserting_after(node):
            mask = gm.graph.get_attr(name + SUFFIX)
        with gm.graph.inserting_after(mask):
            used = gm.graph.call_function(masked if way == "through" else kept, (node, mask))
        node.replace_all_uses_with(used, delete_user_cb=lambda user, used=used: user is not used)
        site.nodes.append(used)
    gm.recompile()
    return site

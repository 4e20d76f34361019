"""Put into biases what pruned units gave on average."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from secateur.graph import Program, with_parameters
from secateur.passes.base import Context, Cost, Pass, PassResult
from secateur.passes.data import CalibrationError
from secateur.passes.repair import held_back
from secateur.passes.repair_run import Lockstep
from secateur.passes.repair_sites import Site, Target, sites


@dataclass(frozen=True)
class Compensate(Pass):
    """Move the mean of what pruned units gave into the biases of their consumers.  Numerics: lossy.

    In the order of the graph, each consumer's bias grows by the mean over calibration tokens of what its output lacks,
    on the inputs that the already pruned and compensated model gives it.  With dense inputs that is W[:, dropped]
    mean(x_dropped).  One calibration sequence in five is held back and must gain, or the bias stays as it is: for some
    scores the mean of the rest is no help.  A consumer without a bias is left alone, by name; runtime.with_biases opens
    a model so that it has them.

    target: what the output lacks: own (of what the op gave in the dense model) or stream (of the sum that it is added
        to, so that earlier errors count, too).
    Source: An et al. 2024 (FLAP), arXiv:2312.11983, eq. 6; the order, the target and the check are ours.
    """

    name: ClassVar[str] = "compensate"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    uses: ClassVar[frozenset[str]] = frozenset({"cut"})
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})

    target: Target = "own"

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def cost(self) -> Cost:
        return Cost(2.0, 0.0, holds=2)

    def requires(self, program: Program) -> list[str]:
        on_meta = any(p.is_meta for _, p in program.named_parameters())
        return super().requires(program) + ["the weights are on the meta device: open the model with weights"] * on_meta

    def call(self, program: Program, context: Context) -> PassResult:
        data = context.data or ()
        if len(data) < 2:
            raise CalibrationError("compensate needs two calibration sequences or more: one is held back to check it")
        assert program.cut is not None
        found, refused = sites(program, self.target, bias=True)
        refused |= {site.parameter: "its op has no bias" for site in found if site.bias is None}
        for name, reason in refused.items():
            context.log.info("compensate leaves %s alone: %s", name, reason)
        dense, pruned = Lockstep(program.cut.dense, data), Lockstep(program, data)
        parameters, values, figures = dict(program.named_parameters()), dict[str, Tensor](), dict[str, Any]()
        open_ = [site for site in found if site.bias is not None]
        for site in context.progress(open_, "compensate", len(open_)):
            assert site.bias is not None
            shift, left = mean_lack(site, dense, pruned, len(data))
            figures[site.bias] = {"error": round(left, 4), "changed": shift is not None}
            if shift is not None:
                bias = parameters[site.bias].detach()
                values[site.bias] = (bias.double() + shift).to(bias.dtype)
                pruned.replace(site.bias, values[site.bias], site.bias_chain)
        after = with_parameters(program, values).replace(scores={}) if values else program
        facts = {"compensated": len(values), "left_alone": refused, "biases": figures}
        return PassResult(after, bool(values), facts)


def mean_lack(site: Site, dense: Lockstep, pruned: Lockstep, count: int) -> tuple[Tensor | None, float]:
    """([outputs] float64: the mean over all tokens of what the op's output lacks, or None where held-back tokens would
    not gain; root of the held-back error that is left, relative to the one before)."""
    dense.advance(site.target)
    pruned.advance(site.node.name)
    back, seen, held = held_back(count), list[Tensor](), list[Tensor]()
    for sample in range(count):
        (held if sample in back else seen).append(_lack(site, dense, pruned, sample))
    fitted, tested = torch.cat(seen), torch.cat(held)
    before, after = (float(x.square().sum()) for x in (tested, tested - fitted.mean(0)))
    if not after < before:
        return None, 1.0
    return torch.cat([fitted, tested]).mean(0), math.sqrt(after / before)


def _lack(site: Site, dense: Lockstep, pruned: Lockstep, sample: int) -> Tensor:
    wanted = _rows(dense.value(sample, site.target))
    given = [_rows(pruned.value(sample, node.name)) for node in (site.node, *site.others)]
    return wanted.index_select(-1, site.keep_out.to(wanted.device)) - sum(given[1:], start=given[0])


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1]).double()

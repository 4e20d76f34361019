"""Bias compensation: the mean contribution of pruned units moves into biases."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from secateur.graph import Program, with_parameters
from secateur.passes.base import Context, Cost, Pass, PassResult
from secateur.passes.calibration.data import CalibrationError
from secateur.passes.calibration.kl import kl
from secateur.passes.calibration.lockstep import Lockstep
from secateur.passes.repair.repair import held_back_sequences
from secateur.passes.repair.sites import Site, find_sites


@dataclass(frozen=True)
class Compensate(Pass):
    """Move the mean of what pruned units gave into the biases of their consumers.  Numerics: lossy.

    A consumer's bias grows by the mean over calibration tokens of what its output lacks on the
    inputs of the dense
    model: W[:, dropped] mean(x_dropped), or what a refit since has left of it.  (On the inputs of
    the pruned model the few tokens of huge activations would fill the mean with what earlier layers
    lost.)  One calibration sequence in five is held back.  A bias whose output's squared error does
    not fall there stays as it is, and so do all where the KL to the dense model does not.  A
    consumer without a bias is left alone, by name; runtime.with_biases opens a model so that it has
    them.

    Source:
        An et al. 2024 (FLAP), arXiv:2312.11983, eq. 6; both checks are ours.
    """

    name: ClassVar[str] = "compensate"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    uses: ClassVar[frozenset[str]] = frozenset({"cut"})
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})

    @property
    def needs_data(self) -> bool:
        """Always: means are taken over calibration tokens."""
        return True

    @property
    def least_sequences(self) -> int:
        """Some are held back to check."""
        return 2

    @property
    def cost(self) -> Cost:
        """Forward passes of the dense model and both checks."""
        return Cost(1.6, 0.0, holds=1)

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run; biases need weights.

        Args:
            program: pruned.
        """
        reasons = super().requires(program)
        if any(p.is_meta for _, p in program.named_parameters()):
            reasons.append("the weights are on the meta device: open the model with weights")
        return reasons

    def call(self, program: Program, context: Context) -> PassResult:
        """Add to biases what pruned units gave on average, where held-back sequences gain by
        it.

        Args:
            program: pruned, with its cut.
            context: with calibration data.

        Raises:
            CalibrationError: fewer than two calibration sequences.
        """
        data = context.data or ()
        if len(data) < 2:
            raise CalibrationError(
                "compensate needs two calibration sequences or more: one is held back to check it"
            )
        assert program.cut is not None
        sites, refused = find_sites(program, "own", bias=True)
        refused |= {site.parameter: "its op has no bias" for site in sites if site.bias is None}
        for name, reason in refused.items():
            context.log.info("compensate leaves %s alone: %s", name, reason)
        dense = Lockstep(program.cut.dense, data)
        back = held_back_sequences(len(data))
        parameters = dict(program.named_parameters())
        values = dict[str, Tensor]()
        figures = dict[str, Any]()
        open_ = []
        for site in sites:
            if site.bias is not None:
                open_.append(site)
        for site in context.progress(open_, "compensate", len(open_)):
            assert site.bias is not None
            bias = parameters[site.bias].detach()
            dense.advance_to(site.node.name)
            lacks = []
            for sample in range(len(data)):
                lacks.append(
                    _missing_output(site, dense, sample, parameters[site.parameter].detach(), bias)
                )
            shift, error = mean_lack(lacks, back)
            figures[site.bias] = {"error": round(error, 4), "changed": shift is not None}
            if shift is not None:
                values[site.bias] = (bias.double() + shift).to(bias.dtype)
        after = program
        kl_before = 0.0
        kl_after = 0.0
        if values:
            after = with_parameters(program, values).replace(scores={})
            held_back = [data[index] for index in sorted(back)]
            kl_before = kl(program.cut.dense, program, held_back).mean
            kl_after = kl(program.cut.dense, after, held_back).mean
        is_better = kl_after < kl_before
        if not is_better and values:
            context.log.info(
                "compensate changes nothing: KL %.4f with it, %.4f without", kl_after, kl_before
            )
        metrics = {
            "compensated": len(values) if is_better else 0,
            "kl_before": kl_before,
            "kl_after": kl_after,
            "left_alone": refused,
            "biases": figures,
        }
        return PassResult(after if is_better else program, is_better, metrics)


def mean_lack(lacks: Sequence[Tensor], back: Collection[int]) -> tuple[Tensor | None, float]:
    """([outputs] float64: the mean over all tokens, or None where the tokens held back would not
    gain by that of the others; root of the held-back error that is left, relative to the one
    before).

    Args:
        lacks: what an output lacks, [tokens, outputs], by sequence.
        back: numbers of the sequences held back.
    """
    seen = torch.cat([x for index, x in enumerate(lacks) if index not in back])
    held_back = torch.cat([x for index, x in enumerate(lacks) if index in back])
    before = float(held_back.square().sum())
    after = float((held_back - seen.mean(0)).square().sum())
    if not after < before:
        return None, 1.0
    return torch.cat([seen, held_back]).mean(0), math.sqrt(after / before)


def _missing_output(
    site: Site, dense: Lockstep, sample: int, weight: Tensor, bias: Tensor
) -> Tensor:
    """The dense op's output less what the weight as it is now makes of the inputs that stayed:
    [tokens, outputs]."""
    x = _as_rows(dense.node_value(sample, site.x.name))
    wanted = _as_rows(dense.node_value(sample, site.node.name))
    weight_KN = (weight if site.turned else weight.T).double()
    output = x.index_select(-1, site.keep_in.to(x.device)) @ weight_KN + bias.double()
    return wanted.index_select(-1, site.keep_out.to(x.device)) - output


def _as_rows(value: Tensor) -> Tensor:
    """[..., channels] as [tokens, channels] float64."""
    return value.reshape(-1, value.shape[-1]).double()

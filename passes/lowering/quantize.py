"""Quantisation of the weights of linear layers to integer grids; the Program stays in floats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from secateur.graph import Program, with_parameters
from secateur.passes.base import Context, Cost, Pass, PassResult
from secateur.passes.calibration.gram import gram_of, output_error
from secateur.passes.calibration.lockstep import Lockstep
from secateur.passes.lowering.layers import (
    Layer,
    linear_layers,
    on_meta,
    parameter_values,
    sharing_input,
)
from secateur.passes.solvers.gptq import quantize_gptq
from secateur.passes.solvers.integer_grid import grid_of

Made = tuple[dict[str, Tensor], dict[str, float]]


@dataclass(frozen=True)
class Quantize(Pass):
    """Round the weights of linear layers to 8 or 4 bits; zeros stay zeros.  Numerics: lossy.

    The numbers stay floats of the same dtype, each a whole multiple of its scale, so that every
    loader opens the model;
    ``lower`` finds the scales again in the numbers, and packs them.

    bits: 8 (a scale for each output) or 4 (a scale for each output and 128 inputs).
    method: rtn (round to nearest, no data) or gptq (later weights make up for the error of earlier
        ones, on the inputs that the quantized model really sees).
    head: round the layer whose outputs the model returns, too; not where it is tied to the
        embeddings.
    damping: of gptq, in parts of the mean of the inputs' squares.

    Source:
        gptq: Frantar et al. 2022, arXiv:2210.17323, algorithm 1.
    """

    name: ClassVar[str] = "quantize"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})

    bits: Literal[8, 4] = 8
    method: Literal["rtn", "gptq"] = "rtn"
    head: bool = False
    damping: Annotated[float, Field(gt=0)] = 0.01

    @property
    def needs_data(self) -> bool:
        """Whether the method reads calibration data: gptq does."""
        return self.method == "gptq"

    @property
    def cost(self) -> Cost:
        """One forward pass and a half for gptq, none for rounding to nearest."""
        if self.needs_data:
            return Cost(1.5, 1.0)
        return Cost(0.0, 1.0)

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run; rounding needs weights.

        Args:
            program: to be rounded.
        """
        reasons = super().requires(program)
        if on_meta(program):
            reasons.append("the weights are on the meta device: open the model with weights")
        return reasons

    def call(self, program: Program, context: Context) -> PassResult:
        """Round the chosen weights.

        Args:
            program: to be rounded.
            context: with calibration data for gptq.

        Raises:
            GramError: the Gram matrix of a layer's inputs cannot be factored.
        """
        layers, refused = linear_layers(program)
        chosen = []
        for layer in layers:
            reason = self._reason_to_spare(layer)
            if reason:
                refused[layer.parameter] = reason
            else:
                chosen.append(layer)
        for name, reason in refused.items():
            context.log.info("quantize leaves %s alone: %s", name, reason)
        if self.needs_data:
            work = self._round_by_gptq
        else:
            work = self._round_to_nearest
        quantized, errors = work(program, chosen, context)
        if not quantized:
            return PassResult(
                program, False, {"bits": self.bits, "layers": 0, "left_alone": refused}
            )
        rounded = with_parameters(program, quantized).replace(scores={})
        error = math.sqrt(sum(e * e for e in errors.values()) / len(errors))
        metrics = {}
        for name, value in errors.items():
            metrics[name] = round(value, 5)
        figures = {
            "layers": len(quantized),
            "error": round(error, 5),
            "left_alone": refused,
            "errors": metrics,
        }
        return PassResult(rounded, True, {"bits": self.bits, **figures})

    def _reason_to_spare(self, layer: Layer) -> str:
        """Why a layer keeps its numbers; "" where it does not."""
        if layer.looked_up:
            return "it is the table of embeddings, too"
        if layer.head and not self.head:
            return "the model returns its outputs; head=true rounds it"
        return ""

    def _round_to_nearest(self, program: Program, layers: list[Layer], context: Context) -> Made:
        """Round to nearest.  The error is that of the weights, relative to their norm."""
        known = parameter_values(program)
        quantized: dict[str, Tensor] = {}
        for layer in context.progress(layers, "quantize", len(layers)):
            weight = known[layer.parameter]
            quantized[layer.parameter] = grid_of(weight, self.bits).round_to_grid(weight)
        return quantized, {
            name: _relative_error(known[name], value) for name, value in quantized.items()
        }

    def _round_by_gptq(self, program: Program, layers: list[Layer], context: Context) -> Made:
        """Layer after layer, on the inputs that come out of the layers already rounded.  The error
        is the outputs'."""
        known = parameter_values(program)
        data = context.data or ()
        run = Lockstep(program, data)
        quantized: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        groups = sharing_input(layers)
        for sharing in context.progress(groups, "quantize", len(groups)):
            run.advance_to(sharing[0].node.name)
            gram, _ = gram_of(run, sharing[0].x.name, len(data))
            for layer in sharing:
                weight = known[layer.parameter]
                value = quantize_gptq(weight, gram, self.bits, self.damping)
                errors[layer.parameter] = output_error(weight, value, gram)
                quantized[layer.parameter] = value
                run.replace_parameter(layer.parameter, value, layer.chain)
        return quantized, errors


def _relative_error(weight: Tensor, rounded: Tensor) -> float:
    """Norm of the change relative to the norm of the weight."""
    change = (rounded.float() - weight.float()).norm()
    return float(change / weight.float().norm().clamp_min(1e-30))

"""Fisher: how far the predictions move without a unit, by gradients at what its consumers read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx
from torch.nn import functional as F

from secateur.graph import CoupledGroup, Program
from secateur.passes.base import Context
from secateur.passes.calibration.data import IGNORED, CalibrationError, Sample, main_input
from secateur.passes.calibration.kl import select_logits
from secateur.passes.calibration.observe import Reader, readers
from secateur.passes.importance.base import Importance, MemberScores, Needs
from secateur.passes.storage.heap import trim_heap


@dataclass(frozen=True)
class Fisher(Importance):
    """Half the Fisher information of a factor on the unit: the KL that its removal costs to second
    order, nats a token.

    With z the sum over a unit's channels of x * dL/dx at one token, the score is the mean over
    tokens of z^2 / 2; L is the summed cross entropy of labels.  Scores of different groups are on
    one scale: rank globally without normalising.
    labels: sampled (drawn from the model's own predictions: the Fisher matrix, whose quadratic form
        is the KL to the dense model) or data (the token that follows: the empirical one).
    draws: how many labels are drawn for each token, each with a backward pass of its own.

    Source:
        Kwon et al. 2022, arXiv:2204.09656, section 3.1; Martens 2014, arXiv:1412.1193, section 5
        (sampled labels).
    """

    name: ClassVar[str] = "fisher"
    needs: ClassVar[Needs] = "gradients"

    labels: Literal["sampled", "data"] = "sampled"
    draws: Annotated[int, Field(ge=1)] = 1

    def sees(self, program: Program, group: CoupledGroup) -> bool:
        """Whether a weight reads the group.

        Args:
            program: on any device.
            group: that may be pruned.
        """
        return bool(readers(program, group))

    def members(
        self, program: Program, groups: Sequence[CoupledGroup], context: Context
    ) -> MemberScores:
        """Half the Fisher information of each unit, one tensor for each activation that is
        read.

        Args:
            program: the model.
            groups: to score.
            context: with calibration data; its seed draws the labels.

        Returns:
            by group name, tensors [units] float32, nats a token.

        Raises:
            CalibrationError: labels=data, and predictions and tokens differ in number.
        """
        reading = {}
        for group in groups:
            if group_readers := readers(program, group):
                reading[group.name] = group_readers
        wanted = [reader for group_readers in reading.values() for reader in group_readers]
        sums = {}
        for reader in wanted:
            sums[reader] = torch.zeros(len(reader.positions), dtype=torch.float64)
        data = context.data or ()
        generator = torch.Generator().manual_seed(context.seed)
        runner = _Gradients(program, sums)
        for sample in context.progress(data, "gradients", len(data)):
            scores, labels = self._scores_and_labels(program, runner, sample, generator)
            for draw, drawn in enumerate(labels):
                summed = F.cross_entropy(scores, drawn, ignore_index=IGNORED, reduction="sum")
                summed.backward(retain_graph=draw + 1 < len(labels))
            del scores, summed  # so that the next sequence takes their place
            trim_heap()
        tokens = sum(sample.tokens for sample in data) * (
            self.draws if self.labels == "sampled" else 1
        )
        return {
            name: [(sums[r] / (2 * tokens)).float() for r in group_readers]
            for name, group_readers in reading.items()
        }

    def _scores_and_labels(
        self, program: Program, runner: _Gradients, sample: Sample, generator: torch.Generator
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits [T, V] with a graph behind them, and the labels [T] of each backward pass."""
        scores = select_logits(runner.forward(sample.inputs))
        flat = scores.reshape(-1, scores.shape[-1]).float()
        if self.labels == "sampled":
            chances = flat.detach().softmax(-1).cpu()
            drawn = torch.multinomial(chances, self.draws, replacement=True, generator=generator)
            del chances
            return flat, list(drawn.T.to(flat.device))
        if sample.labels is not None:
            ids = sample.labels
        else:
            ids = sample.inputs[main_input(program)]
        wanted = F.pad(ids[:, 1:], (0, 1), value=IGNORED).reshape(-1).to(flat.device)
        if len(wanted) != len(flat):
            raise CalibrationError(
                f"{len(flat)} predictions for {len(wanted)} tokens: use fisher{{labels=sampled}}"
            )
        return flat, [wanted]


class _Gradients(fx.Interpreter):
    """Runs the graph so that a backward pass adds z^2 of every wanted unit to ``sums``."""

    def __init__(self, program: Program, sums: Mapping[Reader, Tensor]) -> None:
        super().__init__(program.gm, garbage_collect_values=True)
        self.extra_traceback = False
        self._nodes = list(program.gm.graph.nodes)
        self._given = program.source.example_inputs
        self._sums = sums
        self._wanted: dict[fx.Node, list[Reader]] = {}
        for reader in sums:
            self._wanted.setdefault(reader.node, []).append(reader)

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output; parameters are constants, the values that consumers read are
        variables."""
        feed = {**self._given, **inputs}
        placeholders = []
        for node in self._nodes:
            if node.op == "placeholder":
                placeholders.append(node)
        with torch.enable_grad():
            return self.run(
                *(feed.get(node.target) for node in placeholders), enable_io_processing=False
            )

    def get_attr(
        self, target: fx.node.Target, args: tuple[fx.node.Argument, ...], kwargs: dict[str, object]
    ) -> Any:
        """The parameter as a constant."""
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, Tensor):
            return value.detach()
        return value

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; a value that consumers read becomes a variable with a hook."""
        value = super().run_node(n)
        if n not in self._wanted:
            return value
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        seen = value.detach()
        wanted = self._wanted[n]
        value.register_hook(lambda gradient: _add_squares(self._sums, wanted, seen, gradient))
        return value


def _add_squares(
    sums: Mapping[Reader, Tensor], wanted: Collection[Reader], x: Tensor, gradient: Tensor
) -> None:
    """Add z^2 over the tokens of one sequence to the sums of each reader."""
    product = x.float() * gradient.float()
    for reader in wanted:
        channels = product.movedim(reader.dim, -1).flatten(0, -2)
        units = channels[:, reader.positions.to(channels.device)].sum(-1)
        sums[reader].add_(units.square().sum(0, dtype=torch.float64).cpu())

"""Taylor: by how much the loss would move if an entry became zero, to first or second order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from secateur.graph import CoupledGroup, Program
from secateur.passes.base import Context
from secateur.passes.importance.base import Importance, MemberScores, Needs, scores_of
from secateur.passes.importance.gradients import (
    Gradients,
    LossKind,
    gradients_by_block,
    loss_gradients,
)

Form = Literal["element", "vector", "second", "mixed"]
SALIENCE: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "element": lambda w, g, a: (w * g).abs(),
    "vector": lambda w, g, a: w * g,
    "second": lambda w, g, a: (w * a * w).abs(),
    "mixed": lambda w, g, a: (w * g - 0.5 * w * a * w).abs(),
}
NEEDS_SQUARES = ("second", "mixed")


@dataclass(frozen=True)
class Taylor(Importance):
    """By how much the loss would move without a unit; L is the mean loss over all calibration
    tokens.

    loss: next-token (cross entropy of the token that follows) or labels (cross entropy of the given
        labels, unshifted: masked language models, classifiers, encoder-decoders).
    form: element (sum of |w * dL/dw|), vector (|sum of w * dL/dw| of each row or column of a unit),
        second (sum of |w * A * w| with A the mean over sequences of the squared gradient of a
        sequence's mean loss: the diagonal of the empirical Fisher matrix) or mixed (sum of |w *
        dL/dw - w * A * w / 2|).

    Source:
        Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627, eq. 3-5 (``param_first``, ``vectorize``,
        ``param_second``, ``param_mix`` in code). by_block: block after block from the last, with
        each block's activations computed again: memory is the gradients and activations of one
        block and what passes between blocks, for a third more work.
    """

    name: ClassVar[str] = "taylor"
    needs: ClassVar[Needs] = "gradients"

    loss: LossKind = "next-token"
    form: Form = "element"
    by_block: bool = False

    def members(
        self, program: Program, groups: Sequence[CoupledGroup], context: Context
    ) -> MemberScores:
        """Taylor scores of each group, one tensor for each member parameter.

        Args:
            program: the model.
            groups: to score.
            context: with calibration data.

        Returns:
            by group name, tensors [units] float32.

        Raises:
            CalibrationError: nothing to predict, labels are missing, or squared gradients are
                asked block by block for a shared parameter.
        """
        wanted = set()
        for group in groups:
            for member in group.members:
                wanted.add(member.parameter)
        squared = self.form in NEEDS_SQUARES
        pieces = gradients_by_block if self.by_block else _all_at_once
        gradient_pieces = pieces(program, wanted, context, self.loss, squared)
        return scores_of(
            groups, self._entry_saliences(program, gradient_pieces), vectors=self.form == "vector"
        )

    def _entry_saliences(
        self, program: Program, pieces: Iterator[Gradients]
    ) -> Iterator[tuple[str, Tensor]]:
        """(Parameter name, salience of every entry), each freed before the next."""
        named = dict(program.named_parameters())
        for gradients in pieces:
            while gradients.mean:  # each piece is let go before the next is asked for
                name, mean = gradients.mean.popitem()
                yield (
                    name,
                    SALIENCE[self.form](
                        named[name].detach().float(), mean, gradients.squares.pop(name, mean)
                    ),
                )
                del mean


def _all_at_once(
    program: Program, wanted: set[str], context: Context, loss: LossKind, squared: bool
) -> Iterator[Gradients]:
    """All gradients as one piece."""
    yield loss_gradients(program, wanted, context, loss, squared)

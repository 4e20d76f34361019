"""A model cut before its head, so that its logits need never stand all at once."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.graph.errors import PipelineError
from secateur.passes.calibration.kl import select_logits
from secateur.passes.training.rows import HeadRows, LogitRows

log = logging.getLogger("secateur.passes")

CLOSE = 1e-5  # of the largest logit: what the same product in another order may differ by


@dataclass(frozen=True, eq=False)
class Output:
    """rows: distributions of the batch's tokens, flattened.
    states: hidden states [b, t, X], embeddings first.
    """

    rows: HeadRows | LogitRows
    states: tuple[Tensor, ...] = ()


class Network(nn.Module):
    """A model whose last product, hidden state times head, is left to who asks for rows.

    The head is a linear module that the model names as its output embedding; it is taken out, and
    what the model then gives as logits is the hidden state that the head reads.  Where something
    follows the head (a soft cap), or the head is not linear, the model stays whole and gives
    logits.

    model: changed in place; ``restore`` puts the head back.
    probe: inputs of one short sequence, on the model's device.
    precision: matrix products are done in it (autocast); None leaves the weights' own.
    """

    def __init__(
        self, model: nn.Module, probe: Mapping[str, Any], precision: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.body = model
        self.precision = precision
        accepted = inspect.signature(model.forward).parameters
        if "use_cache" in accepted:
            self.fixed = {"use_cache": False}
        else:
            self.fixed = {}
        self.head, self.place = _cut_head(model, {**probe, **self.fixed})

    def forward(self, inputs: Mapping[str, Any], states: bool = False) -> Output:
        """Rows for every position of the inputs, and the hidden states if asked for.

        Args:
            inputs: of the model, by name.
            states: whether hidden states are wanted.

        Returns:
            rows and hidden states.
        """
        device = next(v.device.type for v in inputs.values() if isinstance(v, Tensor))
        if states:
            more = {"output_hidden_states": True}
        else:
            more = {}
        with torch.autocast(device, self.precision) if self.precision else nullcontext():
            output = self.body(**inputs, **self.fixed, **more)
        hidden_states = getattr(output, "hidden_states", None) or ()
        if states and not hidden_states:
            raise PipelineError(
                f"{type(self.body).__name__} gives no hidden states to compare: leave states=[] "
                "(logits alone)"
            )
        scores = select_logits(output)
        flat = scores.reshape(-1, scores.shape[-1])
        if self.head is None:
            return Output(LogitRows(flat), tuple(hidden_states))
        return Output(
            HeadRows(flat, self.head.weight, self.head.bias, self.precision), tuple(hidden_states)
        )

    def train(self, mode: bool = True) -> Network:
        """As of any module, but graphs have one mode, that of their capture, and refuse to be
        asked."""
        self.training = mode
        for child in self.children():
            if not isinstance(child, fx.GraphModule):
                child.train(mode)
        return self

    def restore(self) -> None:
        """Put the head back where it was."""
        if self.head is not None:
            owner, _, name = self.place.rpartition(".")
            setattr(self.body.get_submodule(owner), name, self.head)


def _cut_head(model: nn.Module, probe: Mapping[str, Any]) -> tuple[nn.Linear | None, str]:
    """The head and its path in the model, in whose place an identity now stands; or (None, "")."""
    named = getattr(model, "get_output_embeddings", None)
    head = None
    if named is not None:
        head = named()
    path = next((name for name, module in model.named_modules() if module is head), "")
    if (
        type(head) is not nn.Linear or not path
    ):  # one under a mask multiplies by something else than its weight
        log.info(
            "no linear head to cut off: the losses are made from logits of a whole micro-batch"
        )
        return None, ""
    owner, _, name = path.rpartition(".")
    was_training = model.training
    parent = model.get_submodule(owner)
    model.eval()
    try:
        with torch.no_grad():
            expected = select_logits(model(**probe))
            setattr(parent, name, nn.Identity())
            logits = head(select_logits(model(**probe)))
        if _is_same_output(expected, logits):
            return head, path
        reason = "the model changes its logits after the head"
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = f"the model does not run without it ({error})"
    finally:
        model.train(was_training)
    setattr(parent, name, head)
    log.info(
        "the head %s stays: %s; the losses are made from logits of a whole micro-batch",
        path,
        reason,
    )
    return None, ""


def _is_same_output(expected: Tensor, found: Tensor) -> bool:
    """Whether two outputs are equal up to rounding."""
    if expected.shape != found.shape:
        return False
    gap = (expected.double() - found.double()).abs().max()
    low = expected.dtype in (
        torch.bfloat16,
        torch.float16,
    )  # a cap would pass for rounding there: only bits count
    return bool(torch.equal(expected, found) if low else gap <= CLOSE * expected.abs().max())

"""Gradients of the calibration loss: all at once, or block by block with recomputation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from secateur.graph import Program
from secateur.graph.blocks.chain import Chain, Stage, Values, chain
from secateur.passes.base import Context
from secateur.passes.calibration.data import IGNORED, CalibrationError, Sample, main_input
from secateur.passes.calibration.kl import select_logits
from secateur.passes.storage.heap import trim_heap

LossKind = Literal["next-token", "labels"]


@dataclass(frozen=True)
class Gradients:
    """Of the loss, by parameter name, float32, shape of the parameter; zeros where the loss does
    not reach.

    mean: of the mean loss over all calibration tokens.
    squares: mean over sequences of the squared gradient of the sequence's own mean loss; empty
        unless asked for.
    """

    mean: dict[str, Tensor]
    squares: dict[str, Tensor]


@dataclass
class Sums:
    """Running sums of gradients: each goes in as soon as it is there and is freed, so that no
    second set stands.

    total: tokens to predict.
    sequences: those that hold any.
    count: such tokens of the sequence at work.
    """

    total: int
    sequences: int
    squared: bool
    count: int = 0

    def start_sums(self, leaf: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sums of a leaf's gradient and of its squares, zero yet.

        Args:
            leaf: parameter that takes the gradient.

        Returns:
            (sums of gradients, sums of squares or None), shape of the leaf, float32.
        """
        mean = torch.zeros_like(leaf, dtype=torch.float32)
        squares = None
        if self.squared:
            squares = torch.zeros_like(mean)
        leaf.register_post_accumulate_grad_hook(self._move_into(mean, squares))
        return mean, squares

    def _move_into(self, mean: Tensor, squares: Tensor | None) -> Callable[[Tensor], None]:
        """A hook that adds a leaf's gradient to the sums and frees it."""

        def add_gradient(leaf: Tensor) -> None:
            if leaf.grad is not None:
                mean.add_(leaf.grad)
                if squares is not None:  # of the sequence's own mean loss
                    gradient = leaf.grad.float() * (self.total / self.count)
                    squares.add_(gradient.square_(), alpha=1 / self.sequences)
                leaf.grad = None

        return add_gradient


def mean_gradients(
    program: Program, wanted: set[str], context: Context, loss: LossKind
) -> dict[str, Tensor]:
    """Gradient of the mean loss over all calibration tokens, see ``gradients``.

    Args:
        program: the model.
        wanted: names of parameters.
        context: with calibration data.
        loss: what is differentiated.

    Returns:
        by parameter name, float32.
    """
    return loss_gradients(program, wanted, context, loss).mean


def loss_gradients(
    program: Program, wanted: set[str], context: Context, loss: LossKind, squared: bool = False
) -> Gradients:
    """Gradients over the calibration data.

    Every sequence runs alone and adds its summed loss over the total count, so that batching
    changes nothing.

    Args:
        program: the model.
        wanted: names of parameters.
        context: with calibration data.
        loss: what is differentiated.
        squared: whether the squares are wanted, too.

    Raises:
        CalibrationError: nothing to predict, or labels are missing.
    """
    data, sums = _count_targets(program, context, loss, squared)
    leaves = {}
    for name, p in program.named_parameters():
        if name in wanted:
            leaves[name] = p.detach().requires_grad_()
    gradients = {}
    for name, leaf in leaves.items():
        gradients[name] = sums.start_sums(leaf)
    with torch.enable_grad():
        for sample, count in context.progress(data, "gradients", len(data)):
            sums.count = count
            if count:
                output = functional_call(program.gm, dict(leaves), (), dict(sample.inputs))
                (sum_loss(output, program, sample, loss) / sums.total).backward(
                    inputs=list(leaves.values())
                )
    return _as_gradients(gradients)


def _count_targets(
    program: Program, context: Context, loss: LossKind, squared: bool
) -> tuple[list[tuple[Sample, int]], Sums]:
    """Each sequence with its tokens to predict, and empty sums for all of them."""
    data = context.data or ()
    counts = []
    for sample in data:
        counts.append(int((loss_targets(sample, program, loss) != IGNORED).sum()))
    if sum(counts) == 0:
        raise CalibrationError(
            "the calibration data holds no token to predict: sequences need at least two tokens"
        )
    sums = Sums(sum(counts), sum(count > 0 for count in counts), squared)
    return list(zip(data, counts, strict=True)), sums


def _as_gradients(held: Mapping[str, tuple[Tensor, Tensor | None]]) -> Gradients:
    """The finished sums as Gradients."""
    squares = {}
    for name, (_, square) in held.items():
        if square is not None:
            squares[name] = square
    return Gradients({name: mean for name, (mean, _) in held.items()}, squares)


# Block after block
def gradients_by_block(
    program: Program, wanted: set[str], context: Context, loss: LossKind, squared: bool = False
) -> Iterator[Gradients]:
    """The same gradients, those of one block at a time from the last to the first; drop each before
    the next is asked.

    A first pass over all sequences keeps what passes between blocks (on the CPU); then every block
    runs again, sequence after sequence, with its gradients on.  Memory: one block's gradients and
    its activations for one sequence, and all that passes between blocks; a parameter that several
    blocks read is held until the first of them is done.

    Args:
        program: the model.
        wanted: names of parameters.
        context: with calibration data.
        loss: what is differentiated.
        squared: whether the squares are wanted, too.

    Raises:
        CalibrationError: as ``gradients``; or squares are asked of a parameter that several blocks
            read: the gradient of one sequence is not whole before the first of them.
        UnsupportedOp: no residual block is found.

    Source:
        Chen et al. 2016, arXiv:1604.06174 (recomputation), by blocks.
    """
    run = _Blockwise(program, wanted, *_count_targets(program, context, loss, squared))
    steps = [*run.chain.stages, *reversed(run.chain.stages)]
    for position, stage in enumerate(context.progress(steps, "gradients by block", len(steps))):
        if position < len(run.chain.stages):
            run.forward_stage(stage)
        else:
            yield run.backward_stage(stage, loss)
            trim_heap()


class _Blockwise:
    """Values before every stage of every sequence, and gradients at the stage that was reached on
    the way back."""

    def __init__(
        self, program: Program, wanted: set[str], data: Sequence[tuple[Sample, int]], sums: Sums
    ) -> None:
        self.program = program
        self.data = data
        self.sums = sums
        self.chain: Chain = chain(program)
        self.names = {id(p): name for name, p in program.named_parameters() if name in wanted}
        self.owned = {stage: self._wanted_parameters(stage) for stage in self.chain.stages}
        readers = Counter[str]()
        for owned in self.owned.values():
            readers.update(set(owned.values()))
        shared = sorted(name for name, count in readers.items() if count > 1)
        if shared and sums.squared:
            message = (
                f"taylor: {shared[0]} is read in several blocks, so squared gradients "
                "cannot be had block by block"
            )
            raise CalibrationError(
                f"{message}: use by_block=false, or a form that is not second or mixed"
            )
        self.first = dict[str, Stage]()
        for stage in reversed(self.chain.stages):
            for name in self.owned[stage].values():
                self.first[name] = stage
        self.moved = self._dependent_nodes()
        self.values: list[dict[Stage, Values]] = [{} for _ in data]
        self.now: list[Values] = [self.chain.initial_values(sample.inputs) for sample, _ in data]
        self.grads: list[dict[str, Tensor]] = [{} for _ in data]
        self.held: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.leaves: dict[str, Tensor] = {}

    def _wanted_parameters(self, stage: Stage) -> dict[str, str]:
        """Wanted parameters of a stage: their name in its module, and in the source model."""
        named_parameters = stage.module.named_parameters(remove_duplicate=False)
        names: dict[str, str] = {}
        for target, p in named_parameters:
            if id(p) in self.names:
                names[target] = self.names[id(p)]
        return names

    def _dependent_nodes(self) -> set[str]:
        """Names of the nodes whose value depends on a wanted parameter."""
        targets = dict(self.program.gm.named_parameters(remove_duplicate=False))
        moved: set[str] = set()
        for node in self.program.gm.graph.nodes:
            is_parameter = node.op == "get_attr" and id(targets.get(str(node.target))) in self.names
            if is_parameter or any(source.name in moved for source in node.all_input_nodes):
                moved.add(node.name)
        return moved

    @torch.no_grad()
    def forward_stage(self, stage: Stage) -> None:
        """Run a stage on every sequence, and keep what it read."""
        last = stage is self.chain.stages[-1]
        for index, values in enumerate(self.now):
            self.values[index][stage] = {name: _park_value(values[name]) for name in values}
            if last:
                self.now[index] = {}
            else:
                self.now[index] = self.chain.run_stage(stage, values)

    def backward_stage(self, stage: Stage, loss: LossKind) -> Gradients:
        """Gradients of the parameters that no earlier stage reads."""
        parameters = dict(stage.module.named_parameters(remove_duplicate=False))
        for name in set(self.owned[stage].values()) - set(self.leaves):
            target = next(t for t, n in self.owned[stage].items() if n == name)
            self.leaves[name] = parameters[target].detach().requires_grad_()
            self.held[name] = self.sums.start_sums(self.leaves[name])
        with torch.enable_grad():
            for index, (_, count) in enumerate(self.data):
                values = self.values[index].pop(stage)
                self.sums.count = count
                if count:
                    self._backpropagate(stage, index, values, loss)
        done = []
        for name in self.held:
            if self.first[name] is stage:
                done.append(name)
        for name in done:
            del self.leaves[name]
        gradients = _as_gradients({name: self.held.pop(name) for name in done})
        if stage is self.chain.stages[0]:
            rest = set(self.names.values()) - set(self.first)
        else:
            rest = set()
        zeros = {}
        for n, p in self.program.named_parameters():
            if n in rest:
                zeros[n] = torch.zeros_like(p, dtype=torch.float32)
        return Gradients(
            {**gradients.mean, **zeros},
            {**gradients.squares, **(zeros if self.sums.squared else {})},
        )

    def _backpropagate(self, stage: Stage, at: int, values: Values, loss: LossKind) -> None:
        """Run a stage again on one sequence, and take the gradients at its end to its inputs and
        parameters."""
        inputs = {}
        for name in stage.inputs:
            inputs[name] = self._make_leaf(name, values[name])
        fed = []
        for n, v in inputs.items():
            fed.append(v.clone() if n in stage.mutated_inputs and isinstance(v, Tensor) else v)
        leaf_values = {}
        for target, name in self.owned[stage].items():
            leaf_values[target] = self.leaves[name]
        produced = dict(
            zip(stage.outputs, functional_call(stage.module, leaf_values, tuple(fed)), strict=True)
        )
        leaves = []
        for v in inputs.values():
            if isinstance(v, Tensor) and v.requires_grad:
                leaves.append(v)
        leaves += {id(leaf): leaf for leaf in leaf_values.values()}.values()
        if stage is self.chain.stages[-1]:
            output = self.chain.final_output({**values, **inputs, **produced})
            ends: list[Tensor] = [
                sum_loss(output, self.program, self.data[at][0], loss) / self.sums.total
            ]
            output_gradients: list[Tensor | None] = [None]
        else:
            reached = []
            for name in produced:
                if name in self.grads[at] and produced[name].requires_grad:
                    reached.append(name)
            ends = [produced[name] for name in reached]
            output_gradients = [self.grads[at][name] for name in reached]
        for name in produced:
            self.grads[at].pop(name, None)
        if ends and leaves and ends[0].requires_grad:
            torch.autograd.backward(ends, output_gradients, inputs=leaves)
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.grad is not None:
                before = self.grads[at].get(name)
                if before is None:
                    self.grads[at][name] = value.grad
                else:
                    self.grads[at][name] = before + value.grad

    def _make_leaf(self, name: str, value: object) -> object:
        """An input of a stage, to take a gradient where a wanted parameter stands behind it."""
        if not isinstance(value, Tensor):
            return value
        value = value.to(self._device)
        if name in self.moved and value.is_floating_point():
            return value.detach().requires_grad_()
        return value

    @property
    def _device(self) -> torch.device:
        """The device of the parameters."""
        return next((p.device for _, p in self.program.named_parameters()), torch.device("cpu"))


def _park_value(value: object) -> object:
    """A value on the CPU, unless it is a Parameter."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.cpu()
    return value


# The loss
def loss_targets(sample: Sample, program: Program, loss: LossKind) -> Tensor:
    """What the logits of a sample are compared with: [1, seq - 1] for next-token, else the labels
    as given.

    Args:
        sample: one sequence.
        program: names the main input.
        loss: kind of the loss.

    Returns:
        int64 token or class ids, -100 where not counted.
    """
    if loss == "labels" or sample.has_aligned_labels:
        if sample.labels is None:
            raise CalibrationError("taylor{loss=labels} needs labels in the calibration data")
        return sample.labels
    if sample.labels is not None:
        labels = sample.labels
    else:
        labels = sample.inputs[main_input(program)]
    return labels[:, 1:]


def sum_loss(output: Any, program: Program, sample: Sample, loss: LossKind) -> Tensor:
    """Cross entropy of a model's output in nats, summed over the tokens of a sample, float32.

    Args:
        output: of the model.
        program: names the main input.
        sample: one sequence.
        loss: kind of the loss.

    Returns:
        scalar.
    """
    scores = select_logits(output)
    wanted = loss_targets(sample, program, loss).to(scores.device)
    if loss == "next-token" and not sample.has_aligned_labels:
        scores = scores[:, :-1]
    if scores.dim() < 2 or scores.shape[:-1] != wanted.shape:
        shapes = f"logits {list(scores.shape)} and targets {list(wanted.shape)}"
        raise CalibrationError(
            f"the loss {loss!r} does not fit {shapes}: choose taylor{{loss=...}} or give labels"
        )
    flat = scores.reshape(-1, scores.shape[-1]).float()
    return F.cross_entropy(flat, wanted.reshape(-1), ignore_index=IGNORED, reduction="sum")

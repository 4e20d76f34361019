"""Damage of depth cuts, measured on the chain of a model's blocks.

Every sequence runs once through the whole chain; what enters each stage is kept, and a candidate is
run from its first missing part on.  Memory: one sequence's stream, whatever the number of
candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from secateur.graph import Block, Chain, Program, Stage, SubBlock, blocks, chain
from secateur.graph.blocks.chain import Values
from secateur.graph.edit.drop import module_without
from secateur.passes.base import Context
from secateur.passes.calibration.data import IGNORED, CalibrationError, Sample
from secateur.passes.calibration.kl import sample_logits, select_logits, token_kl
from secateur.passes.calibration.observe import Reader, observe
from secateur.passes.importance.gradients import LossKind, loss_targets, sum_loss

By = Literal["kl", "perplexity"]
Part = Block | SubBlock
Run = Callable[[Stage, Values], Values]


def measure_damages(
    program: Program,
    reference: Program,
    cuts: Sequence[frozenset[str]],
    by: By,
    context: Context,
    what: str,
) -> list[float]:
    """Damage of each cut, nats a token, over the calibration sequences.

    Args:
        program: the model.
        reference: whose predictions count for kl.
        cuts: names of blocks or sub-blocks that are left out together.
        by: kl, KL(reference || rest); perplexity, the mean loss of the next token (its exponential
            is the perplexity) or of the sequence's own labels.
        context: with calibration data.
        what: description for the progress reporter.

    Returns:
        one number a cut.
    """
    plans = [_Plan(chain(program), cut) for cut in cuts]
    sums = torch.zeros(len(cuts), dtype=torch.float64)
    count = 0
    data = context.data or ()
    work = []
    for sample in data:
        for index in range(len(cuts)):
            work.append((sample, index))
    states: list[Values] = []
    judge: _Judge | None = None
    with torch.no_grad():
        for sample, index in context.progress(work, what, len(work)):
            if index == 0:
                states = list(_stage_inputs(chain(program), sample))
                judge = _Judge(program, reference, sample, by)
                count += judge.count_tokens
            assert judge is not None
            sums[index] += judge(plans[index].run_from(states))
    if count == 0:
        raise CalibrationError(
            "the calibration sequences have no token to predict: give longer ones"
        )
    return [float(value) / count for value in sums]


def block_influences(program: Program, parts: Sequence[Part], context: Context) -> dict[str, float]:
    """Block influence by name: one minus the mean cosine of the stream before and after a part,
    over all tokens.

    Args:
        program: the model.
        parts: blocks or sub-blocks.
        context: with calibration data.

    Returns:
        influence by name.

    Source:
        Men et al. 2024 (ShortGPT), arXiv:2403.03853, equation 1.
    """
    meters = [_Meter(part) for part in parts]
    none = torch.empty(0, dtype=torch.int64)
    readers = dict[Reader, tuple[_Meter, int]]()
    for meter in meters:
        for index, node in enumerate(meter.nodes):
            readers[Reader(node, -1, none)] = (meter, index)

    def observe_value(reader: Reader, value: Tensor, batch: int) -> None:
        meter, index = readers[reader]
        meter.take_value(index, value)

    observe(program, context, list(readers), observe_value)
    return {meter.part.name: 1 - meter.total / max(1, meter.rows) for meter in meters}


def part_parameters(program: Program) -> dict[str, int]:
    """Elements of the parameters that only one block or sub-block reads, by its name.

    Args:
        program: the model.
    """
    sizes = {}
    for name, parameter in program.named_parameters():
        sizes[name] = parameter.numel()
    parts = {part.name: part.parameters for part in blocks(program)}
    parts |= {sub.name: sub.parameters for block in blocks(program) for sub in block.sub_blocks}
    elements: dict[str, int] = {}
    for name, parameters in parts.items():
        elements[name] = sum(sizes[parameter] for parameter in parameters)
    return elements


class _Meter:
    """Sums the cosines of one part; its values of a sequence come in the order of the graph."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.total = 0.0
        self.rows = 0
        joined = isinstance(part, SubBlock) and not part.alone
        end = part.end
        if isinstance(part, SubBlock) and joined:
            end = part.branch.operand
        self.nodes: tuple[fx.Node, fx.Node] = (part.start, end)
        self.joined = joined
        self.seen = dict[int, Tensor]()

    def take_value(self, at: int, value: Tensor) -> None:
        """Keep one value; with both present, add the cosines of their rows."""
        self.seen[at] = value
        if len(self.seen) == 2:
            before = self.seen[0].reshape(-1, self.seen[0].shape[-1]).float()
            after = self.seen[1].reshape(-1, self.seen[1].shape[-1]).float()
            if self.joined:
                after = before + after
            cosines = F.cosine_similarity(before, after, dim=-1)
            self.total += float(cosines.double().sum())
            self.rows += len(cosines)
            self.seen.clear()


class _Judge:
    """Sums the damage over one sequence's tokens."""

    def __init__(self, program: Program, reference: Program, sample: Sample, by: By) -> None:
        self.program = program
        self.sample = sample
        self.expected = sample_logits(reference, sample) if by == "kl" else None
        has_labels = sample.labels is not None and (
            sample.labels.dim() == 1 or sample.has_aligned_labels
        )
        if has_labels:
            self.loss: LossKind = "labels"
        else:
            self.loss = "next-token"

    @property
    def count_tokens(self) -> int:
        """Number of tokens over which the damage of the sequence is summed."""
        if self.expected is not None:
            return len(self.expected)
        return int((loss_targets(self.sample, self.program, self.loss) != IGNORED).sum())

    def __call__(self, output: Any) -> float:
        if self.expected is None:
            return float(sum_loss(output, self.program, self.sample, self.loss))
        logits = select_logits(output)
        return float(token_kl(self.expected, logits.reshape(-1, logits.shape[-1])).double().sum())


class _Plan:
    """How a chain runs without some of its parts."""

    def __init__(self, whole: Chain, cut: frozenset[str]) -> None:
        self.chain = whole
        self.runs: dict[Stage, Run] = {}
        for stage in whole.blocks:
            assert stage.block is not None
            subs = []
            for sub in stage.block.sub_blocks:
                if sub.name in cut:
                    subs.append(sub.name)
            if stage.name in cut or len(subs) == len(stage.block.sub_blocks):
                self.runs[stage] = whole.skip_block
            elif subs:
                self.runs[stage] = self._make_rest(stage, subs)

    def _make_rest(self, stage: Stage, subs: list[str]) -> Run:
        """The run of a stage without some of its sub-blocks."""
        module = module_without(stage, subs)
        return lambda at, values: self.chain.run_stage(at, values, module)

    def run_from(self, states: Sequence[Values]) -> Any:
        """The output, from what enters each stage of the whole chain."""
        first = min(
            (self.chain.place[stage] for stage in self.runs), default=len(self.chain.stages) - 1
        )
        values = states[first]
        for stage in self.chain.stages[first:]:
            values = self.runs.get(stage, self.chain.run_stage)(stage, values)
        return self.chain.final_output(values)


def _stage_inputs(whole: Chain, sample: Sample) -> Sequence[Values]:
    """What enters each stage."""
    states = [whole.initial_values(sample.inputs)]
    for stage in whole.stages[:-1]:
        states.append(whole.run_stage(stage, states[-1]))
    return states

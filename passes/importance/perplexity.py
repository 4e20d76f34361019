"""Perplexity: by how much the model is worse without a unit, measured by leaving each out in
turn."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from secateur.graph import CoupledGroup, Program, keep
from secateur.graph.capture.calls import get_attribute
from secateur.passes.base import Context, Cost
from secateur.passes.calibration.data import IGNORED, CalibrationError, Sample, main_input
from secateur.passes.calibration.kl import (
    CachedLogProbs,
    cache_log_probs,
    select_logits,
    token_losses,
)
from secateur.passes.calibration.lockstep import Lockstep
from secateur.passes.calibration.observe import op_name
from secateur.passes.importance.base import Importance, MemberScores, Needs

SAME_OP = {"aten.view": "aten.reshape", "aten._unsafe_view": "aten.reshape"}


@dataclass(frozen=True)
class Perplexity(Importance):
    """Mean loss of a calibration token (or KL to the whole model) without the unit, less that with
    it, in nats.

    Each unit is cut out of the graph by itself, with all that this moves in a norm, a softmax or a
    router.  Only what
    stands behind the unit is run again: half a forward pass for each unit, on average, so this is
        for few, large units.

    measure: loss (log perplexity; a unit that does harm scores below zero) or kl (to the whole
        model's predictions).
    families: of the groups that are scored; others are left out.
    sequences: how many of the calibration sequences are used, from the first; null for all.

    Source:
        Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.2 (perplexity drop), for
        any coupled group.
    """

    name: ClassVar[str] = "perplexity"
    needs: ClassVar[Needs] = "activations"
    # A unit is cut out everywhere, so that the graph keeps its shape.
    by_cell: ClassVar[bool] = False

    measure: Literal["loss", "kl"] = "loss"
    families: tuple[str, ...] = ("kv_heads", "query_heads", "experts")
    sequences: Annotated[int, Field(ge=1)] | None = 8

    @property
    def cost(self) -> Cost:
        """Forward passes for about a hundred units on a part of the sequences."""
        return Cost(25.0, 0.0)  # for about a hundred units, a part of the sequences

    def sees(self, program: Program, group: CoupledGroup) -> bool:
        """Whether the group is of a family that is scored, and units may go.

        Args:
            program: on any device.
            group: that may be pruned.
        """
        return group.family in self.families and group.units > max(1, group.min_units)

    def members(
        self, program: Program, groups: Sequence[CoupledGroup], context: Context
    ) -> MemberScores:
        """Loss or KL without each unit, less that of the whole model.

        Args:
            program: the model.
            groups: to score; those outside ``families`` are left out.
            context: with calibration data.

        Returns:
            by group name, one tensor [units] float32, nats a token.

        Raises:
            CalibrationError: no token to predict, or predictions and tokens differ in number.
        """
        data = (context.data or ())[: self.sequences]
        chosen = []
        for g in groups:
            if self.sees(program, g):
                chosen.append(g)
        order = {}
        for position, node in enumerate(program.gm.graph.nodes):
            order[node.name] = position
        starts = {
            group.name: first_moved(program, _mask_unit(program, group, 0)) for group in chosen
        }
        chosen.sort(key=lambda group: order[starts[group.name]])
        judge = _Judge(program, data, self.measure)
        run = Lockstep(program, data)
        units = [(group, unit) for group in chosen for unit in range(group.units)]
        totals = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in chosen}
        for group, unit in context.progress(units, "units left out", len(units)):
            run.advance_to(starts[group.name])
            smaller = _mask_unit(program, group, unit)
            moved = find_affected_nodes(program, smaller)
            rest = (
                rest_of(run, position, smaller, moved, starts[group.name])
                for position in range(len(data))
            )
            totals[group.name][unit] = judge.mean_loss(rest)
        return {name: [(scores - judge.whole).float()] for name, scores in totals.items()}


def _mask_unit(program: Program, group: CoupledGroup, unit: int) -> Program:
    """The Program without one unit of a group."""
    return keep(program, {group: [u for u in range(group.units) if u != unit]})


class _Judge:
    """The measure of predictions against calibration tokens.  whole: that of the whole model."""

    def __init__(self, program: Program, data: Sequence[Sample], measure: str) -> None:
        self.data = data
        self.measure = measure
        self.main = main_input(program)
        with torch.no_grad():
            predictions = []
            for sample in data:
                predictions.append(_flatten_logits(select_logits(program(**sample.inputs))))
            if measure == "kl":
                self.reference: list[CachedLogProbs] = [
                    cache_log_probs(logits) for logits in predictions
                ]
            else:
                self.reference = []
        if measure == "kl":
            self.whole = 0.0
        else:
            self.whole = self.mean_loss(predictions)

    def mean_loss(self, predictions: Iterable[Tensor]) -> float:
        """Nats a token, over all sequences."""
        values = torch.cat(
            [self._token_losses(index, logits) for index, logits in enumerate(predictions)]
        ).double()
        if not values.numel():
            raise CalibrationError(
                "the calibration data holds no token to predict: sequences need at least two tokens"
            )
        return float(values.mean())

    def _token_losses(self, at: int, predicted: Tensor) -> Tensor:
        """Loss or KL of every counted token of a sequence, in nats."""
        if self.measure == "kl":
            return self.reference[at].kl(predicted)
        sample = self.data[at]
        wanted = (sample.labels if sample.labels is not None else sample.inputs[self.main]).reshape(
            -1
        )
        if len(wanted) != len(predicted):
            raise CalibrationError(
                f"{len(predicted)} predictions for {len(wanted)} tokens: use "
                f"perplexity{{measure=kl}}"
            )
        return token_losses(predicted[:-1], wanted[1:])[wanted[1:] != IGNORED]


def _flatten_logits(predictions: Tensor) -> Tensor:
    """Logits as [T, V]."""
    return predictions.reshape(-1, predictions.shape[-1])


# What an edit moves, and the rest of a run
def find_affected_nodes(before: Program, after: Program) -> set[str]:
    """Names of the nodes of ``after`` whose value may differ from that of ``before``: those that
    the edit changed or made, and what follows from them.

    Args:
        before: program without the edit.
        after: program with the edit.

    Returns:
        names of nodes.
    """
    known = {node.name: node for node in before.gm.graph.nodes}
    moved: set[str] = set()
    for node in after.gm.graph.nodes:
        old = known.get(node.name)
        if (
            old is None
            or any(n.name in moved for n in node.all_input_nodes)
            or not _is_same_value(before, old, after, node)
        ):
            moved.add(node.name)
    return moved


def _is_same_value(before: Program, old: fx.Node, after: Program, new: fx.Node) -> bool:
    """Whether a node computes the same op of the same arguments in both Programs."""
    if old.op != new.op or _describe_arguments(old) != _describe_arguments(new):
        return False
    if new.op == "get_attr":
        return get_attribute(before.gm, str(old.target)) is get_attribute(after.gm, str(new.target))
    if new.op != "call_function":
        return str(old.target) == str(new.target)
    a = op_name(old) or old.target
    b = op_name(new) or new.target
    return bool(SAME_OP.get(str(a), a) == SAME_OP.get(str(b), b))


def _describe_arguments(node: fx.Node) -> str:
    """The arguments with nodes by name."""
    return str(fx.node.map_arg((node.args, node.kwargs), lambda n: n.name))


def first_moved(before: Program, after: Program) -> str:
    """The first node, weights left out, whose value an edit may move; a node of both programs.

    Args:
        before: program without the edit.
        after: program with the edit.

    Returns:
        name of a node.
    """
    moved = find_affected_nodes(before, after)
    known = {node.name for node in before.gm.graph.nodes}
    names: list[str] = []
    for n in after.gm.graph.nodes:
        if n.name in moved & known and n.op != "get_attr":
            names.append(n.name)
    return names[0]


def rest_of(
    run: Lockstep, sample: int, after: Program, moved: Collection[str], start: str
) -> Tensor:
    """The logits [T, V] of an edited program, from where its values begin to differ from those of
    ``run``, which has been advanced to that node.

    Args:
        run: the program without the edit, advanced to ``start``.
        sample: number of the sequence.
        after: program with the edit.
        moved: names of affected nodes.
        start: name of the first affected node.
    """
    return _flatten_logits(select_logits(_Rest(after, run, sample, moved).finish_from(start)))


class _Rest(fx.Interpreter):
    """The last part of an edited graph, on values that the whole one holds."""

    def __init__(self, after: Program, run: Lockstep, sample: int, moved: Collection[str]) -> None:
        super().__init__(after.gm, garbage_collect_values=True)
        self.extra_traceback = False
        self.run_of_whole = run
        self.sample = sample
        self.moved = moved

    @torch.no_grad()
    def finish_from(self, start: str) -> Any:
        """The model's output."""
        nodes = list(self.graph.nodes)
        position = next(i for i, node in enumerate(nodes) if node.name == start)
        late = set(nodes[position:])
        for node in nodes[:position]:
            if any(user in late for user in node.users) or node.name in self.moved:
                self.env[node] = self._early_value(node)
        for node in nodes[position:-1]:
            self.env[node] = self.run_node(node)
            for done in self.user_to_last_uses.get(node, []):
                self.env.pop(done, None)
        return self.module.graph.process_outputs(self.run_node(nodes[-1]))  # type: ignore[union-attr, operator]

    def _early_value(self, node: fx.Node) -> Any:
        """A value from before the edit's reach; its own copy, since ops behind it may write in
        place."""
        if node.op == "get_attr" or node.name in self.moved:
            return self.run_node(node)
        value = self.run_of_whole.node_value(self.sample, node.name)
        if isinstance(value, Tensor):
            return value.clone()
        return value

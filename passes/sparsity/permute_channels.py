"""Channel permutation before an n:m pattern: the order of units that keeps most of the score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from secateur.graph import FAMILIES, CoupledGroup, Member, Program, coupled_groups
from secateur.graph.edit.permute import explain_fixed, permute
from secateur.graph.errors import EditError
from secateur.graph.pattern import Pattern
from secateur.passes.base import Context, Cost, Pass, PassResult
from secateur.passes.calibration.data import CalibrationError
from secateur.passes.calibration.gram import GramError, inverse_factor
from secateur.passes.calibration.kl import select_logits
from secateur.passes.calibration.lockstep import Lockstep
from secateur.passes.calibration.observe import Reader, observe
from secateur.passes.importance.base import distinct_members
from secateur.passes.importance.moments import pairs_of
from secateur.passes.language.options import OptionError, did_you_mean
from secateur.passes.lowering.layers import linear_layers, on_meta, parameter_values
from secateur.passes.solvers.column_order import ColumnOrder, arrange_columns

ROWS = 32_768  # rows of weights that a search looks at; of more, a random part
DAMPING = 0.01  # of the Gram matrices, in parts of the mean square
GAP = 1e-4  # of the largest output, in float32: more is no rounding
Inputs = dict[tuple[str, int], Tensor]


@dataclass(frozen=True)
class PermuteChannels(Pass):
    """Reorder the units of coupled groups, in every weight at once, for an n:m pattern to come.
    Numerics: close.

    In a row of a weight, n:m chooses among neighbours; which inputs are neighbours is free as far
    as the coupled groups
    say so: what produces, scales and consumes a unit moves with it.  So nothing is gathered at run
    time, and the checkpoint opens everywhere.  Each group is searched for the order that keeps most
    of the score in all weights that consume it, each of which counts alike.  The outputs are
    compared before and after, and must agree.

    pattern: that ``sparsify`` will put on the weights.
    metric: of the sparsify to come: magnitude (W^2), wanda (W^2 times the mean square of the input
        over the calibration tokens) or sparsegpt (W^2 over the diagonal of the inverse of the
        inputs' Gram matrix).
    families: of coupled groups to reorder; with none ([]) all whose order makes a difference.  One
        order of the stream for all layers keeps little more, and served SparseGPT worse than none.

    Source:
        Zhang et al. 2024 (RIA), ICLR 2024, section 4.2, who gather at run time; coupled groups in
        place of that, and the search over all consumers together, are ours.
    """

    name: ClassVar[str] = "permute-channels"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "close"
    bars: ClassVar[Mapping[str, str]] = {
        "sparse": "weights are sparse along inputs that would change places: put permute-channels "
        "before sparsify"
    }

    pattern: str = "2:4"
    metric: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    families: tuple[str, ...] = ("mlp",)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            Pattern.parse(self.pattern)
        except ValueError as error:
            raise OptionError(
                f"{self.name}: pattern={self.pattern!r}: {error}", option="pattern"
            ) from None
        for family in self.families:
            if family not in FAMILIES:
                hint = did_you_mean(family, FAMILIES)
                raise OptionError(
                    f"{self.name}: {family!r} is no family of groups; {hint}", option="families"
                )

    @property
    def needs_data(self) -> bool:
        """Whether the metric reads the inputs of the weights: magnitude does not."""
        return self.metric != "magnitude"

    @property
    def cost(self) -> Cost:
        """Forward passes that gather norms or Gram matrices, for estimates."""
        return Cost(1.5 if self.needs_data else 0.0, 4.0, holds=int(self.metric == "sparsegpt"))

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run; the search needs weights.

        Args:
            program: with dense weights.
        """
        reasons = super().requires(program)
        if on_meta(program):
            reasons.append("the weights are on the meta device: open the model with weights")
        return reasons

    def call(self, program: Program, context: Context) -> PassResult:
        """Search an order for each group and move its units.

        Args:
            program: with dense weights.
            context: with calibration data, where the metric reads it.

        Raises:
            EditError: the outputs change by more than rounding.
            CalibrationError: the Gram matrix of an input cannot be factored.
        """
        pattern = Pattern.parse(self.pattern)
        read, unreadable = self._find_readable(program, pattern)
        for name, reason in unreadable.items():
            context.log.info("permute-channels leaves %s alone: %s", name, reason)
        norms = NORMS[self.metric](program, list(read), context)
        known = parameter_values(program)
        orders = dict[str, ColumnOrder]()
        for group, members in context.progress(list(read.items()), "permute", len(read)):
            score = _squared_scores(members, known, norms, context.seed)
            orders[group.name] = arrange_columns(score, pattern.kept, pattern.of, context.seed)
        order = {}
        for name, column_order in orders.items():
            if column_order.after > column_order.before:
                order[name] = column_order.order
        metrics = {}
        for name, column_order in orders.items():
            metrics[name] = {
                "before": round(column_order.before, 5),
                "after": round(column_order.after, 5),
            }
        figures = {"permuted": len(order), "kept": metrics, "left_alone": unreadable}
        if not order:
            return PassResult(program, False, figures)
        after = permute(program, order)
        figures["difference"] = _check_unchanged(program, after, context)
        return PassResult(after, True, figures)

    def _find_readable(
        self, program: Program, pattern: Pattern
    ) -> tuple[dict[CoupledGroup, list[Member]], dict[str, str]]:
        """The groups to reorder, each with the weights in whose inputs the order makes a
        difference; and why not others that have such weights."""
        dense = _stay_dense(program)
        readable = dict[CoupledGroup, list[Member]]()
        unreadable = dict[str, str]()
        for group in coupled_groups(program):
            members = []
            for m in distinct_members(group):
                consumes = m.role == "consumes" and m.parameter not in dense
                if consumes and list(_unit_positions(m, pattern.of)):
                    members.append(m)
            if not members or (self.families and group.family not in self.families):
                continue
            reason = explain_fixed(program, group)
            if reason:
                unreadable[group.name] = reason
            else:
                readable[group] = members
        return readable, unreadable


def _stay_dense(program: Program) -> set[str]:
    """Weights that ``sparsify`` passes by unless told otherwise: embeddings and the head."""
    layers, refused = linear_layers(program)
    head = set()
    for layer in layers:
        if layer.head or layer.looked_up:
            head.add(layer.parameter)
    return head | {name for name, reason in refused.items() if "looked up" in reason}


def _unit_positions(member: Member, of: int) -> Iterator[Tensor]:
    """Positions [units] of each place inside a unit, where the units stand side by side in whole
    groups of ``of``."""
    units = len(member.positions)
    for run in member.positions.T:
        side_by_side = bool((run.diff() == 1).all())
        if side_by_side and units % of == 0 and int(run[0]) % of == 0:
            yield run


def _squared_scores(
    members: list[Member], known: dict[str, Tensor], norms: Inputs, seed: int
) -> Tensor:
    """Squared scores of all that reads a group: [rows, units] float32, those of each weight with a
    sum of one."""
    generator = torch.Generator().manual_seed(seed)
    parts = list[Tensor]()
    share = ROWS // max(1, sum(len(member.positions.T) for member in members))
    for member in members:
        weight = known[member.parameter].movedim(member.dim, -1).flatten(0, -2).float()
        seen = norms.get((member.parameter, member.dim))
        if seen is None:
            scored = weight.square()
        else:
            scored = weight.square() * seen.to(weight.device, torch.float32)
        total = scored.sum(dtype=torch.float64).clamp_min(1e-30)
        chosen = torch.randperm(len(scored), generator=generator)[: max(share, 256)].to(
            weight.device
        )
        if len(chosen) < len(scored):
            scored = scored[chosen]
        parts += [scored[:, run.to(weight.device)] / total for run in member.positions.T]
    return torch.cat(parts)


def _input_norms(program: Program, groups: list[CoupledGroup], context: Context) -> Inputs:
    """Sum of squares of every input over the calibration tokens, by weight and dim: [inputs]
    float64."""
    pairs = []
    for group in groups:
        pairs += pairs_of(program, group)
    wanted = {(r.node, r.dim): r for _, r in pairs}
    sums = dict[Any, Tensor]()

    def observe_value(reader: Reader, value: Tensor, batch: int) -> None:
        rows = value.movedim(reader.dim, -1).float().flatten(0, -2)
        new = rows.square().sum(0, dtype=torch.float64)
        sums[reader.node, reader.dim] = sums.get((reader.node, reader.dim), 0) + new

    observe(program, context, list(wanted.values()), observe_value)
    norms: Inputs = {}
    for member, reader in pairs:
        key = (member.parameter, member.dim)
        norms[key] = sums[reader.node, reader.dim]
    return norms


def _inverse_curvatures(program: Program, groups: list[CoupledGroup], context: Context) -> Inputs:
    """One over the diagonal of the inverse Gram matrix of every input, by weight and dim: [inputs]
    float32.

    It is what removing a weight costs after the others of its row made up for it.  One matrix is
    held at a time.

    Source:
        Hassibi & Stork 1992 (OBS), eq. 5; damped as in ``sparsify``.
    """
    order = {}
    for position, node in enumerate(program.gm.graph.nodes):
        order[node] = position
    data = context.data or ()
    pairs = []
    for group in groups:
        pairs += pairs_of(program, group)
    run = Lockstep(program, data)
    inverses = dict[tuple[str, int], Tensor]()
    seen = dict[Any, Tensor]()
    for member, reader in sorted(pairs, key=lambda pair: order[pair[1].node]):
        place = (reader.node, reader.dim)
        if place not in seen:
            run.advance_to(reader.node.name)
            gram_KK = torch.zeros(0)
            for sample in range(len(data)):
                rows = (
                    run.node_value(sample, reader.node.name)
                    .movedim(reader.dim, -1)
                    .float()
                    .flatten(0, -2)
                )
                part = (rows.T @ rows).double()
                if not sample:
                    gram_KK = part
                else:
                    gram_KK = gram_KK + part
            try:
                seen[place] = 1 / inverse_factor(gram_KK, DAMPING)[0].square().sum(0)
            except GramError as error:
                raise CalibrationError(
                    f"permute-channels, inputs of {member.parameter}: {error}"
                ) from error
        inverses[member.parameter, member.dim] = seen[place]
    return inverses


NORMS: Mapping[str, Callable[[Program, list[CoupledGroup], Context], Inputs]] = {
    "magnitude": lambda program, groups, context: {},
    "wanda": _input_norms,
    "sparsegpt": _inverse_curvatures,
}


def _check_unchanged(before: Program, after: Program, context: Context) -> float:
    """The largest change of an output, relative to the largest output.

    Raises:
        EditError: it is more than rounding.
    """
    inputs = dict(context.data[0].inputs if context.data else before.source.example_inputs)
    with torch.no_grad():
        logits_before = select_logits(before(**inputs)).double()
        logits_after = select_logits(after(**inputs)).double()
    rounding = max(
        (torch.finfo(p.dtype).eps for _, p in before.named_parameters() if p.is_floating_point()),
        default=0,
    )
    difference = (logits_before - logits_after).abs().max()
    gap = float(difference / logits_before.abs().max().clamp_min(1e-30))
    allowed = max(GAP, 8 * rounding)
    if not gap <= allowed:
        raise EditError(
            f"permute-channels: another order of the channels changes the outputs by {gap:.3g} of "
            "the largest "
            f"(rounding would be {allowed:.1g}): the model treats some channel by its place; name "
            "the families "
            "to reorder (families=[mlp]), or leave the pass out"
        )
    return gap

"""Lowering: the form in which each linear layer runs on a machine, with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from secateur.graph import Program, Step
from secateur.graph.reading import shown
from secateur.passes.base import JSON, Context, Cost, Pass, PassResult
from secateur.passes.lowering.cost import (
    BITS,
    DENSE,
    INT4,
    INT8,
    KINDS,
    SPARSE,
    Machine,
    machine_named,
    weight_bytes,
)
from secateur.passes.lowering.layers import (
    Layer,
    linear_layers,
    not_24,
    on_meta,
    parameter_values,
    sharing_input,
)
from secateur.passes.solvers.integer_grid import Grid, find_grid

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
GAIN = 0.98  # a packed form must be expected to take less than this part of dense


@dataclass(frozen=True)
class LayerPlan:
    """The planned form of one linear layer.

    layer: its weight's name.
    kind: of ``lower_cost.KINDS``.
    shape: [N, K].
    bytes, ms: of the form chosen; dense_* of the dense one.
    measured: ms was measured, not modelled.
    reason: why this form.
    rounds: packing rounds a copy of the weight, so the layer is not what the stock checkpoint
        computes.
    shares: first of the layers that read the same input and are packed in the same form: one
        product serves them all.
    """

    layer: str
    kind: str
    shape: tuple[int, int]
    bytes: int
    dense_bytes: int
    ms: float
    dense_ms: float
    measured: bool
    reason: str
    rounds: bool = False
    shares: str = ""


@dataclass(frozen=True)
class Lowering:
    """The plan of a model.

    layers: in graph order.
    dtype: what the lowered model computes in.
    left_alone: other weights, and why.
    chosen: a ``lower`` pass chose the forms, so that is how the model runs; without one, 2:4
        weights are kept packed for whoever asks for them.
    """

    layers: tuple[LayerPlan, ...]
    dtype: str
    machine: str
    source: str
    batch: int
    left_alone: Mapping[str, str]
    chosen: bool = True

    @property
    def packed_layers(self) -> tuple[LayerPlan, ...]:
        """The layers that do not stay dense."""
        return tuple(row for row in self.layers if row.kind != DENSE)

    def to_json(self) -> JSON:
        """As the history keeps it, with totals."""
        dense = Counter(row.reason.split(":")[0] for row in self.layers if row.kind == DENSE)
        totals = {}
        for name in ("bytes", "dense_bytes"):
            totals[name] = sum(getattr(row, name) for row in self.layers)
        times = {}
        for name in ("ms", "dense_ms"):
            times[name] = round(sum(getattr(row, name) for row in self.layers), 4)
        kinds = dict(Counter(row.kind for row in self.layers))
        return {**asdict(self), "kinds": kinds, "stays_dense": dict(dense), **totals, **times}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Lowering:
        """The plan that ``to_json`` wrote.

        Args:
            value: as returned by ``to_json``.

        Returns:
            the plan.
        """
        names = ("dtype", "machine", "source", "batch", "left_alone", "layers")
        fields = {name: value[name] for name in names} | {"chosen": value.get("chosen", True)}
        try:
            plan: Lowering = TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"{place}: {first['msg']}, found {shown(first['input'])}") from None
        known = {row.layer for row in plan.layers}
        if plan.dtype not in DTYPES:
            raise ValueError(
                f"dtype is {shown(plan.dtype)}, one of {', '.join(DTYPES)} was expected"
            )
        for row in plan.layers:
            if row.kind not in KINDS:
                raise ValueError(f"{shown(row.layer)} has the unknown form {shown(row.kind)}")
            if min(row.shape) < 1 or (row.shares and row.shares not in known):
                raise ValueError(
                    f"{shown(row.layer)} has a shape, or shares an input, that cannot be"
                )
        return plan


@dataclass(frozen=True)
class Lower(Pass):
    """Plan the fastest form of each linear layer: dense, 2:4, int8, int4.  Numerics: exact.

    The Program stays as it is; saving it writes the packed weights beside the stock checkpoint, and
    loading that gives a model that runs on them.  A form is open to a layer if its weight already
    is what the form holds: 2:4 (sparsify), on an integer grid (quantize), or both.

    machine: here (measured), h200, h100, a100, or a JSON file.
    batch: rows that a step multiplies: sequences decoded at once.
    dtype: what the lowered model computes in; same is the parameters' own.
    head: dense leaves the layer whose outputs the model returns; auto treats it as any other; int8
        rounds a copy of it, which the stock checkpoint does not have (lossy).
    smallest: choose the form of the fewest bytes instead of the least time.
    """

    name: ClassVar[str] = "lower"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "exact"

    machine: str = "here"
    batch: Annotated[int, Field(ge=1)] = 1
    dtype: Literal["same", "float32", "float16", "bfloat16"] = "same"
    head: Literal["dense", "auto", "int8"] = "dense"
    smallest: bool = False

    @property
    def cost(self) -> Cost:
        """No forward pass; one byte a parameter for the check of patterns and grids."""
        return Cost(0.0, 1.0)

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run; a plan looks at the weights.

        Args:
            program: to be planned.
        """
        reasons = super().requires(program)
        if on_meta(program):
            reasons.append("the weights are on the meta device: open the model with weights")
        return reasons

    def call(self, program: Program, context: Context) -> PassResult:
        """Plan the forms, log each with its reason, and keep the plan in the history.

        Args:
            program: to be planned.
            context: for progress and log.
        """
        plan = self.make_plan(program, machine_named(self.machine), context)
        for row in plan.layers:
            context.log.info("%s: %s (%s)", row.layer, row.kind, row.reason)
        if not plan.packed_layers:
            context.log.warning(
                "lower packs nothing: %s",
                "; ".join(sorted({row.reason for row in plan.layers})[:3]),
            )
        return PassResult(program, False, {"plan": plan.to_json()})

    def make_plan(
        self, program: Program, machine: Machine, context: Context | None = None
    ) -> Lowering:
        """The plan, without touching the Program.

        Args:
            program: the model.
            machine: that it will run on.
            context: for progress; None: silent.
        """
        context = context or Context()
        layers, refused = linear_layers(program)
        known = parameter_values(program)
        model_dtype = next((known[layer.parameter].dtype for layer in layers), torch.float32)
        dtype = DTYPES.get(self.dtype, model_dtype)
        rows: dict[str, LayerPlan] = {}
        groups = sharing_input(layers)
        for sharing in context.progress(groups, "lower", len(groups)):
            planned = []
            for member in sharing:
                planned.append(self._plan_layer(member, known[member.parameter], machine, dtype))
            rows |= {row.layer: row for row in _unify_shared_inputs(sharing, planned)}
        ordered = tuple(rows[layer.parameter] for layer in layers)
        return Lowering(
            ordered,
            str(dtype).removeprefix("torch."),
            machine.name,
            machine.source,
            self.batch,
            refused,
        )

    def _plan_layer(
        self, layer: Layer, weight: Tensor, machine: Machine, dtype: torch.dtype
    ) -> LayerPlan:
        """The form with the least time (or bytes) of those open to one layer."""
        grid = find_grid(weight)
        forms, closed = self._open_forms(layer, weight, grid)
        times = {
            kind: machine.milliseconds(kind, *layer.shape, self.batch, dtype)
            for kind in (DENSE, *forms)
        }
        sizes = {kind: weight_bytes(kind, *layer.shape, dtype) for kind in times}
        need = {kind: float(sizes[kind]) if self.smallest else times[kind][0] for kind in times}
        best = min(need, key=lambda kind: need[kind])
        if need[best] < GAIN * need[DENSE]:
            kind = best
        else:
            kind = DENSE
        return LayerPlan(
            layer=layer.parameter,
            kind=kind,
            shape=layer.shape,
            bytes=sizes[kind],
            dense_bytes=sizes[DENSE],
            ms=round(times[kind][0], 5),
            dense_ms=round(times[DENSE][0], 5),
            measured=times[kind][1] and times[DENSE][1],
            reason=_explain_choice(kind, forms, closed, times, self.smallest),
            rounds=kind == INT8 and grid is None,
        )

    def _open_forms(self, layer: Layer, weight: Tensor, grid: Grid | None) -> tuple[list[str], str]:
        """The packed forms open to a layer, and why others are not."""
        if layer.head and self.head == "dense":
            return [], "the model returns its outputs, and head=dense leaves it"
        if layer.looked_up and self.head != "int8":
            return [], "it is the table of embeddings, too"
        if layer.head and self.head == "int8" and grid is None:
            return [INT8], "a rounded copy"
        not_sparse = not_24(weight)
        plain = None
        if grid is not None:
            plain = {8: INT8, 4: INT4}.get(grid.bits)
        forms = list[str]()
        reasons = list[str]()
        if not_sparse is None and plain is not None:
            forms.append(f"{SPARSE}+{plain}")
        if not_sparse is None:
            forms.append(SPARSE)
        else:
            reasons.append(f"not 2:4: {not_sparse}")
        if plain is not None:
            forms.append(plain)
        if grid is None:
            reasons.append("not on an integer grid")
        return forms, "; ".join(reasons)


def _explain_choice(
    kind: str,
    found: Iterable[str],
    closed: str,
    times: Mapping[str, tuple[float, bool]],
    smallest: bool,
) -> str:
    """The reason of a plan: the times of the open forms, or why none is open."""
    word = {True: "measured", False: "expected"}
    listed = ", ".join(
        f"{name} {ms:.4f} ms {word[measured]}" for name, (ms, measured) in times.items()
    )
    if not list(found):
        return closed
    if kind == DENSE:
        return f"no packed form is {'smaller' if smallest else 'faster'}: {listed}"
    return listed


def _unify_shared_inputs(sharing: list[Layer], rows: list[LayerPlan]) -> list[LayerPlan]:
    """Layers of one input in one packed form, with or without biases alike, share one product."""
    first: dict[tuple[str, bool], str] = {}
    row_unified = []
    for layer, row in zip(sharing, rows, strict=True):
        key = (row.kind, layer.bias is None)
        if row.kind != DENSE and not layer.head:
            leader = first.setdefault(key, row.layer)
        else:
            leader = ""
        row_unified.append(LayerPlan(**{**vars(row), "shares": leader}))
    count = Counter(row.shares for row in row_unified)
    unified: list[LayerPlan] = []
    for row in row_unified:
        unified.append(
            LayerPlan(**{**vars(row), "shares": row.shares if count[row.shares] > 1 else ""})
        )
    return unified


def last_lowering(history: Iterable[Step]) -> Lowering | None:
    """The plan of the last ``lower`` of a history, or None.

    Args:
        history: of a program.
    """
    plans = []
    for step in history:
        if step.name == Lower.name:
            plans.append(step.figures["plan"])
    if plans:
        return Lowering.from_json(plans[-1])
    return None


def plan_as_pruned(program: Program) -> Lowering:
    """Every weight that a pass made sparse in the packed form, if it is 2:4 as it stands (1:2 and
    1:4 are, too); for a program that was not lowered.  Times are zero: nobody asked how long a
    product takes.

    Args:
        program: with or without sparse weights.
    """
    layers = []
    for layer in linear_layers(program)[0]:
        if layer.parameter in program.sparse:
            layers.append(layer)
    known = parameter_values(program)
    dtype = next(
        (t for t in (known[layer.parameter].dtype for layer in layers) if t in DTYPES.values()),
        torch.float32,
    )
    rows = list[LayerPlan]()
    for sharing in sharing_input(layers):
        rows += _unify_shared_inputs(sharing, _as_pruned(sharing, known, dtype))
    return Lowering(tuple(rows), str(dtype).removeprefix("torch."), "", "", 0, {}, chosen=False)


def _as_pruned(
    layers: Iterable[Layer], known: Mapping[str, Tensor], dtype: torch.dtype
) -> list[LayerPlan]:
    """Plans of layers in the form that pruning left them in."""
    rows = []
    for layer in layers:
        weight = known[layer.parameter]
        dense = weight_bytes(DENSE, *layer.shape, dtype)
        closed = "it is the table of embeddings, too" if layer.looked_up else not_24(weight)
        closed = f"its weight is {weight.dtype}" if weight.dtype != dtype else closed
        if closed:
            kind = DENSE
            reason = closed
        else:
            kind = SPARSE
            reason = "2:4 as it was pruned"
        size = weight_bytes(kind, *layer.shape, dtype)
        rows.append(
            LayerPlan(layer.parameter, kind, layer.shape, size, dense, 0.0, 0.0, False, reason)
        )
    return rows


def bits_of(row: LayerPlan) -> int | None:
    """8, 4, or None for a form of floats.

    Args:
        row: plan of one layer.
    """
    return BITS[row.kind]

"""Which weights become sparse under a budget of bytes: those that the model misses least, chosen exactly.

Dims: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.graph import Pattern, Program, Share
from secateur.graph.errors import EditError
from secateur.passes.allocation.solve import Size, solve
from secateur.passes.base import Context
from secateur.passes.journal import Journal
from secateur.passes.lower_layers import Layer, sharing_input, weights
from secateur.passes.quality import Kept, logits
from secateur.passes.quality import kept as kept_of
from secateur.passes.repair_run import Lockstep
from secateur.passes.sparsify_layer import Recipe, solved

Budget = float | int
Damage = Literal["kl", "output"]
JUDGED = 4  # calibration sequences on which the KL is measured
JUDGE = "budget "


def check_budget(value: Any) -> Any:
    """A part (a float up to 1) or a number of bytes.  Raises: ValueError: neither."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and (not number or value <= 0 or (isinstance(value, float) and value > 1)):
        raise ValueError(f"{value!r}: expected a part of the dense bytes (0.7) or a number of bytes (90000000)")
    return value


def packed_bytes(weight: Tensor, kind: Pattern | Share) -> int:
    """Bytes of a sparse weight: the values that stay, and a bit for each place."""
    rows, columns = weight.shape
    groups = columns // kind.group(columns)
    return rows * groups * kind.kept_of(columns) * weight.itemsize + -(-weight.numel() // 8)


def chosen_under(
    budget: Budget, damage: Damage, recipe: Recipe, program: Program, layers: list[Layer], context: Context
) -> tuple[list[Layer], dict[str, Any]]:
    """The layers that become sparse so that all take at most the budget, and the plan as figures.

    Each one's damage is measured alone in the dense model, in the form the recipe gives it there; the sum over those
    that become sparse is the least that the budget allows.
    Raises: EditError: even all of them sparse take more than the budget.
    """
    known = weights(program)
    dense = {one.parameter: known[one.parameter].nbytes for one in layers}
    packed = {one.parameter: packed_bytes(known[one.parameter], recipe.kind) for one in layers}
    limit = budget if isinstance(budget, int) else budget * sum(dense.values())
    if sum(packed.values()) > limit:
        raise EditError(
            f"sparsify: all {len(layers)} weights sparse take {sum(packed.values()):,} bytes, the budget is "
            f"{int(limit):,}: give a larger one, or a sparser pattern"
        )
    hurt = _damages(damage, recipe, program, layers, context)
    menu = [[Size(1, dense[n], 0.0), Size(0, packed[n], max(0.0, hurt[n]))] for n in dense]
    picks = dict(zip(dense, solve(menu, limit), strict=True))
    sparse = [one for one in layers if picks[one.parameter]]
    taken = sum(packed[n] if picks[n] else dense[n] for n in dense)
    figures = {
        "budget_bytes": int(limit),
        "bytes": taken,
        "dense_bytes": sum(dense.values()),
        "kept_dense": [name for name, pick in picks.items() if not pick],
        "damages": {name: round(value, 8) for name, value in hurt.items()},
    }
    return sparse, {"plan": figures}


def _damages(
    damage: Damage, recipe: Recipe, program: Program, layers: list[Layer], context: Context
) -> dict[str, float]:
    """By name: KL in nats a token, or squared output error relative to the outputs' squares."""
    data, journal, known = context.data or (), Journal(context.resume), weights(program)
    run, found = Lockstep(program, data), dict[str, float]()
    judged = list(range(min(JUDGED, len(data))))
    expected: dict[int, Kept] = {}
    groups = sharing_input(layers)
    for sharing in context.progress(groups, "measure damage", len(groups)):
        kept = journal.read(JUDGE + sharing[0].parameter)
        if kept is None or set(kept.facts) != {one.parameter for one in sharing}:
            run.advance(sharing[0].node.name)
            named = {one.parameter: known[one.parameter] for one in sharing}
            made = solved(recipe, named, run, sharing[0].x.name, len(data))
            facts = {}
            for one in sharing:
                if damage == "output":
                    facts[one.parameter] = (made[one.parameter].error or 0.0) ** 2
                    continue
                if not expected:
                    expected = {at: kept_of(_flat(run.finish(at, {}, []))) for at in judged}
                facts[one.parameter] = _kl(run, one, made[one.parameter].weight, expected)
            journal.write(JUDGE + sharing[0].parameter, facts=facts)
        else:
            facts = kept.facts
        found |= facts
    return found


def _kl(run: Lockstep, layer: Layer, value: Tensor, expected: Mapping[int, Kept]) -> float:
    """KL(dense || with this weight alone sparse), the mean over the judged tokens."""
    found = []
    for sample, wanted in expected.items():
        output = run.finish(sample, {str(layer.chain[0].target): value}, [layer.chain])
        found.append(wanted.kl(_flat(output)))
    return float(torch.cat(found).double().mean())


def _flat(output: Any) -> Tensor:
    """Logits [T, V]."""
    found = logits(output)
    return found.reshape(-1, found.shape[-1])

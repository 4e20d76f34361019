"""Choice of the weights that become sparse under a budget of bytes: an exact knapsack.

Dims: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.graph import Pattern, Program, Share
from secateur.graph.errors import EditError
from secateur.passes.base import JSON, Context
from secateur.passes.calibration.kl import CachedLogProbs, cache_log_probs, select_logits
from secateur.passes.calibration.lockstep import Lockstep
from secateur.passes.lowering.layers import Layer, parameter_values, sharing_input
from secateur.passes.solvers.knapsack import SizeOption, solve_knapsack
from secateur.passes.sparsity.layer import LayerRecipe, sparsify_layers
from secateur.passes.storage.journal import Journal

Budget = float | int
Damage = Literal["kl", "output"]
JUDGED = 4  # calibration sequences on which the KL is measured
JUDGE = "budget "


def check_budget(value: Any) -> Any:
    """A part (a float up to 1) or a number of bytes.

    Args:
        value: of the option.

    Raises:
        ValueError: neither.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and (not number or value <= 0 or (isinstance(value, float) and value > 1)):
        raise ValueError(
            f"{value!r}: expected a part of the dense bytes (0.7) or a number of bytes (90000000)"
        )
    return value


def count_packed_bytes(weight: Tensor, kind: Pattern | Share) -> int:
    """Bytes of a sparse weight: the values that stay, and a bit for each place.

    Args:
        weight: [N, K].
        kind: pattern or share of zeros.
    """
    rows, columns = weight.shape
    groups = columns // kind.group_size(columns)
    return rows * groups * kind.kept_per_group(columns) * weight.itemsize + -(-weight.numel() // 8)


def choose_layers(
    budget: Budget,
    damage: Damage,
    recipe: LayerRecipe,
    program: Program,
    layers: list[Layer],
    context: Context,
) -> tuple[list[Layer], JSON]:
    """The layers that become sparse so that all take at most the budget, and the plan as figures.

    Each one's damage is measured alone in the dense model, in the form the recipe gives it there;
    the sum over those that become sparse is the least that the budget allows.

    Args:
        budget: bytes, or part of the dense bytes.
        damage: how damage is measured.
        recipe: how one layer is made sparse.
        program: the model.
        layers: to choose from.
        context: with calibration data.

    Raises:
        EditError: even all of them sparse take more than the budget.
    """
    known = parameter_values(program)
    dense = {}
    packed = {}
    for layer in layers:
        dense[layer.parameter] = known[layer.parameter].nbytes
        packed[layer.parameter] = count_packed_bytes(known[layer.parameter], recipe.kind)
    limit = budget if isinstance(budget, int) else budget * sum(dense.values())
    if sum(packed.values()) > limit:
        raise EditError(
            f"sparsify: all {len(layers)} weights sparse take {sum(packed.values()):,} bytes, "
            "the budget is "
            f"{int(limit):,}: give a larger one, or a sparser pattern"
        )
    hurt = _measure_damages(damage, recipe, program, layers, context)
    menu = []
    for n in dense:
        menu.append([SizeOption(1, dense[n], 0.0), SizeOption(0, packed[n], max(0.0, hurt[n]))])
    picks = dict(zip(dense, solve_knapsack(menu, limit), strict=True))
    sparse = []
    for layer in layers:
        if picks[layer.parameter]:
            sparse.append(layer)
    taken = sum(packed[n] if picks[n] else dense[n] for n in dense)
    figures = {
        "budget_bytes": int(limit),
        "bytes": taken,
        "dense_bytes": sum(dense.values()),
        "kept_dense": [name for name, pick in picks.items() if not pick],
        "damages": {name: round(value, 8) for name, value in hurt.items()},
    }
    return sparse, {"plan": figures}


def _measure_damages(
    damage: Damage, recipe: LayerRecipe, program: Program, layers: list[Layer], context: Context
) -> dict[str, float]:
    """By name: KL in nats a token, or squared output error relative to the outputs' squares."""
    data = context.data or ()
    journal = Journal(context.resume)
    known = parameter_values(program)
    run = Lockstep(program, data)
    damages = dict[str, float]()
    judged = list(range(min(JUDGED, len(data))))
    expected: dict[int, CachedLogProbs] = {}
    groups = sharing_input(layers)
    for sharing in context.progress(groups, "measure damage", len(groups)):
        entry = journal.read(JUDGE + sharing[0].parameter)
        if entry is None or set(entry.facts) != {layer.parameter for layer in sharing}:
            run.advance_to(sharing[0].node.name)
            named = {}
            for layer in sharing:
                named[layer.parameter] = known[layer.parameter]
            solutions = sparsify_layers(recipe, named, run, sharing[0].x.name, len(data))
            facts = {}
            for layer in sharing:
                if damage == "output":
                    facts[layer.parameter] = (solutions[layer.parameter].error or 0.0) ** 2
                    continue
                if not expected:
                    for index in judged:
                        logits_TV = _flatten_logits(run.finish_sample(index, {}, []))
                        expected[index] = cache_log_probs(logits_TV)
                facts[layer.parameter] = _divergence_of_layer(
                    run, layer, solutions[layer.parameter].weight, expected
                )
            journal.write(JUDGE + sharing[0].parameter, facts=facts)
        else:
            facts = entry.facts
        damages |= facts
    return damages


def _divergence_of_layer(
    run: Lockstep, layer: Layer, value: Tensor, expected: Mapping[int, CachedLogProbs]
) -> float:
    """KL(dense || with this weight alone sparse), the mean over the judged tokens."""
    divergences = []
    for sample, wanted in expected.items():
        output = run.finish_sample(sample, {str(layer.chain[0].target): value}, [layer.chain])
        divergences.append(wanted.kl(_flatten_logits(output)))
    return float(torch.cat(divergences).double().mean())


def _flatten_logits(output: Any) -> Tensor:
    """Logits [T, V]."""
    logits = select_logits(output)
    return logits.reshape(-1, logits.shape[-1])

"""Prune a zoo model and compare with the oracle."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zoo.models import NAMED, PLAIN, perturb, tiny_model

import secateur.graph as graph
from secateur.graph import CoupledGroup, Program

ATTENTION = {"hidden", "mlp", "kv_heads", "head_dim"}
_FAMILIES = {
    "mixtral": ATTENTION | {"experts", "query_heads"},
    "qwen3_moe": ATTENTION | {"experts", "query_heads"},
    "deepseek_v3": ATTENTION | {"latent"},
    "conv_net": {"channels"},
}


@dataclass(frozen=True)
class Figures:
    """eager: largest difference of graph and module.  difference: of pruned and masked, relative to
    the largest logit (at least 1).  moved: how far the edit moves the output.  families: those with
    an unlocked group."""

    eager: float
    difference: float
    moved: float
    families: set[str]
    conflicts: list[str]


def expected_families(kind: str) -> set[str]:
    """The families that must be free in an architecture."""
    return _FAMILIES.get(kind, ATTENTION)


@functools.lru_cache(maxsize=40)
def captured(kind: str) -> tuple[nn.Module, Program]:
    """The tiny model of an architecture and its Program, built once."""
    if kind in PLAIN:
        maker, example = PLAIN[kind]
        torch.manual_seed(0)
        model = perturb(maker())
        return model, graph.capture(model, example)
    model = tiny_model(kind)
    return model, graph.capture(model)


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def other_inputs(program: Program, seed: int = 1) -> dict[str, Any]:
    """Inputs of another batch and length where those are free, of the captured sizes where they are
    not."""
    generator = torch.Generator().manual_seed(seed)
    sizes = program.gm.meta["call"]["sizes"]
    inputs = {}
    for name, value in program.source.example_inputs.items():
        if isinstance(value, Tensor):
            shape = [fixed or free for fixed, free in zip(sizes[name], (3, 9), strict=False)]
            shape += sizes[name][2:]
            whole = not value.is_floating_point()
            inputs[name] = (
                torch.randint(3, 100, shape, generator=generator) if whole else torch.randn(shape)
            )
        else:
            inputs[name] = value
    return inputs


def random_edit(
    groups: list[CoupledGroup], seed: int = 0, drop: float = 0.3
) -> dict[CoupledGroup, Tensor]:
    """Keep a random part of the units of each group, at least what must stay; for each outer unit
    another part."""
    generator = torch.Generator().manual_seed(seed)
    edit = {}
    for group in groups:
        keep = max(group.min_units, group.units - max(1, int(group.units * drop)))
        columns = [
            torch.randperm(group.units, generator=generator)[:keep]
            for _ in range(group.coordinates)
        ]
        edit[group] = torch.stack(columns, 1) if group.outer is not None else columns[0]
    return edit


@torch.no_grad()
def compare(
    program: Program, edit: dict[CoupledGroup, Tensor], inputs: dict[str, Any]
) -> tuple[float, Tensor]:
    """Relative difference of the pruned Program and the masked one, and the masked output."""
    pruned = logits(graph.keep(program, edit)(**inputs))
    masked = logits(graph.masked_call(program, edit, **inputs))
    return float((pruned - masked).abs().max()) / max(1.0, float(masked.abs().max())), masked


@torch.no_grad()
def check_all_at_once(kind: str) -> Figures:
    """Cut 30 % of every unlocked group of an architecture at once."""
    model, program = captured(kind)
    groups = graph.coupled_groups(program)
    free = [g for g in groups if not g.locked]
    inputs = other_inputs(program)
    whole = logits(program(**inputs))
    difference, masked = compare(program, random_edit(free), inputs)
    graph.verify(graph.keep(program, random_edit(free)))
    return Figures(
        eager=float((whole - logits(model(**inputs))).abs().max()),
        difference=difference,
        moved=float((masked - whole).abs().max()),
        families={g.family for g in free},
        conflicts=graph.analyse(program).space.conflicts,
    )


__all__ = [
    "NAMED",
    "PLAIN",
    "captured",
    "check_all_at_once",
    "compare",
    "logits",
    "other_inputs",
    "random_edit",
]

"""Faults planted in the rules and in the groups: each one must be caught by the oracle, the
verifier or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from zoo.checks import captured, compare, logits, other_inputs, random_edit
from zoo.models import perturb

import secateur.graph as graph
from secateur.graph import Program
from secateur.graph.axes.atoms import Atom, make_concatenation, make_product
from secateur.graph.axes.rules import RULES, contraction
from secateur.graph.axes.rules.base import Op


def _forgets_bias(op: Op) -> Any:
    x, weight = op.axes(op["input"]), op.axes(op["weight"])
    op.space.unify(x[-1], weight[-1])
    return [*x[:-1], weight[0]]


def _contracts_the_wrong_axis(op: Op) -> Any:
    x, weight = op.axes(op["input"]), op.axes(op["weight"])
    return [*x[:-1], weight[0]]


def _swaps_factors(op: Op) -> Any:
    """A factored view that ties nothing to the axis it came from."""
    out = RULES_BEFORE["aten::view"](op)
    return [*out[:-2], Atom(out[-2].size), Atom(out[-1].size)] if len(out) == 4 else out


def _shifts_slices(op: Op) -> Any:
    """A slice that is thought to start at the end of the axis."""
    axes = op.axes(op["self"])
    dim = op.dim(len(axes))
    source, length = axes[dim], op.sizes()[dim]
    if length == source.size or op.is_data(source) or op.state.is_symbolic(op.value.shape[dim]):
        return RULES_BEFORE["aten::slice"](op)
    parts = op.space.split_concat(source, [source.size - length, length])
    assert parts is not None
    start = op["start"] or 0
    axes[dim] = parts[1] if start == 0 else make_concatenation([parts[1]])
    return axes


def _reverses_splits(op: Op) -> Any:
    return RULES_BEFORE["aten::split"](op)[::-1]


def _reverses_cat(op: Op) -> Any:
    out = RULES_BEFORE["aten::cat"](op)
    dim = op.dim(len(out))
    parts = [op.axes(x)[dim] for x in op["tensors"]]
    if not op.is_data(out[dim]):
        out[dim] = make_concatenation(parts[::-1])
    return out


def _query_major_heads(op: Op) -> Any:
    """Grouped queries laid out as (query, group) instead of (group, query)."""
    axes = op.axes(op["self"])
    out = RULES_BEFORE["aten::reshape"](op)
    if len(axes) == 5 and len(out) == 4:
        out[1] = make_product([axes[2], axes[1]])
    return out


def _never_resizes(*_: Any, **__: Any) -> None:
    return None


def _free_norm(op: Op) -> Any:
    """A norm whose weight is not tied to its input."""
    return op.axes(op["input"])


RULES_BEFORE: dict[str, Callable[[Op], Any]] = dict(RULES)
RULE_FAULTS: dict[str, tuple[str, Callable[[Op], Any], str]] = {
    "linear forgets its bias": ("aten::linear", _forgets_bias, "nano_gpt"),
    "linear contracts nothing": ("aten::linear", _contracts_the_wrong_axis, "llama"),
    "view loses the order of factors": ("aten::view", _swaps_factors, "llama"),
    "slices start elsewhere": ("aten::slice", _shifts_slices, "llama"),
    "split is reversed": ("aten::split", _reverses_splits, "nano_gpt"),
    "cat is reversed": ("aten::cat", _reverses_cat, "joined"),
    "query heads come before groups": ("aten::reshape", _query_major_heads, "llama"),
    "norm leaves its weight": ("aten::layer_norm", _free_norm, "nano_gpt"),
}


class Joined(torch.nn.Module):
    """Two branches of different width, joined and read by one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = (
            torch.nn.Linear(6, 8),
            torch.nn.Linear(6, 12),
            torch.nn.Linear(20, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.left(x).relu(), self.right(x).tanh()], -1))


def _program(kind: str) -> Program:
    """A Program of its own, so that an analysis by sound rules is not reused."""
    return (
        graph.capture(perturb(Joined()), torch.randn(2, 6))
        if kind == "joined"
        else captured(kind)[1].replace()
    )


def _is_caught(program: Program) -> bool:
    """Whether grouping, verifying, running or comparing any unlocked group tells that something is
    wrong."""
    try:
        groups = [g for g in graph.coupled_groups(program) if not g.locked]
    except graph.SecateurError:
        return True
    inputs = other_inputs(program)
    for group in groups:
        edit = random_edit([group])
        try:
            graph.verify(graph.keep(program, edit))
            difference, _ = compare(program, edit, inputs)
        except (graph.SecateurError, RuntimeError):
            return True
        if difference > 1e-4:
            return True
    return False


@pytest.mark.parametrize("fault", RULE_FAULTS)
def test_a_wrong_rule_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong, kind = RULE_FAULTS[fault]
    program = _program(kind)
    monkeypatch.setitem(RULES, name, wrong)
    assert _is_caught(program)


def test_the_same_models_pass_with_sound_rules() -> None:
    for kind in {kind for _, _, kind in RULE_FAULTS.values()}:
        assert not _is_caught(_program(kind))


def test_a_constant_that_is_not_resized_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program("nano_gpt")
    monkeypatch.setattr(Op, "resize_list", _never_resizes)
    assert _is_caught(program)


def test_a_scale_that_follows_the_width_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program("nano_gpt")
    monkeypatch.setattr(contraction, "_pin_scale", _never_resizes)
    assert _is_caught(program)


def test_a_split_that_is_not_rewritten_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program("nano_gpt")
    monkeypatch.setattr(Op, "add_rewrite", _never_resizes)
    assert _is_caught(program)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen3", "mixtral"])
def test_every_misplaced_member_is_caught(kind: str) -> None:
    """Mutation test: in one member at a time the units sit one position off, in the pruned model
    and in the mask."""
    _, program = captured(kind)
    inputs = other_inputs(program)
    survivors, tried = [], 0
    for group in (g for g in graph.coupled_groups(program) if not g.locked and g.units >= 4):
        edit = random_edit([group], drop=0.25)
        pruned = graph.keep(program, edit)
        for member in group.members[:6]:
            if len(group.members) + len(group.buffers) < 2:
                continue
            differs = _differs_when_rolled(program, pruned, group, member, edit, inputs)
            tried += differs is not None
            if differs is False:
                survivors.append((group.name, member.parameter, member.dim))
    assert tried >= 10
    assert not survivors


@torch.no_grad()
def _differs_when_rolled(
    program: Program, pruned: Program, group: Any, member: Any, edit: Any, inputs: dict[str, Any]
) -> bool | None:
    """Slice one parameter of the pruned program one position off and compare with the sound mask;
    None: no mutant."""
    keep = torch.zeros(
        program.gm.get_parameter(member.parameter).shape[member.dim], dtype=torch.bool
    )
    dropped = [u for u in range(group.units) if u not in edit[group]]
    keep[:] = True
    keep[member.positions[dropped].flatten()] = False
    rolled = keep.roll(1)
    if bool((rolled == keep).all()):
        return None
    full = program.gm.get_parameter(member.parameter)
    now = pruned.gm.get_parameter(member.parameter)
    before = now.detach().clone()
    wrong = full.detach()
    for dim, mask in _masks(program, group, member.parameter, edit, {member.dim: rolled}).items():
        wrong = wrong.index_select(dim, mask.nonzero()[:, 0])
    now.copy_(wrong)
    got = pruned(**inputs)
    now.copy_(before)
    want = graph.masked_call(program, edit, **inputs)
    return float((logits(got) - logits(want)).abs().max()) > 1e-4


def _masks(
    program: Program, group: Any, parameter: str, edit: Any, replaced: dict[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Kept positions by dim of one parameter, with one dim's replaced."""
    masks = dict(replaced)
    dropped = [u for u in range(group.units) if u not in edit[group]]
    for member in group.members:
        if member.parameter == parameter and member.dim not in masks:
            mask = torch.ones(
                program.gm.get_parameter(parameter).shape[member.dim], dtype=torch.bool
            )
            mask[member.positions[dropped].flatten()] = False
            masks[member.dim] = mask
    return masks

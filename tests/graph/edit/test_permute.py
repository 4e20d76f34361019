"""Another order of units: the same function, the same record of what was pruned, and what must keep
its order."""

from __future__ import annotations

import pytest
import torch
from zoo.checks import captured, logits, other_inputs

from secateur.graph import Program, coupled_groups, keep, verify, with_parameters
from secateur.graph.edit.permute import explain_fixed, permute
from secateur.graph.errors import EditError
from secateur.graph.pattern import Pattern
from secateur.graph.sparse import Sparse

KINDS = ["llama", "gpt2", "mixtral", "nano_gpt"]
MORE = ["deepseek_v3", "t5", "gemma2", "phi3", "qwen3", "bloom", "falcon", "bert"]
MLP = "mlp@model.layers.0.mlp"


def orders(program: Program, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random order of every group that may have one."""
    generator = torch.Generator().manual_seed(seed)
    free = [g for g in coupled_groups(program) if not explain_fixed(program, g)]
    return {g.name: torch.randperm(g.units, generator=generator) for g in free}


def run(program: Program, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return logits(program(**inputs))


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]
)
def test_every_group_of_every_architecture_at_once(kind: str) -> None:
    _, program = captured(kind)
    wanted = orders(program)
    after = permute(program, wanted)
    verify(after)
    inputs = other_inputs(program)
    torch.testing.assert_close(run(after, inputs), run(program, inputs), atol=1e-5, rtol=1e-4)
    moved = [
        n
        for n, p in after.named_parameters()
        if not torch.equal(p, dict(program.named_parameters())[n])
    ]
    assert len(moved) > len(wanted) / 2
    assert [g.name for g in coupled_groups(after)] == [g.name for g in coupled_groups(program)]


def test_each_member_moves_its_own_units() -> None:
    _, program = captured("llama")
    order = torch.randperm(96)
    before, after = (dict(p.named_parameters()) for p in (program, permute(program, {MLP: order})))
    for name in ("gate_proj", "up_proj"):
        name = f"model.layers.0.mlp.{name}.weight"
        assert torch.equal(after[name], before[name][order])
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(after[down], before[down][:, order])
    same = [name for name in before if ".0.mlp." not in name]
    assert all(after[name] is before[name] for name in same)


def test_back_again_is_bit_equal() -> None:
    _, program = captured("llama")
    wanted = orders(program, 3)
    back = permute(
        permute(program, wanted), {name: order.argsort() for name, order in wanted.items()}
    )
    assert all(
        torch.equal(p, dict(program.named_parameters())[name])
        for name, p in back.named_parameters()
    )


def test_the_dense_program_and_scores_follow() -> None:
    """After a cut, position i of the pruned model still is the kept position i of the dense one."""
    _, dense = captured("llama")
    cut = keep(dense, {MLP: [5, 7, 8, 20, 50, 60, 70, 90]})
    cut = cut.replace(scores={MLP: torch.arange(8.0)})
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    after = permute(cut, {MLP: order})
    assert after.cut is not None and cut.cut is not None
    assert torch.equal(after.scores[MLP], order.float())
    assert torch.equal(after.cut.kept[MLP], cut.cut.kept[MLP])
    down = "model.layers.0.mlp.down_proj.weight"
    pruned, whole = (dict(p.named_parameters())[down] for p in (after, after.cut.dense))
    assert torch.equal(whole[:, after.cut.kept[MLP]], pruned)
    inputs = other_inputs(dense)
    torch.testing.assert_close(
        run(after.cut.dense, inputs), run(dense, inputs), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(run(after, inputs), run(cut, inputs), atol=1e-5, rtol=1e-4)


def test_the_order_that_there_is_changes_nothing() -> None:
    _, program = captured("llama")
    after = permute(program, {g.name: torch.arange(g.units) for g in coupled_groups(program)})
    assert after.gm is program.gm


def test_inputs_of_a_sparse_weight_stay_and_its_rows_move_with_what_was_removed() -> None:
    _, program = captured("llama")
    up, down = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight")
    weight, pattern, order = (
        dict(program.named_parameters())[up].detach(),
        Pattern(2, 4),
        torch.randperm(96),
    )
    mask = pattern.select_mask(weight.abs())
    kept, removed = torch.where(mask, weight, 0), torch.where(mask, 0, weight)
    sparse = with_parameters(program, {up: kept}).replace(
        sparse={up: Sparse(pattern, removed=removed)}
    )
    after = permute(sparse, {MLP: order})
    verify(after)
    found = after.sparse[up].removed
    assert found is not None and torch.equal(found, removed[order])
    with pytest.raises(EditError, match="reorder channels first"):
        permute(sparse.replace(sparse={down: Sparse(pattern)}), {MLP: order})


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ({"mlp@nowhere": torch.arange(96)}, "no group 'mlp@nowhere'"),
        ({MLP: torch.zeros(96, dtype=torch.int64)}, "every unit 0..95 once"),
        ({MLP: torch.arange(95)}, "every unit 0..95 once"),
        ({"head_dim@model.layers": torch.arange(8).flip(0)}, "inv_freq runs along it"),
        ({"outputs@lm_head": torch.arange(128).flip(0)}, "keeps its order"),
    ],
)
def test_refusals(order: dict[str, torch.Tensor], reason: str) -> None:
    _, program = captured("llama")
    with pytest.raises(EditError, match=reason):
        permute(program, order)

"""Folding heads: the paper's pairs, identities on toys, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from secateur.graph import Program, coupled_groups, keep, with_parameters
from secateur.graph.errors import EditError
from secateur.passes import PruneWidth
from secateur.passes.width.fold_heads import fold_heads, fold_pairs

ByKind = Callable[[str], Program]


@pytest.mark.parametrize(
    ("heads", "kept", "pairs"),
    [
        (
            6,
            4,
            [(2, 5), (3, 4)],
        ),  # of six by falling score: the third and fourth take the sixth and fifth
        (4, 2, [(0, 3), (1, 2)]),
        (5, 4, [(3, 4)]),
    ],
)
def test_the_pairs_of_the_paper(heads: int, kept: int, pairs: list[tuple[int, int]]) -> None:
    assert fold_pairs(torch.arange(heads, 0, -1.0), kept) == pairs
    back = [(heads - 1 - i, heads - 1 - j) for i, j in pairs]
    assert fold_pairs(torch.arange(heads) + 1.0, kept) == back


def parts(program: Program, name: str) -> Tensor:
    return dict(program.named_parameters())[name].detach()


def heads_of(program: Program, family: str) -> list[str]:
    return [group.name for group in coupled_groups(program) if group.family == family]


def test_queries_alone_under_grouped_queries(llama: Program) -> None:
    names = heads_of(llama, "query_heads")
    scored = llama.replace(scores={name: torch.tensor([1.0, 2.0]) for name in names})
    plain = PruneWidth(query_heads=1)(scored)
    folded = PruneWidth(query_heads=1, fold_heads=True)(scored)
    wq = parts(llama, "model.layers.0.self_attn.q_proj.weight").view(
        2, 2, 16, 64
    )  # [kv head, query head, 16, 64]
    expected = (2 * wq[:, 1] - wq[:, 0]).reshape(32, 64)
    assert parts(folded, "model.layers.0.self_attn.q_proj.weight").equal(expected)
    rest = [n for n, _ in llama.named_parameters() if "q_proj" not in n]
    assert all(parts(folded, n).equal(parts(plain, n)) for n in rest)
    assert folded.cut is not None and folded.cut.dense is scored


def test_equal_heads_fold_into_themselves(llama: Program, ids: Tensor) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    wq = parts(llama, name).view(2, 2, 16, 64)
    twins = with_parameters(llama, {name: wq[:, :1].expand(2, 2, 16, 64).reshape(64, 64)})
    group = next(g for g in coupled_groups(twins) if g.family == "query_heads" and ".0." in g.name)
    scored = twins.replace(scores={group.name: torch.tensor([2.0, 1.0])})
    options = {"groups": {group.name: 1}, "uniform": False}
    plain, folded = (PruneWidth(**options, fold_heads=fold)(scored) for fold in (False, True))  # type: ignore[arg-type]
    torch.testing.assert_close(folded(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_whole_heads_where_each_has_its_own_keys(program_of: ByKind) -> None:
    program = program_of("gpt2")
    (name, *_) = heads_of(program, "kv_heads")
    group = next(g for g in coupled_groups(program) if g.name == name)
    scored = program.replace(scores={name: torch.arange(group.units, 0, -1.0)})
    folded = fold_heads(scored, {name: group.units - 1})
    member = next(m for m in group.members if m.role == "produces")
    before, after = (parts(p, member.parameter).movedim(member.dim, 0) for p in (program, folded))
    last, kept = member.positions[-1], member.positions[-2]
    assert after[kept].equal(2 * before[kept] - before[last])
    assert after[last].equal(before[last])
    assert (
        keep(folded, {name: torch.arange(group.units - 1)}).num_parameters < program.num_parameters
    )


def test_what_cannot_be_folded_is_refused(llama: Program, program_of: ByKind) -> None:
    scored = llama.replace(
        scores={n: torch.tensor([1.0, 2.0]) for n in heads_of(llama, "kv_heads")}
    )
    with pytest.raises(EditError, match="prune query_heads instead"):
        PruneWidth(kv_heads=1, fold_heads=True)(scored)
    gpt2 = program_of("gpt2")
    name = heads_of(gpt2, "kv_heads")[0]
    with pytest.raises(EditError, match="at least half must"):
        fold_heads(gpt2.replace(scores={name: torch.arange(4.0)}), {name: 1})


def test_other_families_are_left_alone(llama: Program) -> None:
    names = heads_of(llama, "mlp")
    scored = llama.replace(scores={name: torch.rand(96) for name in names})
    assert fold_heads(scored, dict.fromkeys(names, 48)) is scored

"""Query heads chosen under each key/value head: against the oracle, the stock class, and by
hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo.models import tiny_model

from secateur.graph import CoupledGroup, Program, capture, coupled_groups, keep, verify
from secateur.graph.axes.analysis import analyse
from secateur.graph.axes.coordinates import find_outers
from secateur.graph.edit.permute import explain_fixed, permute
from secateur.graph.errors import EditError
from secateur.graph.oracle.masked import masked_call
from secateur.passes.repair.sites import remaining_positions

HEADS = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8}


@pytest.fixture(scope="module")
def llama() -> Program:
    """Two layers, 3 key/value heads with 4 query heads of 8 each."""
    return capture(tiny_model("llama", **HEADS))


def queries(program: Program, layer: int = 0) -> CoupledGroup:
    return [g for g in coupled_groups(program) if g.family == "query_heads"][layer]


def logits(program: Program) -> Tensor:
    with torch.no_grad():
        return program(input_ids=torch.arange(18).reshape(2, 9) % 11).logits


def by_oracle(program: Program, edit: dict[str, Tensor]) -> Tensor:
    return masked_call(program, edit, input_ids=torch.arange(18).reshape(2, 9) % 11).logits


CHOICE = torch.tensor(
    [[0, 1, 2], [3, 2, 3]]
)  # of key/value head 0: 0 and 3, of 1: 1 and 2, of 2: 2 and 3


def test_the_outer_group_is_the_key_value_heads(llama: Program) -> None:
    group = queries(llama)
    assert (group.units, group.coordinates, group.within) == (
        4,
        3,
        "kv_heads@model.layers.0.self_attn",
    )
    assert group.members[0].cells[1, 2].tolist() == list(range((2 * 4 + 1) * 8, (2 * 4 + 2) * 8))
    assert all(
        g.within is None and g.coordinates == 1
        for g in coupled_groups(llama)
        if g.family != "query_heads"
    )
    cells = group.as_cells()
    assert cells.units == 12
    assert cells.members[0].positions[1 * 3 + 2].equal(group.members[0].cells[1, 2])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "olmo2", "phi3"])
def test_each_key_value_head_keeps_its_own(kind: str, attention: str) -> None:
    program = capture(tiny_model(kind, attention, **HEADS))
    edit = {queries(program, at).name: CHOICE.roll(at, 1) for at in range(2)}
    smaller = keep(program, edit)
    verify(smaller)
    expected = by_oracle(program, edit)
    torch.testing.assert_close(logits(smaller), expected, atol=1e-5, rtol=1e-5)
    same_places = keep(program, {name: units[:, 0] for name, units in edit.items()})
    assert float((logits(same_places) - expected).abs().max()) > 1e-3


def test_the_stock_class_of_the_smaller_size_computes_it(llama: Program) -> None:
    smaller = keep(llama, {queries(llama, at).name: CHOICE for at in range(2)})
    stock = tiny_model("llama", **{**HEADS, "num_attention_heads": 6})
    stock.load_state_dict(dict(smaller.named_parameters()), strict=False)
    ids = torch.arange(18).reshape(2, 9) % 11
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids).logits, logits(smaller))
    rows = torch.cat([torch.arange(8) + 8 * head for head in (0, 3, 4 + 1, 4 + 2, 8 + 2, 8 + 3)])
    name = "model.layers.1.self_attn.q_proj.weight"
    before, after = (dict(p.named_parameters())[name] for p in (llama, smaller))
    assert torch.equal(after, before[rows])


def test_indices_in_any_order_and_masks_say_the_same(llama: Program) -> None:
    name = queries(llama).name
    mask = queries(llama).mask(CHOICE)
    made = [keep(llama, {name: units}) for units in (CHOICE, CHOICE.flip(0), mask)]
    assert all(torch.equal(logits(made[0]), logits(one)) for one in made[1:])
    alike = keep(llama, {name: torch.tensor([[0, 0, 0], [2, 2, 2]])})
    assert alike.cut is not None and alike.cut.kept[name].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([[0, 1], [1, 2]], r"shape \[2, 2\]"),
        ([[0, 1, 4]], "units 0..3"),
        ([[0, 1, 2], [0, 2, 3]], "twice"),
        ([[True, True, True], [True, False, True], [False] * 3, [False] * 3], "equally many"),
    ],
)
def test_bad_choices_are_refused(llama: Program, units: list[list[int]], message: str) -> None:
    with pytest.raises(EditError, match=message):
        keep(llama, {queries(llama).name: torch.tensor(units)})


def test_groups_without_an_outer_one_take_no_such_choice(llama: Program) -> None:
    with pytest.raises(EditError, match="stay or go everywhere"):
        keep(llama, {"mlp@model.layers.0.mlp": torch.tensor([[0, 1], [2, 3]])})


def test_edits_add_up_in_the_numbers_of_the_dense_program(llama: Program) -> None:
    heads, kv = queries(llama).name, queries(llama).within or ""
    first = keep(llama, {heads: torch.tensor([[0, 1, 0], [1, 2, 2], [3, 3, 3]])})
    assert queries(first).name == heads
    second = keep(first, {kv: [0, 2]})
    assert queries(second).coordinates == 2
    third = keep(second, {heads: torch.tensor([[1, 0], [2, 2]])})
    assert third.cut is not None and third.cut.dense is llama
    assert third.cut.kept[heads][:, [0, 2]].tolist() == [[1, 0], [3, 3]]
    assert queries(third).name == heads
    torch.testing.assert_close(
        logits(third), by_oracle(llama, dict(third.cut.kept)), atol=1e-5, rtol=1e-5
    )
    at_once = keep(llama, dict(third.cut.kept))
    assert torch.equal(logits(at_once), logits(third))
    for (name, dim), positions in remaining_positions(third.cut).items():
        dense, cut = (dict(p.named_parameters())[name] for p in (llama, third))
        assert cut.shape[dim] == len(positions)
        assert name.endswith("_proj.weight") and dense.shape[dim] > len(positions)
    after_position = keep(
        keep(llama, {heads: [0, 2, 3]}), {heads: CHOICE.clamp_max(2)[:, [0, 1, 0]]}
    )
    assert after_position.cut is not None
    assert after_position.cut.kept[heads].tolist() == [[0, 2, 0], [3, 3, 3]]


def test_order_is_fixed_after_a_choice_by_coordinate(llama: Program) -> None:
    name = queries(llama).name
    smaller = keep(llama, {name: CHOICE})
    assert "before it is pruned" in (explain_fixed(smaller, queries(smaller)) or "")
    with pytest.raises(EditError, match="before it is pruned"):
        permute(smaller, {name: torch.tensor([1, 0])})


def test_one_key_value_head_and_heads_with_their_own_have_no_coordinates() -> None:
    single = capture(tiny_model("llama", num_attention_heads=4, num_key_value_heads=1))
    assert all(group.within is None for group in coupled_groups(single))
    assert all(group.within is None for group in coupled_groups(capture(tiny_model("gpt2"))))


class Mixed(nn.Module):
    """Groups of 3 times 4 channels; ``sums`` adds over the groups, so that the places in them
    meet."""

    def __init__(self, sums: bool) -> None:
        super().__init__()
        self.up, self.down, self.sums = nn.Linear(5, 12), nn.Linear(4 if sums else 12, 5), sums

    def forward(self, x: Tensor) -> Tensor:
        grouped = self.up(x).relu().view(*x.shape[:-1], 3, 4)
        return self.down(grouped.sum(-2) if self.sums else grouped.flatten(-2))


@pytest.mark.parametrize("sums", [False, True])
def test_a_sum_over_the_outer_units_forbids_the_choice(sums: bool) -> None:
    program = capture(Mixed(sums).eval(), {"x": torch.rand(2, 5)})
    inner = next(g.leaf for g in coupled_groups(program) if g.units == 4)
    outer = [
        leaf
        for axis in analyse(program).tensors["up.weight"][0]
        for leaf in axis.leaves()
        if leaf.size == 3
    ]
    assert find_outers(analyse(program), [inner]) == ({} if sums else {inner: outer[0]})

"""What an edit leaves behind: the record of the cut, and other values for parameters."""

from __future__ import annotations

import pytest
import torch
from zoo.models import tiny_model

from secateur.graph import Program, capture, keep, verify, with_parameters
from secateur.graph.errors import EditError

MLP = "mlp@model.layers.0.mlp"
WEIGHT = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def llama() -> Program:
    return capture(tiny_model("llama"))


def test_the_record_of_a_cut_is_composed_over_edits(llama: Program) -> None:
    first = keep(llama, {MLP: [3, 10, 40, 41, 90]})
    second = keep(first, {MLP: [0, 2, 4]})
    assert llama.cut is None
    assert first.cut is not None and second.cut is not None
    assert first.cut.kept[MLP].tolist() == [3, 10, 40, 41, 90]
    assert second.cut.kept[MLP].tolist() == [3, 40, 90]
    assert second.cut.dense is llama
    dense, twice = (dict(program.named_parameters())[WEIGHT] for program in (llama, second))
    assert torch.equal(dense[:, second.cut.kept[MLP]], twice)


def test_node_names_outlive_an_edit(llama: Program) -> None:
    twice = keep(keep(llama, {MLP: range(50)}), {MLP: range(20)})
    assert [node.name for node in twice.gm.graph.nodes] == [
        node.name for node in llama.gm.graph.nodes
    ]


def test_other_values_leave_the_given_program_alone(llama: Program) -> None:
    old = dict(llama.named_parameters())[WEIGHT]
    ids = torch.arange(6)[None]
    before = llama(input_ids=ids).logits
    other = with_parameters(llama, {WEIGHT: torch.zeros_like(old)})
    verify(other)
    named = dict(other.named_parameters())
    assert not named[WEIGHT].any() and old.any()
    assert all(p is named[name] for name, p in llama.named_parameters() if name != WEIGHT)
    assert torch.equal(llama(input_ids=ids).logits, before)
    assert not torch.equal(other(input_ids=ids).logits, before)


def test_a_wrong_shape_and_an_unknown_name_are_refused(llama: Program) -> None:
    with pytest.raises(EditError, match="shape"):
        with_parameters(llama, {WEIGHT: torch.zeros(3)})
    with pytest.raises(EditError, match="no such parameter"):
        with_parameters(llama, {"nothing": torch.zeros(3)})


def test_a_unit_named_twice_is_refused(llama: Program) -> None:
    for units in ([0, 1, 1], [3, 3], torch.tensor([5, 2, 5])):
        with pytest.raises(EditError, match="names a unit twice"):
            keep(llama, {MLP: units})

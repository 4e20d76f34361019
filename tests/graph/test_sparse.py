"""What edits make of sparse weights, and what the verifier says of broken ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from zoo.models import tiny_model

from secateur.graph import (
    Pattern,
    Program,
    Sparse,
    blocks,
    capture,
    drop,
    keep,
    verify,
    with_parameters,
)
from secateur.graph.errors import EditError, VerificationError
from secateur.graph.sparse import find_faults

DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
MLP = "mlp@model.layers.0.mlp"
TWO = Pattern(2, 4)


def sparse_program(program: Program, *names: str) -> Program:
    """The named weights 2:4 by magnitude, with everything that can be kept beside them."""
    known, values, told = dict(program.named_parameters()), dict[str, Tensor](), dict[str, Sparse]()
    for name in names:
        dense = known[name].detach()
        mask = TWO.select_mask(dense.abs())
        values[name] = torch.where(mask, dense, 0.0)
        told[name] = Sparse(
            TWO, norms=torch.ones(dense.shape[1]), removed=torch.where(mask, 0.0, dense)
        )
    return with_parameters(program, values).replace(sparse=told)


@pytest.fixture(scope="module")
def llama() -> Program:
    return capture(tiny_model("llama"))


@pytest.fixture(scope="module")
def sparse(llama: Program) -> Program:
    return sparse_program(llama, DOWN, UP)


def test_a_sparse_program_is_sound(llama: Program, sparse: Program) -> None:
    verify(sparse)
    known, dense = dict(sparse.named_parameters()), dict(llama.named_parameters())
    assert not llama.sparse and set(sparse.sparse) == {DOWN, UP}
    for name, one in sparse.sparse.items():
        assert torch.equal(known[name] + one.removed, dense[name])


def test_inputs_of_a_sparse_weight_stay(sparse: Program) -> None:
    with pytest.raises(
        EditError, match=f"{DOWN} is 2:4 sparse along its inputs.*prune widths first"
    ):
        keep(sparse, {MLP: range(48)})


def test_outputs_of_a_sparse_weight_are_cut_with_it(llama: Program) -> None:
    only_up = sparse_program(llama, UP)
    smaller = keep(only_up, {MLP: range(1, 96, 2)})
    verify(smaller)
    removed = smaller.sparse[UP].removed
    assert removed is not None and torch.equal(removed, only_up.sparse[UP].removed[1::2])
    assert smaller.sparse[UP].norms is only_up.sparse[UP].norms


def test_a_dropped_layer_takes_its_sparse_weights_with_it(llama: Program) -> None:
    other = UP.replace("layers.0", "layers.1")
    smaller = drop(sparse_program(llama, UP, DOWN, other), [blocks(llama)[0].name])
    verify(smaller)
    assert set(smaller.sparse) == {other}


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (1.0, "is not 2:4: 1 of"),
        (math.nan, "is not 2:4: 1 of"),
        (1e-45, "is not 2:4: 1 of"),
        (-0.0, "negative zeros"),
    ],
)
def test_a_value_that_should_be_zero(sparse: Program, value: float, fault: str) -> None:
    weight = dict(sparse.named_parameters())[DOWN].detach().clone()
    row, column = (weight == 0).nonzero()[7].tolist()
    weight[row, column] = value
    with pytest.raises(VerificationError, match=f"sparse weights are sparse: {DOWN} .*{fault}"):
        verify(with_parameters(sparse, {DOWN: weight}))


def test_what_is_kept_beside_a_weight_must_fit_it(sparse: Program) -> None:
    def broken(name: str, one: Sparse, fault: str) -> None:
        with pytest.raises(VerificationError, match=fault):
            verify(sparse.replace(sparse={name: one}))

    broken("nothing", Sparse(TWO), "nothing is said to be 2:4, but is no parameter")
    broken("model.norm.weight", Sparse(TWO), "has shape")
    broken(DOWN, Sparse(Pattern(3, 5)), "no multiple of 5")
    broken(DOWN, Sparse(TWO, norms=torch.ones(3)), "norms of shape")
    broken(DOWN, Sparse(TWO, removed=torch.ones(3, 4)), "removed values of shape")
    broken(
        DOWN, Sparse(TWO, removed=torch.ones(64, 96)), "other values where removed ones are kept"
    )


def test_a_weight_without_numbers_is_checked_for_its_shape() -> None:
    weight = torch.empty(64, 96, device="meta")
    assert list(find_faults(weight, Sparse(TWO))) == []
    assert list(find_faults(weight, Sparse(Pattern(3, 5)))) == [
        "cannot be 3:5: 96 inputs are no multiple of 5"
    ]

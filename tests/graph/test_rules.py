"""The table of rules: every row names an op that exists, an op without a row is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur.graph as graph
from secateur.graph.axes.rules import RULES, axis_rule, find_rule
from secateur.graph.axes.rules.pointwise import POINTWISE_NAMES
from secateur.graph.errors import UnsupportedOp


def test_every_row_names_an_op() -> None:
    loose = set(POINTWISE_NAMES)  # names that some supported torch version lacks
    missing = []
    for name in RULES:
        space, _, op = name.partition("::")
        if (
            space == "aten"
            and op.split(".")[0] not in loose
            and not hasattr(torch.ops.aten, op.split(".")[0])
        ):
            missing.append(name)
    of_other_versions = {"aten::grouped_mm", "aten::_fused_rms_norm"}
    assert set(missing) <= of_other_versions


def test_a_second_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="aten::linear has an axis rule already"):
        axis_rule("aten::linear")(lambda op: None)


def test_an_in_place_op_goes_by_its_functional_name_but_a_dunder_does_not() -> None:
    assert find_rule(torch.ops.aten.relu_.default) is not None
    assert find_rule(torch.ops.aten.__and__.Tensor) is RULES["aten::__and__"]


def test_an_op_without_a_rule_is_refused_by_name_with_its_module() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.project = nn.Linear(4, 4)
            self.solver = Solver()

        def forward(self, x: Tensor) -> Tensor:
            return self.solver(self.project(x))

    class Solver(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.pinv(x)

    program = graph.capture(Odd(), torch.randn(4, 4))
    with pytest.raises(
        UnsupportedOp, match=r"linalg_pinv.*module solver.*axis_rule\('aten::linalg_pinv'\)"
    ):
        graph.coupled_groups(program)


class _Case(nn.Module):
    """Two projections with an op between; the axis between them is free unless the op locks it."""

    def __init__(self, op: object, width: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 5)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.op(self.up(x)))  # type: ignore[operator]


LOCKS = {
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "sort": lambda x: x.sort(-1).values,
    "cumprod": lambda x: x.cumprod(-1),
    "a maximum": lambda x: x * x.amax(-1, keepdim=True),
    "a fixed index": lambda x: x[..., torch.tensor([1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 10])],
    "fft": lambda x: torch.fft.fft(x).real,
}
FREES = {
    "relu": torch.relu,
    "a sum": lambda x: x + x.sum(-1, keepdim=True),
    "a mean": lambda x: x - x.mean(-1, keepdim=True),
    "two halves": lambda x: torch.cat(x.chunk(2, -1), -1),
    "a view and back": lambda x: x.view(-1, 3, 4).transpose(1, 2).transpose(1, 2).reshape(-1, 12),
    "a softmax": lambda x: x.softmax(-1),
    "a running sum": lambda x: x.cumsum(-1),
}


@pytest.mark.parametrize("name", LOCKS)
def test_an_op_that_goes_by_position_locks_its_axis_and_says_so(name: str) -> None:
    program = graph.capture(_Case(LOCKS[name]), torch.randn(2, 6))
    between = [
        g
        for g in graph.coupled_groups(program)
        if any(m.parameter == "up.weight" and m.dim == 0 for m in g.members)
    ]
    assert between and all(g.locked for g in between)


@pytest.mark.parametrize("name", FREES)
def test_an_op_with_a_meaning_for_fewer_units_leaves_them_free(name: str) -> None:
    torch.manual_seed(0)
    program = graph.capture(_Case(FREES[name]), torch.randn(2, 6))
    between = [
        g
        for g in graph.coupled_groups(program)
        if any(m.parameter == "up.weight" and m.dim == 0 for m in g.members)
    ]
    assert between and not any(g.locked for g in between)
    x = torch.randn(2, 6)
    for group in between:
        edit = {group: range(1, group.units)}
        torch.testing.assert_close(
            graph.keep(program, edit)(x), graph.masked_call(program, edit, x)
        )

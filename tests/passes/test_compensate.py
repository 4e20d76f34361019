"""Bias compensation: FLAP's formula where inputs are dense, gated on what was held back, order of the graph."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.graph import Program, capture, coupled_groups, keep
from secateur.graph.errors import PipelineError
from secateur.passes import CalibrationError, Context, samples
from secateur.passes.compensate import Compensate, mean_lack


class Stacked(nn.Module):
    """Two hidden layers of ten neurons that lean to one side, with biases behind them."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.up = nn.ModuleList(nn.Linear(6, 10) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(10, 6, bias=bias) for _ in range(2))
        for up in self.up:
            nn.init.constant_(up.bias, 1.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


def cut(bias: bool = True) -> Program:
    program = capture(Stacked(bias).eval(), {"input_ids": torch.zeros(2, 7, dtype=torch.int64)})
    mlps = [g for g in coupled_groups(program) if g.units == 10]
    return keep(program, {group: torch.arange(6) for group in mlps})


def run(program: Program, ids: Tensor, **options: str) -> Program:
    return Compensate(**options)(program, Context(data=samples([ids], program)))  # type: ignore[arg-type]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 11, (10, 12), generator=torch.Generator().manual_seed(5))


def test_the_first_bias_gets_what_the_dropped_columns_gave_on_average(ids: Tensor) -> None:
    program = cut()
    after = dict(run(program, ids).named_parameters())
    assert program.cut is not None
    model = program.cut.dense.source.model
    with torch.no_grad():
        hidden = torch.relu(model.up[0](model.tokens(ids))).flatten(0, 1)  # type: ignore[operator, index]
    dropped = torch.arange(6, 10)
    expected = model.down[0].bias + model.down[0].weight[:, dropped] @ hidden[:, dropped].mean(0)  # type: ignore[index]
    torch.testing.assert_close(after["down.0.bias"], expected)


@pytest.mark.parametrize("target", ["own", "stream"])
def test_it_comes_nearer_to_the_dense_model(ids: Tensor, target: str) -> None:
    program = cut()
    better = run(program, ids, target=target)
    assert program.cut is not None
    fresh = torch.randint(0, 11, (20, 12), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        wanted = program.cut.dense(fresh)
        errors = [float((wanted - p(fresh)).square().sum()) for p in (program, better)]
    assert errors[1] < 0.7 * errors[0]
    figures = better.history[-1].figures
    assert figures["compensated"] == 2 and all(f["error"] < 1 and f["changed"] for f in figures["biases"].values())
    assert better.cut is program.cut


def test_the_second_layer_is_compensated_on_what_the_first_now_gives(ids: Tensor) -> None:
    program = cut()
    after = dict(run(program, ids).named_parameters())
    assert program.cut is not None
    dense = program.cut.dense.source.model
    with torch.no_grad():
        first = torch.relu(dense.up[0](dense.tokens(ids)))  # type: ignore[operator, index]
        streams = [dense.tokens(ids) + dense.down[0](first)]  # type: ignore[operator, index]
        small = first[..., :6] @ dense.down[0].weight[:, :6].T + after["down.0.bias"]  # type: ignore[index]
        streams.append(dense.tokens(ids) + small)  # type: ignore[operator]
        hidden = [torch.relu(dense.up[1](x)) for x in streams]  # type: ignore[index]
        weight = dense.down[1].weight  # type: ignore[index]
        lack = hidden[0] @ weight.T - hidden[1][..., :6] @ weight[:, :6].T
        expected = dense.down[1].bias + lack.flatten(0, 1).mean(0)  # type: ignore[index]
    torch.testing.assert_close(after["down.1.bias"], expected)


class Fixed:
    """A run whose values are given: by sample, then the same at every node."""

    def __init__(self, values: list[Tensor]) -> None:
        self.values = values

    def advance(self, name: str) -> None:
        """Nothing to do."""

    def value(self, sample: int, name: str) -> Tensor:
        return self.values[sample]


@pytest.mark.parametrize(("held", "used"), [(3.0, True), (0.6, True), (0.5, False), (-1.0, False)])
def test_a_mean_that_does_not_hold_elsewhere_is_not_used(held: float, used: bool) -> None:
    site: Any = SimpleNamespace(target="y", node=SimpleNamespace(name="y"), others=(), keep_out=torch.arange(2))
    wanted = [torch.full((1, 3, 2), held if i == 2 else 1.0) for i in range(5)]  # the third of five is held back
    shift, left = mean_lack(site, Fixed(wanted), Fixed([torch.zeros(1, 3, 2)] * 5), 5)  # type: ignore[arg-type]
    if used:
        assert shift is not None and shift.tolist() == pytest.approx([(4 + held) / 5] * 2)
        assert left == pytest.approx(abs(held - 1) / held)
    else:
        assert shift is None and left == 1.0


def test_ops_without_a_bias_are_named(ids: Tensor) -> None:
    after = run(cut(bias=False), ids)
    assert after.history[-1].figures["left_alone"] == dict.fromkeys(
        ["down.0.weight", "down.1.weight"], "its op has no bias"
    )
    assert after.history[-1].figures["compensated"] == 0


def test_a_cut_and_two_sequences_are_needed(ids: Tensor) -> None:
    whole = capture(Stacked().eval(), {"input_ids": torch.zeros(2, 7, dtype=torch.int64)})
    with pytest.raises(PipelineError, match="nothing was pruned"):
        run(whole, ids)
    with pytest.raises(CalibrationError, match="two calibration sequences"):
        run(cut(), ids[:1])

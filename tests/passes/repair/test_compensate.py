"""Bias compensation: FLAP's formula where inputs are dense, gated on what was held back, order of
the graph."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.graph import Program, capture, coupled_groups, keep
from secateur.graph.errors import PipelineError
from secateur.passes import CalibrationError, Context, samples
from secateur.passes.repair import compensate
from secateur.passes.repair.compensate import Compensate, mean_lack


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


def run(program: Program, ids: Tensor) -> Program:
    return Compensate()(program, Context(data=samples([ids], program)))


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


def test_it_comes_nearer_to_the_dense_model(ids: Tensor) -> None:
    program = cut()
    better = run(program, ids)
    assert program.cut is not None
    fresh = torch.randint(0, 11, (20, 12), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        wanted = program.cut.dense(fresh)
        errors = [float((wanted - p(fresh)).square().sum()) for p in (program, better)]
    assert errors[1] < 0.7 * errors[0]
    figures = better.history[-1].figures
    assert figures["compensated"] == 2 and all(
        f["error"] < 1 and f["changed"] for f in figures["biases"].values()
    )
    assert better.cut is program.cut


def test_every_layer_is_compensated_on_what_the_dense_model_feeds_it(ids: Tensor) -> None:
    program = cut()
    after = dict(run(program, ids).named_parameters())
    assert program.cut is not None
    dense: Any = program.cut.dense.source.model
    with torch.no_grad():
        x = dense.tokens(ids)
        x = x + dense.down[0](torch.relu(dense.up[0](x)))
        hidden = torch.relu(dense.up[1](x)).flatten(0, 1)
        expected = dense.down[1].bias + dense.down[1].weight[:, 6:] @ hidden[:, 6:].mean(0)
    torch.testing.assert_close(after["down.1.bias"], expected)


def test_what_a_refit_has_put_right_is_not_added_again(ids: Tensor) -> None:
    program = cut()
    once = run(program, ids)
    again = run(once, ids)
    old, new = dict(once.named_parameters()), dict(again.named_parameters())
    assert again.history[-1].figures["compensated"] in (0, 2)
    torch.testing.assert_close(new["down.0.bias"], old["down.0.bias"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("held", "used"), [(3.0, True), (0.6, True), (0.5, False), (-1.0, False)])
def test_a_mean_that_does_not_hold_elsewhere_is_not_used(held: float, used: bool) -> None:
    lacks = [torch.full((3, 2), held if at == 2 else 1.0, dtype=torch.float64) for at in range(5)]
    shift, left = mean_lack(lacks, {2})
    if used:
        assert shift is not None and shift.tolist() == pytest.approx([(4 + held) / 5] * 2)
        assert left == pytest.approx(abs(held - 1) / held)
    else:
        assert shift is None and left == 1.0


def test_nothing_stays_that_takes_the_predictions_further_away(
    ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = cut()
    worse = iter([1.0, 1.5])
    monkeypatch.setattr(
        compensate, "kl", lambda dense, one, held: SimpleNamespace(mean=next(worse))
    )
    after = run(program, ids)
    figures = after.history[-1].figures
    assert after.gm is program.gm and figures["compensated"] == 0
    assert (figures["kl_before"], figures["kl_after"]) == (1.0, 1.5)


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

"""Layers of different sizes, and the one size that a stock class wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from secateur.graph import Program, coupled_groups, drop, keep, with_parameters
from secateur.graph.errors import PipelineError
from secateur.passes import PruneWidth, Score
from secateur.passes.importance import Random
from secateur.passes.width.fill_widths import FillWidths
from secateur.runtime import plan_config, save
from secateur.runtime.stock.config_search import UnsupportedConfigError

IDS = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(4))


def uneven(program: Program) -> Program:
    found = {
        g.name: g.units
        for g in coupled_groups(program)
        if g.family in ("mlp", "kv_heads") and g.locked is None
    }
    sizes = {
        name: range(at % 2, units, 1 + at % 2)
        for at, (name, units) in enumerate(sorted(found.items()))
    }
    cut = keep(program, dict(sizes))
    moved = {
        name: p.detach() + 0.01 * torch.randn_like(p)
        for name, p in cut.named_parameters()
        if "down" in name
    }
    return with_parameters(cut, moved)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_the_outputs_stay_and_a_stock_class_holds_it(
    program_of: Callable[[str], Program], kind: str
) -> None:
    cut = uneven(program_of(kind))
    with pytest.raises(UnsupportedConfigError):
        plan_config(cut)
    filled = FillWidths()(cut)
    plan_config(filled)
    with torch.no_grad():
        torch.testing.assert_close(
            filled(input_ids=IDS).logits, cut(input_ids=IDS).logits, rtol=1e-5, atol=1e-5
        )
    figures = filled.history[-1].figures
    assert figures["parameters_after"] == filled.num_parameters > cut.num_parameters
    assert all(few < many for few, many in figures["sizes"].values()) and figures["sizes"]
    zeros = sum(int((p == 0).sum()) for name, p in filled.named_parameters() if p.dim() == 2)
    assert zeros >= filled.num_parameters - cut.num_parameters - 1000


def test_it_reloads_in_a_fresh_process(llama: Program, tmp_path: Path) -> None:
    report = save(FillWidths()(uneven(llama)), tmp_path / "saved")
    assert report.reload["difference"] <= 1e-4


def test_dropped_blocks_stay_away(program_of: Callable[[str], Program]) -> None:
    program = program_of("gemma2")
    names = [g.name for g in coupled_groups(program) if g.family == "mlp"]
    (last,) = {g.block for g in coupled_groups(program) if g.name == names[-1]}
    cut = drop(keep(program, {names[0]: range(10)}), [last])
    filled = FillWidths()(cut)
    assert filled.cut is not None and filled.cut.dropped == (last,)
    with torch.no_grad():
        torch.testing.assert_close(
            filled(input_ids=IDS).logits, cut(input_ids=IDS).logits, rtol=1e-5, atol=1e-5
        )


def test_one_size_is_left_alone(llama: Program) -> None:
    cut = PruneWidth(mlp=0.5)(Score(Random())(llama))
    done = FillWidths()(cut)
    assert done.gm is cut.gm and done.history[-1].figures == {
        "sizes": {},
        "seed": 0,
        "seconds": done.history[-1].figures["seconds"],
    }
    with pytest.raises(PipelineError, match="nothing was pruned"):
        FillWidths()(llama)

"""Steps, batches and precision that follow from the options."""

from __future__ import annotations

import pytest
import torch

from secateur.graph.errors import PipelineError
from secateur.passes.language.options import options_table
from secateur.passes.training.adapt_lora import AdaptLora
from secateur.passes.training.distill import Distill
from secateur.passes.training.plan import StepPlan, autocast_dtype, plan_steps
from secateur.passes.training.run import thin_curve


def test_a_batch_is_made_of_whole_micro_batches() -> None:
    options = Distill(
        tokens=100_000, batch_tokens=4096, micro_batch=3, warmup=0.1, evaluations=4, save_every=7
    )
    found = plan_steps(options, 512, options.tokens)
    assert found == StepPlan(steps=25, micro=2, accumulate=4, warmup=3, evaluate=7, save=7)
    assert found.sequences == 8
    tiny = plan_steps(Distill(tokens=1, batch_tokens=1, micro_batch=64), 512, 1)
    assert (tiny.steps, tiny.sequences, tiny.micro, tiny.accumulate) == (1, 1, 1, 1)


def test_processes_share_the_batch_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = plan_steps(Distill(batch_tokens=4096, micro_batch=4), 512, 8192)
    assert (found.sequences, found.micro, found.accumulate, found.world, found.steps) == (
        8,
        2,
        1,
        4,
        2,
    )
    with pytest.raises(PipelineError, match="do not divide among 4 processes"):
        plan_steps(Distill(batch_tokens=512 * 6), 512, 8192)


def test_low_precision_weights_are_multiplied_as_they_were() -> None:
    both = {torch.float32, torch.bfloat16}
    assert (
        autocast_dtype("auto", {torch.float32}) is None
        and autocast_dtype("auto", both) is torch.bfloat16
    )
    assert (
        autocast_dtype("bfloat16", {torch.float32}) is torch.bfloat16
        and autocast_dtype("float32", both) is None
    )


def test_every_option_says_what_it_means() -> None:
    for one in (Distill, AdaptLora):
        rows = options_table(one)
        assert all(meaning for _, _, meaning in rows)
        assert {name: meaning for name, _, meaning in rows}["tokens"].startswith("to train on")


def test_a_long_curve_is_thinned_to_means() -> None:
    curve = [{"step": s, "tokens": 10.0 * s, "lr": 1.0 / s, "kl": float(s)} for s in range(1, 6)]
    assert thin_curve(curve, 2) == [
        {"step": 2, "tokens": 20.0, "lr": 0.5, "kl": 1.5},
        {"step": 4, "tokens": 40.0, "lr": 0.25, "kl": 3.5},
        {"step": 5, "tokens": 50.0, "lr": 0.2, "kl": 5.0},
    ]

"""Room for biases: found by what a switch does, zero at first, and a stock checkpoint in the
end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo.models import tiny_model

from secateur.graph import capture
from secateur.passes import Pipeline
from secateur.runtime import UnsupportedConfigError, load, open_model, save
from secateur.runtime.stock.biases import adds_biases, with_biases


def test_a_model_without_biases_gets_zeros_and_computes_the_same() -> None:
    model = tiny_model("llama")
    larger = with_biases(model)
    assert larger.config.attention_bias is True and larger.config.mlp_bias is True
    new = {n: p for n, p in larger.named_parameters() if n not in dict(model.named_parameters())}
    assert len(new) == 2 * 7 and all(not p.any() for p in new.values())
    assert larger.lm_head.weight is model.lm_head.weight and model.config.attention_bias is False
    ids = torch.randint(0, 128, (2, 9))
    torch.testing.assert_close(larger(ids).logits, model(ids).logits)


def test_a_class_without_such_a_switch_says_so() -> None:
    with pytest.raises(UnsupportedConfigError, match="no switch"):
        with_biases(tiny_model("gpt2"))


def test_only_new_biases_count() -> None:
    before = {"a.weight": (2, 3)}
    assert adds_biases(before, {"a.weight": (2, 3), "a.bias": (2,)})
    for after in (
        before,
        None,
        {"a.weight": (2, 4), "a.bias": (2,)},
        {**before, "b.weight": (2,)},
        {"a.bias": (2,)},
    ):
        assert not adds_biases(before, after)


def test_compensated_biases_are_a_stock_checkpoint(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    program = capture(with_biases(open_model(tmp_path / "model")), folder=tmp_path / "model")
    ids = torch.randint(0, 128, (6, 12))
    smaller = Pipeline.parse("score{metric=wanda},prune-width{mlp=0.5},compensate").run(
        program, [ids]
    )
    assert smaller.history[-1].figures["compensated"] == 2
    report = save(smaller, tmp_path / "out")
    assert report is not None
    found = load(tmp_path / "out")
    assert found.config.mlp_bias is True and bool(found.model.layers[0].mlp.down_proj.bias.any())
    assert (
        not found.model.layers[0].mlp.up_proj.bias.any()
        and not found.model.layers[1].self_attn.o_proj.bias.any()
    )
    with torch.no_grad():
        torch.testing.assert_close(
            found(ids).logits, smaller(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )

"""Adapters are trained, merged, and gone."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from zoo.models import tiny_model

from secateur.graph import Program, capture
from secateur.graph.errors import PipelineError
from secateur.passes import Context
from secateur.passes.training.adapt_lora import AdaptLora, find_projections
from secateur.runtime import save, to_transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from worker import pruned, sparse

QUICK = {
    "tokens": 1440,
    "batch_tokens": 96,
    "held_out": 4,
    "evaluations": 2,
    "lr": 2e-3,
    "warmup": 0.0,
}


@pytest.fixture(scope="module")
def made() -> tuple[Program, Context]:
    torch.manual_seed(0)
    return pruned()


def test_all_projections_are_found_in_the_graph_and_no_others() -> None:
    program = capture(tiny_model("llama"))
    layer = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    layer += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    expected = [f"model.layers.{i}.{name}" for i in range(2) for name in layer]
    assert find_projections(to_transformers(program), program) == expected
    other = capture(tiny_model("gpt2"))
    names = {name.rpartition("h.")[2] for name in find_projections(to_transformers(other), other)}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"{i}.{part}" for i in range(2) for part in parts}


@pytest.mark.parametrize("loss", [{}, {"kl": 1.0, "ce": 0.0}], ids=["text", "teacher"])
def test_the_merged_model_is_the_adapted_one(
    made: tuple[Program, Context], loss: dict[str, float], tmp_path: Path
) -> None:
    small, context = made
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    adapted = AdaptLora(**QUICK, **loss)(small, context)
    told = adapted.history[-1].figures
    losses = [point["loss"] for point in told["curve"]]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert told["merge_difference"] <= 1e-5 and told["adapted"] == 14
    assert told["adapter_parameters"] == sum(
        8 * sum(p.shape) for n, p in small.named_parameters() if "proj" in n
    )
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "proj" in name}
    assert all(
        torch.equal(p, before[name]) and p.requires_grad for name, p in small.named_parameters()
    )
    assert all(p.requires_grad for _, p in adapted.named_parameters())
    assert {name for name, _ in to_transformers(adapted).named_parameters()} == set(before)
    save(adapted, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*adapter*"))


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_adapters_of_a_sparse_model_keep_its_zeros(dropout: float) -> None:
    small, context = sparse()
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    adapted = AdaptLora(**QUICK, dropout=dropout)(small, context)
    told, parameters = adapted.history[-1].figures, dict(adapted.named_parameters())
    assert told["merge_difference"] <= 1e-5 and told["under_masks"] == len(small.sparse) == 14
    for name, one in adapted.sparse.items():
        after = parameters[name].detach()
        assert one.pattern.describe_violations(after) is None and not torch.equal(
            after, before[name]
        )
        assert (
            torch.equal(after != 0, before[name] != 0)
            and not ((after == 0) & after.signbit()).any()
        )
    losses = [point["loss"] for point in told["curve"]]
    assert sum(losses[-4:]) < sum(losses[:4])
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(input_ids=ids).logits, to_transformers(adapted)(input_ids=ids).logits
        )


def test_it_needs_a_stock_model(made: tuple[Program, Context]) -> None:
    small, context = made
    with pytest.raises(PipelineError, match="no stock class holds this shape"):
        AdaptLora(**QUICK)(small, replace(context, raise_model=None))


def test_text_alone_needs_no_cut(made: tuple[Program, Context]) -> None:
    small, _ = made
    assert AdaptLora().requires(small.replace(cut=None)) == []
    assert AdaptLora(kl=1.0).requires(small.replace(cut=None)) != []

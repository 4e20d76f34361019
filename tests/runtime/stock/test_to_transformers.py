"""A raised model is the stock class over the program's own parameters, and computes what the
program computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtime_models import GPT2, SMALL, pruned, tiny
from transformers import PreTrainedModel

from secateur.graph import capture, coupled_groups, keep
from secateur.graph.program import Program
from secateur.runtime.stock import to_transformers as raising
from secateur.runtime.stock.config_search import UnsupportedConfigError
from secateur.runtime.stock.to_transformers import to_transformers, to_transformers_with_plan

MHA = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(tiny("LlamaConfig", **SMALL))


@pytest.fixture(scope="module")
def narrower(captured: Program) -> Program:
    groups = coupled_groups(captured)
    return keep(captured, {group: range(72) for group in groups if group.family == "mlp"})


WIDTHS = {"mlp": 0.75, "kv_heads": 0.75, "hidden": 0.75}


@pytest.mark.parametrize(
    ("config", "cls", "fields", "parts"),
    [
        ("LlamaConfig", None, SMALL | {"tie_word_embeddings": True}, WIDTHS),
        ("Qwen3Config", None, SMALL | {"head_dim": 8}, WIDTHS),
        ("MixtralConfig", None, SMALL | {"num_local_experts": 4}, WIDTHS | {"experts": 0.75}),
        ("GPT2Config", None, GPT2, WIDTHS),
        ("Gemma2Config", None, SMALL | {"head_dim": 8}, {"mlp": 0.75, "kv_heads": 0.5}),
        ("BertConfig", "BertForMaskedLM", MHA, WIDTHS),
    ],
)
def test_raised_model_computes_the_program(
    config: str, cls: str | None, fields: dict[str, Any], parts: dict[str, float]
) -> None:
    model = tiny(config, cls, **fields)
    program = pruned(model, **parts)
    raised = to_transformers_with_plan(program)
    assert type(raised.model) is type(model) and not raised.model.training
    assert raised.difference is not None and raised.difference <= 1e-4
    assert raised.plan.changes
    ours = {id(parameter) for _, parameter in program.named_parameters()}
    assert {id(parameter) for parameter in raised.model.parameters()} >= ours


def test_head_count_that_no_shape_shows_is_found_by_the_outputs() -> None:
    raised = to_transformers_with_plan(pruned(tiny("GPT2Config", **GPT2), **WIDTHS))
    assert raised.plan.changes == {"n_embd": (64, 48), "n_head": (8, 6)}


def test_training_the_raised_model_trains_the_program(llama: PreTrainedModel) -> None:
    program = pruned(llama, mlp=0.75)
    model = to_transformers(program)
    ids = torch.arange(12).reshape(2, 6)
    before = program(input_ids=ids).logits.detach()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    after = program(input_ids=ids).logits.detach()
    assert not torch.equal(before, after)
    assert (after - model(input_ids=ids).logits).abs().max() <= 1e-4


def test_ties_stay_ties() -> None:
    model = to_transformers(
        pruned(tiny("LlamaConfig", **SMALL | {"tie_word_embeddings": True}), hidden=0.75)
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generation_settings_are_kept(narrower: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = narrower.source.model.generation_config
    monkeypatch.setattr(settings, "max_new_tokens", 17)
    assert to_transformers(narrower).generation_config.max_new_tokens == 17


def test_unedited_program(captured: Program) -> None:
    raised = to_transformers_with_plan(captured)
    assert raised.plan.changes == {} and raised.difference == 0.0
    assert {id(p) for p in raised.model.parameters()} == {
        id(p) for p in captured.source.model.parameters()
    }


def test_constant_of_the_configuration_is_refused() -> None:
    """The class scales embeddings by the square root of the width: a narrower one computes
    something else."""
    program = pruned(tiny("Gemma2Config", **SMALL | {"head_dim": 8}), hidden=0.75)
    with pytest.raises(
        UnsupportedConfigError,
        match=r"hidden_size 64 -> 48.*computes something else.*embed_scale \(8 -> 6\.9282\)",
    ):
        to_transformers(program)


def test_layers_that_differ_are_refused(captured: Program) -> None:
    first = next(group for group in coupled_groups(captured) if group.family == "mlp")
    with pytest.raises(UnsupportedConfigError, match="layers differ"):
        to_transformers(keep(captured, {first: range(48)}))


def test_meta_device_says_that_it_compares_nothing(caplog: pytest.LogCaptureFixture) -> None:
    program = pruned(tiny("LlamaConfig", meta=True, **SMALL), mlp=0.75)
    raised = to_transformers_with_plan(program)
    assert raised.difference is None and raised.plan.changes == {"intermediate_size": (96, 72)}
    assert all(parameter.device.type == "meta" for parameter in raised.model.parameters())
    assert "not compared" in caplog.text


def test_bfloat16(llama: PreTrainedModel) -> None:
    program = pruned(llama.to(torch.bfloat16), **WIDTHS)
    raised = to_transformers_with_plan(program)
    assert raised.difference is not None and raised.difference <= 2e-2
    assert raised.model.dtype == raised.model.config.dtype == torch.bfloat16


def test_buffers_are_the_stock_ones(narrower: Program) -> None:
    source: Any = narrower.source.model
    assert torch.equal(
        to_transformers(narrower).model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq
    )


@pytest.mark.parametrize(
    "found", [torch.full((2, 2), float("nan")), torch.zeros(2, 3), torch.full((2, 2), 9.0)]
)
def test_difference_sees_what_it_should(found: torch.Tensor) -> None:
    gap = raising.largest_difference({"logits": torch.ones(2, 2)}, {"logits": found})
    assert gap > 1.0


def test_probe_tokens_fit_the_vocabulary_and_nothing_smaller() -> None:
    """Tables of positions and of kinds have fewer rows; token numbers must not be folded into
    those."""
    fields = MHA | {"type_vocab_size": 2, "max_position_embeddings": 64}
    program = capture(tiny("BertConfig", "BertForMaskedLM", **fields))
    ids = program.source.example_inputs["input_ids"]
    assert torch.equal(raising.probe_inputs(program)["input_ids"], ids) and ids.max() > 2


def test_no_shared_output_is_no_agreement() -> None:
    assert raising.largest_difference({"logits": torch.ones(1)}, {"other": torch.ones(1)}) == float(
        "inf"
    )

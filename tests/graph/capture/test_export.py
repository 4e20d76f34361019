"""Capture: what comes in, what the graph computes, what is refused and how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from zoo.checks import captured, logits
from zoo.models import NanoGPT, perturb, tiny_config, tiny_model

import secateur.graph as graph
from secateur.graph.errors import CaptureError

IDS = torch.arange(3, 30).reshape(3, 9)


@pytest.mark.parametrize("example", [IDS, (IDS,), [IDS], {"ids": IDS}])
def test_example_inputs_in_every_form(example: object) -> None:
    model = perturb(NanoGPT())
    program = graph.capture(model, example)
    assert torch.equal(program(IDS), model(IDS))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (16, 64)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_one_graph_serves_every_batch_and_length(kind: str, shape: tuple[int, int]) -> None:
    model, program = captured(kind)
    ids = torch.randint(3, 100, shape)
    with torch.no_grad():
        assert torch.equal(program(ids).logits, model(ids, use_cache=False).logits)


def test_the_graph_holds_the_very_parameters_of_the_model() -> None:
    model, program = captured("gpt2")
    own = dict(model.named_parameters())
    assert {n: id(p) for n, p in program.named_parameters()} == {n: id(p) for n, p in own.items()}
    assert program.num_parameters == sum(p.numel() for p in own.values())


def test_gradients_reach_the_model_and_are_the_model_s() -> None:
    model = tiny_model("llama")
    program = graph.capture(model)
    program(IDS).logits.square().mean().backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(IDS, use_cache=False).logits.square().mean().backward()
    assert set(ours) == {n for n, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(ours[name], parameter.grad)


def test_calls_like_the_model() -> None:
    model, program = captured("llama")
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        for output in (
            program(IDS),
            program(input_ids=IDS),
            program(IDS, use_cache=False),
            program.gm(input_ids=IDS),
        ):
            assert type(output) is type(model(IDS))
            assert torch.equal(output.logits, expected)


def test_an_input_that_was_not_captured_is_refused_not_ignored() -> None:
    _, program = captured("llama")
    with pytest.raises(CaptureError, match="captured without"):
        program(IDS, attention_mask=torch.ones_like(IDS))
    with pytest.raises(CaptureError, match="takes input_ids"):
        program()


def test_an_attention_mask_can_be_captured() -> None:
    model = tiny_model("llama")
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    program = graph.capture(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    with torch.no_grad():
        ours = program(input_ids=IDS, attention_mask=mask).logits
        theirs = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    assert torch.equal(ours[mask.bool()], theirs[mask.bool()])


def test_a_size_that_the_model_s_code_fixes_is_held() -> None:
    _, program = captured("mamba")
    with pytest.raises(CaptureError, match=r"input_ids has shape \(3, 9\).*fixed \[None, 11\]"):
        program(IDS)


def test_the_meta_device_needs_no_weights() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("qwen3"))
    names = [g.name for g in graph.coupled_groups(graph.capture(model))]
    assert names == [g.name for g in graph.coupled_groups(captured("qwen3")[1])]


def test_training_mode_is_put_back_and_dropout_is_not_captured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)).train()
    program = graph.capture(model, torch.ones(2, 4))
    assert model.training
    assert torch.equal(program(torch.ones(2, 4)), model[0](torch.ones(2, 4)))


def test_what_cannot_be_captured_names_the_module_and_the_reason() -> None:
    class Data(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if bool(x.sum() > 0) else x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), Data()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    with pytest.raises(CaptureError, match=r"Outer cannot be captured: in layers\.1 \(Data\): .*"):
        graph.capture(Outer(), torch.ones(2, 4))


@pytest.mark.parametrize("shape", [(1, 8), (1, 1), (3, 3), (2, 2)])
def test_the_example_s_own_sizes_fix_nothing(shape: tuple[int, int]) -> None:
    model = perturb(NanoGPT())
    program = graph.capture(model, torch.randint(3, 100, shape))
    assert torch.equal(program(IDS), model(IDS))


def test_a_plain_module_without_example_inputs_is_told_what_to_pass() -> None:
    with pytest.raises(CaptureError, match="give capture example_inputs"):
        graph.capture(NanoGPT())
    with pytest.raises(CaptureError, match=r"example_inputs name \['tokens'\]"):
        graph.capture(NanoGPT(), {"tokens": IDS})


def test_an_encoder_and_a_decoder_have_inputs_of_their_own() -> None:
    model, program = captured("t5")
    encoder, decoder = torch.randint(3, 100, (2, 8)), torch.randint(3, 100, (2, 5))
    with torch.no_grad():
        ours = logits(program(input_ids=encoder, decoder_input_ids=decoder))
        theirs = model(input_ids=encoder, decoder_input_ids=decoder, use_cache=False).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["granitemoe", "llava"])
def test_a_class_that_reads_the_cache_switch_from_its_configuration_alone(kind: str) -> None:
    model = _reads_cache_switch_from_config(kind)
    configs = [model.config, model.config.get_text_config()]
    before = [getattr(config, "use_cache", None) for config in configs]
    program = graph.capture(model)
    assert True in before
    assert [getattr(config, "use_cache", None) for config in configs] == before
    with torch.no_grad():
        assert torch.equal(program(IDS).logits, model(IDS, use_cache=False).logits)


def _reads_cache_switch_from_config(kind: str) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "granitemoe":
        moe = GraniteMoeConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
        return GraniteMoeForCausalLM(moe).eval()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes), vision_config=vision, image_token_index=5
    )
    return LlavaForConditionalGeneration(config).eval()

"""The plug-in against minimal stand-ins of the vLLM classes that it uses: they load, stack and call
like vLLM does."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo.models import tiny_model
from zoo.sparse import made_24

import secateur
from secateur.graph.errors import ArtifactError
from secateur.passes import Pipeline
from secateur.runtime.serving import vllm as plugin
from secateur.runtime.serving.packing import find_planned_kind, make_packed_linear, plan_of_manifest

STACKS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class LinearBase(nn.Module):
    """A layer that asks for its method and lets it make and use the weight."""

    def __init__(
        self, config: Any, prefix: str, inputs: int, outputs: list[int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.method = config.get_quant_method(self, prefix)
        self.method.create_weights(self, inputs, outputs, inputs, sum(outputs), dtype)

    def load(self, parts: list[Tensor]) -> None:
        self.weight.data.copy_(torch.cat(parts))
        self.method.process_weights_after_loading(self)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.method.apply(self, x, bias)


class UnquantizedLinearMethod:
    def create_weights(
        self,
        layer: nn.Module,
        inputs: int,
        outputs: list[int],
        input_size: int,
        output_size: int,
        dtype: torch.dtype,
    ) -> None:
        layer.weight = nn.Parameter(
            torch.empty(sum(outputs), inputs, dtype=dtype), requires_grad=False
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


@pytest.fixture
def config_class(monkeypatch: pytest.MonkeyPatch) -> type:
    """The class that the plug-in registers."""
    registered: dict[str, type] = {}

    def register(name: str) -> Callable[[type], type]:
        assert name not in registered, "registered twice"
        quantization.QUANTIZATION_METHODS.append(name)
        return lambda cls: registered.setdefault(name, cls)

    linear, quantization, base = (
        ModuleType(name) for name in ("linear", "quantization", "base_config")
    )
    linear.LinearBase, linear.UnquantizedLinearMethod = LinearBase, UnquantizedLinearMethod
    quantization.QUANTIZATION_METHODS, quantization.register_quantization_config = ["fp8"], register
    base.QuantizationConfig = QuantizationConfig
    layers = ModuleType("layers")
    layers.quantization, layers.linear = quantization, linear
    prefix = "vllm.model_executor.layers"
    tree = {
        "vllm": ModuleType("vllm"),
        "vllm.model_executor": ModuleType("model_executor"),
        prefix: layers,
    }
    tree |= {f"{prefix}.linear": linear, f"{prefix}.quantization": quantization}
    tree[f"{prefix}.quantization.base_config"] = base
    for name, module in tree.items():
        monkeypatch.setitem(sys.modules, name, module)
    plugin.register()
    plugin.register()
    return registered["secateur"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2:4 and 8 bits, but for one layer that is dense."""
    program = made_24(secateur.capture(tiny_model("llama")), but=("layers.1.mlp.down_proj",))
    folder = tmp_path_factory.mktemp("serving") / "out"
    secateur.save(
        Pipeline.parse("quantize{bits=8},lower{smallest=true}").run(program), folder, check=False
    )
    return folder


def configured(config_class: type, artifact: Path) -> Any:
    """As vLLM does: the file named, its JSON, the mapping of the model."""
    (name,) = config_class.get_config_filenames()
    config = config_class.from_config(json.loads((artifact / name).read_text()))
    config.packed_modules_mapping = STACKS
    return config


def layer_of(
    config: Any, model: nn.Module, prefix: str, dtype: torch.dtype = torch.float32
) -> tuple[LinearBase, Tensor]:
    """A server's layer with the checkpoint's weights, and the dense weight."""
    parts = [
        model.get_submodule(name).weight.detach()
        for name in plugin.split_stacked_name(prefix, STACKS)
    ]
    layer = LinearBase(config, prefix, parts[0].shape[1], [len(part) for part in parts], dtype)
    layer.load([part.to(dtype) for part in parts])
    return layer, torch.cat(parts).to(dtype)


def test_layers_are_packed_as_planned_and_give_the_dense_outputs(
    config_class: type, artifact: Path
) -> None:
    config, model = configured(config_class, artifact), secateur.load(artifact, packed=False)
    assert config.get_name() == "secateur" and torch.bfloat16 in config.get_supported_act_dtypes()
    for name, kind in (
        ("self_attn.qkv_proj", "2:4+int8"),
        ("mlp.gate_up_proj", "2:4+int8"),
        ("mlp.down_proj", "int8"),
    ):
        layer, weight = layer_of(config, model, f"model.layers.1.{name}")
        assert layer.packed.kind == kind and not hasattr(layer, "weight")
        x, bias = torch.randn(3, weight.shape[1]), torch.randn(len(weight))
        assert torch.allclose(layer(x, bias), nn.functional.linear(x, weight, bias), atol=1e-4)
        assert torch.allclose(layer(x), nn.functional.linear(x, weight), atol=1e-4)


def test_a_weight_cast_by_the_server_is_still_packed(config_class: type, artifact: Path) -> None:
    config, model = configured(config_class, artifact), secateur.load(artifact, packed=False)
    layer, weight = layer_of(config, model, "model.layers.0.self_attn.o_proj", torch.bfloat16)
    x = torch.randn(2, weight.shape[1]).bfloat16()
    assert layer.packed.kind == "2:4+int8"
    wanted = nn.functional.linear(x.float(), weight.float())
    assert (layer(x).float() - wanted).abs().max() <= 2e-2 * wanted.abs().max()


def test_what_stays_dense_is_told(
    config_class: type, artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, model = configured(config_class, artifact), secateur.load(artifact, packed=False)
    with caplog.at_level(logging.INFO, logger="vllm.secateur"):
        unknown = config.get_quant_method(LinearBase.__new__(LinearBase), "model.vision.proj")
        layer = LinearBase(config, "model.layers.0.mlp.down_proj", 96, [64], torch.float32)
        layer.load([torch.randn(64, 96)])
    assert type(unknown) is UnquantizedLinearMethod and not hasattr(layer, "packed")
    assert "the plan has no model.vision.proj" in caplog.text and "not 2:4 as loaded" in caplog.text
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))
    assert config.get_quant_method(nn.Embedding(4, 4), "model.embed_tokens") is None
    assert (
        type(config.get_quant_method(LinearBase.__new__(LinearBase), "lm_head"))
        is UnquantizedLinearMethod
    )
    assert model is not None


def test_shards_that_cut_scales_stay_dense() -> None:
    from secateur.passes.solvers.integer_grid import grid_of

    weight = torch.randn(16, 512)
    four = grid_of(weight, 4).round_to_grid(weight)
    whole, _ = make_packed_linear("int4", "x", four[:, :256])
    cut, why = make_packed_linear("int4", "x", four[:, 64:320])
    assert whole is not None and cut is None and "a shard that cuts groups" in why
    assert make_packed_linear("int8", "x", four)[1].startswith("on a grid of 4 bits")


def test_plans_of_stacked_layers(artifact: Path) -> None:
    plan = plan_of_manifest(json.loads((artifact / "secateur.json").read_text()))
    assert find_planned_kind(plan, ["model.layers.0.mlp.down_proj"])[0] == "2:4+int8"
    mixed = find_planned_kind(
        plan, ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    )
    assert mixed == ("dense", "stacked layers were planned as 2:4+int8, int8")
    with pytest.raises(ArtifactError, match="not lowered"):
        plan_of_manifest({"history": [{"name": "score", "figures": {}}]})

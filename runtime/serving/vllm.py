"""An out-of-tree plug-in for vLLM: ``vllm serve DIR --quantization secateur`` runs a lowered model
on packed weights.

vLLM finds ``register`` through the entry point ``vllm.general_plugins``.  It loads the stock
checkpoint as always; once a linear layer's weight is loaded, the layer is packed as the plan in the
artifact's manifest says, if its numbers allow it, and the dense weight is dropped.  Nothing in
``config.json`` names the plug-in, so every other loader is unaffected.

Interfaces used: ``register_quantization_config``, ``QuantizationConfig``, ``LinearBase``,
    ``UnquantizedLinearMethod``.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.program import JSON
from secateur.kernels.sparse24 import PackedLinear
from secateur.passes.lowering.cost import DENSE
from secateur.passes.lowering.lower import Lowering
from secateur.runtime.save.artifact import MANIFEST
from secateur.runtime.serving.packing import (
    find_planned_kind,
    make_packed_linear,
    multiply_packed,
    plan_of_manifest,
    warm_up,
)

log = logging.getLogger(
    "vllm.secateur"
)  # below vLLM's own logger, so that its settings show the lines

NAME = "secateur"


def register() -> None:
    """Make ``--quantization secateur`` known to vLLM.  Calling it twice does nothing more."""
    from vllm.model_executor.layers import quantization

    if NAME not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config(NAME)(make_config_class())


def make_config_class() -> type:
    """The configuration class, over vLLM's own base classes."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class PackedLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
        """Loads as a dense layer does, then packs."""

        def __init__(self, kind: str, name: str) -> None:
            super().__init__()
            self.kind = kind
            self.layer_name = name

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            """Pack the loaded weight, or leave it dense and say why."""
            weight: Any = layer.weight
            module, why = make_packed_linear(self.kind, self.layer_name, weight.detach())
            if module is None:
                log.warning("%s stays dense: %s", self.layer_name, why)
                super().process_weights_after_loading(layer)
                return
            del layer.weight
            if module.values.is_cuda:
                module.arrange_for_gpu()
                warm_up(module, weight.dtype)
            layer.packed = module

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """[..., K] -> [..., N]."""
            packed: PackedLinear | None = getattr(layer, "packed", None)
            if packed is None:
                dense: Tensor = super().apply(layer, x, bias)
                return dense
            return multiply_packed(packed, x, bias)

    class SecateurConfig(QuantizationConfig):  # type: ignore[misc]
        """Which layers are packed, from the manifest of an artifact."""

        def __init__(self, plan: Lowering) -> None:
            super().__init__()
            self.plan = plan

        def get_name(self) -> str:
            return NAME

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 80

        @staticmethod
        def get_config_filenames() -> list[str]:
            return [MANIFEST]

        @classmethod
        def from_config(cls, config: JSON) -> SecateurConfig:
            return cls(plan_of_manifest(config))

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            """A packed method for the linear layers that the plan packs; vLLM's own for all
            others."""
            if not isinstance(layer, LinearBase):
                return None
            kind, why = find_planned_kind(
                self.plan, split_stacked_name(prefix, self.packed_modules_mapping)
            )
            if kind == DENSE:
                log.info("%s stays dense: %s", prefix, why)
                return UnquantizedLinearMethod()
            return PackedLinearMethod(kind, prefix)

    return SecateurConfig


def split_stacked_name(prefix: str, mapping: dict[str, list[str]]) -> list[str]:
    """The checkpoint's layers in one of vLLM's: ``a.qkv_proj`` is ``a.q_proj``, ``a.k_proj`` and
    ``a.v_proj``.

    Args:
        prefix: of vLLM's layer.
        mapping: names of the parts by the name of the whole.
    """
    path, _, leaf = prefix.rpartition(".")
    names = list(mapping.get(leaf, [leaf]))
    if not path:
        return names
    return [f"{path}.{name}" for name in names]

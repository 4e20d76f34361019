"""One step of a causal language model as a function of tensors: tokens, position and cache in,
logits out.

Dims: B sequences, T tokens, S longest sequence, H key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

HeadShapes = tuple[tuple[tuple[int, int], tuple[int, int]], ...]


class GivenLayer(CacheLayerMixin):
    """A cache layer over given tensors [B, H, S, D], written in place; position says how many are
    filled."""

    is_compileable = True
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.position = keys, values, position
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, *states: Tensor) -> None:
        """Nothing: the tensors are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write T new keys and values after those that are there; returns the whole."""
        at = torch.arange(key_states.shape[-2], device=self.device) + self.position
        self.keys.index_copy_(2, at, key_states)
        self.values.index_copy_(2, at, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys to mask, offset of the first)."""
        return self.keys.shape[-2], 0

    def get_seq_length(self, *args: Any) -> Any:
        """How many positions are filled, int64 []."""
        return self.position

    def get_max_length(self) -> int:
        """S."""
        return int(self.keys.shape[-2])

    get_max_cache_shape = get_max_length  # its name in transformers before 5.20


class DecodeStep(nn.Module):
    """``(ids [B, T], position [], keys, values) -> logits [B, V]`` of the next token; keys and
    values are written."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, position: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        layers: list[Any] = [GivenLayer(k, v, position) for k, v in zip(keys, values, strict=True)]
        out = self.model(
            input_ids=ids, past_key_values=Cache(layers=layers), use_cache=True, logits_to_keep=1
        )
        logits: Tensor = out.logits[:, -1]
        return logits


@torch.no_grad()
def cache_shapes(model: PreTrainedModel) -> HeadShapes:
    """(H, D) of keys and of values of each layer.

    Raises:
        ValueError: a layer keeps something else than all its keys and values (a window, a state),
            or none at all.
    """
    ids = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    cache = model(input_ids=ids, use_cache=True).get("past_key_values")
    if not isinstance(cache, DynamicCache) or not cache.layers:
        raise ValueError(
            f"it keeps {type(cache).__name__} instead of keys and values of each layer"
        )
    shapes = []
    for at, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise ValueError(
                f"its layer {at} keeps {type(layer).__name__} instead of all keys and values"
            )
        shapes.append(
            (
                (layer.keys.shape[1], layer.keys.shape[3]),
                (layer.values.shape[1], layer.values.shape[3]),
            )
        )
    return tuple(shapes)


def make_empty_cache(
    shapes: HeadShapes, batch: int, length: int, dtype: torch.dtype, device: str | torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values [B, H, S, D] of each layer, zeros."""

    def make_zeros(sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        return [
            torch.zeros(batch, heads, length, size, dtype=dtype, device=device)
            for heads, size in sizes
        ]

    return make_zeros([keys for keys, _ in shapes]), make_zeros([values for _, values in shapes])

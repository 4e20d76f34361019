"""One step of a causal language model as a function of tensors: tokens, position and cache in,
logits out.

Dims: B sequences, T tokens, S longest sequence, H key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

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
        self.keys = keys
        self.values = values
        self.position = position
        self.dtype = keys.dtype
        self.device = keys.device
        self.is_initialized = True

    def lazy_initialization(self, *states: Tensor) -> None:
        """Nothing: the tensors are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write T new keys and values after those that are there; returns the whole.

        Args:
            key_states: [B, H, T, D].
            value_states: [B, H, T, D].
        """
        places = torch.arange(key_states.shape[-2], device=self.device) + self.position
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: object) -> tuple[int, int]:
        """(keys to mask, offset of the first)."""
        return self.keys.shape[-2], 0

    def get_seq_length(self, *args: object) -> Any:
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
        """Run the model on tokens after those in the cache.

        Args:
            ids: int64 [B, T].
            position: int64 [], tokens in the cache.
            keys: [B, H, S, D] of each layer; written.
            values: [B, H, S, D] of each layer; written.

        Returns:
            Logits [B, V] of the next token.
        """
        layers: list[Any] = []
        for layer_keys, layer_values in zip(keys, values, strict=True):
            layers.append(GivenLayer(layer_keys, layer_values, position))
        out = self.model(
            input_ids=ids, past_key_values=Cache(layers=layers), use_cache=True, logits_to_keep=1
        )
        logits: Tensor = out.logits[:, -1]
        return logits


@torch.no_grad()
def cache_shapes(model: PreTrainedModel) -> HeadShapes:
    """(H, D) of keys and of values of each layer.

    Args:
        model: with weights.

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
    for place, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise ValueError(
                f"its layer {place} keeps {type(layer).__name__} instead of all keys and values"
            )
        key_shape = (layer.keys.shape[1], layer.keys.shape[3])
        value_shape = (layer.values.shape[1], layer.values.shape[3])
        shapes.append((key_shape, value_shape))
    return tuple(shapes)


def make_empty_cache(
    shapes: HeadShapes, batch: int, length: int, dtype: torch.dtype, device: str | torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values [B, H, S, D] of each layer, zeros.

    Args:
        shapes: (H, D) of keys and of values of each layer.
        batch: B.
        length: S.
        dtype: of all tensors.
        device: of all tensors.
    """

    keys = list[Tensor]()
    values = list[Tensor]()
    for (key_heads, key_size), (value_heads, value_size) in shapes:
        key_shape = (batch, key_heads, length, key_size)
        value_shape = (batch, value_heads, length, value_size)
        keys.append(torch.zeros(key_shape, dtype=dtype, device=device))
        values.append(torch.zeros(value_shape, dtype=dtype, device=device))
    return keys, values

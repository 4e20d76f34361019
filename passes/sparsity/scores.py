"""How much each entry of a weight matters, seen alone.

Dims: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Metric = Callable[[Tensor, Tensor], Tensor]


def ria_score(size_NK: Tensor, norms_K: Tensor) -> Tensor:
    """An entry's parts of its row's and of its column's sum, times the root of its input's norm.

    Args:
        size_NK: |W|, float32.
        norms_K: root mean square of each input.

    Returns:
        [N, K], higher is kept.
    """
    tiny = torch.finfo(size_NK.dtype).tiny
    shares = size_NK / size_NK.sum(1, keepdim=True).clamp_min(tiny) + size_NK / size_NK.sum(
        0
    ).clamp_min(tiny)
    return shares * norms_K.sqrt()


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "magnitude": lambda size_NK, norms_K: size_NK,
        "wanda": lambda size_NK, norms_K: size_NK * norms_K,
        "ria": ria_score,
    }
)
"""(|W| [N, K] float32, root mean square of each input [K]) -> score [N, K], higher is kept.

Sources: Sun et al. 2024 (Wanda), arXiv:2306.11695, eq. 1; Zhang et al. 2024 (RIA), ICLR 2024,
    eq. 4, a = 1/2.
"""

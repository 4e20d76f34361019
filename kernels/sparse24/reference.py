"""The specification of every op, in plain torch and float32: expand the weight, multiply.  Never
optimised.

Works on any device.  Dims: N outputs, K inputs, S stored inputs (K rounded up to 8), G scale
groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.kernels.sparse24.formats import expand_kept, scale_of_columns, unpack_nibbles


def dense_weight(
    values: Tensor, mask: Tensor | None, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The dense weight [N, S] of packed tensors.

    Args:
        values, mask, scale: as ``formats`` lays them out; without a mask, quantised values are
        dense: int8 [N, S], uint8 [N, S/2].
        dtype: of the result; products of level and scale are taken in float32.
    """
    if values.dtype == torch.uint8:
        kept = unpack_nibbles(values)
    else:
        kept = values
    if mask is None:
        dense = kept
    else:
        dense = expand_kept(kept, mask)
    if scale is not None:
        dense = dense.float() * scale_of_columns(scale, dense.shape[1])
    return dense.to(dtype)


def linear(
    x: Tensor, values: Tensor, mask: Tensor | None, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``x @ weight^T + bias`` accumulated in float32, rounded once to the dtype of x.

    Args:
        x: [..., K], K at most S: missing columns count as zeros.
        bias: [N].

    Returns:
        [..., N].
    """
    dense = dense_weight(values, mask, scale, torch.float32)
    padded = F.pad(x.float(), (0, dense.shape[1] - x.shape[-1]))
    return F.linear(padded, dense, None if bias is None else bias.float()).to(x.dtype)

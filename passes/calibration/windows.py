"""Windows of tokens, as a model sees them: with the beginning token that its tokenizer puts before
a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def beginning_token(tokenizer: Any) -> int | None:
    """Return the id that a tokenizer puts before every text, or None.

    Args:
        tokenizer: of the model.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return None
    ids = tokenizer("a")["input_ids"]
    if list(ids[:1]) == [bos]:
        return int(bos)
    return None


def text_per_window(window: int, bos: int | None) -> int:
    """Return how many tokens of text stand in a window.

    Args:
        window: tokens of a window, beginning token included.
        bos: id before every window, or None.
    """
    if bos is None:
        return window
    return window - 1


def cut_windows(stream_T: Tensor, window: int, bos: int | None) -> Tensor:
    """Cut a stream of tokens into windows without overlap; a rest is left out.

    Args:
        stream_T: [T] int64.
        window: tokens of a window, beginning token included.
        bos: id before every window, or None.

    Returns:
        [n, window] int64.
    """
    body = text_per_window(window, bos)
    count = len(stream_T) // body
    rows = stream_T[: count * body].view(count, body)
    if bos is None:
        return rows
    return torch.cat([rows.new_full((count, 1), bos), rows], dim=1)

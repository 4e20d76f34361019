"""Text for models with an encoder and a decoder: what of a window goes where.

The first half of a window is given to the encoder, the second is what the decoder predicts: the
prefix language modelling of T5, with the prefix at one half.

Source:
    Raffel et al. 2020 (T5), arXiv:1910.10683, section 3.2.1 (prefix language modelling).
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.graph import Program, SecateurError

DECODER_INPUT = "decoder_input_ids"
IGNORED = -100


class Seq2SeqError(SecateurError):
    """A window that cannot be split, or a model that names no first token of its decoder."""


def takes_decoder_input(program: Program) -> bool:
    """Tell whether a captured model has a decoder that reads token ids of its own.

    Args:
        program: the captured model.
    """
    has_decoder = bool(getattr(program.source.config, "is_encoder_decoder", False))
    return has_decoder and DECODER_INPUT in program.source.example_inputs


def decoder_start(config: object) -> int:
    """Return the id of the token that a decoder begins with.

    Args:
        config: configuration of the model.

    Raises:
        Seq2SeqError: neither ``decoder_start_token_id`` nor ``bos_token_id`` is an id.
    """
    for field in ("decoder_start_token_id", "bos_token_id"):
        token = getattr(config, field, None)
        if isinstance(token, int):
            return token
    raise Seq2SeqError(
        "the configuration names no first token of the decoder: set decoder_start_token_id"
    )


def split_window(ids_BT: Tensor, start: int) -> dict[str, Tensor]:
    """Split windows of text into an input of the encoder and what the decoder is to predict.

    Args:
        ids_BT: [B, T] int64, T at least 2.
        start: id of the token that the decoder begins with.

    Returns:
        ``input_ids`` [B, T // 2], ``decoder_input_ids`` and ``labels`` [B, T - T // 2]: the label
        of a position is the token that it predicts.

    Raises:
        Seq2SeqError: T is 1 or 0.
    """
    length = ids_BT.shape[1]
    if length < 2:
        raise Seq2SeqError("a sequence of one token cannot be split between encoder and decoder")
    labels = ids_BT[:, length // 2 :].contiguous()
    return {
        "input_ids": ids_BT[:, : length // 2].contiguous(),
        DECODER_INPUT: shift_right(labels, start),
        "labels": labels,
    }


def shift_right(labels_BT: Tensor, start: int) -> Tensor:
    """Return the input of a decoder that predicts labels: a first token, then all labels but the
    last.

    Args:
        labels_BT: [B, T] int64; -100 where not counted (the decoder reads the first token there).
        start: id of the token that the decoder begins with.

    Returns:
        [B, T] int64.
    """
    begin = torch.full_like(labels_BT[:, :1], start)
    shifted = torch.cat([begin, labels_BT[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, start)

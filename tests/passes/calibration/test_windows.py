"""Windows begin with the token that the tokenizer puts before a text, and with none else."""

from __future__ import annotations

from typing import Any

import torch

from secateur.passes.calibration.windows import beginning_token, cut_windows


class Letters:
    """A tokenizer of one token a letter."""

    def __init__(self, bos_token_id: int | None, adds: bool) -> None:
        self.bos_token_id = bos_token_id
        self.adds = adds

    def __call__(self, text: str) -> Any:
        ids = [ord(letter) for letter in text]
        if self.adds and self.bos_token_id is not None:
            ids = [self.bos_token_id, *ids]
        return {"input_ids": ids}


def test_the_token_that_a_tokenizer_adds() -> None:
    assert beginning_token(Letters(1, adds=True)) == 1
    assert beginning_token(Letters(1, adds=False)) is None
    assert beginning_token(Letters(None, adds=True)) is None


def test_windows_with_and_without_a_beginning_token() -> None:
    stream = torch.arange(10, 20)
    assert cut_windows(stream, 4, None).tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]
    expected = [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18]]
    assert cut_windows(stream, 4, 1).tolist() == expected

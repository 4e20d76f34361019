"""Text to token windows: documents are joined by the end token and cut into windows of one length.

A pass takes any iterable of input_ids [batch, window]; `TokenWindows` is one that can be iterated
again and again, knows what it was made of, and prints it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from secateur.graph.errors import SecateurError
from secateur.passes.calibration.documents import Render
from secateur.passes.calibration.documents import read_documents as documents_of
from secateur.passes.calibration.windows import cut_windows, text_per_window

CHUNK_DOCUMENTS = 256


class CorpusError(SecateurError):
    """A text file cannot be read, or holds too little text for what is asked of it."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        """Cut texts into tokens; the result holds their ids under ``input_ids``."""
        ...


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Fixed windows of tokens, in batches.

    windows: [n, window] int64, without padding and without overlap.
    batch: windows in each tensor that iteration yields; the last may be smaller.
    documents: how many documents were used, the last perhaps in part.
    seed: seed of the documents' order.
    bos: id that stands first in every window, or None.
    """

    windows: torch.Tensor
    batch: int = 1
    documents: int = 0
    seed: int = 0
    bos: int | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.windows.split(self.batch))

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch)

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.windows.numel()

    def describe(self) -> dict[str, Any]:
        """What these windows are, for a report."""
        n, window = self.windows.shape
        sha256 = hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()
        return {
            "windows": n,
            "window_tokens": window,
            "tokens": self.tokens,
            "documents": self.documents,
            "seed": self.seed,
            "joined_by": "end token",
            "beginning_token": self.bos,
            "sha256": sha256,
        }


def read_documents(
    paths: Sequence[Path | str], *, field: str = "text", render: Render | None = None
) -> list[str]:
    """The documents of text files, in the order of the files.

    Args:
        paths: see ``secateur.passes.calibration.documents``.
        field: the key or the column of the text in a row.
        render: writes conversations as text; None refuses them.

    Raises:
        CorpusError: a file is missing, is not UTF-8, or a line is no such object; or no document is
            left.
    """
    documents: list[str] = []
    for path in paths:
        documents += documents_of(Path(path), field=field, render=render, error=CorpusError)
    if not documents:
        raise CorpusError(
            f"no text in {', '.join(map(str, paths)) or 'an empty list of files'}: give a "
            "file with text"
        )
    return documents


def shuffle_documents(documents: Sequence[str], seed: int = 0) -> list[str]:
    """The documents in an order that depends on the seed and on each text alone, on no library's
    random numbers."""
    return sorted(documents, key=lambda text: hashlib.sha256(f"{seed}/{text}".encode()).digest())


def token_stream(
    documents: Sequence[str], tokenizer: Tokenizer, *, tokens: int | None = None
) -> tuple[torch.Tensor, int]:
    """Tokens of the documents one after another, an end token after each; no beginning token is
    added.

    Args:
        documents: texts, in order.
        tokenizer: of the model.
        tokens: stop when there are so many; None takes all.

    Returns:
        ([T] int64, number of documents used).

    Raises:
        CorpusError: the tokenizer has no end token, or there is less text than asked for.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise CorpusError(
            "the tokenizer has no end token (eos_token) to put between documents: set one"
        )
    stream: list[int] = []
    used = 0
    for start in range(0, len(documents), CHUNK_DOCUMENTS):
        chunk = list(documents[start : start + CHUNK_DOCUMENTS])
        for ids in tokenizer(chunk, add_special_tokens=False)["input_ids"]:
            stream += [*ids, end]
            used += 1
            if tokens is not None and len(stream) >= tokens:
                return torch.tensor(stream[:tokens], dtype=torch.int64), used
    if tokens is not None:
        raise CorpusError(
            f"{tokens} tokens asked for, the text holds {len(stream)}: ask for fewer or give "
            "more text"
        )
    return torch.tensor(stream, dtype=torch.int64), used


def calibration_windows(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    *,
    tokens: int,
    window: int = 512,
    batch: int = 1,
    seed: int = 0,
    bos: int | None = None,
) -> TokenWindows:
    """Cut ``tokens // window`` windows from the documents in a seeded order.

    Args:
        documents: texts.
        tokenizer: of the model.
        tokens: of all windows together.
        window: tokens of a window, beginning token included.
        batch: windows in each tensor of an iteration.
        seed: of the order of the documents.
        bos: id before every window, or None; ``beginning_token`` tells what a model expects.

    Raises:
        CorpusError: window or tokens make no window, or there is too little text.
    """
    if window < 2 or tokens < window or batch < 1:
        raise CorpusError(
            f"window={window}, tokens={tokens}, batch={batch}: need 2 <= window <= tokens "
            "and batch >= 1"
        )
    needed = tokens // window * text_per_window(window, bos)
    stream, used = token_stream(shuffle_documents(documents, seed), tokenizer, tokens=needed)
    windows = cut_windows(stream, window, bos)
    return TokenWindows(windows, batch=batch, documents=used, seed=seed, bos=bos)


def mix_windows(parts: Sequence[TokenWindows]) -> TokenWindows:
    """Join windows of several corpora, those of the first one first.

    Args:
        parts: at least one, all of the same window, batch and beginning token.

    Returns:
        All windows.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    return TokenWindows(
        torch.cat([part.windows for part in parts]),
        batch=first.batch,
        documents=sum(part.documents for part in parts),
        seed=first.seed,
        bos=first.bos,
    )


def share_windows(count: int, shares: Sequence[float]) -> list[int]:
    """Divide windows among corpora by weight; the rest goes to the largest fractions.

    Args:
        count: windows in all.
        shares: weights above zero.

    Returns:
        Windows of each corpus, in order; they add up to ``count``.

    Raises:
        CorpusError: a corpus would get no window.
    """
    exact = [count * share / sum(shares) for share in shares]
    parts = [int(value) for value in exact]
    by_fraction = sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])
    for i in by_fraction[: count - sum(parts)]:
        parts[i] += 1
    if min(parts) < 1:
        raise CorpusError(
            f"{count} windows cannot be shared as {':'.join(f'{share:g}' for share in shares)}: "
            "one file would get none; ask for more --tokens"
        )
    return parts

"""Training text: windows of tokens, some held back for evaluation, and their order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from secateur.graph import Program, SecateurError
from secateur.passes.calibration.data import IGNORED, Sample, samples
from secateur.passes.calibration.documents import read_documents
from secateur.passes.calibration.windows import beginning_token, cut_windows, text_per_window
from secateur.passes.opening import open_tokenizer
from secateur.passes.storage.journal import hash_tensor

DOCUMENTS_AT_ONCE = 256
Item = dict[str, Any]
"""A numbered sequence, or a batch of them, by field."""


class TextError(SecateurError):
    """Training text that cannot be read, or that is too little."""


@dataclass(frozen=True, eq=False)
class TrainingText:
    """train, held_out: sequences to learn from, and to measure by; none is in both."""

    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]

    @property
    def window(self) -> int:
        """Tokens of the longest training sequence."""
        return max(sample.tokens for sample in self.train)

    def sha256(self) -> str:
        """Of all sequences, in order."""
        digest = hashlib.sha256(str(len(self.train)).encode())
        for sample in (*self.train, *self.held_out):
            for name, value in sample.inputs.items():
                digest.update(
                    f"{name} {hash_tensor(value) if isinstance(value, Tensor) else value} ".encode()
                )
        return digest.hexdigest()


def split_held_out(sequences: Sequence[Sample], held_out: int) -> TrainingText:
    """The first ``held_out`` sequences held back, fewer where that would be more than one in five:
    the same ones however many follow.

    Args:
        sequences: in order.
        held_out: most sequences to hold back.

    Returns:
        training and held-back sequences.

    Raises:
        TextError: no sequence to train on.
    """
    back = min(held_out, len(sequences) // 5)
    training = tuple(sequences[back:])
    if not training:
        raise TextError(
            "there is no sequence to train on: give calibration text (--data), or the pass a "
            "text of its own (data=FILE, or --train)"
        )
    return TrainingText(training, tuple(sequences[:back]))


def read_windows(
    file: Path, program: Program, *, tokens: int, window: int, seed: int
) -> tuple[Sample, ...]:
    """Windows of a file in the tokens of the model, at least one and at most enough for ``tokens``.

    Args:
        file: ``.safetensors`` with ``input_ids`` [n, window] of any integer dtype (tokenised
            before); ``.jsonl`` with the text under ``text``; any other file is UTF-8 text,
            documents apart by two empty lines.  Text is tokenised by the tokenizer in the model's
            folder, in a seeded order of the documents, an end token after each, and cut into
            windows without overlap.
        program: names the main input and the tokenizer.
        tokens: stop when there are so many; less text is seen more than once.
        window: tokens of a sequence.
        seed: of the order of documents.

    Raises:
        TextError: the file or the tokenizer cannot be read, or not one window comes out.
    """
    if file.suffix == ".safetensors":
        ids = _read_ids(file)
        window = min(window, ids.shape[1])
        rows = ids[:, :window]
    else:
        ids, bos = _tokenize_file(file, program, tokens, seed)
        if len(ids) < text_per_window(window, bos):
            raise TextError(
                f"{file} holds {len(ids)} tokens, less than one window of {window}: give more text"
            )
        rows = cut_windows(ids, window, bos)
    rows = rows[: -(-tokens // window)]
    if not len(rows):
        raise TextError(f"{file} holds no window of {window} tokens: give more text")
    return samples([rows.long()], program)


def _read_ids(file: Path) -> Tensor:
    """Token ids [n, window] of a safetensors file.

    Raises:
        TextError: the file has no such tensor.
    """
    try:
        ids = load_file(file)["input_ids"]
    except (OSError, SafetensorError, KeyError) as error:
        raise TextError(
            f"{file}: expected safetensors with a tensor input_ids [n, window]: {error!r}"
        ) from error
    if ids.dim() != 2 or ids.is_floating_point():
        raise TextError(
            f"{file}: input_ids is {list(ids.shape)} {ids.dtype}, expected integers [n, window]"
        )
    return ids


def _tokenize_file(
    file: Path, program: Program, tokens: int, seed: int
) -> tuple[Tensor, int | None]:
    """Token ids of a text file as one stream, and the id before every window, or None.

    Raises:
        TextError: no tokenizer, or one without an end token.
    """
    if program.source.folder is None:
        raise TextError(
            f"{file} is text, and the model came from no folder with a tokenizer: give .safetensors"
        )
    tokenizer = open_tokenizer(program.source.folder, TextError)
    if tokenizer.eos_token_id is None:
        raise TextError(
            "the tokenizer has no end token (eos_token) to put between documents: set one"
        )
    stream: list[int] = []
    for chunk in _document_chunks(read_documents(file, error=TextError), seed):
        for ids in tokenizer(chunk, add_special_tokens=False)["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
        if len(stream) >= tokens:
            break
    return torch.tensor(stream), beginning_token(tokenizer)


def _document_chunks(documents: list[str], seed: int) -> Iterator[list[str]]:
    """The documents in a seeded order, some at a time."""
    order = sorted(documents, key=lambda text: hashlib.sha256(f"{seed}/{text}".encode()).digest())
    return (
        order[start : start + DOCUMENTS_AT_ONCE]
        for start in range(0, len(order), DOCUMENTS_AT_ONCE)
    )


class TrainingOrder(torch.utils.data.Dataset[Item]):
    """The sequences in the order of training: as many passes as it takes, each in an order of its
    own.

    The order depends on seed and number of sequences alone, so that a run can go on at any place of
    it.
    """

    def __init__(self, samples: Sequence[Sample], length: int, seed: int) -> None:
        self.samples = samples
        self.length = length
        self.seed = seed
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, at: int) -> Item:
        turn, place = divmod(at, len(self.samples))
        if turn not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            self._orders[turn] = torch.randperm(len(self.samples), generator=generator).tolist()
        window = self._orders[turn][place]
        return {"window": window, "sample": self.samples[window]}


def collate_batch(items: Sequence[Item]) -> Item:
    """A batch: ``inputs`` of the model, ``labels`` (next tokens) and ``counted`` where known,
    numbers of the windows.

    Sequences of different lengths are padded at their ends, and padding is not counted.  It is not
    masked: a causal model cannot see it, and others should be given sequences of one length.

    Args:
        items: with ``window`` and ``sample`` each.
    """
    samples = [item["sample"] for item in items]
    inputs = {}
    for name in samples[0].inputs:
        inputs[name] = _join_sequences([s.inputs[name] for s in samples])
    batch: Item = {
        "inputs": inputs,
        "window": torch.tensor([item["window"] for item in items]),
    }
    targets: list[Tensor] = []
    for sample in samples:
        target = _predicted_targets(sample)
        if target is not None:
            targets.append(target)
    if len(targets) == len(samples):
        lengths = [target.shape[1] for target in targets]
        batch["labels"] = _join_sequences(targets, IGNORED)
        if len(set(lengths)) > 1:
            batch["counted"] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return batch


def _predicted_targets(sample: Sample) -> Tensor | None:
    """[1, t]: what each position predicts, -100 where nothing."""
    if sample.has_aligned_labels:
        return sample.labels
    ids = _predicted_tokens(sample)
    if ids is None:
        return None
    return _next_tokens(ids)


def _next_tokens(ids: Tensor) -> Tensor:
    """[1, t]: at each position the token that follows; -100 at the last."""
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)


def _predicted_tokens(sample: Sample) -> Tensor | None:
    """[1, t] tokens whose next ones are to be predicted: those of the decoder where there is
    one."""
    if sample.labels is not None:
        if sample.labels.dim() == 2:
            return sample.labels
        return None
    names = ("decoder_input_ids", "input_ids", "ids")
    tokens = next((sample.inputs[name] for name in names if name in sample.inputs), None)
    if tokens is None:
        tokens = next(iter(sample.inputs.values()))
    is_token_matrix = (
        isinstance(tokens, Tensor) and tokens.dim() == 2 and not tokens.is_floating_point()
    )
    return tokens if is_token_matrix else None


def _join_sequences(values: Sequence[Any], filler: int = 0) -> Any:
    """One tensor of all sequences, padded where their lengths differ; what is no tensor must be the
    same for all."""
    if not isinstance(values[0], Tensor):
        return values[0]
    if values[0].dim() > 1:
        longest = max(v.shape[1] for v in values)
    else:
        longest = 0
    pad = torch.nn.functional.pad
    uneven = values[0].dim() == 2
    return torch.cat(
        [pad(v, (0, longest - v.shape[1]), value=filler) if uneven else v for v in values]
    )

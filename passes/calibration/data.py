"""Calibration data as single sequences without padding.

Scores must not depend on how sequences were batched, so every batch is cut into its sequences and
every sequence runs alone; padding is cut off, so that it needs no mask and cannot count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.graph import Program, SecateurError
from secateur.passes.calibration.seq2seq import (
    DECODER_INPUT,
    decoder_start,
    shift_right,
    split_window,
    takes_decoder_input,
)

IGNORED = -100
Inputs = dict[str, Any]
"""Keyword arguments of a model by name."""
Batch = Tensor | Mapping[str, Any]


class CalibrationError(SecateurError):
    """Calibration data that the captured model cannot take, or that holds nothing to learn from."""


@dataclass(frozen=True)
class Sample:
    """One sequence.

    inputs: keyword arguments of the model; tensors have batch 1.
    labels: [1, seq] int64 token ids or [1] class ids, -100 where the loss must not look; None
        without labels.
    """

    inputs: Mapping[str, Any]
    labels: Tensor | None = None

    @property
    def has_aligned_labels(self) -> bool:
        """Whether the label of a position is what that position predicts, as with a decoder's
        labels; those of a causal model are its input ids, one position late."""
        is_sequence = self.labels is not None and self.labels.dim() == 2
        return is_sequence and DECODER_INPUT in self.inputs

    @property
    def tokens(self) -> int:
        """Positions of the sequence (1 where the input is not a sequence of tokens)."""
        tensors = []
        for v in self.inputs.values():
            if isinstance(v, Tensor) and not v.is_floating_point():
                tensors.append(v)
        return max((v.shape[1] for v in tensors if v.dim() > 1), default=1)


def samples(data: Iterable[Batch], program: Program) -> tuple[Sample, ...]:
    """The sequences of the data, in order.

    Args:
        data: batches: ``input_ids`` [batch, seq] int64, or maps of model inputs whose tensors share
            the batch dim. ``attention_mask`` (0 where padded) and ``labels`` (-100 where not
            counted) are understood even where the captured model takes neither: padding is cut off,
            as is a tail of ignored labels without a mask. A single tensor [batch, seq] will do,
            too, and so will sequences [seq] one by one. Where the model has an encoder and a
            decoder, plain token ids are split between them (see ``seq2seq``), and a map with labels
            alone gets the decoder's input from them.
        program: the captured model.

    Returns:
        one Sample for each sequence.

    Raises:
        CalibrationError: no sequence at all, wrong shape or dtype, an input that the captured model
            does not take.
    """
    device = next((p.device for _, p in program.named_parameters()), torch.device("cpu"))
    batches = []
    for batch in _list_batches(data):
        batches.append(_move_inputs(device, _as_inputs(batch, program)))
    sequences = list[Sample]()
    for inputs in batches:
        sequences += _split_rows(inputs, program)
    if not sequences:
        raise CalibrationError(
            "the calibration data is empty: give at least one batch of input_ids [batch, seq]"
        )
    return tuple(sequences)


def main_input(program: Program) -> str:
    """The name of the model's first input, ``input_ids`` for most language models.

    Args:
        program: the captured model.
    """
    names = list(program.source.example_inputs)
    preferred = getattr(program.source.model, "main_input_name", "input_ids")
    if preferred in names or not names:
        return preferred
    return names[0]


def _list_batches(data: Iterable[Batch]) -> list[Batch]:
    """The batches of the data; a single tensor or map is one batch.

    Raises:
        CalibrationError: a batch is text.
    """
    if isinstance(data, Tensor | Mapping):
        batches: list[Any] = [data]
    else:
        batches = list(data)
    if any(isinstance(batch, str) for batch in batches):
        raise CalibrationError("calibration data is token ids, not text: tokenise it first")
    return batches


def _as_inputs(batch: Batch, program: Program) -> Inputs:
    """The model inputs of a batch by name.

    Raises:
        CalibrationError: neither a tensor of token ids nor a map.
    """
    if isinstance(batch, Mapping):
        return _add_decoder_input(dict(batch), program)
    if not isinstance(batch, Tensor):
        raise CalibrationError(
            f"expected a tensor or a map of model inputs, found {type(batch).__name__}"
        )
    name = main_input(program)
    if name == "input_ids" and batch.dim() == 1:
        batch = batch[None]
    if name == "input_ids" and (batch.dim() != 2 or batch.is_floating_point()):
        raise CalibrationError(
            f"expected input_ids [batch, seq] int64, found {list(batch.shape)} {batch.dtype}"
        )
    if name == "input_ids" and takes_decoder_input(program):
        return dict(split_window(batch, decoder_start(program.source.config)))
    return {name: batch}


def _add_decoder_input(inputs: Inputs, program: Program) -> Inputs:
    """The inputs, with those of the decoder made from the labels where they are not given."""
    labels = inputs.get("labels")
    if takes_decoder_input(program) and DECODER_INPUT not in inputs and isinstance(labels, Tensor):
        inputs[DECODER_INPUT] = shift_right(labels, decoder_start(program.source.config))
    return inputs


def _move_inputs(device: torch.device, inputs: Inputs) -> Inputs:
    """Inputs where the weights are; on the CPU when those are nowhere yet."""
    if device.type == "meta":
        return inputs
    moved: Inputs = {}
    for name, v in inputs.items():
        moved[name] = v.to(device) if isinstance(v, Tensor) else v
    return moved


def _split_rows(inputs: Inputs, program: Program) -> list[Sample]:
    """One Sample for each sequence of a batch.

    Raises:
        CalibrationError: the tensors differ in their first dim, or the batch size is fixed.
    """
    sizes = {}
    for name, v in inputs.items():
        if isinstance(v, Tensor) and v.dim() > 0:
            sizes[name] = v.shape[0]
    if len(set(sizes.values())) != 1:
        raise CalibrationError(
            f"the tensors of a batch must share their first dim, found {sizes or 'no tensor'}"
        )
    (size,) = set(sizes.values())
    fixed = static_batch(program)
    if fixed is None:
        rows = []
        for i in range(size):
            rows.append({n: v[i : i + 1] if n in sizes else v for n, v in inputs.items()})
    elif fixed == size:
        rows = [inputs]
    else:
        raise CalibrationError(f"the model was captured for batches of {fixed}, found {size}")
    return [_make_sample(row, program) for row in rows]


def static_batch(program: Program) -> int | None:
    """The batch size that the graph was captured for, or None where any will do.

    Args:
        program: the captured model.

    Returns:
        number of sequences, or None.
    """
    for node in program.gm.graph.nodes:
        value = None
        if node.op == "placeholder":
            value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() > 0:
            size = static_size(value.shape[0])
            if size == 1:
                return None
            return size
    return None


def static_size(size: int | torch.SymInt) -> int | None:
    """A size that the graph fixes, or None where it is open.

    Args:
        size: number or symbol.

    Returns:
        number, or None.
    """
    if isinstance(size, torch.SymInt):
        if size.node.expr.is_number:
            return int(size)
        return None
    return int(size)


def _make_sample(row: Inputs, program: Program) -> Sample:
    """A Sample without padding, checked against the inputs of the model.

    Raises:
        CalibrationError: the mask has holes, or an input is unknown.
    """
    accepted = set(program.source.example_inputs)
    row = _trim_padding(row, bool(getattr(program.source.config, "is_encoder_decoder", False)))
    if "labels" in row and "labels" not in accepted:
        labels = row.pop("labels")
    else:
        labels = row.get("labels")
    mask = row.get("attention_mask")
    if mask is not None and "attention_mask" not in accepted:
        if not bool(mask.bool().all()):
            raise CalibrationError(
                "the attention_mask has holes and the captured model takes no attention_mask"
            )
        del row["attention_mask"]
    unknown = sorted(set(row) - accepted)
    if accepted and unknown:
        raise CalibrationError(
            f"the captured model takes no {unknown[0]!r}; it takes: {', '.join(sorted(accepted))}"
        )
    _check_complete(row, program)
    return Sample(row, labels)


def _check_complete(row: Inputs, program: Program) -> None:
    """Refuse a sequence without an input that the graph reads: the example of the capture is no
    data.

    Raises:
        CalibrationError: names the input.
    """
    if not row:
        return
    for node in program.gm.graph.nodes:
        if node.op != "placeholder" or not node.users or node.target in row:
            continue
        if isinstance(program.source.example_inputs.get(node.target), Tensor):
            raise CalibrationError(
                f"the captured model also reads {node.target}, and the calibration data has none: "
                "give it with every sequence"
            )


def _trim_padding(row: Inputs, encoder_decoder: bool) -> Inputs:
    """Cut padding off both ends (by the mask), or ignored labels off the tail; encoder and decoder
    each alone."""
    decoder = set()
    for name in row:
        if name == "labels" or name.startswith("decoder_"):
            decoder.add(name)
    if encoder_decoder:
        late = decoder
    else:
        late = set[str]()
    sides = [[name for name in row if name not in late], sorted(late)]
    trimmed = []
    for side in sides:
        trimmed.append(_trim_side({name: row[name] for name in side}))
    return {**trimmed[0], **trimmed[1]}


def _trim_side(side: Inputs) -> Inputs:
    """The inputs of one side without padding at both ends.

    Raises:
        CalibrationError: the sequence is padding alone.
    """
    mask = next(
        (side[name] for name in ("attention_mask", "decoder_attention_mask") if name in side), None
    )
    labels = side.get("labels")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask.bool().any(0)
    elif isinstance(labels, Tensor) and labels.dim() == 2:
        real = (labels != IGNORED).any(0).flip(0).cumsum(0).flip(0) > 0
    else:
        return side
    if not bool(real.any()):
        raise CalibrationError("a sequence of the calibration data is padding alone")
    where = real.nonzero().flatten()
    start = int(where[0])
    stop = int(where[-1]) + 1
    seq = real.numel()
    fits = set()
    for name, v in side.items():
        if isinstance(v, Tensor) and v.dim() == 2 and v.shape[1] == seq:
            fits.add(name)
    trimmed: Inputs = {}
    for name, v in side.items():
        trimmed[name] = v[:, start:stop] if name in fits else v
    return trimmed

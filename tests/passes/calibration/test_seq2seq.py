"""Text for models with an encoder and a decoder reaches both; no example of the capture does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.graph import Program
from secateur.passes.calibration.data import CalibrationError, samples
from secateur.passes.calibration.kl import next_token_losses
from secateur.passes.calibration.seq2seq import (
    Seq2SeqError,
    decoder_start,
    shift_right,
    split_window,
)
from secateur.passes.importance.gradients import sum_loss
from secateur.passes.training.text import collate_batch

ByKind = Callable[[str], Program]
START = 9


def test_a_window_is_split_between_encoder_and_decoder() -> None:
    parts = split_window(torch.tensor([[3, 4, 5, 6, 7]]), START)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "input_ids": [[3, 4]],
        "decoder_input_ids": [[START, 5, 6]],
        "labels": [[5, 6, 7]],
    }
    with pytest.raises(Seq2SeqError, match="one token"):
        split_window(torch.tensor([[3]]), START)


def test_ignored_labels_are_not_read_by_the_decoder() -> None:
    assert shift_right(torch.tensor([[5, -100, 7]]), START).tolist() == [[START, 5, START]]


def test_a_decoder_without_a_first_token_is_refused() -> None:
    class Nameless:
        decoder_start_token_id = None
        bos_token_id = None

    with pytest.raises(Seq2SeqError, match="decoder_start_token_id"):
        decoder_start(Nameless())


def test_token_ids_reach_both_sides(program_of: ByKind, ids: Tensor) -> None:
    program = program_of("t5")
    start = program.source.config.decoder_start_token_id
    for row, sample in zip(ids, samples([ids], program), strict=True):
        assert sample.inputs["input_ids"].tolist() == [row[:6].tolist()]
        assert sample.inputs["decoder_input_ids"].tolist() == [[start, *row[6:-1].tolist()]]
        assert sample.labels is not None and sample.labels.tolist() == [row[6:].tolist()]


def test_the_decoders_input_follows_from_labels(program_of: ByKind, ids: Tensor) -> None:
    batch = {"input_ids": ids, "labels": ids[:, :3]}
    (sample, *_) = samples([batch], program_of("t5"))
    assert sample.inputs["decoder_input_ids"].tolist() == [[START * 0, *ids[0, :2].tolist()]]


def test_a_missing_input_is_no_example_of_the_capture(program_of: ByKind, ids: Tensor) -> None:
    with pytest.raises(CalibrationError, match="also reads decoder_input_ids"):
        samples([{"input_ids": ids}], program_of("t5"))


def test_losses_compare_each_position_with_its_own_label(program_of: ByKind, ids: Tensor) -> None:
    program = program_of("t5")
    (sample, *_) = samples([ids], program)
    model: Any = program.source.model
    with torch.no_grad():
        logits = model(**sample.inputs).logits[0]
        output = program(**sample.inputs)
    assert sample.labels is not None
    expected = F.cross_entropy(logits, sample.labels[0], reduction="none")
    torch.testing.assert_close(next_token_losses(program, sample), expected)
    total = sum_loss(output, program, sample, "next-token")
    torch.testing.assert_close(total, expected.sum())


def test_a_training_batch_predicts_its_labels(program_of: ByKind, ids: Tensor) -> None:
    data = samples([ids[:2]], program_of("t5"))
    items = [{"window": i, "sample": sample} for i, sample in enumerate(data)]
    assert collate_batch(items)["labels"].tolist() == ids[:2, 6:].tolist()

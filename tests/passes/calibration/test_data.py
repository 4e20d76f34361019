"""Calibration data: batches of any size become single sequences without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo.models import tiny_model

from secateur.graph import Program, capture
from secateur.passes import CalibrationError, samples

IDS = torch.arange(1, 9).view(2, 4)


def shapes(found: Any) -> list[list[int]]:
    return [sample.inputs["input_ids"].tolist()[0] for sample in found]


@pytest.mark.parametrize(
    "data",
    [
        IDS,
        [IDS],
        [IDS[:1], IDS[1:]],
        list(IDS),
        [{"input_ids": IDS}],
        {"input_ids": IDS},
        (batch for batch in [IDS]),
    ],
    ids=["tensor", "list", "split", "sequences", "maps", "map", "generator"],
)
def test_every_form_gives_the_same_sequences(two_layers: Program, data: Any) -> None:
    found = samples(data, two_layers)
    assert shapes(found) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert [sample.tokens for sample in found] == [4, 4]


@pytest.mark.parametrize("mask", [[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
def test_padding_is_cut_off_where_the_mask_says(two_layers: Program, mask: list[int]) -> None:
    labels = torch.tensor([[10, 11, 12, 13]])
    batch = {"input_ids": IDS[:1], "attention_mask": torch.tensor([mask]), "labels": labels}
    (found,) = samples([batch], two_layers)
    real = [place for place, one in enumerate(mask) if one]
    assert found.inputs["input_ids"].tolist() == [[IDS[0, place].item() for place in real]]
    assert found.labels is not None
    assert found.labels.tolist() == [[10 + place for place in real]]
    assert set(found.inputs) == {"input_ids"}


def test_a_tail_of_ignored_labels_is_padding_and_a_head_is_context(two_layers: Program) -> None:
    labels = torch.tensor([[-100, 2, 3, -100]])
    (found,) = samples([{"input_ids": IDS[:1], "labels": labels}], two_layers)
    assert found.inputs["input_ids"].tolist() == [[1, 2, 3]]
    assert found.labels is not None
    assert found.labels.tolist() == [[-100, 2, 3]]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "empty"),
        ("some text", "tokenise it first"),
        (["some text"], "tokenise it first"),
        ([3], "expected a tensor or a map"),
        ([torch.zeros(1, 2, 4, dtype=torch.int64)], r"\[batch, seq\]"),
        ([torch.zeros(2, 4)], "int64"),
        ([{"ids": IDS}], "takes no 'ids'; it takes: input_ids"),
        ([{"input_ids": IDS, "labels": torch.zeros(3, 4)}], "share their first dim"),
        ([{"input_ids": IDS[:1], "attention_mask": torch.tensor([[1, 0, 1, 1]])}], "holes"),
        ([{"input_ids": IDS[:1], "attention_mask": torch.zeros(1, 4)}], "padding alone"),
    ],
)
def test_faults_are_named(two_layers: Program, data: Any, says: str) -> None:
    with pytest.raises(CalibrationError, match=says):
        samples(data, two_layers)


def test_a_mask_with_holes_goes_to_a_model_that_takes_one() -> None:
    inputs = {
        "input_ids": torch.ones(2, 7, dtype=torch.int64),
        "attention_mask": torch.ones(2, 7, dtype=torch.int64),
    }
    program = capture(tiny_model("bert"), inputs)
    mask = torch.tensor([[1, 0, 1, 0]])
    (found,) = samples([{"input_ids": IDS[:1], "attention_mask": mask}], program)
    assert found.inputs["attention_mask"].tolist() == [[1, 0, 1]]


def test_each_side_of_an_encoder_decoder_has_its_own_padding(
    program_of: Callable[[str], Program],
) -> None:
    program = program_of("t5")
    ids = torch.arange(3, 7).view(1, 4)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 0, 0]]),
        "decoder_input_ids": ids,
        "labels": torch.tensor([[3, 4, 5, -100]]),
    }
    (found,) = samples([batch], program)
    assert {name: v.tolist() for name, v in found.inputs.items()} == {
        "input_ids": [[3, 4]],
        "decoder_input_ids": [[3, 4, 5]],
    }
    assert found.labels is not None
    assert found.labels.tolist() == [[3, 4, 5]]


class FixedBatch(nn.Module):
    """Folds its batch into the features, so that no other batch size will do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(-1).view(8))


def test_a_fixed_batch_is_kept_whole() -> None:
    program = capture(FixedBatch().eval(), {"x": torch.randn(2, 4)})
    (found,) = samples([{"x": torch.ones(2, 4)}], program)
    assert found.inputs["x"].shape == (2, 4)
    with pytest.raises(CalibrationError, match="captured for batches of 2, found 3"):
        samples([{"x": torch.ones(3, 4)}], program)

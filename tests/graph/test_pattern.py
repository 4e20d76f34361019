"""Masks against a sorting reference, on numbers chosen to hurt."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.graph import Pattern, Share, parse_pattern
from secateur.graph.errors import PatternError

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(1, 2), Pattern(3, 5)]
# Ties, both zeros, a denormal number, infinities, and neighbours that differ in the last bit.
HARD = [0.0, -0.0, 1e-45, -1e-45, 1.0, 1.0 + 2**-23, -1.0, 3e38, math.inf, -math.inf]


def by_sorting(score: Tensor, kept: int, of: int) -> Tensor:
    """The reference: a stable sort of each group."""
    groups = score.reshape(-1, of)
    order = groups.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, order, True).reshape(score.shape)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_masks_are_those_of_a_stable_sort(data: st.DataObject) -> None:
    pattern = data.draw(st.sampled_from(PATTERNS))
    rows, groups = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5))
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    )
    count = rows * groups * pattern.of
    values = data.draw(st.lists(st.sampled_from(HARD), min_size=count, max_size=count))
    score = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(rows, groups * pattern.of)
    mask = pattern.select_mask(score)
    assert torch.equal(mask, by_sorting(score, pattern.kept, pattern.of))
    weight = torch.where(mask, score, 0.0)
    assert (
        pattern.describe_violations(weight) is None
        and not (weight.signbit() & (weight == 0) & ~mask).any()
    )


def test_every_order_of_a_group_of_four_with_ties() -> None:
    score = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float32)
    assert torch.equal(Pattern(2, 4).select_mask(score), by_sorting(score, 2, 4))
    assert Pattern(2, 4).select_mask(torch.zeros(1, 4)).tolist() == [[True, True, False, False]]


def test_a_mask_is_refreshed_in_place() -> None:
    score = torch.randn(6, 16)
    buffer = torch.ones(16, 6, dtype=torch.bool).T  # strided, and full of what stood there before
    assert Pattern(2, 4).select_mask(score, out=buffer) is buffer
    assert torch.equal(buffer, by_sorting(score, 2, 4))
    assert torch.equal(Share(0.5).select_mask(score, out=buffer), by_sorting(score, 8, 16))


def test_a_score_may_have_more_dims_and_strides() -> None:
    score = torch.randn(3, 8, 5).transpose(1, 2)
    assert torch.equal(Pattern(2, 4).select_mask(score), by_sorting(score.contiguous(), 2, 4))


@pytest.mark.parametrize("pattern", [*PATTERNS[:4], Share(0.5)])
def test_nan_fails_loudly(pattern: Pattern | Share) -> None:
    score = torch.rand(4, 16)
    score[2, 5] = math.nan
    with pytest.raises(PatternError, match="row 2, input 5 is NaN"):
        pattern.select_mask(score)


@pytest.mark.parametrize("columns", [1, 3, 5, 63])
def test_a_width_that_does_not_fit_is_refused(columns: int) -> None:
    with pytest.raises(PatternError, match=f"{columns} inputs are no multiple of 4"):
        Pattern(2, 4).select_mask(torch.rand(2, columns))
    assert "no multiple" in str(Pattern(2, 4).describe_violations(torch.rand(2, columns)))
    kept = Share(0.5).select_mask(torch.rand(7, columns)).sum(-1)
    assert kept.tolist() == [columns - columns // 2] * 7


def test_each_planted_fault_is_counted_and_the_first_is_named() -> None:
    weight = torch.zeros(8, 16)
    weight[:, ::2] = 1.0
    assert Pattern(2, 4).describe_violations(weight) is None
    weight[3, 9] = 1e-45
    weight[5, 1] = math.nan
    assert Pattern(2, 4).describe_violations(weight) == (
        "2 of 32 groups of 4 have over 2 non-zeros, the first in row 3, inputs 8 to 11"
    )
    assert "8 of 8 groups of 16 have over 4 non-zeros" in str(
        Share(0.75).describe_violations(weight)
    )


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "1:2", "50%", "62.5%", "33.3%"])
def test_what_is_written_reads_back(text: str) -> None:
    assert str(parse_pattern(text)) == text
    assert parse_pattern(str(parse_pattern(text))) == parse_pattern(text)


@pytest.mark.parametrize(
    "text", ["", "half", "4:2", "0:4", "2:2", "2:64", "2:4:8", "0%", "100%", "-5%", "5%%"]
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(PatternError, match="expected"):
        parse_pattern(text)


@pytest.mark.slow
def test_all_masks_of_a_small_model_take_half_a_second() -> None:
    import time

    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    weights = [torch.randn(shape) for shape in shapes]
    masks = [torch.empty(shape, dtype=torch.bool) for shape in shapes]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(3):
            start = time.process_time()
            for _layer in range(30):
                for weight, mask in zip(weights, masks, strict=True):
                    Pattern(2, 4).select_mask(weight.abs(), out=mask)
            seconds.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(mask, by_sorting(w.abs(), 2, 4)) for w, mask in zip(weights, masks, strict=True)
    )
    assert min(seconds) <= 0.5

"""KL against closed forms: chunks, kept predictions, clusters of tokens, whole Programs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.graph import Program, coupled_groups, keep
from secateur.passes import samples
from secateur.passes.calibration.kl import (
    KL,
    CachedLogProbs,
    QualityError,
    cache_log_probs,
    kl,
    kl_to,
    mean_stderr,
    next_token_losses,
    predict_reference,
    token_kl,
)


def pair(rows: int = 37, width: int = 50) -> tuple[Tensor, Tensor]:
    maker = torch.Generator().manual_seed(1)
    dense = 3 * torch.randn(rows, width, generator=maker)
    return dense, dense + 0.7 * torch.randn(rows, width, generator=maker)


def by_hand(dense: Tensor, pruned: Tensor) -> Tensor:
    p, q = dense.double().softmax(-1), pruned.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("chunk", [1, 7, 37, 1000])
def test_token_kl_is_the_formula_whatever_the_chunk(chunk: int) -> None:
    dense, pruned = pair()
    found = token_kl(dense, pruned, chunk)
    torch.testing.assert_close(found.double(), by_hand(dense, pruned), rtol=1e-4, atol=1e-6)
    assert float(token_kl(dense, dense, chunk).abs().max()) == 0
    torch.testing.assert_close(token_kl(dense + 5, pruned - 3, chunk), found)


def test_entries_that_cannot_be_predicted_add_nothing() -> None:
    dense, pruned = pair()
    wider = [F.pad(x, (0, 3), value=-math.inf) for x in (dense, pruned)]
    torch.testing.assert_close(token_kl(*wider), token_kl(dense, pruned))


def test_other_shapes_and_numbers_that_are_none_are_refused() -> None:
    dense, pruned = pair()
    with pytest.raises(QualityError, match="cannot be compared"):
        token_kl(dense, pruned[:, :-1])
    with pytest.raises(QualityError, match="36 positions"):
        cache_log_probs(dense, top=4).kl(pruned[1:])
    with pytest.raises(QualityError, match="no number"):
        KL.from_sequences([torch.tensor([1.0, math.nan])])
    with pytest.raises(QualityError, match="0 tokens"):
        KL.from_sequences([])


def test_kept_predictions_give_the_kl_to_four_digits() -> None:
    dense, pruned = pair()
    one = cache_log_probs(dense, chunk=5)
    assert one.log_p.dtype == torch.float16 and one.indices is None
    torch.testing.assert_close(one.kl(pruned, 8), token_kl(dense, pruned), rtol=2e-3, atol=2e-4)


def test_the_likeliest_entries_bound_the_kl_from_below_and_reach_it() -> None:
    dense, pruned = pair()
    whole = token_kl(dense, pruned)
    found = [cache_log_probs(dense, top).kl(pruned, 8) for top in (1, 8, 40, 50)]
    assert isinstance(cache_log_probs(dense, 8), CachedLogProbs) and cache_log_probs(
        dense, 8
    ).log_p.shape == (37, 8)
    for coarse, finer in zip(found, [*found[1:], whole], strict=True):
        assert bool((coarse <= finer + 2e-3).all())
    p, q = dense.double().softmax(-1), pruned.double().softmax(-1)
    at = p.topk(8).indices
    p, q = ([*x.gather(-1, at).unbind(-1), 1 - x.gather(-1, at).sum(-1)] for x in (p, q))
    merged = sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
    torch.testing.assert_close(found[1].double(), merged, rtol=5e-3, atol=5e-4)
    assert cache_log_probs(dense, 50).indices is None


def test_the_summary_says_where_the_damage_is() -> None:
    values = torch.zeros(200)
    values[:2], values[2:40] = 10.0, 0.1
    found = KL.from_sequences([values[:100], values[100:]])
    assert found.tokens == 200 and found.mean == pytest.approx(values.double().mean().item())
    assert found.quantiles[0.5] == 0 and found.quantiles[0.9] == pytest.approx(0.1)
    assert found.shares[0.01] == pytest.approx(20 / 23.8) and found.shares[0.2] == pytest.approx(
        1.0
    )
    assert found.to_json()["share_of_worst_1%"] == found.shares[0.01]


def test_the_standard_error_counts_sequences_not_tokens() -> None:
    same = [torch.full((50,), float(v)) for v in (1, 2, 3, 4)]
    assert mean_stderr(same) == pytest.approx(torch.tensor([1.0, 2, 3, 4]).std().item() / 2)
    alone = torch.arange(9.0)
    assert mean_stderr([alone]) == pytest.approx(alone.std().item() / 3)
    assert mean_stderr([torch.tensor([2.0])]) == 0


@pytest.fixture(scope="module")
def narrower(two_layers: Program) -> Program:
    group = next(g for g in coupled_groups(two_layers) if g.locked is None and g.units == 5)
    return keep(two_layers, {group: [0, 2, 4]})


def test_programs_are_compared_on_every_position(
    two_layers: Program, narrower: Program, ids: Tensor
) -> None:
    data = samples([ids], two_layers)
    with torch.no_grad():
        tokens = [by_hand(two_layers(row[None])[0], narrower(row[None])[0]) for row in ids]
    found = kl(two_layers, narrower, data, chunk=5)
    assert found.tokens == ids.numel() and found.mean == pytest.approx(
        torch.cat(tokens).mean().item(), rel=1e-4
    )
    assert kl(two_layers, two_layers, data).mean == 0
    again = kl_to(predict_reference(two_layers, data), narrower, data)
    assert again.mean == pytest.approx(found.mean, rel=5e-3)
    with pytest.raises(ValueError, match="shorter"):
        kl_to(predict_reference(two_layers, data), narrower, data[1:])


def test_losses_of_next_tokens(two_layers: Program, ids: Tensor) -> None:
    labels = ids[:1].clone()
    labels[0, 3] = -100
    (sample,) = samples([{"input_ids": ids[:1], "labels": labels}], two_layers)
    with torch.no_grad():
        logs = two_layers(ids[:1])[0].log_softmax(-1)
    wanted = [-float(logs[t, ids[0, t + 1]]) for t in range(11) if t + 1 != 3]
    assert next_token_losses(two_layers, sample).tolist() == pytest.approx(wanted, rel=1e-5)

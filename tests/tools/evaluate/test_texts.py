"""Several models on one text: closed forms, one pass, intervals that hold what they should."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.passes.calibration.kl import QualityError
from secateur.tools.evaluate import texts as evaluate_text
from secateur.tools.evaluate.measures import EvaluationError, measure_perplexity
from secateur.tools.evaluate.texts import Bootstrap, ScoredText, score_text, tail_concentration

END = 0


class Bigram:
    """Next-token logits from a table [vocabulary, vocabulary]."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.calls = table, 0

    def __call__(self, input_ids: Tensor) -> Any:
        self.calls += 1
        return SimpleNamespace(logits=self.table[input_ids])


def stream(documents: int = 12, length: int = 15) -> Tensor:
    maker = torch.Generator().manual_seed(2)
    rows = [
        torch.cat([torch.randint(1, 7, (length,), generator=maker), torch.tensor([END])])
        for _ in range(documents)
    ]
    return torch.cat(rows)


def tables() -> tuple[Tensor, Tensor]:
    maker = torch.Generator().manual_seed(1)
    dense = torch.randn(7, 7, generator=maker)
    return dense, dense + 0.5 * torch.randn(7, 7, generator=maker)


def test_numbers_are_those_of_the_tables() -> None:
    dense, pruned = tables()
    text = ScoredText(stream(), END, window=10)
    report = score_text({"pruned": Bigram(pruned), "dense": Bigram(dense)}, text, reference="dense")
    ids = text.stream
    pairs = [(ids[t - 1], ids[t]) for t in range(len(ids)) if t % 10 and ids[t] != END]
    logs = {
        name: table.double().log_softmax(-1)
        for name, table in (("dense", dense), ("pruned", pruned))
    }
    losses = {
        name: -sum(float(log[a, b]) for a, b in pairs) / len(pairs) for name, log in logs.items()
    }
    kls = [
        float((logs["dense"][a].exp() * (logs["dense"][a] - logs["pruned"][a])).sum())
        for a, _ in pairs
    ]
    found = report.models["pruned"]
    assert report.tokens == len(pairs) and list(report.models) == ["pruned", "dense"]
    assert found.nll == pytest.approx(losses["pruned"], rel=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(losses["pruned"]), rel=1e-5)
    assert found.kl is not None and found.kl.mean == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(
        math.exp(losses["pruned"] - losses["dense"]), rel=1e-5
    )
    agrees = [int(dense[a].argmax() == pruned[a].argmax()) for a, _ in pairs]
    assert found.agreement is not None and found.agreement.value == pytest.approx(
        sum(agrees) / len(agrees)
    )
    assert report.models["dense"].kl is None
    for interval in (found.perplexity, found.ratio, found.kl_mean, found.agreement):
        assert interval is not None and interval.low <= interval.value <= interval.high


@pytest.mark.parametrize(("stride", "bos"), [(None, None), (4, None), (None, 0), (3, 0)])
def test_the_perplexity_is_that_of_a_single_model(stride: int | None, bos: int | None) -> None:
    model = Bigram(tables()[0])
    text = ScoredText(stream(), END, window=11, stride=stride, bos=bos)
    alone = measure_perplexity(
        model, text.stream, window=11, stride=stride, bos=bos, unscored=(END,)
    )
    found = score_text({"a": model}, text)
    assert found.models["a"].perplexity.value == pytest.approx(alone.value, rel=1e-6)
    assert found.tokens == alone.tokens and alone.bos in found.protocol


def test_every_model_runs_once_a_window_and_the_same_model_is_at_no_distance() -> None:
    models = {name: Bigram(tables()[0]) for name in ("a", "b", "c")}
    text = ScoredText(stream(), END, window=16)
    report = score_text(models, text, reference="b")
    assert [m.calls for m in models.values()] == [len(text.window_spans())] * 3
    found = report.models["c"]
    assert (
        found.kl is not None
        and found.kl.mean == 0
        and found.agreement is not None
        and found.agreement.low == 1
    )
    assert found.ratio is not None and (found.ratio.low, found.ratio.high) == (1, 1)
    assert report.models["a"].to_json()["kl"]["mean"] == 0


def test_documents_are_resampled_where_there_are_enough_of_them() -> None:
    model = {"a": Bigram(tables()[0])}
    assert "over 12 documents" in score_text(model, ScoredText(stream(), END, window=8)).protocol
    few = score_text(model, ScoredText(stream(3, 40), END, window=8)).protocol
    assert "3 documents" in few and "16 windows" in few
    assert (
        "bootstrap over 119 tokens"
        in score_text(model, ScoredText(stream(3, 40), END, window=200)).protocol
    )


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    maker, hits = torch.Generator().manual_seed(0), 0
    for seed in range(100):
        by_cluster = torch.randn(40, 1, generator=maker) + 0.3 * torch.randn(40, 5, generator=maker)
        found = Bootstrap(torch.arange(40).repeat_interleave(5), seed).interval(
            by_cluster.flatten().double()
        )
        hits += found.low <= 0 <= found.high
    assert 87 <= hits <= 100


def test_resamples_are_the_same_for_every_statistic_and_whatever_is_drawn_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster, values = torch.arange(50).repeat_interleave(3), torch.randn(150, dtype=torch.float64)
    bootstrap = Bootstrap(cluster, 1)
    plain, twice = bootstrap.interval(values), bootstrap.interval(2 * values)
    assert (twice.low, twice.high) == pytest.approx((2 * plain.low, 2 * plain.high))
    monkeypatch.setattr(evaluate_text, "DRAWN_AT_ONCE", 70)
    assert Bootstrap(cluster, 1).interval(values) == plain


def test_concentration_of_the_worst_tokens() -> None:
    curve = dict(tail_concentration(torch.cat([torch.tensor([90.0]), torch.full((99,), 10 / 99)])))
    assert curve[0.01] == pytest.approx(0.9) and curve[1.0] == pytest.approx(1.0)
    assert tail_concentration(torch.zeros(5))[-1] == (1.0, 0.0)


def test_what_cannot_be_measured_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="not finite"):
        score_text({"a": Bigram(torch.full((7, 7), math.nan))}, ScoredText(stream(), END))
    with pytest.raises(EvaluationError, match="0 tokens scored"):
        score_text({"a": Bigram(torch.zeros(7, 7))}, ScoredText(torch.tensor([3]), END))
    with pytest.raises(EvaluationError, match="need a window"):
        score_text({"a": Bigram(torch.zeros(7, 7))}, ScoredText(stream(), END, window=1))
    with pytest.raises(QualityError, match="cannot be compared"):
        models = {"a": Bigram(torch.zeros(7, 7)), "b": Bigram(torch.zeros(7, 9))}
        score_text(models, ScoredText(stream(), END), reference="a")

"""Perplexity against closed forms, each token scored once; speed that states its protocol."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.tools.evaluate import measures as evaluate


class Bigram:
    """Next-token logits from a table [vocabulary, vocabulary]; remembers what it was fed."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.fed = table, []

    def __call__(self, input_ids: torch.Tensor) -> Any:
        self.fed.append(input_ids)
        return SimpleNamespace(logits=self.table[input_ids])


def uniform(vocabulary: int = 11) -> Bigram:
    return Bigram(torch.zeros(vocabulary, vocabulary))


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    result = evaluate.measure_perplexity(uniform(), torch.arange(10) % 11, window=4)
    assert result.value == pytest.approx(11) and result.stderr == pytest.approx(0, abs=1e-6)
    assert result.tokens == 10 - 3 and (result.window, result.stride, result.dtype) == (
        4,
        4,
        "float32",
    )


def test_a_table_model_has_the_perplexity_of_its_table() -> None:
    torch.manual_seed(1)
    table, stream = torch.randn(7, 7), torch.randint(7, (40,))
    losses = -table.log_softmax(-1)[stream[:-1], stream[1:]]
    result = evaluate.measure_perplexity(Bigram(table), stream, window=10, stride=9)
    assert result.tokens == 39 and result.nll == pytest.approx(losses.mean().item(), rel=1e-5)
    assert result.stderr == pytest.approx(losses.std().item() / math.sqrt(39), rel=1e-4)
    assert result.value == pytest.approx(math.exp(result.nll))


def test_long_windows_are_widened_in_chunks_without_a_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, stream = torch.randn(7, 7), torch.randint(7, (50,))
    whole = evaluate.measure_perplexity(Bigram(table), stream, window=50)
    monkeypatch.setattr(evaluate, "LOSS_CHUNK", 3)
    assert evaluate.measure_perplexity(Bigram(table), stream, window=50).nll == pytest.approx(
        whole.nll, rel=1e-6
    )


@given(length=st.integers(2, 60), window=st.integers(2, 20), data=st.data())
def test_every_token_with_a_context_is_scored_exactly_once(
    length: int, window: int, data: st.DataObject
) -> None:
    stride, has_bos = data.draw(st.integers(1, window)), data.draw(st.booleans())
    scored: Counter[int] = Counter()
    for start, end, first in evaluate.window_spans(length, window, stride, has_bos):
        assert end - start <= window
        scored.update(range(start + first, end))
    assert set(scored.values()) <= {1}
    missing = set(range(length)) - set(scored)
    blind = set() if has_bos else set(range(0, length, window)) if stride == window else {0}
    assert missing == blind


def test_a_beginning_token_stands_before_each_window_and_lets_its_first_token_be_scored() -> None:
    model = uniform()
    result = evaluate.measure_perplexity(model, torch.arange(1, 9), window=5, bos=0)
    assert [fed[0].tolist() for fed in model.fed] == [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8]]
    assert result.tokens == 8 and result.window == 5 and "beginning token 0" in result.protocol


def test_unscored_ids_are_left_out_as_targets_only() -> None:
    table, stream = torch.randn(5, 5), torch.tensor([1, 2, 0, 3, 4, 0, 1])
    result = evaluate.measure_perplexity(Bigram(table), stream, window=7, unscored=(0,))
    losses = -table.log_softmax(-1)[stream[:-1], stream[1:]][stream[1:] != 0]
    assert result.tokens == 4 and result.nll == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_protocol_is_one_line_with_every_choice() -> None:
    result = evaluate.measure_perplexity(uniform(), torch.arange(9), window=4, stride=2)
    assert (
        result.protocol == "8 scored tokens, windows of 4 (stride 2), no beginning token, float32"
    )
    assert (
        "no overlap" in evaluate.measure_perplexity(uniform(), torch.arange(9), window=4).protocol
    )


def test_progress_sees_every_window() -> None:
    seen: list[Any] = []

    def report(items: Any, description: str, total: int | None = None) -> Any:
        seen.append((description, list(items)))
        return seen[-1][1]

    evaluate.measure_perplexity(uniform(), torch.arange(10) % 11, window=4, progress=report)
    assert seen == [("perplexity", [(0, 4, 1), (4, 8, 1), (8, 10, 1)])]


@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 4, "stride": 5}, {"window": 4, "stride": 0}]
)
def test_windows_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(evaluate.EvaluationError, match="need a window of two"):
        evaluate.measure_perplexity(uniform(), torch.arange(9), **options)


def test_a_loss_that_is_not_finite_and_an_empty_text_are_errors_not_numbers() -> None:
    with pytest.raises(evaluate.EvaluationError, match="finite"):
        evaluate.measure_perplexity(Bigram(torch.full((9, 9), math.nan)), torch.arange(9))
    with pytest.raises(evaluate.EvaluationError, match="0 tokens scored of 1"):
        evaluate.measure_perplexity(uniform(), torch.arange(1))


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def test_speed_carries_its_protocol_and_a_range_around_its_median(tiny: LlamaForCausalLM) -> None:
    prompt = torch.arange(8).view(2, 4)
    found = evaluate.compare_speed({"a": tiny, "b": tiny}, prompt, new_tokens=3, runs=3)
    assert set(found) == {"a", "b"}
    for phase, speed in found["a"].items():
        assert (speed.phase, speed.batch, speed.prompt_tokens, speed.new_tokens, speed.runs) == (
            phase,
            2,
            4,
            3,
            3,
        )
        assert 0 < speed.slowest <= speed.tokens_per_s <= speed.fastest
        assert "batch 2, 4 prompt tokens" in speed.protocol and "median of 3" in speed.protocol


def test_rates_count_every_sequence_of_the_batch(
    tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([(9.0, 9.0), (0.5, 2.0), (0.25, 4.0), (1.0, 1.0)])
    monkeypatch.setattr(evaluate, "_time_once", lambda *_: next(times))
    found = evaluate.compare_speed(
        {"a": tiny}, torch.zeros(2, 4, dtype=torch.int64), new_tokens=3, runs=3
    )["a"]
    prefill, decode = found["prefill"], found["decode"]
    assert (prefill.slowest, prefill.tokens_per_s, prefill.fastest) == (8.0, 16.0, 32.0)
    assert (decode.slowest, decode.tokens_per_s, decode.fastest) == (1.5, 3.0, 6.0)


def test_models_take_turns_and_decode_feeds_single_tokens_on_the_cache(
    tiny: LlamaForCausalLM,
) -> None:
    fed: list[tuple[str, int]] = []
    hooks = {name: LlamaForCausalLM(tiny.config).eval() for name in "ab"}
    for name, model in hooks.items():
        model.register_forward_pre_hook(
            lambda _, __, kwargs, name=name: fed.append((name, kwargs["input_ids"].shape[1])),
            with_kwargs=True,
        )
    evaluate.compare_speed(hooks, torch.zeros(1, 4, dtype=torch.int64), new_tokens=2, runs=1)
    turn = {name: [(name, 4), (name, 1), (name, 1)] for name in "ab"}
    assert fed == turn["b"] + turn["a"] + turn["a"] + turn["b"]


def test_no_runs_is_refused(tiny: LlamaForCausalLM) -> None:
    with pytest.raises(evaluate.EvaluationError, match="runs=0"):
        evaluate.compare_speed({"a": tiny}, torch.zeros(1, 4, dtype=torch.int64), runs=0)

"""Generation: the loop over compiled steps, and transformers' own, say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import SMALL, tiny
from torch import Tensor
from transformers import PreTrainedModel
from zoo.sparse import made_24

import secateur
from secateur.graph import capture
from secateur.passes.lowering.lower import Lower
from secateur.runtime.serving.engine import (
    GenerateError,
    PackagedEngine,
    StockEngine,
    choose_token,
    open_engine,
)
from secateur.runtime.serving.package import PackageError, PackageFacts
from secateur.runtime.serving.step import DecodeStep, cache_shapes, make_empty_cache

PROMPT = torch.tensor([[5, 9, 31, 7]])


class EagerSteps:
    """What ``Packaged`` does, by the model itself: for the loop, which need not wait for a
    compiler."""

    def __init__(
        self, model: PreTrainedModel, length: int = 32, batch: int = 1, end: tuple[int, ...] = ()
    ) -> None:
        shapes = cache_shapes(model)
        self.facts = PackageFacts(shapes, length, batch, "float32", "cpu", 96, end, "here", False)
        self.step, self.position, self.nbytes = DecodeStep(model), 0, 1
        self.cache = make_empty_cache(shapes, batch, length, torch.float32, "cpu")

    def prefill(self, ids: Tensor) -> Tensor:
        self.position = 0
        return self.decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        logits = self.step(ids, torch.tensor(self.position), *self.cache)
        self.position += ids.shape[1]
        return logits


def engines(model: PreTrainedModel, **facts: Any) -> tuple[StockEngine, PackagedEngine]:
    return StockEngine(model), PackagedEngine(EagerSteps(model, **facts))  # type: ignore[arg-type]


def test_both_engines_say_the_same_greedily_and_by_chance(llama: PreTrainedModel) -> None:
    stock, packaged = engines(llama)
    for options in ({}, {"temperature": 0.7, "seed": 11}):
        seen: list[list[int]] = [[], []]
        runs = [
            engine.generate(
                PROMPT,
                max_new_tokens=9,
                ignore_end=True,
                on_token=lambda c, s=s: s.append(int(c)),
                **options,
            )
            for engine, s in zip((stock, packaged), seen, strict=True)
        ]
        assert runs[0].new_tokens == runs[1].new_tokens == 9 and runs[0].ids.shape == (1, 13)
        assert [run.ids[0, 4:].tolist() for run in runs] == seen
        assert torch.equal(runs[0].ids, runs[1].ids)
        assert all(run.tokens_per_s > 0 and run.prefill_seconds > 0 for run in runs)


def test_an_end_token_ends(llama: PreTrainedModel) -> None:
    plain = engines(llama)[1].generate(PROMPT, max_new_tokens=8).ids[0, 4:].tolist()
    end = plain[3]
    first = plain.index(end)
    llama.generation_config.eos_token_id = end
    stock, packaged = engines(llama, end=(end,))
    for engine in (stock, packaged):
        assert engine.generate(PROMPT, max_new_tokens=8).ids[0, 4:].tolist() == plain[: first + 1]
    assert packaged.generate(PROMPT, max_new_tokens=8, ignore_end=True).new_tokens == 8


def test_sequences_of_a_batch_end_one_by_one(llama: PreTrainedModel) -> None:
    ids = torch.tensor([[5, 9, 31, 7], [8, 8, 40, 3]])
    free = PackagedEngine(EagerSteps(llama, batch=2)).generate(ids, max_new_tokens=6).ids  # type: ignore[arg-type]
    end = int(free[0, 5])
    packaged = PackagedEngine(EagerSteps(llama, batch=2, end=(end,)))  # type: ignore[arg-type]
    found = packaged.generate(ids, max_new_tokens=6).ids
    row, at = found[0, 4:].tolist(), found[0, 4:].tolist().index(end)
    assert row[: at + 1] == free[0, 4 : 5 + at].tolist() and set(row[at:]) == {end}
    stock = StockEngine(llama).generate(ids, max_new_tokens=6, ignore_end=True).ids
    assert torch.equal(stock, free)


def test_no_room_and_no_prompt_are_told(llama: PreTrainedModel) -> None:
    stock, packaged = engines(llama, length=8)
    assert packaged.generate(PROMPT, max_new_tokens=5, ignore_end=True).new_tokens == 5
    with pytest.raises(GenerateError, match="greater length"):
        packaged.generate(PROMPT, max_new_tokens=6)
    for bad in (PROMPT[:, :0], PROMPT[0]):
        with pytest.raises(GenerateError, match="expected prompts"):
            stock.generate(bad)
    with pytest.raises(GenerateError, match="one new token"):
        stock.generate(PROMPT, max_new_tokens=0)


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    found = (
        choose_token(logits, 0.5, torch.Generator().manual_seed(0)).bincount(minlength=3) / 20_000
    )
    assert torch.allclose(found, (logits[0] / 0.5).softmax(-1), atol=0.01)
    assert choose_token(logits[:1], 0.0, torch.Generator()).tolist() == [2]


def test_a_step_on_given_tensors_is_the_model(llama: PreTrainedModel) -> None:
    steps, ids = EagerSteps(llama), torch.randint(3, 96, (1, 12))
    with torch.no_grad():
        wanted = llama(ids).logits[0]
        found = [
            steps.prefill(ids[:, :5]),
            *(steps.decode(ids[:, at : at + 1]) for at in range(5, 12)),
        ]
    assert torch.allclose(torch.cat(found), wanted[4:], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "fields", "reason"),
    [
        ("MistralConfig", {**SMALL, "sliding_window": 4}, "DynamicSlidingWindowLayer"),
        (
            "MambaConfig",
            {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 96, "state_size": 4},
            "instead of",
        ),
    ],
)
def test_other_caches_are_refused_with_the_reason(
    config: str, fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    from secateur.runtime.serving.package import write_package

    with pytest.raises(PackageError, match=reason):
        write_package(tiny(config, **fields), tmp_path / "never")


def test_the_engine_of_a_folder(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "plain")
    secateur.save(Lower(smallest=True)(made_24(capture(llama))), tmp_path / "lowered", check=False)
    plain, packed = (
        open_engine(tmp_path / "plain", device="cpu"),
        open_engine(tmp_path / "lowered", device="cpu"),
    )
    dense = open_engine(tmp_path / "lowered", packed=False, dtype="bfloat16", device="cpu")
    assert isinstance(plain, StockEngine) and "dense weights, float32, eager" in plain.name
    assert (
        isinstance(packed, StockEngine)
        and "packed weights" in packed.name
        and packed.nbytes < plain.nbytes
    )
    assert len(packed.layers) == 15 and {row.kind for row in packed.layers} == {"2:4", "dense"}
    assert "bfloat16" in dense.name
    with pytest.raises(GenerateError, match="lower the model anew"):
        open_engine(tmp_path / "lowered", dtype="bfloat16")


def test_a_model_can_be_looked_at_in_float32_and_comes_back_bit_for_bit(
    llama: PreTrainedModel,
) -> None:
    from secateur.runtime.serving.package import widen_model

    model = llama.to(torch.bfloat16)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    ids = torch.randint(3, 96, (1, 6))
    with torch.no_grad():
        narrow = model(ids).logits
        with widen_model(model):
            wide = model(ids).logits
        again = model(ids).logits
    assert wide.dtype == torch.float32 and narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, again) and torch.allclose(
        narrow.float(), wide, atol=0.1 * float(wide.abs().max())
    )
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before

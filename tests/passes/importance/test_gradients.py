"""Gradients block after block: the same numbers, in a fraction of the memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from zoo.models import tiny_model

from secateur.graph import Program, capture
from secateur.passes import CalibrationError, Context, Pipeline, Score, samples
from secateur.passes.importance import Taylor
from secateur.passes.importance.gradients import Gradients, gradients_by_block, loss_gradients

ByKind = Callable[[str], Program]


def joined(pieces: Iterator[Gradients]) -> Gradients:
    mean, squares = {}, {}
    for piece in pieces:
        assert not set(piece.mean) & set(mean)
        mean.update(piece.mean)
        squares.update(piece.squares)
    return Gradients(mean, squares)


def names(program: Program) -> set[str]:
    return {name for name, _ in program.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma2", "t5"])
def test_they_are_those_of_the_whole_model(kind: str, program_of: ByKind, ids: Tensor) -> None:
    program = program_of(kind)
    batch: Any = (
        {"input_ids": ids, "decoder_input_ids": ids[:, :7], "labels": ids[:, :7]}
        if kind == "t5"
        else ids
    )
    loss: Any = "labels" if kind == "t5" else "next-token"
    context = Context(data=samples([batch], program))
    whole = loss_gradients(program, names(program), context, loss)
    found = joined(gradients_by_block(program, names(program), context, loss))
    assert set(found.mean) == set(whole.mean) and not found.squares
    for name, gradient in whole.mean.items():
        torch.testing.assert_close(
            found.mean[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_squares_and_a_part_of_the_parameters(llama: Program, ids: Tensor) -> None:
    some = {
        name for name in names(llama) if "layers.1.mlp" in name or "layers.0.self_attn.q" in name
    }
    context = Context(data=samples([ids], llama))
    whole = loss_gradients(llama, some, context, "next-token", squared=True)
    found = joined(gradients_by_block(llama, some, context, "next-token", squared=True))
    assert set(found.squares) == some
    for name in some:
        torch.testing.assert_close(found.squares[name], whole.squares[name], rtol=1e-3, atol=1e-9)


def test_scores_are_the_same_in_every_form(llama: Program, ids: Tensor) -> None:
    data = samples([ids], llama)
    for form in ("element", "vector", "second", "mixed"):
        whole, found = (
            Score(Taylor(form=form, by_block=by_block))(llama, Context(data=data)).scores  # type: ignore[arg-type]
            for by_block in (False, True)
        )
        assert list(whole) == list(found)
        for name, scores in whole.items():
            torch.testing.assert_close(found[name], scores, rtol=1e-3, atol=1e-7)
    assert Pipeline.parse("score{metric=taylor{by_block=true}}").passes == (
        Score(Taylor(by_block=True)),
    )


def test_squares_of_a_parameter_that_two_blocks_read_are_refused(ids: Tensor) -> None:
    program = capture(tiny_model("gpt2"))
    assert len(names(program)) < len(
        list(program.source.model.named_parameters(remove_duplicate=False))
    )
    with pytest.raises(CalibrationError, match="read in several blocks"):
        Score(Taylor(form="second", by_block=True))(program, Context(data=samples([ids], program)))


class Bytes(TorchDispatchMode):
    """Counts the bytes of all storages that ops made and that still live, those of the weights left
    out."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {p.untyped_storage()._cdata for _, p in program.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.see(value.untyped_storage())
        return result

    def see(self, storage: Any) -> None:
        """Count a storage until it dies."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        """A storage died."""
        self.known.discard(key)
        self.now -= size


def test_a_deep_model_needs_the_memory_of_one_block() -> None:
    layers = 12
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    program = capture(LlamaForCausalLM(config).eval())
    block = 4 * sum(p.numel() for name, p in program.named_parameters() if ".layers.0." in name)
    data = samples([torch.randint(0, 16, (2, 16))], program)
    peaks = {}
    for by_block in (False, True):
        with Bytes(program) as bytes_:
            Score(Taylor(by_block=by_block))(program, Context(data=data))
        peaks[by_block] = bytes_.peak / block
    assert peaks[False] > layers  # the gradients alone
    assert (
        peaks[True] < 4
    )  # those of one block, what makes scores of them, and what passes between blocks

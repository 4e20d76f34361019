"""Residual blocks are found by their sums; what is unclear is refused with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo.checks import captured

from secateur.graph import blocks, capture, chain, drop
from secateur.graph.errors import EditError, UnsupportedOp

ATTENTION_AND_MLP = {
    "llama": ("self_attn", "mlp"),
    "gpt_neox": ("mlp", "attention"),
    "cohere": ("self_attn", "mlp"),
    "falcon": ("mlp", "self_attention"),
    "gemma2": ("self_attn", "mlp"),
    "olmo2": ("self_attn", "mlp"),
    "opt": ("self_attn", "fc1+fc2"),
    "bert": ("attention", "intermediate+output"),
    "vit": ("attention", "mlp"),
    "mixtral": ("self_attn", "mlp"),
    "nano_gpt": ("attention", "up+down"),
    "conv_net": ("conv_1+conv_2",),
}


@pytest.mark.parametrize("kind", ATTENTION_AND_MLP)
def test_every_layer_is_a_block_of_its_branches(kind: str) -> None:
    """Parallel branches (gpt_neox, cohere, falcon), sandwich norms (gemma2, olmo2), post-norm
    (bert), experts."""
    _, program = captured(kind)
    found = blocks(program)
    assert len(found) == 2
    for block in found:
        assert block.locked is None
        assert (
            tuple(sub.name.removeprefix(f"{block.name}.") for sub in block.sub_blocks)
            == ATTENTION_AND_MLP[kind]
        )
        assert all(sub.locked is None for sub in block.sub_blocks)
        owned = {
            name for name, _ in program.named_parameters() if name.startswith(f"{block.name}.")
        }
        assert set(block.parameters) == owned
        assert block.outputs == (block.end,)


def test_an_encoder_and_a_decoder_are_two_stacks() -> None:
    _, program = captured("t5")
    names = [block.name for block in blocks(program)]
    assert names == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    decoder = blocks(program)[2]
    assert [sub.name.split(".")[-1] for sub in decoder.sub_blocks] == [
        "SelfAttention",
        "EncDecAttention",
        "DenseReluDense",
    ]
    shared = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert shared not in decoder.parameters, (
        "what the first layer computes for all layers is not its own"
    )


def test_routed_and_shared_experts_are_branches_of_their_own() -> None:
    _, program = captured("deepseek_v3")
    names = [sub.name.split(".", 3)[-1] for sub in blocks(program)[1].sub_blocks]
    assert names == ["self_attn", "mlp", "mlp.shared_experts"]


class Shifted(nn.Module):
    """The first layer works on its parameters before it reads the stream."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.up = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.scale + 1
            return x + self.up(x * scale)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_a_layer_makes_of_its_parameters_beforehand_is_its_own() -> None:
    torch.manual_seed(0)
    program = capture(Shifted().eval(), torch.randn(4, 8))
    assert [len(block.parameters) for block in blocks(program)] == [3, 3]
    x = torch.randn(4, 8)
    assert torch.equal(chain(program)(x=x), program(x))


class Layered(nn.Module):
    """Layers whose forward is given: what is added to the stream differs between the cases
    below."""

    def __init__(self, forward: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.how = forward

    def forward(self, x: Tensor) -> Tensor:
        start = x = self.stem(x)
        for layer in self.layers:
            x = getattr(self, self.how)(x, layer, start)
        return self.head(x)

    def plain(self, x: Tensor, layer: nn.Module, start: Tensor) -> Tensor:
        return torch.tanh(layer(x))

    def residual(self, x: Tensor, layer: nn.Module, start: Tensor) -> Tensor:
        return x + torch.tanh(layer(x))

    def scaled(self, x: Tensor, layer: nn.Module, start: Tensor) -> Tensor:
        return 0.5 * x + torch.tanh(layer(x))

    def scaled_branch(self, x: Tensor, layer: nn.Module, start: Tensor) -> Tensor:
        return x + 0.3 * torch.tanh(layer(x))

    def nested(self, x: Tensor, layer: nn.Module, start: Tensor) -> Tensor:
        y = torch.tanh(layer(x))
        return x + (y + 0.1 * y.pow(3))

    def long_skip(self, x: Tensor, layer: nn.Module, start: Tensor) -> Tensor:
        return x + torch.tanh(layer(x)) + start


def layered(how: str) -> nn.Module:
    torch.manual_seed(0)
    return Layered(how).eval()


@pytest.mark.parametrize("how", ["plain", "scaled"])
def test_a_model_that_adds_nothing_to_its_stream_is_refused(how: str) -> None:
    with pytest.raises(UnsupportedOp, match="no residual block"):
        blocks(capture(layered(how), torch.randn(4, 6)))


@pytest.mark.parametrize("how", ["residual", "scaled_branch", "nested"])
def test_blocks_without_modules_of_their_own(how: str) -> None:
    program = capture(layered(how), torch.randn(4, 6))
    assert [block.name for block in blocks(program)] == ["layers.0", "layers.1", "layers.2"]
    assert [len(block.sub_blocks) for block in blocks(program)] == [1, 1, 1]


def test_a_skip_over_all_layers_is_one_block() -> None:
    """Everything is computed from what is added again at the end: no layer can be left out of that
    sum alone."""
    program = capture(layered("long_skip"), torch.randn(4, 6))
    (block,) = blocks(program)
    with pytest.raises(EditError, match="one must stay"):
        drop(program, [block.name])


class Leaking(nn.Module):
    """What is computed inside the first layer is read by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        inner = torch.tanh(self.layers[0](x))
        x = x + 2 * inner
        x = x + self.layers[1](x) * inner
        return x + torch.tanh(self.layers[2](x))


def test_a_block_whose_inner_values_others_read_must_stay() -> None:
    torch.manual_seed(0)
    program = capture(Leaking().eval(), torch.randn(4, 8))
    first, second, third = blocks(program)
    assert "later parts of the model read" in str(first.locked)
    assert "later parts of the model read" in str(first.sub_blocks[0].locked)
    assert second.locked is None and third.locked is None
    with pytest.raises(EditError, match="must stay"):
        drop(program, [first.name])


class Shared(nn.Module):
    """One layer applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + torch.tanh(self.layers[0](x))
        return x


def test_a_layer_that_is_applied_again_is_another_block() -> None:
    torch.manual_seed(0)
    program = capture(Shared().eval(), torch.randn(4, 6))
    assert [block.name for block in blocks(program)] == ["layers.0", "layers.0#2", "layers.0#3"]
    assert all(not block.parameters for block in blocks(program)), "no block owns what all read"
    once = drop(program, ["layers.0#2", "layers.0#3"])
    x = torch.randn(4, 6)
    stem = program.source.model.stem(x)
    assert torch.allclose(once(x), stem + torch.tanh(program.source.model.layers[0](stem)))

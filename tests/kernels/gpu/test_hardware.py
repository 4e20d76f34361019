"""The same checks on a GPU: `pytest -m gpu`.  Every kernel in every configuration, odd shapes, the
op, graphs."""

from __future__ import annotations

import pytest
import torch
from weights24 import KINDS, random_packed

from secateur.kernels.sparse24 import ops  # noqa: F401  registers the ops
from secateur.kernels.sparse24.gpu import api, configs, health
from secateur.kernels.sparse24.gpu.configs import KernelChoice
from secateur.kernels.sparse24.gpu.fragments import FLOATS, Fragments, pack_fragments
from secateur.kernels.sparse24.gpu.launch import launch_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda", 0)
HALVES = (torch.bfloat16, torch.float16)
CONFIGS = [
    *[KernelChoice("decode", c) for c in configs.DECODE["float"]],
    *[KernelChoice("gemm", c) for c in configs.GEMM["float"]],
]


def dtypes(kind: str) -> tuple[torch.dtype, ...]:
    return (FLOATS[kind],) if kind in FLOATS else HALVES


def choices(kind: str) -> list[KernelChoice]:
    """Every configuration of every kernel for a kind."""
    values = configs.value_kind(kind)
    found = [KernelChoice("decode", c) for c in configs.DECODE[values]] + [
        KernelChoice("gemm", c) for c in configs.GEMM[values]
    ]
    return [*found, KernelChoice("expand"), KernelChoice("portable"), KernelChoice("torch")]


def served(choice: KernelChoice, kind: str) -> None:
    if why := health.explain_unfit(choice.backend, kind, health.find_chip(CUDA)):
        pytest.skip(why)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", range(len(choices("bfloat16"))))
def test_every_configuration_passes_its_self_test(kind: str, at: int) -> None:
    choice = choices(kind)[at]
    served(choice, kind)
    for dtype in dtypes(kind):
        assert health.self_test(choice, kind, dtype, CUDA) == ""


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("config", configs.WGMMA)
def test_the_experimental_warpgroup_kernel_passes_its_self_test(
    kind: str, config: configs.WgmmaConfig
) -> None:
    served(KernelChoice("wgmma", config), kind)
    assert health.self_test(KernelChoice("wgmma", config), kind, FLOATS[kind], CUDA) == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "k"), [(1, 8), (16, 64), (63, 132), (1000, 576), (4096, 1536), (257, 4096)]
)
@pytest.mark.parametrize("batch", [1, 7, 16, 17, 63, 300])
def test_the_op_on_odd_sizes(n: int, k: int, kind: str, batch: int) -> None:
    packed = random_packed(n, k, kind, torch.Generator().manual_seed(n + k))
    weight = pack_fragments(packed.to(CUDA))
    for dtype in dtypes(kind):
        x, bias = torch.randn(batch, k).to(dtype), torch.randn(n).to(dtype)
        tensors = (weight.values, weight.indices, weight.scale, bias.to(CUDA))
        y = torch.ops.secateur.linear_24_fragment(x.to(CUDA), *tensors, kind, n)
        backend = api.serving(weight, batch, dtype, CUDA).backend
        assert (
            health.describe_difference(y.cpu(), x, packed, bias, backend in health.ROUNDS_WEIGHT)
            == ""
        )


@pytest.mark.parametrize("kind", KINDS)
def test_packing_on_the_device_gives_the_bits_of_the_cpu(kind: str) -> None:
    packed = random_packed(63, 320, kind, torch.Generator().manual_seed(0))
    here, there = pack_fragments(packed), pack_fragments(packed.to(CUDA))
    assert torch.equal(here.values, there.values.cpu()) and torch.equal(
        here.indices, there.indices.cpu()
    )


@pytest.mark.parametrize("choice", CONFIGS, ids=lambda c: f"{c.backend}-{c.config}")
def test_split_products_are_the_same_bits_each_time(choice: KernelChoice) -> None:
    served(choice, "bfloat16")
    weight = pack_fragments(
        random_packed(256, 4096, "bfloat16", torch.Generator().manual_seed(0)).to(CUDA)
    )
    x = torch.randn(8, 4096, device=CUDA).bfloat16()
    split = KernelChoice(choice.backend, choice.config, 4)
    first = launch_product(x, weight, None, split)
    assert all(torch.equal(first, launch_product(x, weight, None, split)) for _ in range(20))


def test_offsets_beyond_32_bits_are_reached() -> None:
    """A weight of more than 2^31 words: the last rows of a product that overflows 32-bit offsets
    are right."""
    n, k = 540_672, 16_384
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free device memory")
    tail = random_packed(64, k, "bfloat16", torch.Generator().manual_seed(0))
    last = pack_fragments(tail.to(CUDA))
    values = torch.zeros(n // 16, k // 32, 32, 4, dtype=torch.int32, device=CUDA)
    indices = torch.full((n // 16, k // 64, 32), 0x44444444, dtype=torch.int32, device=CUDA)
    values[-4:], indices[-4:] = last.values, last.indices
    x = torch.randn(3, k).bfloat16()
    weight = Fragments("bfloat16", (n, k), values, indices)
    for choice in (CONFIGS[0], KernelChoice("gemm", configs.GEMM["float"][0])):
        y = launch_product(x.to(CUDA), weight, None, choice)
        assert health.describe_difference(y[:, -64:].cpu(), x, tail) == "" and not y[:, :-64].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 40])
def test_the_op_is_captured_in_a_graph_and_compiled(kind: str, batch: int) -> None:
    packed = random_packed(256, 1024, kind, torch.Generator().manual_seed(0))
    weight, dtype = pack_fragments(packed.to(CUDA)), dtypes(kind)[0]
    api.warm_up([weight], [batch], dtype)
    static = torch.randn(batch, 1024, device=CUDA).to(dtype)

    def layer(x: torch.Tensor) -> torch.Tensor:
        tensors = (weight.values, weight.indices, weight.scale, None)
        return torch.ops.secateur.linear_24_fragment(x, *tensors, kind, 256)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(static)
    static.copy_(torch.randn_like(static))
    graph.replay()
    assert torch.equal(out, layer(static))
    assert torch.equal(torch.compile(layer, fullgraph=True)(static), layer(static))


@pytest.mark.parametrize("batch", [16, 128])
def test_the_vendors_sparse_library_agrees(batch: int) -> None:
    """An outside check of the fragments: torch compresses the same dense weight by its own code."""
    packed = random_packed(256, 1024, "bfloat16", torch.Generator().manual_seed(0))
    weight, x = pack_fragments(packed.to(CUDA)), torch.randn(batch, 1024).bfloat16()
    try:
        y = launch_product(x.to(CUDA), weight, None, KernelChoice("cusparselt"))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no cuSPARSELt: {error}")
    assert health.describe_difference(y.cpu(), x, packed) == ""

"""What `linear_24_fragment` refuses, and the op on CPU.  Launches: interpreted_api.py; on a GPU,
test_hardware.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.kernels.sparse24 import ops  # noqa: F401  registers the ops
from secateur.kernels.sparse24.gpu import api, health
from secateur.kernels.sparse24.gpu.fragments import Fragments, pack_fragments

X = torch.zeros(2, 128, dtype=torch.bfloat16)
PLAIN, INT8 = (pack_fragments(health.random_weight(40, 128, kind)) for kind in ("bfloat16", "int8"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "float32"}, "kind 'float32'"),
        ({"x": X.float()}, "x is torch.float32"),
        ({"x": X.half()}, "x is torch.float16, the weight torch.bfloat16"),
        ({"scale": torch.ones(40)}, "floats have none"),
        ({"x": X[:, :0]}, "x has 0 columns, the weight 128"),
        ({"n": 60}, "n is 60, the weight has 3 x 16 rows"),
        ({"bias": torch.zeros(40)}, "bias is not"),
        ({"values": PLAIN.values.to("meta")}, "another operand is not"),
        (
            {"values": PLAIN.values.transpose(2, 3).contiguous().transpose(2, 3)},
            "must be contiguous",
        ),
    ],
)
def test_operands_that_disagree_are_refused(change: dict[str, Any], text: str) -> None:
    given = {
        "x": X,
        "values": PLAIN.values,
        "indices": PLAIN.indices,
        "scale": None,
        "bias": None,
        "kind": "bfloat16",
    }
    with pytest.raises(ValueError, match=f"linear_24_fragment.*{text}"):
        api.linear_24_fragment(**{**given, "n": 40, **change})


def test_quantised_weights_need_their_scale() -> None:
    with pytest.raises(ValueError, match="have a scale"):
        api.check_operands(X, Fragments("int8", (40, 128), INT8.values, INT8.indices, None), None)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8", "int4"])
def test_the_op_on_cpu_gives_the_same_product(kind: str) -> None:
    packed = health.random_weight(40, 132, kind)
    weight = pack_fragments(packed)
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    x = torch.randn(3, 132).to(dtype)
    y = torch.ops.secateur.linear_24_fragment(
        x, weight.values, weight.indices, weight.scale, None, kind, 40
    )
    assert health.describe_difference(y, x, packed) == ""


def test_a_wrong_product_is_described() -> None:
    packed = health.random_weight(8, 64, "bfloat16")
    x = torch.randn(2, 64).bfloat16()
    y = (x.float() @ packed.to_dense(torch.float32).T).bfloat16()
    assert health.describe_difference(y, x, packed) == ""
    y[1, 3] = float("nan")
    assert health.describe_difference(y, x, packed).startswith(
        "1 of 16 results are wrong, y[1, 3] is nan"
    )


@pytest.mark.parametrize(
    ("backend", "kind", "capability", "text"),
    [
        ("decode", "int8", 75, "needs compute capability 8.0"),
        ("wgmma", "bfloat16", 80, "needs compute capability 9.0"),
        ("wgmma", "bfloat16", 100, "on compute capability 9.0 alone"),
        ("wgmma", "int4", 90, "not int4"),
        ("decode", "int4", 120, ""),
        ("expand", "int4", 70, ""),
    ],
)
def test_which_chip_a_kernel_is_for(backend: str, kind: str, capability: int, text: str) -> None:
    assert text in health.explain_unfit(backend, kind, health.Chip("chip", capability, 1))
    assert bool(text) == bool(
        health.explain_unfit(backend, kind, health.Chip("chip", capability, 1))
    )

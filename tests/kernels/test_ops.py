"""The ops trace, compile, export and differentiate; one graph says which layout it holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from zoo.sparse24 import quantized, weight_24

from secateur.kernels.sparse24 import (
    FormatError,
    PackedLinear,
    cpu,
    linear,
    op_of,
    ops,
    pack,
    pack_dense,
)

ROOT = Path(__file__).parents[2]


def arguments(
    kind: str, sparse: bool, rows: int = 24, columns: int = 100
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(dense weight, packed tensors of the op without x and bias)."""
    weight = weight_24(rows, columns)
    if kind == "float32":
        packed = pack(weight)
        return weight, (packed.values, packed.mask)
    levels, scale = quantized(weight, kind)
    packed = pack(levels, kind, scale)
    if sparse:
        assert packed.scale is not None
        return packed.to_dense(), (packed.values, packed.mask, packed.scale)
    return packed.to_dense(), pack_dense(levels, scale)


LAYOUTS = [("float32", True), ("int8", True), ("int4", True), ("int8", False), ("int4", False)]
every = pytest.mark.parametrize(("kind", "sparse"), LAYOUTS)


def overload(kind: str, sparse: bool) -> torch._ops.OpOverload:
    found: torch._ops.OpOverload = getattr(torch.ops.secateur, op_of(kind, sparse)).default
    return found


@every
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(kind: str, sparse: bool, biased: bool) -> None:
    _, packed = arguments(kind, sparse)
    x = torch.randn(3, 100, requires_grad=True)
    bias = torch.randn(24, requires_grad=True) if biased else None
    opcheck(overload(kind, sparse), (x, *packed, bias))


@every
def test_gradients_for_x_and_bias_are_those_of_the_dense_layer(kind: str, sparse: bool) -> None:
    weight, packed = arguments(kind, sparse)
    inputs = [torch.randn(2, 3, 100), torch.randn(24)]
    found, wanted = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    mask, scale = (packed[1] if sparse else None), (packed[-1] if kind != "float32" else None)
    loss = linear(found[0], packed[0], mask, scale, found[1]).square().sum()
    dense = nn.functional.linear(wanted[0], weight, wanted[1]).square().sum()
    loss.backward()
    dense.backward()
    assert torch.allclose(loss, dense, rtol=1e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.grad is not None and torch.allclose(
            mine.grad, theirs.grad, rtol=1e-4, atol=1e-3
        )


class Net(nn.Module):
    """Two packed layers with a rectifier between: floats, then levels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = PackedLinear.from_packed(pack(weight_24(64, 100)), torch.randn(64))
        levels, scale = quantized(weight_24(20, 64), "int4")
        self.down = PackedLinear.from_packed(pack(levels, "int4", scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compile_fullgraph(backend: str) -> None:
    net, x = Net(), torch.randn(3, 100)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    assert torch.allclose(compiled(x), net(x), atol=1e-5)
    assert torch.allclose(
        compiled(torch.randn(5, 100).fill_(0.5)), net(torch.full((5, 100), 0.5)), atol=1e-5
    )


def exported() -> tuple[Net, torch.export.ExportedProgram]:
    net = Net()
    return net, torch.export.export(
        net, (torch.randn(3, 100),), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=4096)}}
    )


def test_export_with_a_dynamic_batch_is_saved_and_names_the_layout(tmp_path: Path) -> None:
    net, program = exported()
    targets = {str(node.target) for node in program.graph.nodes if "secateur" in str(node.target)}
    assert targets == {"secateur.linear_24.default", "secateur.linear_24_int4.default"}
    torch.export.save(program, tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()
    for batch in (1, 7, 33):
        x = torch.randn(batch, 100)
        assert torch.allclose(again(x), net(x), atol=1e-5)


def test_training_through_a_packed_layer_moves_what_stands_before_it() -> None:
    first, net = nn.Linear(100, 100), Net()
    out = net(first(torch.randn(4, 100))).square().mean()
    out.backward()
    assert first.weight.grad is not None and bool(first.weight.grad.abs().sum() > 0)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == []


def test_a_packed_layer_stands_in_for_linear() -> None:
    layer = nn.Linear(40, 12)
    with torch.no_grad():
        layer.weight.copy_(weight_24(12, 40))
    packed, x = PackedLinear.from_linear(layer), torch.randn(2, 5, 40)
    assert torch.allclose(packed(x), layer(x), atol=1e-5) and packed.bias is layer.bias
    assert torch.equal(packed.to_packed.to_dense(), layer.weight) and "kind='2:4'" in repr(packed)
    again = PackedLinear.from_packed(pack(torch.zeros(12, 40)), torch.zeros(12))
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(x), packed(x))
    assert (
        packed.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
        and packed.to_packed.kind == "bfloat16"
    )
    with pytest.raises(FormatError, match="not 2:4"):
        PackedLinear.from_linear(nn.Linear(40, 12))


def test_casting_a_quantised_layer_keeps_its_scale() -> None:
    levels, scale = quantized(weight_24(12, 40), "int8")
    layer = PackedLinear.from_linear(nn.Linear(40, 12), levels, scale)
    before = layer.scale
    layer.to(torch.bfloat16)
    assert (
        layer.scale is not None
        and torch.equal(layer.scale, before)
        and layer.scale.dtype == torch.float32
    )
    assert layer(torch.randn(2, 40).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 90)}, "x has 90 columns, the packed weight 104"),
        ({"x": torch.randn(2, 105)}, "x has 105 columns, the packed weight 104"),
        ({"x": torch.randn(2, 100).half()}, "values are torch.float32"),
        ({"x": torch.randn(2, 100).double()}, "x is torch.float64"),
        ({"bias": torch.ones(23)}, "bias is not"),
        ({"mask": torch.zeros(24, 12, dtype=torch.uint8)}, "mask is not"),
    ],
)
def test_operands_that_disagree_are_refused_while_tracing_too(
    change: dict[str, Tensor], message: str
) -> None:
    _, (values, mask) = arguments("float32", True)
    given = {
        "x": torch.randn(2, 100),
        "values": values,
        "mask": mask,
        "scale": None,
        "bias": None,
    } | change
    with pytest.raises(ValueError, match=message):
        ops.check_operands(**given, name="linear_24")
    fake = {
        name: None if t is None else t.to("meta") for name, t in given.items() if name != "scale"
    }
    with pytest.raises(ValueError, match=message):
        torch.ops.secateur.linear_24(*fake.values())


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_scales_of_another_shape_are_refused_while_tracing_too(kind: str, sparse: bool) -> None:
    dense, packed = arguments(kind, sparse)
    *values, scale = packed
    name, x = op_of(kind, sparse), torch.randn(2, dense.shape[1])
    mask = values[1] if sparse else None
    ops.check_operands(x, values[0], mask, scale, None, name)
    wrong = [scale[:-1], scale.repeat(2, *[1] * (scale.ndim - 1)), scale[..., None]]
    wrong += [scale.repeat(1, 2), scale[:, :0]] if kind == "int4" else []
    for one in wrong:
        with pytest.raises(ValueError, match="scale is not"):
            ops.check_operands(x, values[0], mask, one, None, name)
        with pytest.raises(ValueError, match="scale is not"):
            getattr(torch.ops.secateur, name)(*(t.to("meta") for t in (x, *values, one)))
    for columns in (dense.shape[1] - 8, dense.shape[1] + 8):
        with pytest.raises(ValueError, match=f"x has {columns} columns"):
            ops.check_operands(torch.randn(2, columns), values[0], mask, scale, None, name)


def test_only_quantised_dense_weights_have_an_op() -> None:
    with pytest.raises(ValueError, match="torch's linear"):
        op_of("bfloat16", sparse=False)
    assert [op_of(kind, sparse) for kind, sparse in LAYOUTS] == list(ops.PLACES)


PACKAGE = """
import ctypes, sys, torch
if sys.argv[2] == "python":
    import secateur.kernels.sparse24
else:
    ctypes.CDLL(sys.argv[2]).secateur_register_standalone()
assert ("secateur" in sys.modules) == (sys.argv[2] == "python")
run = torch._inductor.aoti_load_package(sys.argv[1])
for batch in (1, 5):
    x = torch.arange(batch * 100).view(batch, 100).remainder(7).float()
    print(*run(x).flatten().tolist())
"""


@pytest.mark.slow
def test_a_package_ahead_of_time_runs_with_and_without_this_library(tmp_path: Path) -> None:
    net, program = exported()
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "net.pt2")
    )
    inputs = [torch.arange(b * 100).view(b, 100).remainder(7).float() for b in (1, 5)]
    wanted = [net(x).flatten() for x in inputs]
    library = cpu.backend().library
    for how in ["python", *([str(library)] if library else [])]:
        command = [sys.executable, "-P", "-c", PACKAGE, package, how]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT), "HOME": str(Path.home())},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        for line, row in zip(done.stdout.splitlines(), wanted, strict=True):
            assert torch.allclose(torch.tensor([float(v) for v in line.split()]), row, atol=1e-4)

"""One product ``y = x W^T`` in every form that the machine offers: ours, and the strongest of
torch.

Dims: B rows, N outputs, K inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.kernels.sparse24 import PackedLinear
from secateur.passes.base import Progress, no_progress
from secateur.passes.lowering.cost import (
    DENSE,
    INT4,
    INT8,
    SPARSE,
    SPARSE_INT4,
    SPARSE_INT8,
    Timing,
    weight_bytes,
)
from secateur.passes.lowering.lower import LayerPlan
from secateur.passes.solvers.integer_grid import Grid, find_grid, grid_of
from secateur.runtime.packed.store import backend_of, pack_weight
from secateur.tools.bench.timing import Spread, copies_needed, time_in_turns

TOLERANCE = MappingProxyType({torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3})
"""Largest accepted error of a product, relative to its largest number."""
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """A way to hold and multiply a weight.

    kind: of ``lower_cost.KINDS``.
    dtype: of x.
    make: (W [N, K] of that form's numbers) -> the product.
    base: what others are compared with.
    """

    name: str
    kind: str
    dtype: torch.dtype
    make: Callable[[Tensor], Product]
    base: bool = False


@dataclass(frozen=True)
class KernelRow:
    """One form on one shape.

    seconds: of a product, None where ``fault`` says why it was not timed.
    nbytes: of the weight.
    share: part of the stream bandwidth that reading the weight reached.
    backend: what computed it.
    """

    form: str
    kind: str
    dtype: str
    shape: tuple[int, int]
    batch: int
    seconds: Spread | None
    nbytes: int
    share: float | None
    error: float | None
    backend: str
    fault: str = ""

    def timing(self) -> Timing | None:
        """As ``lower`` wants it; None for what is torch's and not dense, or was not timed."""
        is_usable = self.form.startswith("ours") or self.kind == DENSE
        ms = 0.0
        if self.seconds:
            ms = 1e3 * self.seconds.median
        if is_usable and ms:
            return Timing(self.kind, *self.shape, self.batch, self.dtype, round(ms, 6))
        return None


def two_of_four(weight: Tensor) -> Tensor:
    """[N, K] with the two smallest of every four neighbours along K set to zero: for timing, not
    for quality."""
    columns = weight.shape[1]
    padded = F.pad(weight, (0, -columns % 4))
    groups = padded.reshape(len(weight), -1, 4)
    drop = groups.abs().argsort(dim=-1, stable=True)[..., :2]
    return groups.scatter(-1, drop, 0.0).reshape(padded.shape)[:, :columns]


def numbers_of(kind: str, weight: Tensor) -> Tensor:
    """A weight with the zeros and on the grid that a kind wants."""
    if kind.startswith(SPARSE):
        weight = two_of_four(weight)
    bits = {INT8: 8, SPARSE_INT8: 8, INT4: 4, SPARSE_INT4: 4}.get(kind)
    if bits:
        return grid_of(weight, bits).round_to_grid(weight)
    return weight


# The forms
def _pack_form(kind: str) -> Callable[[Tensor], PackedLinear]:
    def make_packed(weight: Tensor) -> PackedLinear:
        shape = (weight.shape[0], weight.shape[1])
        row = LayerPlan("w.weight", kind, shape, 0, 0, 0.0, 0.0, False, "")
        layer = pack_weight(row, weight, weight.dtype)
        tensors = {name: tensor.clone() for name, tensor in layer.tensors.items()}
        return PackedLinear(kind, shape[1], tensors, None, [shape[0]])

    return make_packed


def _dense_product(weight: Tensor) -> Product:
    own_weight = weight.clone()
    return lambda x: F.linear(x, own_weight)


def _grid_of(weight: Tensor) -> Grid:
    """The grid that ``numbers_of`` put a weight on."""
    grid = find_grid(weight)
    assert grid is not None, "numbers_of gives numbers on a grid"
    return grid


def _torch_int8(weight: Tensor) -> Product:
    grid = _grid_of(weight)
    codes = grid.to_codes(weight)
    scale = grid.scale_NG[:, 0].to(weight.dtype)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scale)


def _torch_int4(weight: Tensor) -> Product:
    grid = _grid_of(weight)
    raised = (grid.to_codes(weight).int() + 8).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(raised, 1)
    scale = grid.scale_NG.t().to(weight.dtype)
    # [groups, N, (scale, zero)]
    pairs = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, pairs)


def _torch_24(weight: Tensor) -> Product:
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    return lambda x: F.linear(x, sparse)


BF16 = torch.bfloat16
FP32 = torch.float32
FORMS: Mapping[str, tuple[Form, ...]] = MappingProxyType(
    {
        "cpu": (
            Form("torch fp32", DENSE, FP32, _dense_product, base=True),
            Form("torch bf16", DENSE, BF16, _dense_product, base=True),
            Form("torch int8", INT8, BF16, _torch_int8),
            Form("torch int4", INT4, BF16, _torch_int4),
            Form("ours 2:4 fp32", SPARSE, FP32, _pack_form(SPARSE)),
            *(
                Form(f"ours {kind} bf16", kind, BF16, _pack_form(kind))
                for kind in (SPARSE, SPARSE_INT8, SPARSE_INT4, INT8, INT4)
            ),
        ),
        "cuda": (
            Form("torch bf16", DENSE, BF16, _dense_product, base=True),
            Form("torch 2:4", SPARSE, BF16, _torch_24),
            *(
                Form(f"ours {kind} bf16", kind, BF16, _pack_form(kind))
                for kind in (SPARSE, SPARSE_INT8, SPARSE_INT4)
            ),
        ),
    }
)


# Measuring
@torch.no_grad()
def bench_kernels(
    shapes: Iterable[tuple[int, int]],
    batches: Iterable[int],
    device: torch.device,
    bandwidth: float,
    *,
    rounds: int = 20,
    seed: int = 0,
    forms: Iterable[Form] | None = None,
    progress: Progress = no_progress,
) -> list[KernelRow]:
    """Every form on every shape and batch, all forms of one shape in turns.

    Args:
        shapes: [N, K] of the weights.
        batches: rows of x.
        device: where all runs.
        bandwidth: bytes a second of reading memory, for the share.
        rounds: counted rounds; in each, all take turns.
        seed: of the numbers.
        progress: reporter of long work.
        forms: None is all of the device's. A form whose check is red is not timed; its row says
            why.
    """
    rows = list[KernelRow]()
    chosen = FORMS[device.type]
    if forms is not None:
        chosen = tuple(forms)
    for n, k in shapes:
        draws = torch.Generator().manual_seed(seed)
        weight = torch.randn(n, k, generator=draws) / k**0.5
        for batch in batches:
            x = torch.randn(batch, k, generator=draws).to(device)
            rows += _one_shape(chosen, weight.to(device), x, bandwidth, rounds, progress)
    return rows


def _one_shape(
    forms: Iterable[Form],
    weight: Tensor,
    x: Tensor,
    bandwidth: float,
    rounds: int,
    progress: Progress,
) -> list[KernelRow]:
    shape = (weight.shape[0], weight.shape[1])
    batch = x.shape[0]
    rows: dict[str, KernelRow] = {}
    works: dict[str, Callable[[], int]] = {}
    for form in forms:
        rows[form.name], work = _check_product(form, weight, x)
        if work is not None:
            works[form.name] = work
    spreads = time_in_turns(
        works,
        x.device,
        rounds=rounds,
        progress=progress,
        description=f"{shape[0]}x{shape[1]} B{batch}",
    )
    for name, spread in spreads.items():
        share = rows[name].nbytes / spread.median / bandwidth
        rows[name] = replace(rows[name], seconds=spread, share=share)
    return list(rows.values())


def _check_product(
    form: Form, weight: Tensor, x: Tensor
) -> tuple[KernelRow, Callable[[], int] | None]:
    """The row of a form without its times, and the work to be timed if the product is right."""
    numbers = numbers_of(form.kind, weight).to(form.dtype)
    operand = x.to(form.dtype)
    shape = (weight.shape[0], weight.shape[1])
    row = KernelRow(
        form=form.name,
        kind=form.kind,
        dtype=str(form.dtype).removeprefix("torch."),
        shape=shape,
        batch=x.shape[0],
        seconds=None,
        nbytes=weight_bytes(form.kind, *shape, form.dtype),
        share=None,
        error=None,
        backend="torch",
    )
    try:
        product = form.make(numbers)
        error = relative_error(product(operand), operand, numbers)
    except (RuntimeError, NotImplementedError, ValueError) as failed:
        return replace(row, fault=f"does not run: {str(failed).splitlines()[0][:120]}"), None
    if isinstance(product, PackedLinear):
        row = replace(row, backend=backend_of(product))
    row = replace(row, error=error)
    if not error <= TOLERANCE[form.dtype]:
        fault = f"wrong: relative error {error:.2g}, allowed {TOLERANCE[form.dtype]:g}"
        return replace(row, fault=fault), None
    copies = [product]
    while len(copies) < copies_needed(row.nbytes, x.device):
        if isinstance(product, PackedLinear):
            copies.append(copy.deepcopy(product))
        else:
            copies.append(form.make(numbers))

    def run_product() -> int:
        for multiply in copies:
            multiply(operand)
        return len(copies)

    return row, run_product


def relative_error(output: Tensor, x: Tensor, weight: Tensor) -> float:
    """Largest difference to the product in float64, over its largest number; infinite where not
    finite."""
    wanted = F.linear(x.double(), weight.double())
    if output.shape != wanted.shape or not bool(output.isfinite().all()):
        return float("inf")
    return float((output.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def timings_of(rows: Iterable[KernelRow]) -> list[Timing]:
    """What ``lower`` can use of some rows: ours, and the fastest dense one of torch for each
    dtype."""
    return [timing for row in rows if (timing := row.timing()) is not None]

"""The torch ops: the contract between graphs and kernels.  Importing this module registers them.

Canonical ops hold the tensors of ``formats`` (the form on disk), on any device:

* ``secateur::linear_24(x, values, mask, bias)``             values float32, float16 or bfloat16, as
x
* ``secateur::linear_24_int8(x, values, mask, scale, bias)``  row scales
* ``secateur::linear_24_int4(x, values, mask, scale, bias)``  scales of 128 columns
* ``secateur::linear_int8(x, values, scale, bias)``, ``secateur::linear_int4(x, values, scale,
bias)``: not sparse;
  values int8 [N, S] and uint8 [N, S/2] (two a byte, + 8, the earlier in the low half), scales as
  above

and one op holds a weight that was rearranged for the tensor cores of a GPU:

* ``secateur::linear_24_fragment(x, values, indices, scale, bias, kind, n)``: fragment order
(``gpu.fragments``); kind
  bfloat16, float16, int8 or int4 as in ``formats``; x [..., K] with the K that was packed, n rows
  of the result.
  CUDA: ``gpu.api.linear_24_fragment`` with these arguments.  Elsewhere:
  ``gpu.fragments.dense_weight(values, indices, scale, kind, n, k, dtype)`` gives the dense [n, k]
  and torch multiplies.

The layout is part of the op's name, so a graph says by itself which tensors it holds: a canonical
graph runs anywhere (on CUDA by expanding: right, not fast), a graph lowered for a GPU calls
``linear_24_fragment`` on tensors that
``gpu.fragments`` made.  ``secateur::weight_24`` and ``secateur::weight_24_fragment`` give the dense
weight back: the gradient for x is ``grad @ weight``; packed weights are frozen and get none.

Who serves a call: on CPU the compiled kernels of ``cpu``, registered for the CPU key at first use
if they can be built and pass their self-test; ``linear_24_fragment`` on CUDA ``gpu.api``;
everything else the reference. All accumulate in float32.  x [..., K] may be up to 7 columns
narrower than S (formats pads K); x, values (floats) and bias have one dtype.  Results for x that is
not finite are those of the expanded weight on CPU and unspecified on GPUs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secateur.kernels.sparse24 import cpu, reference
from secateur.kernels.sparse24.formats import ALIGN, FLOAT_KINDS, GROUP_INT4, QUANTIZED_KINDS

FLOATS = tuple(FLOAT_KINDS.values())
SCHEMAS = {
    "linear_24": "(Tensor x, Tensor values, Tensor mask, Tensor? bias=None) -> Tensor",
    "linear_24_int8": "(Tensor x, Tensor values, Tensor mask, Tensor scale, Tensor? bias=None) "
    "-> Tensor",
    "linear_24_int4": "(Tensor x, Tensor values, Tensor mask, Tensor scale, Tensor? bias=None) "
    "-> Tensor",
    "linear_int8": "(Tensor x, Tensor values, Tensor scale, Tensor? bias=None) -> Tensor",
    "linear_int4": "(Tensor x, Tensor values, Tensor scale, Tensor? bias=None) -> Tensor",
    "weight_24": "(Tensor values, Tensor? mask, Tensor? scale, ScalarType dtype) -> Tensor",
    "linear_24_fragment": "(Tensor x, Tensor values, Tensor indices, Tensor? scale, Tensor? bias, "
    "str kind, int n) "
    "-> Tensor",
    "weight_24_fragment": "(Tensor values, Tensor indices, Tensor? scale, str kind, int n, int k, "
    "ScalarType dtype) "
    "-> Tensor",
}
# Where the arguments (mask, scale) of a canonical op stand; None: it has none.
PLACES: dict[str, tuple[int | None, int | None]] = {
    "linear_24": (2, None),
    "linear_24_int8": (2, 3),
    "linear_24_int4": (2, 3),
    "linear_int8": (None, 2),
    "linear_int4": (None, 2),
}


def op_of(kind: str, sparse: bool = True) -> str:
    """Name of the canonical op for a kind of ``formats.KINDS``: ``linear_24_int8``, ..."""
    if not sparse and kind not in QUANTIZED_KINDS:
        raise ValueError(f"a dense {kind} weight needs no op of ours: use torch's linear")
    return "_".join(
        ["linear", *(["24"] if sparse else []), *([kind] if kind in QUANTIZED_KINDS else [])]
    )


def linear(
    x: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The canonical op that fits the tensors: ``x @ weight^T + bias``.

    Args:
        x: [..., K].
        values, mask, scale: of a ``Packed24``; mask None: dense and quantised.
        bias: [N].

    Returns:
        [..., N], dtype of x.
    """
    if scale is None:
        return _LINEAR["linear_24"](x, values, mask, bias)
    if values.dtype == torch.uint8:
        kind = "int4"
    else:
        kind = "int8"
    if mask is None:
        return _LINEAR[f"linear_{kind}"](x, values, scale, bias)
    return _LINEAR[f"linear_24_{kind}"](x, values, mask, scale, bias)


def columns_of(values: Tensor, mask: Tensor | None) -> int:
    """S of packed values."""
    elements = values.shape[1] * (2 if values.dtype == torch.uint8 else 1)
    if mask is None:
        return elements
    return 2 * elements


def check_operands(
    x: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    name: str,
) -> None:
    """Raises ValueError where dtypes or shapes of a canonical op disagree."""
    rows = values.shape[0]
    wide = columns_of(values, mask)
    floats = None
    if scale is None:
        floats = x.dtype
    expected = {"linear_24_int8": torch.int8, "linear_int8": torch.int8}.get(
        name, floats or torch.uint8
    )
    scaled: tuple[int, ...]
    if name.endswith("int8"):
        scaled = (rows,)
    else:
        scaled = (rows, -(-wide // GROUP_INT4))
    troubles = [
        (x.dtype not in FLOATS, f"x is {x.dtype}: expected float32, float16 or bfloat16"),
        (
            values.dtype != expected,
            f"values are {values.dtype}: expected {expected} for x of {x.dtype}",
        ),
        (
            not wide - ALIGN < x.shape[-1] <= wide,
            f"x has {x.shape[-1]} columns, the packed weight {wide}",
        ),
        (mask is not None and tuple(mask.shape) != (rows, wide // ALIGN), "mask is not [N, S/8]"),
        (scale is not None and tuple(scale.shape) != scaled, f"scale is not {list(scaled)}"),
        (
            bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype),
            "bias is not [N] of the dtype of x",
        ),
    ]
    found = []
    for wrong, text in troubles:
        if wrong:
            found.append(text)
    if found:
        raise ValueError(f"secateur::{name}: {'; '.join(found)}")


def _canonical_operands(
    name: str, args: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(x, values, mask, scale, bias) of a canonical op's arguments, defaults filled in."""
    mask_at, scale_at = PLACES[name]
    places = []
    for at in (mask_at, scale_at):
        if at is not None:
            places.append(at)
    after = 2 + len(places)
    mask = None
    if mask_at is not None:
        mask = args[mask_at]
    scale = None
    if scale_at is not None:
        scale = args[scale_at]
    return args[0], args[1], mask, scale, args[after] if len(args) > after else None


def _make_kernel(name: str) -> Callable[..., Tensor]:
    def run_kernel(*args: Any) -> Tensor:
        """The op on any device without a kernel of its own: compiled on the CPU, else the
        reference."""
        on_cpu = all(a.device.type == "cpu" for a in args if isinstance(a, Tensor))
        if on_cpu and cpu.is_active():  # from now on the compiled kernel holds the CPU key
            result: Tensor = getattr(torch.ops.secateur, name)(*args)
            return result
        check_operands(*_canonical_operands(name, args), name)
        return reference.linear(*_canonical_operands(name, args))

    return run_kernel


def _make_fake(name: str) -> Callable[..., Tensor]:
    def output_shape(*args: Any) -> Tensor:
        """The result without its values, after the operands were checked."""
        x, values, *_ = operands = _canonical_operands(name, args)
        check_operands(*operands, name)
        return x.new_empty(*x.shape[:-1], values.shape[0])

    return output_shape


def _make_setup(name: str) -> Callable[..., None]:
    def save_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward pass reads."""
        x, values, mask, scale, bias = _canonical_operands(name, inputs)
        ctx.save_for_backward(values, mask, scale)
        ctx.columns, ctx.arguments, ctx.biased = x.shape[-1], len(inputs), bias is not None

    return save_operands


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, mask, scale = ctx.saved_tensors
    dense = torch.ops.secateur.weight_24(values, mask, scale, grad.dtype)
    grads: list[Tensor | None] = [None] * ctx.arguments
    if ctx.needs_input_grad[0]:
        grads[0] = (grad @ dense)[..., : ctx.columns]
    if ctx.biased and ctx.needs_input_grad[-1]:
        if grad.ndim > 1:
            grads[-1] = grad.flatten(0, -2).sum(0)
        else:
            grads[-1] = grad
    return tuple(grads)


def _weight_fake(
    values: Tensor, mask: Tensor | None, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return values.new_empty(values.shape[0], columns_of(values, mask), dtype=dtype)


def _lazy_gpu_function(module: str, function: str) -> Callable[..., Tensor]:
    """A function of the GPU kernels, imported when it is called: Triton is an optional package."""

    def call_function(*args: Any) -> Tensor:
        """Import the module and call its function."""
        found = getattr(
            importlib.import_module(f"secateur.kernels.sparse24.gpu.{module}"), function
        )
        result: Tensor = found(*args)
        return result

    return call_function


def _fragment_reference(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    kind: str,
    n: int,
) -> Tensor:
    dense = torch.ops.secateur.weight_24_fragment(
        values, indices, scale, kind, n, x.shape[-1], torch.float32
    )
    return torch.nn.functional.linear(x.float(), dense, None if bias is None else bias.float()).to(
        x.dtype
    )


def _fragment_fake(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    kind: str,
    n: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _weight_fragment_fake(
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    kind: str,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    return values.new_empty(n, k, dtype=dtype)


def _fragment_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, scale, _, ctx.kind, ctx.n = inputs
    ctx.save_for_backward(values, indices, scale)
    ctx.columns = x.shape[-1]


def _fragment_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = torch.ops.secateur.weight_24_fragment(
        *ctx.saved_tensors, ctx.kind, ctx.n, ctx.columns, grad.dtype
    )
    bias = None
    if ctx.needs_input_grad[4]:
        bias = grad.flatten(0, -2).sum(0)
    return grad @ weight, None, None, None, bias, None, None


def _register_ops() -> None:
    for name, schema in SCHEMAS.items():
        torch.library.define(f"secateur::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name in PLACES:
        torch.library.impl(f"secateur::{name}", "CompositeExplicitAutograd", _make_kernel(name))
        torch.library.register_fake(f"secateur::{name}", _make_fake(name))
        torch.library.register_autograd(
            f"secateur::{name}", _backward, setup_context=_make_setup(name)
        )
    torch.library.impl("secateur::weight_24", "CompositeExplicitAutograd", reference.dense_weight)
    torch.library.register_fake("secateur::weight_24", _weight_fake)
    fragment = "secateur::linear_24_fragment"
    torch.library.impl(fragment, "CompositeExplicitAutograd", _fragment_reference)
    torch.library.impl(fragment, "CUDA", _lazy_gpu_function("api", "linear_24_fragment"))
    torch.library.register_fake(fragment, _fragment_fake)
    torch.library.register_autograd(fragment, _fragment_backward, setup_context=_fragment_save)
    torch.library.impl(
        "secateur::weight_24_fragment",
        "CompositeExplicitAutograd",
        _lazy_gpu_function("fragments", "restore_dense"),
    )
    torch.library.register_fake("secateur::weight_24_fragment", _weight_fragment_fake)


_register_ops()
_LINEAR: dict[str, Callable[..., Tensor]] = {
    name: getattr(torch.ops.secateur, name).default for name in PLACES
}

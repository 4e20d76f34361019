"""A numpy stand-in for Triton's Gluon language: the kernels' own source runs on CPU, one program
after the other.

Every tensor is the whole block as a numpy array with the integer widths of the device (int32
arithmetic wraps); layouts
are ignored: they are proved where the kernels are compiled (`assert_trivial`).  Inline assembly
goes to the emulator. Shared memory is one array of bytes, poisoned; an element's place follows its
layout's swizzle.  Asynchronous copies land either as late as allowed, when a wait retires their
group, or as early as possible, at once: the first shows a missing wait, the second a stage that is
    overwritten while it is still read.
"""

from __future__ import annotations

import builtins
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from emulator import Ptx, to_bf16

Kernel = Callable[..., None]
FOLDER = Path(__file__).parents[3] / "kernels" / "sparse24" / "gpu"
PACKAGE = "secateur.kernels.sparse24.gpu."
SHARED_BYTES = 232_448  # what a block may use on Hopper
BASE = 1024  # address of shared memory: not zero, so that a forgotten base shows
POISON = 0x7F  # 0x7F7F: bf16 3.4e38, fp16 NaN; 0x7F7F7F7F: not an ordered index word


class Tensor(np.ndarray):  # type: ignore[type-arg]
    """A block's tensor.  bf16 tensors hold their bits as uint16 and are only stored."""

    def __array_wrap__(
        self, array: Any, context: Any = None, return_scalar: bool = False
    ) -> Tensor:
        return np.asarray(array).view(Tensor)

    def to(self, dtype: DType, bitcast: bool = False) -> Tensor:
        plain = np.ascontiguousarray(self)
        if bitcast:
            return plain.view(dtype.numpy).view(Tensor).reshape(self.shape)
        if dtype.name == "bf16":
            return to_bf16(plain.astype(np.float32)).view(Tensor).reshape(self.shape)
        return plain.astype(dtype.numpy).view(Tensor).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class DType:
    name: str
    numpy: Any

    @property
    def element_ty(self) -> DType:
        return self


DTYPES = {
    torch.int32: DType("i32", np.int32),
    torch.int16: DType("i16", np.int16),
    torch.float32: DType("fp32", np.float32),
    torch.float16: DType("fp16", np.float16),
    torch.bfloat16: DType("bf16", np.uint16),
}


class Pointer:
    """Offsets into a buffer: a torch tensor's memory, so that stores are seen by the caller."""

    def __init__(self, buffer: Any, dtype: DType, offset: Any = 0) -> None:
        self.buffer, self.dtype, self.offset = buffer, dtype, offset

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Pointer:
        assert tensor.is_contiguous()
        bits = tensor.detach().view(-1)
        array = (bits.view(torch.int16) if tensor.dtype == torch.bfloat16 else bits).numpy()
        return cls(array.view(DTYPES[tensor.dtype].numpy), DTYPES[tensor.dtype])

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(
            self.buffer,
            self.dtype,
            np.asarray(self.offset, np.int64) + np.asarray(offset, np.int64),
        )


class Shared:
    """A view of shared memory: the byte address of each element."""

    def __init__(self, program: Program, addresses: Any, dtype: DType) -> None:
        self.program, self.addresses, self.dtype = program, addresses, dtype

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < len(self.addresses), "a stage outside the ring"
        return Shared(self.program, self.addresses[int(i)], self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        assert start >= 0 and start + length <= self.addresses.shape[dim], (
            "a slice outside the buffer"
        )
        return Shared(
            self.program, np.take(self.addresses, range(start, start + length), dim), self.dtype
        )

    @property
    def places(self) -> Any:
        return self.addresses // np.dtype(self.dtype.numpy).itemsize

    def load(self, layout: Any = None) -> Tensor:
        return self.program.memory.view(self.dtype.numpy)[self.places].view(Tensor)

    def store(self, values: Any) -> None:
        self.program.memory.view(self.dtype.numpy)[self.places] = values


class Program:
    """What one running program owns: its place in the grid, shared memory, copies in flight."""

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...], early: bool) -> None:
        self.place, self.grid, self.early = place, grid, early
        self.memory = np.full(SHARED_BYTES, POISON, np.uint8)
        self.used = 0
        self.pending: list[tuple[Shared, Any]] = []
        self.groups: list[list[tuple[Shared, Any]]] = []

    def allocate(self, dtype: DType, shape: list[int], layout: Any = None) -> Shared:
        size = np.dtype(dtype.numpy).itemsize
        addresses = np.arange(int(np.prod(shape))).reshape(shape) * size
        if getattr(layout, "name", "") == "NVMMASharedLayout":
            assert layout.args[0] == 128 and shape[-1] * size == 128, (
                "only rows of 128 bytes are modelled"
            )
            addresses ^= ((addresses >> 7) & 7) << 4
        start, self.used = self.used, -(-(self.used + addresses.size * size) // 1024) * 1024
        assert self.used <= SHARED_BYTES, f"{self.used} bytes of shared memory"
        return Shared(self, addresses + start, dtype)

    def copy(self, target: Shared, source: Pointer, mask: Any = None, **_: Any) -> None:
        values = load(source, mask)  # what is masked arrives as zeros
        assert values.shape == target.addresses.shape, (
            f"copy of {values.shape} to {target.addresses.shape}"
        )
        if self.early:
            target.store(values)
        else:
            self.pending.append((target, values))

    def commit(self) -> None:
        self.groups.append(self.pending)
        self.pending = []

    def wait(self, outstanding: int = 0) -> None:
        while len(self.groups) > outstanding:
            for target, values in self.groups.pop(0):
                target.store(values)


class Layout:
    def __init__(self, *args: Any, **_: Any) -> None:
        self.name, self.args = type(self).__name__, args


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    offset, where = np.broadcast_arrays(pointer.offset, True if mask is None else np.asarray(mask))
    inside = (offset >= 0) & (offset < pointer.buffer.size)
    assert inside[where].all(), "a load outside its tensor"
    values = pointer.buffer[np.where(where, offset, 0)]
    return np.where(where, values, np.asarray(other).astype(values.dtype)).view(Tensor)


def store(pointer: Pointer, values: Any, mask: Any = None) -> None:
    offset, values, where = np.broadcast_arrays(
        pointer.offset, np.asarray(values), True if mask is None else mask
    )
    offset, values = offset[where], values[where]
    assert ((offset >= 0) & (offset < pointer.buffer.size)).all(), "a store outside its tensor"
    assert len(np.unique(offset)) == len(offset), "two lanes store to one address"
    pointer.buffer[offset] = values


def assembly(
    program: Program, text: str, constraints: str, args: list[Any], dtype: Any, pack: int
) -> Any:
    """inline_asm_elementwise: `pack` elements of a lane's registers are the operands of one run of
    the text."""
    shape = np.broadcast_shapes(*(np.shape(arg) for arg in args))
    grouped = [registers_last(np.broadcast_to(arg, shape), pack) for arg in args]
    n_out = sum(part.strip().startswith("=") for part in constraints.split(","))
    n_all, operands = len(constraints.split(",")), {}
    for i, array in enumerate(grouped):
        for j in range(pack):
            bits = np.ascontiguousarray(array[..., j])
            operands[f"${n_out + i * pack + j}"] = bits.view(np.uint32)
    assert len(operands) + n_out == n_all, (
        f"{n_all} constraints for {len(operands) + n_out} operands"
    )
    for i, part in enumerate(constraints.split(",")):
        if part.isdigit():  # an input in the place of that output
            operands[f"${part}"] = operands[f"${i}"]
    result = Ptx(program.memory, BASE).run(text, operands)
    outs = []
    types = dtype if isinstance(dtype, tuple) else (dtype,)
    for at, out_type in enumerate(types):
        registers = np.stack([result[f"${at * pack + j}"] for j in range(pack)], -1)
        outs.append(registers_back(registers, shape, pack).view(out_type.numpy).view(Tensor))
    return tuple(outs) if isinstance(dtype, tuple) else outs[0]


def registers_last(array: Any, pack: int) -> Any:
    """[..., lanes, pack]: registers are the last axis, then (the warpgroup kernel) axis 1."""
    if pack in (1, array.shape[-1]):
        return array if pack > 1 else array[..., None]
    moved = np.moveaxis(array, 1, 2)
    assert moved.shape[2] * moved.shape[3] == pack, f"pack {pack} of a tensor {array.shape}"
    return moved.reshape(*moved.shape[:2], pack)


def registers_back(array: Any, shape: tuple[int, ...], pack: int) -> Any:
    if pack in (1, shape[-1]):
        return np.ascontiguousarray(array if pack > 1 else array[..., 0])
    return np.ascontiguousarray(
        np.moveaxis(array.reshape(shape[0], shape[2], shape[1], shape[3]), 2, 1)
    )


class Machine:
    """The modules that a kernel imports, and the program that runs."""

    def __init__(self) -> None:
        self.program = Program((0, 0, 0), (1, 1, 1), early=False)
        copies = SimpleNamespace(
            async_copy_global_to_shared=lambda *a, **k: self.program.copy(*a, **k),
            commit_group=lambda: self.program.commit(),
            wait_group=lambda n=0: self.program.wait(n),
        )
        hopper = SimpleNamespace(fence_async_shared=lambda: None, async_copy=copies)
        nvidia = SimpleNamespace(ampere=SimpleNamespace(async_copy=copies), hopper=hopper)
        gluon = SimpleNamespace(
            jit=lambda f: f, language=SimpleNamespace(**self.language(), nvidia=nvidia)
        )
        self.triton = SimpleNamespace(experimental=SimpleNamespace(gluon=gluon))

    def language(self) -> dict[str, Any]:
        tensor = lambda value: np.asarray(value).view(Tensor)  # noqa: E731
        names = (
            "SliceLayout DistributedLinearLayout BlockedLayout SwizzledSharedLayout "
            "NVMMASharedLayout"
        ).split()
        dtypes = {
            "int16": np.int16,
            "int32": np.int32,
            "int64": np.int64,
            "float16": np.float16,
            "float32": np.float32,
        }
        wide = lambda v, axis: np.sum(np.asarray(v, np.float64), axis).astype(np.float32)  # noqa: E731
        return {
            **{name: type(name, (Layout,), {}) for name in names},
            **{name: DType(name, numpy) for name, numpy in dtypes.items()},
            "constexpr": lambda value: value,
            "program_id": lambda axis: tensor(np.int32(self.program.place[axis])),
            "num_programs": lambda axis: tensor(np.int32(self.program.grid[axis])),
            "arange": lambda start, end, layout=None: tensor(np.arange(start, end, dtype=np.int32)),
            "expand_dims": lambda v, axis: tensor(np.expand_dims(v, axis)),
            "reshape": lambda v, shape: tensor(np.reshape(v, shape)),
            "permute": lambda v, order: tensor(np.transpose(v, order)),
            "zeros": lambda shape, dtype, layout=None: tensor(np.zeros(shape, dtype.numpy)),
            "zeros_like": lambda v: tensor(np.zeros_like(v)),
            "sum": lambda v, axis: tensor(wide(v, axis)),
            "where": lambda c, a, b: tensor(np.where(c, a, b)),
            "minimum": lambda a, b: tensor(np.minimum(a, b)),
            "convert_layout": lambda v, layout, assert_trivial=False: v,
            "static_range": range,
            "static_assert": self.static_assert,
            "barrier": lambda: None,
            "load": load,
            "store": store,
            "allocate_shared_memory": lambda *args: self.program.allocate(*args),
            "inline_asm_elementwise": self.assembly,
        }

    @staticmethod
    def static_assert(condition: bool, text: str) -> None:
        assert condition, text

    def assembly(
        self, text: str, constraints: str, args: Any, dtype: Any, is_pure: bool, pack: int
    ) -> Any:
        return assembly(self.program, text, constraints, args, dtype, pack)

    def launch(
        self, kernel: Kernel, grid: Iterable[int], *args: Any, early: bool = False, **kw: Any
    ) -> None:
        sizes = (*grid, 1, 1)[:3]
        arguments = [Pointer.of(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        for place in np.ndindex(*sizes):
            self.program = Program(place, sizes, early)
            kernel(*arguments, **kw)


class Kernels:
    """The kernel modules, their source executed against a `Machine`.

    `edits`: (module, old text, new text): faults planted in the source.
    """

    def __init__(self, *edits: tuple[str, str, str]) -> None:
        self.machine, self.edits, self.loaded = Machine(), edits, {}  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> SimpleNamespace:
        if name not in self.loaded:
            source = (FOLDER / f"{name}.py").read_text()
            for module, old, new in self.edits:
                if module == name:
                    assert source.count(old), (
                        f"{name}.py has no {old!r}: the planted fault is out of date"
                    )
                    source = source.replace(old, new)
            space: dict[str, Any] = {
                "__name__": name,
                "__builtins__": {**vars(builtins), "__import__": self.find},
            }
            exec(compile(source, str(FOLDER / f"{name}.py"), "exec"), space)
            self.loaded[name] = SimpleNamespace(**space)
        return self.loaded[name]

    def find(
        self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        if name.startswith(PACKAGE):
            return getattr(self, name.removeprefix(PACKAGE))
        if name.split(".")[0] != "triton":
            return builtins.__import__(name, globals, locals, fromlist, level)
        found: Any = SimpleNamespace(triton=self.machine.triton)
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def launch(self, kernel: Kernel, grid: Iterable[int], *args: Any, **kw: Any) -> None:
        self.machine.launch(kernel, grid, *args, **kw)

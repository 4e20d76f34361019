"""Shapes of the kernels as data: what may be tried, what each may cost, and which kernel serves
which batch.

Tile sizes are chosen by counting (bytes in flight, registers, shared memory), not by measuring: no
row here was timed.
`benchmarks/kernels_gpu.py --tune` times all of them on a GPU and writes a table that `load_table`
reads; a row of such a table wins over `guess`.  The limits are asserted on the machine code of
every variant, for both chips.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

Backend = Literal["decode", "gemm", "wgmma", "expand", "cusparselt", "portable", "torch"]
CAPABILITIES = (80, 90)  # compute capability * 10: what is compiled ahead of time and tested
SHARED_BYTES = {
    80: 166_912,
    90: 232_448,
}  # a block's limit (CUDA programming guide, technical specifications)
DECODE_BATCH = 16
TABLE_VERSION = 1


@dataclass(frozen=True)
class DecodeConfig:
    """P blocks of k a warp and step, MT row tiles, NT tiles of 8 batch rows, WARPS; `registers` of
    a lane at most."""

    p: int
    mt: int
    nt: int
    warps: int
    registers: int


@dataclass(frozen=True)
class GemmConfig:
    """MT x WM row tiles of 16, NT x WN batch tiles of 8, KU blocks a stage, STAGES; `registers` of
    a lane at most."""

    mt: int
    nt: int
    wm: int
    wn: int
    ku: int
    stages: int
    registers: int

    @property
    def rows(self) -> int:
        """Outputs of a block."""
        return 16 * self.mt * self.wm

    @property
    def batch(self) -> int:
        """Batch rows of a block."""
        return 8 * self.nt * self.wn


@dataclass(frozen=True)
class WgmmaConfig:
    """WG warpgroups of 64 rows, STAGES; `registers` of a lane at most."""

    wg: int
    stages: int
    registers: int


Config = DecodeConfig | GemmConfig | WgmmaConfig
# By kind of values, the likeliest first.  In flight a warp: P * MT * (1152, 640, 800) bytes of
# float, int8, int4.  With up to 128 registers two blocks of eight warps fit a multiprocessor,
# beyond that one; Triton 3.6 takes more than 3.8.
DECODE: dict[str, tuple[DecodeConfig, ...]] = {
    "float": (
        DecodeConfig(2, 1, 1, 8, registers=128),
        DecodeConfig(2, 2, 1, 8, registers=184),
        DecodeConfig(4, 1, 1, 4, registers=224),
        DecodeConfig(1, 2, 2, 8, registers=136),
        DecodeConfig(1, 1, 2, 8, registers=112),
    ),
    "int8": (
        DecodeConfig(2, 2, 1, 8, registers=160),
        DecodeConfig(2, 1, 1, 8, registers=128),
        DecodeConfig(4, 1, 1, 4, registers=192),
        DecodeConfig(1, 2, 2, 8, registers=128),
        DecodeConfig(1, 1, 2, 8, registers=104),
    ),
    "int4": (
        DecodeConfig(2, 1, 1, 8, registers=160),
        DecodeConfig(1, 2, 1, 8, registers=144),
        DecodeConfig(1, 1, 1, 8, registers=112),
        DecodeConfig(1, 2, 2, 8, registers=184),
        DecodeConfig(1, 1, 2, 8, registers=144),
    ),
}
GEMM: dict[str, tuple[GemmConfig, ...]] = {
    "float": (
        GemmConfig(4, 4, 2, 4, 1, 4, registers=168),  # 128 x 128
        GemmConfig(4, 2, 4, 2, 1, 4, registers=104),  # 256 x 32
        GemmConfig(2, 2, 2, 4, 2, 3, registers=104),  # 64 x 64
        GemmConfig(2, 1, 4, 2, 2, 4, registers=72),  # 128 x 16
    ),
    "int8": (
        GemmConfig(4, 4, 2, 4, 1, 4, registers=168),
        GemmConfig(4, 2, 4, 2, 1, 4, registers=112),
        GemmConfig(2, 2, 2, 4, 2, 3, registers=104),
        GemmConfig(2, 1, 4, 2, 2, 4, registers=80),
    ),
    "int4": (
        GemmConfig(
            2, 4, 2, 4, 1, 3, registers=200
        ),  # 64 x 128: a group's sums need registers beside the total's
        GemmConfig(4, 2, 4, 2, 1, 4, registers=176),
        GemmConfig(2, 2, 2, 4, 1, 4, registers=128),
        GemmConfig(2, 1, 4, 2, 1, 4, registers=96),
    ),
}
WGMMA: tuple[WgmmaConfig, ...] = (
    WgmmaConfig(1, 4, registers=128),
    WgmmaConfig(2, 4, registers=128),
)
EXPAND_BLOCKS = 4  # blocks of 64 columns that one program of `expand` and of `gemv` takes

# Up to which batch a kernel is guessed to be the best one, by capability: an open question until it
# is timed.
GUESSES: dict[int, tuple[tuple[float, Backend], ...]] = {
    0: ((1, "portable"), (float("inf"), "expand")),
    80: ((DECODE_BATCH, "decode"), (float("inf"), "gemm")),
    90: ((DECODE_BATCH, "decode"), (256, "gemm"), (float("inf"), "expand")),
}


@dataclass(frozen=True)
class KernelChoice:
    """How one product is computed; `config` and `splits` (parts of K) for the kernels of the sparse
    tensor cores."""

    backend: Backend
    config: Config | None = None
    splits: int = 1
    reason: str = "guess"


def value_kind(kind: str) -> str:
    """float, int8 or int4: what the kernels distinguish among the kinds of ``formats``."""
    if kind in ("int8", "int4"):
        return kind
    return "float"


def splits_of(programs: int, steps: int, multiprocessors: int) -> int:
    """Parts of K: as few as give every multiprocessor two programs, a power of two, of at least
    four steps each."""
    splits = 1
    while splits * programs < 2 * multiprocessors and splits * 8 <= steps:
        splits *= 2
    return splits


def guess_config(
    kind: str, n: int, k: int, batch: int, capability: int, multiprocessors: int
) -> KernelChoice:
    """The kernel and its shape for a product [batch, k] x [n, k]^T where nothing was measured."""
    rows = GUESSES[max(c for c in GUESSES if c <= capability)]
    backend = next(name for limit, name in rows if batch <= limit)
    values = value_kind(kind)
    blocks = -(-k // (128 if kind == "int4" else 64))
    if backend == "decode":
        decode = next(c for c in DECODE[values] if 8 * c.nt >= batch)
        programs = -(-n // (16 * decode.mt))
        steps = -(-blocks // (decode.p * decode.warps))
        return KernelChoice(backend, decode, splits_of(programs, 4 * steps, multiprocessors))
    if backend == "gemm":
        fits = [c for c in GEMM[values] if c.batch >= min(batch, 128)]
        if fits:
            gemm = min(fits, key=lambda c: (c.batch, -c.rows))
        else:
            gemm = GEMM[values][0]
        programs = -(-n // gemm.rows) * -(-batch // gemm.batch)
        return KernelChoice(
            backend, gemm, splits_of(programs, -(-blocks // gemm.ku), multiprocessors)
        )
    return KernelChoice(backend)


def choose_config(
    kind: str, n: int, k: int, batch: int, device: str, capability: int, multiprocessors: int
) -> KernelChoice:
    """The measured row for this device and shape, of the smallest batch that is not below this one;
    else a guess."""
    rows = [r for r in load_table().get(device, ()) if (r["kind"], r["n"], r["k"]) == (kind, n, k)]
    fits = [r for r in rows if r["batch"] >= batch]
    if not fits:
        return guess_config(kind, n, k, batch, capability, multiprocessors)
    return choice_of(min(fits, key=lambda r: int(r["batch"])))


def choice_of(row: dict[str, Any]) -> KernelChoice:
    """A row of a table as a Choice."""
    classes: dict[str, Any] = {"decode": DecodeConfig, "gemm": GemmConfig, "wgmma": WgmmaConfig}
    make = classes.get(row["backend"])
    return KernelChoice(
        row["backend"], make(**row["config"]) if make else None, int(row["splits"]), "measured"
    )


def row_of(
    choice: KernelChoice, kind: str, n: int, k: int, batch: int, microseconds: float
) -> dict[str, Any]:
    """A Choice as a row of a table: the time is of one product, `batch` the largest that it was
    measured for."""
    config = None
    if choice.config is not None:
        config = asdict(choice.config)
    found = {"kind": kind, "n": n, "k": k, "batch": batch, "microseconds": microseconds}
    return {**found, "backend": choice.backend, "config": config, "splits": choice.splits}


@lru_cache(maxsize=1)
def load_table() -> dict[str, list[dict[str, Any]]]:
    """Measured rows by device name, from the JSON file that the environment variable
    SECATEUR_GPU_TABLE names.

    Raises:
        ValueError: the file is no such table.
    """
    path = os.environ.get("SECATEUR_GPU_TABLE")
    if not path:
        return {}
    try:
        table = json.loads(Path(path).read_text())
        if table["version"] != TABLE_VERSION:
            raise ValueError(f"version {table['version']}, this program reads {TABLE_VERSION}")
        devices: dict[str, list[dict[str, Any]]] = table["devices"]
        for row in (row for rows in devices.values() for row in rows):
            choice_of(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"SECATEUR_GPU_TABLE={path} is no table of measured kernels ({error}): "
        raise ValueError(
            message + "write one with `python benchmarks/kernels_gpu.py --tune`, or unset it"
        ) from error
    return devices

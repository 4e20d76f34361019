"""The compiled CPU kernels: built at first use, tested against the reference, then registered for
the ops.

The library is one C++ file (``cpu_kernels.cpp``) for processors with AVX-512 and VBMI2.  It is
compiled with the system's C++ compiler against torch's headers into a folder of the user's cache
whose name is a hash of all that goes into it.  A build happens in a folder of its own that is
renamed when it is whole, so concurrent first uses and killed builds leave no half library and no
lock.  (torch's own extension loader needs ninja and leaves a lock when killed.)

Environment: SECATEUR_CPU_KERNELS=0: never build, use the reference.   SECATEUR_KERNEL_CACHE: the
    cache folder.
CXX: the compiler.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from secateur.kernels.sparse24.selftest import find_failures

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
NAMESPACE = "secateur_cpu"
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vbmi2")
FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-Wno-psabi"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi2", "-mfma", "-mf16c"),
)
BF16_CPU, BF16_FLAG = "avx512_bf16", "-mavx512bf16"
BUILD_SECONDS = 600

log = logging.getLogger(__name__)
_lock = RLock()


@dataclass(frozen=True)
class Backend:
    """Who serves the canonical ops on CPU.

    Attributes:
        name: ``avx512`` or ``reference``.
        reason: why not the compiled kernels, else what they use.
        library: the shared library's path.
    """

    name: str
    reason: str
    library: Path | None = None


class Unavailable(Exception):
    """The compiled kernels cannot be had; the message says why.  Never leaves this module."""


_backend: Backend | None = None


def backend() -> Backend:
    """The CPU backend of this process; the first call builds, tests and registers the kernels where
    it can.

    A fallback is logged once, with its reason.
    """
    global _backend
    with _lock:
        if _backend is None:
            try:
                _backend = _start_backend()
            except Unavailable as reason:
                _backend = Backend("reference", str(reason))
                log.warning("2:4 layers run on the slow reference: %s", reason)
        return _backend


def is_active() -> bool:
    """Whether the compiled kernels serve the ops, loading them at the first call."""
    return backend().name != "reference"


def build_library(source: Path = SOURCE, namespace: str = NAMESPACE) -> Path:
    """Compile the library unless the cache holds it.

    Args:
        namespace: the torch library that its raw kernels define.

    Returns:
        the shared library's path.

    Raises:
        Unavailable: no compiler, or it failed; the message holds the end of what it said.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise Unavailable("there is no C++ compiler (c++ or g++, or name one in CXX)")
    options = [
        *FLAGS,
        *([BF16_FLAG] if BF16_CPU in processor_flags() else []),
        f"-DSECATEUR_NAMESPACE={namespace}",
    ]
    text = source.read_bytes()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256(
        repr((text, options, torch.__version__, version, platform.machine())).encode()
    ).hexdigest()
    folder = cache_folder() / f"{namespace}-{key[:24]}"
    library = folder / "kernels.so"
    if not library.is_file():
        _compile_library(compiler, options, text, folder)
    if fault := not_private(library):
        raise Unavailable(
            f"{fault}: delete {folder}, or name another folder in SECATEUR_KERNEL_CACHE"
        )
    return library


def not_private(library: Path) -> str:
    """Why others could have put a library where it lies, "" if they could not.

    Args:
        library: and its folder and the cache folder must belong to this user or root, and be
            writable by no other; no folder above them may be writable by everybody, but for those
            with the sticky bit.
    """
    own = (library, library.parent, library.parent.parent)
    for path in (*own, *library.parent.parent.absolute().parents):
        try:
            facts = path.stat()
        except OSError as error:
            return f"{path} cannot be looked at ({error.strerror})"
        if path in own and facts.st_uid not in (0, os.geteuid()):
            return f"{path} belongs to another user, who could have put code there"
        others = facts.st_mode & (0o022 if path in own else 0o002)
        if others and not (path not in own and facts.st_mode & stat.S_ISVTX):
            return f"{path} can be written by others, who could have put code there"
    return ""


def load_library(library: Path, namespace: str = NAMESPACE) -> torch._ops._OpNamespace:
    """The raw kernels of a library: ``.linear_out(x, values, mask, scale, bias, y)``."""
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise Unavailable(f"{library} does not load: {error.__cause__ or error}") from error
    raw: torch._ops._OpNamespace = getattr(torch.ops, namespace)
    return raw


def processor_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = []
    for line in lines:
        if line.startswith("flags"):
            found.append(line.split(":", 1)[1].split())
    if found:
        return frozenset(found[0])
    return frozenset()


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    if given := os.environ.get("SECATEUR_KERNEL_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "secateur" / "kernels"


def _start_backend() -> Backend:
    if os.environ.get("SECATEUR_CPU_KERNELS", "1") == "0":
        raise Unavailable("SECATEUR_CPU_KERNELS=0 asks for it")
    flags = processor_flags()
    if missing := [flag for flag in NEEDED if flag not in flags]:
        raise Unavailable(f"this processor has no {', '.join(missing)}")
    library = build_library()
    raw = load_library(library)
    if found := find_failures(raw.linear_out):
        raise Unavailable(
            f"the self-test of {library} failed: {found[0]} ({len(found)} in all); please report it"
        )
    raw.activate()
    if BF16_CPU in flags:
        how = "bfloat16 products in hardware"
    else:
        how = "bfloat16 products as float32"
    return Backend("avx512", f"{how}; self-test passed", library)


def _compile_library(compiler: str, options: list[str], text: bytes, folder: Path) -> None:
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise Unavailable(f"the cache folder {folder.parent} cannot be written: {error}") from error
    try:
        source = draft / "kernels.cpp"
        target = draft / "kernels.so"
        source.write_bytes(text)
        # OpenMP's symbols are those of the runtime that torch itself loads: a second runtime would
        # fight for the cores.
        paths = [f"-I{p}" for p in include_paths()] + [f"-L{p}" for p in library_paths()]
        command = [compiler, *options, *paths, "-c", str(source), "-o", str(draft / "kernels.o")]
        link = [
            compiler,
            "-shared",
            str(draft / "kernels.o"),
            "-o",
            str(target),
            *paths,
            "-ltorch_cpu",
            "-lc10",
        ]
        log.info("compiling the CPU kernels (once, about half a minute) into %s", folder)
        for step in (command, [*link, *(f"-Wl,-rpath,{p}" for p in library_paths())]):
            result = subprocess.run(step, capture_output=True, text=True, timeout=BUILD_SECONDS)
            if result.returncode:
                raise Unavailable(f"{compiler} failed: {' '.join(result.stderr.split())[-800:]}")
        (draft / "kernels.o").unlink()
        target.chmod(0o700)
        try:
            draft.rename(folder)
        except OSError:  # another process was faster: its library is as good
            if not (folder / "kernels.so").is_file():
                raise
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the build in {folder.parent} failed: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)

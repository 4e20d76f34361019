"""An ahead-of-time package: prefill and decode steps as compiled code, run without the model's
Python code.

A package is an artifact folder with

- ``prefill.pt2``, ``decode.pt2``: machine code of AOTInductor for this processor; no weights
inside;
- ``weights.safetensors``: what both steps read, once;
- ``package.json``: shapes of the cache, longest sequence, dtype, end tokens, and what it was
compiled for;
- tokenizer files.

Loading a package runs its machine code.  One that was compiled by this user on this machine carries
a signature of the user's key (runtime/serving/trust.py) and is opened; any other needs
``trust_code=True``, as one trusts a program.  The manifest says whether a file was changed since.

Dims: B sequences, T tokens of a step, S longest sequence, H key/value heads, D head size, V
    vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch._inductor
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from secateur.graph.errors import ArtifactError, SecateurError
from secateur.graph.program import JSON
from secateur.graph.reading import read_json_object, reason_of, shown
from secateur.kernels.sparse24 import PackedLinear
from secateur.passes.lowering.lower import DTYPES
from secateur.runtime.packed.weights import iterate_packed_modules
from secateur.runtime.save.artifact import (
    check_target,
    read_manifest,
    verify_artifact,
    write_artifact,
)
from secateur.runtime.save.side_files import copy_side_files
from secateur.runtime.serving.step import DecodeStep, cache_shapes, make_empty_cache
from secateur.runtime.serving.trust import is_signed, sign
from secateur.runtime.stock.to_transformers import TOLERANCE

log = logging.getLogger(__name__)

FILE = "package.json"
WEIGHTS = "weights.safetensors"
STEPS = ("prefill", "decode")
VERSION = 1
SIGNATURE = "signature"
OPS = "secateur.kernels.sparse24.ops"


class CompiledStep(Protocol):
    """A step of a package, as torch loads it."""

    def __call__(
        self, ids: Tensor, position: Tensor, keys: list[Tensor], values: list[Tensor], /
    ) -> Tensor:
        """Logits [B, V] of the next token; keys and values are written."""
        ...


class PackageError(SecateurError):
    """A model cannot be packaged, or a package cannot run here."""


@dataclass(frozen=True)
class PackageFacts:
    """What a package is.

    cache: [H, D] of keys and of values of each layer.
    length: S.
    batch: B.
    end: ids that end a sequence.
    compiled_for: processor capability or GPU, and torch; another one is refused.
    ops: whether ops of ours are called.
    """

    cache: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    length: int
    batch: int
    dtype: str
    device: str
    vocabulary: int
    end: tuple[int, ...]
    compiled_for: str
    ops: bool
    version: int = VERSION

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, value: JSON) -> PackageFacts:
        """Read and check the facts of a file.

        Args:
            value: its JSON object.

        Raises:
            PackageError: of another version.
            KeyError: no version.
            ValueError: a fact of a wrong type, or that no package has.
        """
        if value["version"] != VERSION:
            version = shown(value["version"])
            raise PackageError(
                f"{FILE} has version {version}, expected {VERSION}: package the model again"
            )
        facts: PackageFacts = TypeAdapter(cls).validate_python(value)
        if facts.dtype not in DTYPES or facts.device not in ("cpu", "cuda"):
            raise ValueError(
                f"dtype {shown(facts.dtype)} on {shown(facts.device)} is no way to run"
            )
        if min(facts.length, facts.batch, facts.vocabulary) < 1:
            raise ValueError("a length, batch or vocabulary below one")
        return facts


def write_package(
    model: PreTrainedModel,
    path: str | Path,
    *,
    length: int = 2048,
    batch: int = 1,
    source: Path | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = log.info,
) -> PackageFacts:
    """Compile the prefill and decode steps of a model, lowered or not, and prove that they give
    what it gives.

    Args:
        model: to be packaged.
        path: the folder to make.
        length: longest sequence, prompt and new tokens together.
        batch: sequences at once.
        source: folder whose tokenizer files go along.
        overwrite: replace an earlier result.
        tell: gets a line for each phase.

    Raises:
        PackageError: the model keeps another cache than plain keys and values, does not export, or
            the compiled steps give something else; nothing is left behind.
    """
    inputs = [source, getattr(model, "name_or_path", None)]
    check_target(path, overwrite=overwrite, inputs=inputs)
    model.eval()
    step = DecodeStep(model)
    facts = _package_facts(model, length, batch)
    weights: dict[str, Tensor] = {}
    with write_artifact(path, overwrite=overwrite, inputs=inputs) as draft, torch.no_grad():
        for name in STEPS:
            started = time.perf_counter()
            exported = _export_step(step, facts, name)
            _compile_step(exported, draft.folder / f"{name}.pt2")
            weights |= _step_constants(exported, draft.folder / f"{name}.pt2")
            tell(f"{name} compiled in {time.perf_counter() - started:.0f} s")
        save_file(_unshare_weights(weights), draft.folder / WEIGHTS)
        (draft.folder / FILE).write_text(facts.to_json(), "utf-8")
        draft.figures = {
            "difference": _largest_difference(model, PackagedModel(draft.folder, facts)),
            SIGNATURE: sign(_signed_files(draft.folder)),
        }
        tell(f"compiled steps and model differ by {draft.figures['difference']:.2g}")
        if source is not None:
            copy_side_files(source, draft.folder)
    return facts


def is_package(path: Path) -> bool:
    """Whether a folder is an ahead-of-time package: a model folder may hold a ``package.json`` of
    other tools."""
    return (path / FILE).is_file() and any((path / f"{name}.pt2").is_file() for name in STEPS)


def made_here(path: Path) -> bool:
    """Whether the machine code of a package was compiled by this user on this machine, and is
    unchanged.

    Args:
        path: a folder with a manifest.

    Raises:
        ArtifactError: the manifest is damaged.
    """
    files = _signed_files(path)
    sound = all(file.is_file() and not file.is_symlink() for file in files)
    return sound and is_signed(files, read_manifest(path).figures.get(SIGNATURE))


def _signed_files(folder: Path) -> list[Path]:
    return [folder / FILE, *(folder / f"{name}.pt2" for name in STEPS)]


def load_package(
    path: str | Path, *, verify: bool = True, trust_code: bool = False
) -> PackagedModel:
    """The compiled steps of a package.

    Args:
        path: its folder.
        verify: re-hash every file first.
        trust_code: run machine code that was not compiled by this user on this machine.

    Raises:
        ArtifactError: changed since it was made.
        PackageError: it is machine code from elsewhere, or was compiled for another machine or
            torch.
    """
    folder = Path(path).expanduser()
    read_manifest(folder)
    verify_artifact(folder, hashes=verify)
    if not trust_code and not made_here(folder):
        raise PackageError(
            f"{folder} holds machine code that was not compiled by you on this machine, and "
            "opening it runs that code: "
            "package the model yourself, or say --trust-code (trust_code=True) if you trust "
            "whoever made it"
        )
    facts = read_facts(folder)
    if facts.compiled_for != describe_target(facts.device):
        raise PackageError(
            f"{folder} was compiled for {facts.compiled_for}, this is "
            f"{describe_target(facts.device)}: package it again"
        )
    return PackagedModel(folder, facts)


def read_facts(folder: Path) -> PackageFacts:
    """What a package says of itself; its machine code is not touched.

    Args:
        folder: of the package.

    Raises:
        ArtifactError: damaged.
        PackageError: of another version.
    """
    try:
        return PackageFacts.from_json(read_json_object(folder / FILE, ArtifactError))
    except SecateurError:
        raise
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        why = reason_of(error)
        raise ArtifactError(
            f"{folder / FILE} is damaged ({why}): package the model again"
        ) from error


class PackagedModel:
    """Two compiled steps over one set of weights and one cache.

    ``prefill`` begins anew with prompts of one length; ``decode`` adds a token to each.  Both give
    the logits [B, V] of the next token.
    """

    def __init__(self, folder: Path, facts: PackageFacts) -> None:
        if facts.ops and importlib.util.find_spec(OPS) is not None:
            importlib.import_module(OPS)
        self.facts = facts
        self._weights = {n: t.to(facts.device) for n, t in load_file(folder / WEIGHTS).items()}
        self._steps = {name: self._load_step(folder / f"{name}.pt2") for name in STEPS}
        self._keys, self._values = make_empty_cache(
            facts.cache, facts.batch, facts.length, _parse_dtype(facts.dtype), facts.device
        )
        self.position = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, each counted once."""
        tensors = {tensor.data_ptr(): tensor for tensor in self._weights.values()}
        return sum(tensor.nbytes for tensor in tensors.values())

    def prefill(self, ids_BT: Tensor) -> Tensor:
        """Logits after a prompt; what was in the cache is forgotten.

        Args:
            ids_BT: int64; B is that of the package.
        """
        self.position = 0
        if ids_BT.shape[1] == 1:
            return self.decode(ids_BT)
        return self._run_step("prefill", ids_BT)

    def decode(self, ids_B1: Tensor) -> Tensor:
        """Logits after one more token.

        Args:
            ids_B1: int64; B is that of the package.
        """
        return self._run_step("decode", ids_B1)

    def _run_step(self, name: str, ids: Tensor) -> Tensor:
        count = ids.shape[1]
        if ids.shape[0] != self.facts.batch or self.position + count > self.facts.length:
            raise PackageError(
                f"the package holds {self.facts.batch} sequences of {self.facts.length} tokens; "
                f"{ids.shape[0]} of "
                f"{self.position + count} were asked for: package the model again with another "
                "batch or length"
            )
        position = torch.tensor(self.position, device=ids.device)
        logits: Tensor = self._steps[name](ids, position, self._keys, self._values)
        self.position += count
        return logits

    def _load_step(self, file: Path) -> CompiledStep:
        """A compiled step over the shared weights: it keeps pointers to them and no copy."""
        step = torch._inductor.aoti_load_package(str(file))
        weights = {name: self._weights[name] for name in step.get_constant_fqns()}
        step.load_constants(weights, check_full_update=True, user_managed=True)
        compiled: CompiledStep = step
        return compiled


def describe_target(device: str) -> str:
    """What machine code depends on."""
    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = torch.backends.cpu.get_cpu_capability()
    return f"{where}, torch {torch.__version__}"


def _package_facts(model: PreTrainedModel, length: int, batch: int) -> PackageFacts:
    end = getattr(model.generation_config, "eos_token_id", None)
    try:
        cache = cache_shapes(model)
    except ValueError as error:
        raise PackageError(f"{type(model).__name__} cannot be packaged: {error}") from error
    end_tokens: tuple[int, ...] = ()
    if isinstance(end, Sequence):
        end_tokens = tuple(end)
    elif end is not None:
        end_tokens = (end,)
    return PackageFacts(
        cache=cache,
        length=length,
        batch=batch,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        vocabulary=model.config.get_text_config().vocab_size,
        end=end_tokens,
        compiled_for=describe_target(model.device.type),
        ops=next(iterate_packed_modules(model), None) is not None,
    )


def _export_step(step: DecodeStep, facts: PackageFacts, name: str) -> ExportedProgram:
    """The graph of a step; the prompt's length stays open."""
    count = 1
    if name == "prefill":
        count = 3
    keys, values = make_empty_cache(
        facts.cache, facts.batch, facts.length, _parse_dtype(facts.dtype), facts.device
    )
    ids = torch.ones(facts.batch, count, dtype=torch.int64, device=facts.device)
    inputs = (ids, torch.tensor(0, device=facts.device), keys, values)
    open_length = None
    if name == "prefill":
        open_length = {1: torch.export.Dim("tokens", min=2, max=facts.length)}
    still: list[None] = [None] * len(keys)
    try:
        with warnings.catch_warnings():
            # of torch's own pytree, about torch's own code
            warnings.simplefilter("ignore", FutureWarning)
            return torch.export.export(
                step, inputs, dynamic_shapes=(open_length, None, still, still), strict=False
            )
    except Exception as error:  # torch.export raises whatever the model's code raises
        raise PackageError(
            f"the {name} step does not export: {str(error).splitlines()[0][:300]}"
        ) from error


def _compile_step(exported: ExportedProgram, file: Path) -> None:
    options = {"aot_inductor.package_constants_in_so": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(file), inductor_configs=options
            )
    except Exception as error:  # a compiler's complaints have many classes
        raise PackageError(
            f"{file.stem} does not compile: {str(error).splitlines()[0][:300]}"
        ) from error


def _step_constants(exported: ExportedProgram, file: Path) -> dict[str, Tensor]:
    """The tensors that a compiled step reads, under the names it knows them by."""
    tensors = {**exported.state_dict, **exported.constants}
    names: list[str] = torch._inductor.aoti_load_package(str(file)).get_constant_fqns()
    return {name: tensors[name].detach() for name in names}


def _unshare_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies where two names share memory, which safetensors does not store."""
    pointers: set[int] = set()
    unshared = {}
    for name, tensor in weights.items():
        fresh = tensor.contiguous().cpu()
        if fresh.data_ptr() in pointers:
            unshared[name] = fresh.clone()
        else:
            unshared[name] = fresh
        pointers.add(fresh.data_ptr())
    return unshared


def _largest_difference(model: nn.Module, packaged: PackagedModel) -> float:
    """Largest difference of the logits of a prompt and a next token, relative where above one.

    In 16 bits, compiled and eager code round at other places, and neither is the truth: then the
    compiled steps must come as close to the same weights in float32 as the model itself does,
    within twice its distance.

    Raises:
        PackageError: they differ by more.
    """
    facts = packaged.facts
    count = min(9, facts.length)
    spread = torch.arange(facts.batch * count).reshape(facts.batch, count)
    ids = (spread * 7919 % facts.vocabulary).to(facts.device)
    compiled = torch.stack([packaged.prefill(ids[:, :-1]), packaged.decode(ids[:, -1:])], 1).float()
    eager = model(input_ids=ids).logits[:, -2:].float()
    gap = _relative_difference(compiled, eager)
    allowed = TOLERANCE[torch.float32]
    if _parse_dtype(facts.dtype).itemsize == 2:
        with widen_model(model):
            exact = model(input_ids=ids).logits[:, -2:].float()
        gap = _relative_difference(compiled, exact)
        allowed = 2 * _relative_difference(eager, exact) + TOLERANCE[torch.float32]
    if not gap <= allowed:
        raise PackageError(
            f"the compiled steps differ by {gap:.3g}, where {allowed:.3g} is allowed: nothing "
            "was written"
        )
    return gap


def _relative_difference(outputs: Tensor, wanted: Tensor) -> float:
    return float((outputs - wanted).abs().max() / wanted.abs().max().clamp_min(1))


@contextmanager
def widen_model(model: nn.Module) -> Iterator[None]:
    """The model with its 16-bit tensors in float32 while the block runs; the very same tensors come
    back.

    Args:
        model: changed in place, and back.
    """
    tensors: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.itemsize == 2:
            tensors[id(tensor)] = tensor
    narrow = {key: tensor.data for key, tensor in tensors.items()}
    scales = set()
    for _, module in iterate_packed_modules(model):
        if isinstance(module, PackedLinear) and module.scale is not None:
            scales.add(id(module.scale))
    try:
        for key, tensor in tensors.items():
            if key not in scales:
                tensor.data = narrow[key].float()
        yield
    finally:
        for key, tensor in tensors.items():
            tensor.data = narrow[key]


def _parse_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype

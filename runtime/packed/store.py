"""Carrying a plan out: weights packed once, kept beside the stock checkpoint, and put into the
stock model on loading.

Dims: N outputs, K inputs.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.graph.errors import ArtifactError, SecateurError
from secateur.graph.program import JSON, Program
from secateur.graph.reading import read_json_object, reason_of
from secateur.kernels.sparse24 import StackedPart, formats
from secateur.kernels.sparse24.backends import backend_report
from secateur.kernels.sparse24.module import NAMES, PackedLinear
from secateur.kernels.sparse24.ops import op_of
from secateur.passes.lowering.cost import DENSE
from secateur.passes.lowering.lower import (
    DTYPES,
    LayerPlan,
    Lowering,
    bits_of,
    last_lowering,
    plan_as_pruned,
)
from secateur.passes.solvers.integer_grid import Grid, find_grid, grid_of
from secateur.runtime.open.finite import check_finite
from secateur.runtime.open.source import open_model
from secateur.runtime.packed.weights import (
    BESIDE,
    PackedLayer,
    iterate_packed_modules,
    stack_layers,
)

log = logging.getLogger(__name__)

FOLDER = "packed"
WEIGHTS = "weights.safetensors"
PLAN = "plan.json"
VERSION = 1
KIND_OF_BITS = {8: "int8", 4: "int4"}


@dataclass(frozen=True)
class LayerReport:
    """What a layer of a loaded model runs on.

    backend: which kernel serves it.
    reason: why this form, or why it stays dense.
    bytes: of its packed weight, and of the dense one in the model's dtype.
    """

    layer: str
    kind: str
    op: str
    backend: str
    reason: str
    bytes: int
    dense_bytes: int


# Packing
def pack_weight(row: LayerPlan, weight_NK: Tensor, dtype: torch.dtype) -> PackedLayer:
    """A weight in the form that a plan wants, proved to be the same numbers.

    Args:
        row: the plan of the layer.
        weight_NK: [N, K], in any float dtype.
        dtype: of the values of forms without integers.

    Raises:
        ArtifactError: not 2:4, or not on an integer grid, any more: a pass after ``lower`` changed
            it.
    """
    bits = bits_of(row)
    if bits is None:
        grid = None
    elif row.rounds:
        grid = grid_of(weight_NK, bits)
    else:
        grid = find_grid(weight_NK)
    lost_grid = bits is not None and (grid is None or grid.bits != bits)
    if lost_grid or tuple(weight_NK.shape) != row.shape:
        raise ArtifactError(
            f"{row.layer} was planned as {row.kind} {list(row.shape)} and has changed: put "
            "lower last"
        )
    try:
        tensors = _pack_tensors(row.kind, weight_NK, grid, dtype)
    except formats.FormatError as error:
        raise ArtifactError(
            f"{row.layer} was planned as {row.kind}: {error}; put lower last"
        ) from error
    if not row.rounds and not _is_unpacked(row, tensors, weight_NK.to(dtype)):
        raise ArtifactError(
            f"{row.layer}: the packed weight is not the weight; this is a fault of secateur"
        )
    return PackedLayer(row.layer.removesuffix(".weight"), row.kind, row.shape, tensors)


def _is_unpacked(row: LayerPlan, tensors: Mapping[str, Tensor], weight_NK: Tensor) -> bool:
    unpacked = unpack_weight(row.kind, row.shape, tensors, weight_NK.dtype)
    return torch.equal(unpacked, weight_NK)


def _pack_tensors(
    kind: str, weight_NK: Tensor, grid: Grid | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    sparse = kind.startswith("2:4")
    columns = weight_NK.shape[1]
    if grid is None:
        return formats.pack(weight_NK.to(dtype)).to_tensors()
    name = KIND_OF_BITS[grid.bits]
    codes = grid.to_codes(weight_NK)
    scale = grid.scale_NG
    if grid.bits == 8:
        scale = grid.scale_NG[:, 0]
    scale = scale.to(formats.SCALE_DTYPE[name]).contiguous()
    if sparse:
        return formats.pack(codes, name, scale).to_tensors()
    codes = nn.functional.pad(codes, (0, formats.count_stored_columns(columns) - columns))
    if grid.bits == 4:
        values = formats.pack_nibbles(codes)
    else:
        values = codes.contiguous()
    return {"values": values, "scale": scale}


def unpack_weight(
    kind: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """The dense weight [N, K] of packed tensors.

    Args:
        kind: the packed form.
        shape: (N, K).
        tensors: values, and mask and scale where the form has them.
        dtype: of the result.
    """
    weight: Tensor = torch.ops.secateur.weight_24(
        tensors["values"], tensors.get("mask"), tensors.get("scale"), dtype
    )
    return weight[:, : shape[1]]


def pack_layers(
    program: Program, plan: Lowering, holder: nn.Module
) -> tuple[list[PackedLayer], Lowering]:
    """The packed weights of a program, under the names of the stock model that holds its
    parameters, and the plan that
    could be carried out: a layer that no ``nn.Linear`` holds stays dense, with the reason.

    Args:
        program: with weights.
        plan: as ``lower`` chose.
        holder: the stock model over the program's parameters.

    Returns:
        The packed layers, and the plan that was carried out.
    """
    parameters = dict(program.named_parameters())
    owners = {}
    for name, module in holder.named_modules():
        if type(module) is nn.Linear:
            owners[id(module.weight)] = name
    packed = list[PackedLayer]()
    rows = list[LayerPlan]()
    renamed = dict[str, str]()
    for row in plan.layers:
        owner = owners.get(id(parameters.get(row.layer)))
        if row.kind != DENSE and owner is None:
            why = f"no nn.Linear of {type(holder).__name__} holds it"
            row = replace(
                row, kind=DENSE, bytes=row.dense_bytes, ms=row.dense_ms, shares="", reason=why
            )
        if owner is not None:
            renamed[row.layer] = f"{owner}.weight"
            weight = parameters[row.layer].detach()
            row = replace(row, layer=renamed[row.layer])
            if row.kind != DENSE:
                packed.append(pack_weight(row, weight, DTYPES[plan.dtype]))
        rows.append(row)
    shared = tuple(replace(row, shares=renamed.get(row.shares, "")) for row in rows)
    return packed, replace(plan, layers=shared)


# The side file
def write_packed(program: Program, holder: nn.Module, folder: Path) -> JSON:
    """Write packed weights into ``folder/packed``: as the last ``lower`` chose, or else all that a
    pass made 2:4.

    Args:
        program: with weights.
        folder: of the checkpoint.
        holder: the stock model over the program's parameters.

    Returns:
        Figures: layers by kind, bytes packed and dense; empty where nothing was packed.
    """
    plan = last_lowering(program.history) or plan_as_pruned(program)
    if not plan.packed_layers:
        return {}
    layers, done = pack_layers(program, plan, holder)
    write_layers(layers, done, folder / FOLDER)
    return {
        "kinds": dict(Counter(row.kind for row in done.layers)),
        "bytes": sum(layer.count_bytes for layer in layers),
        "dense_bytes": sum(row.dense_bytes for row in done.packed_layers),
    }


def write_layers(layers: Iterable[PackedLayer], plan: Lowering, folder: Path) -> None:
    """The packed tensors as safetensors, and the plan as JSON.

    Args:
        layers: the packed weights.
        plan: of all layers.
        folder: to be made.
    """
    folder.mkdir()
    tensors = dict[str, Tensor]()
    for layer in layers:
        for part, tensor in layer.tensors.items():
            tensors[f"{layer.name}.{part}"] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS)
    content = json.dumps({"version": VERSION, **plan.to_json()}, indent=1)
    (folder / PLAN).write_text(content + "\n", "utf-8")


def read_layers(folder: Path) -> tuple[list[PackedLayer], Lowering]:
    """What ``write_layers`` wrote, checked.

    Args:
        folder: as ``write_layers`` made it.

    Raises:
        ArtifactError: damaged, of another version, or tensors that do not fit the plan.
    """
    plan = read_plan(folder)
    return [layer for _, layer in load_layers(folder, plan)], plan


def load_layers(folder: Path, plan: Lowering) -> Iterator[tuple[LayerPlan, PackedLayer]]:
    """The packed weights of a plan, one after another, checked.

    Args:
        folder: as ``write_layers`` made it.
        plan: that is kept there.

    Raises:
        ArtifactError: damaged, or tensors that do not fit the plan.
    """
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            names = set(file.keys())
            for row in plan.packed_layers:
                tensors = {n: file.get_tensor(n) for n in _tensor_names(row) if n in names}
                layer = _check_layer(row, tensors)
                check_finite(tensors.items(), folder, ArtifactError)
                yield row, layer
    except ArtifactError:
        raise
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ArtifactError(
            f"{folder} is damaged ({reason_of(error)}): save the model again"
        ) from error


def read_plan(folder: Path) -> Lowering:
    """The plan that ``write_layers`` wrote.

    Args:
        folder: as ``write_layers`` made it.

    Raises:
        ArtifactError: damaged, or of another version.
    """
    file = folder / PLAN
    try:
        value = read_json_object(file, ArtifactError)
        if value["version"] != VERSION:
            raise ArtifactError(
                f"{file} has version {value['version']}, expected {VERSION}: save the model again"
            )
        return Lowering.from_json(value)
    except SecateurError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{file} is damaged ({reason_of(error)}): save the model again"
        ) from error


def _tensor_names(row: LayerPlan) -> list[str]:
    return [f"{row.layer.removesuffix('.weight')}.{name}" for name in NAMES]


def _check_layer(row: LayerPlan, tensors: Mapping[str, Tensor]) -> PackedLayer:
    name = row.layer.removesuffix(".weight")
    bits = bits_of(row)
    parts = {}
    for part in NAMES:
        if f"{name}.{part}" in tensors:
            parts[part] = tensors[f"{name}.{part}"]
    if row.kind.startswith("2:4"):
        if bits:
            kind = KIND_OF_BITS[bits]
        else:
            kind = str(parts["values"].dtype).removeprefix("torch.")
        formats.Packed24.from_tensors(parts, kind, row.shape)
    elif unpack_weight(row.kind, row.shape, parts, torch.float32).shape != row.shape:
        raise ValueError(f"{name} is not [{row.shape[0]}, {row.shape[1]}]")
    return PackedLayer(name, row.kind, row.shape, parts)


# The model that runs
def lower_model(model: nn.Module, layers: Iterable[PackedLayer], plan: Lowering) -> None:
    """Put packed weights where a stock model's linear layers stand; layers that share an input
    become one product.

    Args:
        model: to be changed.
        layers: packed weights by the names of its modules.
        plan: which layers share an input.

    Raises:
        ArtifactError: the model has no such layer, or one of another shape.
    """
    groups: dict[str, list[PackedLayer]] = {}
    shares = {row.layer.removesuffix(".weight"): row.shares for row in plan.packed_layers}
    for layer in layers:
        groups.setdefault(shares[layer.name] or layer.name, []).append(layer)
    for group in groups.values():
        linears = [_find_linear(model, layer) for layer in group]
        device = linears[0].weight.device
        modules = stack_layers(group, [linear.bias for linear in linears])
        for layer, module in zip(group, modules, strict=True):
            path, _, leaf = layer.name.rpartition(".")
            setattr(model.get_submodule(path), leaf, module.to(device))
    log.info(
        "%d linear layers run packed, as %d products", sum(map(len, groups.values())), len(groups)
    )


def _find_linear(model: nn.Module, layer: PackedLayer) -> nn.Linear:
    try:
        module = model.get_submodule(layer.name)
    except AttributeError:
        module = None
    if type(module) is not nn.Linear or tuple(module.weight.shape) != layer.shape:
        raise ArtifactError(
            f"the model has no linear layer {layer.name} of shape {list(layer.shape)}: save "
            "it again"
        )
    return module


def load_lowered(folder: Path) -> PreTrainedModel:
    """The stock model of a folder on the packed weights beside it, in the dtype of its plan.

    Args:
        folder: of a checkpoint with packed weights beside it.

    Raises:
        ArtifactError: damaged, or weights that do not fit the model.
        SourceError: its checkpoint is not sound.
    """
    layers, plan = read_layers(folder / FOLDER)
    model = open_model(folder, dtype=DTYPES[plan.dtype])
    lower_model(model, layers, plan)
    return model


def has_packed(folder: Path) -> bool:
    """Whether packed weights lie beside a checkpoint."""
    return (folder / FOLDER / PLAN).is_file()


def runs_packed(folder: Path, asked: bool | None) -> bool:
    """Whether a folder's model is to run on its packed weights.

    Args:
        folder: of a checkpoint.
        asked: None means as a ``lower`` pass chose, and dense where none did.

    Raises:
        ArtifactError: they are asked for and are not there, or their plan is damaged.
    """
    if asked and not has_packed(folder):
        raise ArtifactError(
            f"{folder} has no packed weights: save a model whose weights are 2:4, or lowered"
        )
    if not has_packed(folder):
        return False
    if asked is None:
        return read_plan(folder / FOLDER).chosen
    return asked


def running(model: nn.Module, plan: Lowering | None = None) -> list[LayerReport]:
    """What each linear layer of a model runs on, dense ones too: nothing falls back unseen.

    Args:
        model: stock, packed or not.
        plan: where the reasons are; without it they are empty.
    """
    reasons = dict[str, str]()
    if plan:
        reasons = {row.layer.removesuffix(".weight"): row.reason for row in plan.layers}
    reports = list[LayerReport]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            size = module.weight.nbytes
            reason = reasons.get(name, "")
            reports.append(LayerReport(name, DENSE, "aten::linear", "torch", reason, size, size))
    for path, module in iterate_packed_modules(model):
        name = path.removesuffix(f".{BESIDE}")
        reports.append(_report_layer(name, module, reasons.get(name, "")))
    return reports


def _report_layer(name: str, module: PackedLinear | StackedPart, reason: str) -> LayerReport:
    if isinstance(module, PackedLinear):
        first = module
    else:
        first = module.first[0]
    share = module.out_features / sum(first.sizes)
    op = op_name(first)
    width = 2
    if first.bias is not None:
        width = first.bias.dtype.itemsize
    elif first.values.is_floating_point() and not first.order:
        width = first.values.dtype.itemsize
    dense = module.out_features * module.in_features * width
    return LayerReport(
        name,
        module.kind,
        f"secateur::{op}",
        backend_of(first),
        reason,
        round(first.nbytes * share),
        dense,
    )


def op_name(module: PackedLinear) -> str:
    """The op that a module calls."""
    if module.order:
        return "linear_24_fragment"
    quantized = {torch.int8: "int8", torch.uint8: "int4"}.get(module.values.dtype, "float32")
    return op_of(quantized, module.mask is not None)


def backend_of(module: PackedLinear) -> str:
    """Which kernel serves a module's op where its tensors are, and why not a faster one."""
    op = op_name(module)
    device = module.values.device.type
    for row in backend_report():
        if (row.device, row.op) == (device, op):
            if row.backend != "reference":
                return row.backend
            return f"reference: {row.reason}"
    return "reference"


def as_json(rows: Iterable[LayerReport]) -> list[JSON]:
    """A report as JSON."""
    return [asdict(row) for row in rows]

"""What a server's linear layer becomes: packed, if its plan and its numbers say so; dense
otherwise, with the reason.

It knows no server: an adapter gives it a weight as the server loaded it (rows of several layers
stacked, perhaps a shard of them) and the names of the layers in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.graph.errors import ArtifactError
from secateur.graph.program import JSON
from secateur.kernels.sparse24 import PackedLinear
from secateur.passes.lowering.cost import DENSE, KINDS, weight_bytes
from secateur.passes.lowering.layers import not_24
from secateur.passes.lowering.lower import DTYPES, LayerPlan, Lower, Lowering
from secateur.passes.solvers.integer_grid import find_grid
from secateur.runtime.packed.store import pack_weight


def plan_of_manifest(manifest: JSON) -> Lowering:
    """The plan that the last ``lower`` of an artifact left in its manifest.

    Args:
        manifest: as JSON.

    Raises:
        ArtifactError: the artifact was never lowered.
    """
    plans = []
    for step in manifest.get("history", ()):
        if step["name"] == Lower.name:
            plans.append(step["figures"]["plan"])
    if not plans:
        raise ArtifactError(
            "the model was not lowered: put the pass lower last when compressing it"
        )
    return Lowering.from_json(plans[-1])


def find_planned_kind(plan: Lowering, names: Sequence[str]) -> tuple[str, str]:
    """(form, reason) for a weight that stacks the rows of some layers: theirs, if it is one and the
    same.

    Args:
        plan: of the artifact.
        names: of the layers whose rows are stacked.
    """
    known = {row.layer.removesuffix(".weight"): row for row in plan.layers}
    missing = [name for name in names if name not in known]
    if missing:
        return DENSE, f"the plan has no {missing[0]}"
    kinds = {known[name].kind: known[name].reason for name in names}
    if len(kinds) > 1:
        return DENSE, f"stacked layers were planned as {', '.join(sorted(kinds))}"
    return next(iter(kinds.items()))


def make_packed_linear(kind: str, name: str, weight_NK: Tensor) -> tuple[PackedLinear | None, str]:
    """The packed form of a loaded weight, or None and the reason why its numbers do not allow it.

    A shard along the inputs may cut groups of scales, and a cast may have moved numbers off their
    grid: then the layer stays dense, which is right whatever its numbers are.

    Args:
        kind: the planned form.
        name: of the layer, for messages.
        weight_NK: as the server loaded it.
    """
    dtype = weight_NK.dtype
    shape = (weight_NK.shape[0], weight_NK.shape[1])
    if kind not in KINDS or dtype not in DTYPES.values():
        return None, f"{kind} in {dtype} is no packed form"
    if kind.startswith("2:4") and (why := not_24(weight_NK)):
        return None, f"not 2:4 as loaded: {why}"
    if "int" in kind and (grid := find_grid(weight_NK)) is None:
        return (
            None,
            "not on its integer grid as loaded (a shard that cuts groups of 128 inputs, or a cast)",
        )
    if "int" in kind and grid is not None and f"int{grid.bits}" not in kind:
        return None, f"on a grid of {grid.bits} bits as loaded"
    dense = weight_bytes(DENSE, *shape, dtype)
    row = LayerPlan(
        f"{name}.weight", kind, shape, weight_bytes(kind, *shape, dtype), dense, 0.0, 0.0, False, ""
    )
    layer = pack_weight(row, weight_NK, dtype)
    return PackedLinear(kind, shape[1], layer.tensors, None, [shape[0]]).to(weight_NK.device), ""


def multiply_packed(module: PackedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight^T + bias`` of a packed weight, the bias held by the server.

    Args:
        module: holds the packed weight [N, K].
        x: [..., K].
        bias: [N], or None.

    Returns:
        [..., N].
    """
    product: Tensor = module(x)
    if bias is None:
        return product
    return product + bias


def warm_up(
    module: PackedLinear, dtype: torch.dtype, batches: Sequence[int] = (1, 16, 256)
) -> None:
    """Run a product of each batch once, so that no kernel is compiled or tested while a CUDA graph
    is captured.

    Args:
        module: of a packed weight.
        dtype: of its input.
        batches: rows of the input.
    """
    for batch in batches:
        module(torch.zeros(batch, module.in_features, dtype=dtype, device=module.values.device))

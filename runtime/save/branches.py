"""Models whose sparse weights have dense branches beside them: raised, kept and opened.

No stock class has a place for a branch.  What is kept is a folder with the stock checkpoint of all
else in ``base``, exactly as sparse as it is, and the branches beside it in the format of a PEFT
adapter (what sums inputs is ``lora_A``, what is made of the sums is ``lora_B``, scale 1): ``load``
opens both, on packed weights or not, and so does PEFT, over
``base``.  The folder itself is no stock model, so that nobody opens half of it unawares.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from secateur.graph.errors import ArtifactError
from secateur.graph.program import JSON, Program
from secateur.graph.reading import reading
from secateur.kernels.sparse24 import PackedLinear, StackedPart
from secateur.passes.sparsity.boost import branch_parameters, remove_branches
from secateur.runtime.open.checkpoint import read_header
from secateur.runtime.open.finite import check_finite
from secateur.runtime.open.source import open_model
from secateur.runtime.packed.store import load_lowered, runs_packed

if TYPE_CHECKING:
    from secateur.runtime.save.stock_checkpoint import SaveReport

BASE = "base"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


class BranchedLinear(nn.Linear):
    """y = x W^T + b + (x A^T) B^T.

    boost_in: A [R, K].
    boost_out: B [N, R].
    """

    boost_in: nn.Parameter
    boost_out: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer with its branch.

        Args:
            input: [..., K].

        Returns:
            [..., N].
        """
        branch = F.linear(F.linear(input, self.boost_in), self.boost_out)
        return F.linear(input, self.weight, self.bias) + branch


class BranchedPacked(nn.Module):
    """The same beside a packed weight.

    packed: gives x W^T + b.
    boost_in: A [R, K].
    boost_out: B [N, R].
    """

    def __init__(
        self, packed: PackedLinear | StackedPart, a: nn.Parameter, b: nn.Parameter
    ) -> None:
        super().__init__()
        self.packed = packed
        self.boost_in = a
        self.boost_out = b

    def forward(self, input: Tensor) -> Tensor:
        """Compute the packed layer with its branch.

        Args:
            input: [..., K].

        Returns:
            [..., N].
        """
        output: Tensor = self.packed(input)
        return output + F.linear(F.linear(input, self.boost_in), self.boost_out)


def attach_branches(
    model: nn.Module, branches: Mapping[str, tuple[nn.Parameter, nn.Parameter]]
) -> None:
    """Give linear modules of a model their branches, in place.

    Args:
        model: to be changed.
        branches: (A [R, K], B [N, R]) by the module's path.

    Raises:
        ArtifactError: a path leads to no plain or packed linear module, or shapes do not fit.
    """
    for path, (a, b) in branches.items():
        module = model.get_submodule(path)
        if not _has_place(module, a, b):
            raise ArtifactError(
                f"{path} has no place for a branch of {list(a.shape)} and {list(b.shape)}"
            )
        if isinstance(module, PackedLinear | StackedPart):
            owner, _, name = path.rpartition(".")
            frozen_a = nn.Parameter(a.detach(), requires_grad=False)
            frozen_b = nn.Parameter(b.detach(), requires_grad=False)
            branched = BranchedPacked(module, frozen_a, frozen_b)
            setattr(model.get_submodule(owner), name, branched)
        else:
            module.__class__ = BranchedLinear
            module.boost_in = a
            module.boost_out = b


def _has_place(module: nn.Module, a: Tensor, b: Tensor) -> bool:
    """Whether a module is a plain or packed linear one of the shapes of a branch."""
    if not isinstance(module, PackedLinear | StackedPart) and type(module) is not nn.Linear:
        return False
    sizes = (module.out_features, module.in_features)
    return (b.shape[0], a.shape[1]) == sizes and len(a) == b.shape[1]


def branches_of(program: Program, model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """The branches of a program by the paths of modules in the model that holds its other
    Parameters."""
    parameters = dict(program.named_parameters())
    paths = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            paths[id(module.weight)] = path
    branches = {}
    for name, (a, b) in sorted(branch_parameters(program).items()):
        branches[paths[id(parameters[name])]] = (parameters[a], parameters[b])
    return branches


def is_branched(folder: Path) -> bool:
    """Whether a folder was written by ``save_branched``."""
    return (folder / CONFIG).is_file() and (folder / BASE / "config.json").is_file()


def checkpoint_in(folder: Path) -> Path:
    """Where the stock checkpoint of a folder is: in ``base`` where there are branches beside it."""
    if is_branched(folder):
        return folder / BASE
    return folder


def load_branched(
    folder: Path,
    *,
    packed: bool | None = False,
    dtype: str | torch.dtype = "auto",
    weights: bool = True,
) -> PreTrainedModel:
    """The model of a folder with its branches, in eval mode.

    Args:
        folder: written by ``save_branched``.
        packed: run on packed weights; None does if ``lower`` chose so.
        dtype: of a model on stock weights; "auto" keeps the stored one.
        weights: False builds it on the meta device.

    Raises:
        ArtifactError: branches do not fit.
        SourceError: the checkpoint is not sound.
    """
    base = folder / BASE
    if runs_packed(base, packed):
        model = load_lowered(base)
    else:
        model = open_model(base, dtype=dtype, weights=weights)
    stored: dict[str, dict[str, Tensor]] = {}
    read_header(folder / WEIGHTS)
    with reading(folder / WEIGHTS, ArtifactError, "Save the model again"):
        for key, value in load_file(folder / WEIGHTS).items():
            path, kind = key.removeprefix(PREFIX).removesuffix(".weight").rsplit(".", 1)
            check_finite([(key, value)], folder / WEIGHTS, ArtifactError)
            stored.setdefault(path, {})[kind] = value.to(model.device, model.dtype)
        branches = {}
        for path, pair in stored.items():
            branches[path] = (nn.Parameter(pair["lora_A"]), nn.Parameter(pair["lora_B"]))
        attach_branches(model, branches)
    model.eval()
    return model


def open_with_branches(
    path_or_id: str | Path, *, dtype: str | torch.dtype = "auto", weights: bool = True
) -> PreTrainedModel:
    """``open_model``, for folders with branches as well."""
    folder = Path(path_or_id).expanduser()
    if is_branched(folder):
        return load_branched(folder, dtype=dtype, weights=weights)
    return open_model(path_or_id, dtype=dtype, weights=weights)


def write_branches(branches: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> None:
    """Branches as a PEFT adapter of the model in ``base``."""
    tensors = {}
    ranks = {}
    for path, (a, b) in branches.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.detach().cpu().contiguous().clone()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.detach().cpu().contiguous().clone()
        ranks[path] = len(a)
    save_file(tensors, folder / WEIGHTS)
    most = max(ranks.values())
    config: JSON = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": f"./{BASE}",
        "inference_mode": True,
        "bias": "none",
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "target_modules": sorted(branches),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def save_branched(
    program: Program,
    path: Path,
    *,
    overwrite: bool,
    check: bool,
    packed: bool,
    figures: Mapping[str, object] | None,
) -> SaveReport:
    """``save`` for a program with branches; see the head of this file.  What was written is opened
    and compared."""
    from secateur.runtime.save import stock_checkpoint
    from secateur.runtime.save.artifact import read_manifest, write_artifact
    from secateur.runtime.stock import to_transformers as stock

    started = time.perf_counter()
    plain = remove_branches(program)
    needed = program.num_bytes + 2 * stock_checkpoint.SPARE_BYTES
    with write_artifact(
        path, needed_bytes=needed, overwrite=overwrite, inputs=[program.source.folder]
    ) as draft:
        report = stock_checkpoint.save(plain, draft.folder / BASE, check=check, packed=packed)
        raised = stock.to_transformers_with_plan(plain)
        write_branches(branches_of(program, raised.model), draft.folder)
        gap = gap_to(program, load_branched(draft.folder))
        if not gap <= stock.accepted_difference(program):
            raise ArtifactError(
                f"the saved model with its branches is not the program: outputs differ by {gap:g}"
            )
        draft.history = stock.as_history(program)
        draft.figures = {
            "num_parameters": program.num_parameters,
            "difference": gap,
            "reload": dict(report.reload),
        }
        draft.figures |= {"branches": len(branch_parameters(program)), **dict(figures or {})}
    return replace(
        report,
        path=path,
        num_bytes=read_manifest(path).num_bytes,
        num_parameters=program.num_parameters,
        difference=gap,
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def gap_to(program: Program, model: nn.Module) -> float:
    """Largest difference of a model's outputs to the program's, relative where above one."""
    from secateur.runtime.stock.to_transformers import (
        comparable_outputs,
        largest_difference,
        probe_inputs,
    )

    inputs = probe_inputs(program)
    expected = comparable_outputs(program(**inputs))
    return largest_difference(expected, comparable_outputs(model(**inputs)))

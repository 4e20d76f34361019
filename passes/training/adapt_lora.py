"""Recovery of a pruned model by low-rank adapters that are merged into its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.graph import Program, coupled_groups
from secateur.graph.errors import PipelineError
from secateur.passes.base import Context, Cost
from secateur.passes.calibration.kl import select_logits
from secateur.passes.sparsity.boost import branch_parameters
from secateur.passes.training.distill import JSON, Distill, PreparedModel, Share
from secateur.passes.training.masks.choice import bake_mask, start_mask
from secateur.passes.training.masks.masked import SUFFIX
from secateur.passes.training.run import make_probe
from secateur.passes.training.text import TrainingText

MERGED = 1e-3  # of the largest logit: more between adapted and merged model is no rounding


@dataclass(frozen=True)
class AdaptLora(Distill):
    """Train low-rank adapters of all projections, then merge them.  Numerics: lossy.

    Every linear module that holds a weight which produces or consumes a coupled group gets W +
    (alpha / rank) B A; only A and B are trained, with cross entropy on the text or, by ``kl``, on
    what the dense model says.  The merged model has the shapes it had, so it is saved like any
    other.  A sparse weight gets m (W + (alpha / rank) B A) from the first step on, so that what is
    trained is what is merged: exactly as sparse as it was.

    kl, ce: weights of the KL to the teacher and of the cross entropy of the text.
    rank, alpha, dropout: of the adapters; dropout is that of their input while they are trained.

    Source:
        Hu et al. 2021 (LoRA), arXiv:2106.09685, section 4.1; the defaults are those of Ma et al.
        2023 (LLM-Pruner), arXiv:2305.11627: rank 8, alpha 16, dropout 0.05, learning rate 1e-4, all
        projections.
    """

    name: ClassVar[str] = "adapt-lora"
    packages: ClassVar[Mapping[str, str]] = {
        "peft": "pip install 'secateur[train]'",
        **Distill.packages,
    }
    bars: ClassVar[Mapping[str, str]] = {}

    lr: Annotated[float, Field(gt=0)] = 1e-4
    kl: Share = 0.0
    ce: Share = 1.0
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05

    @property
    def cost(self) -> Cost:
        """Of the moments of adapters alone; activations are those of full training."""
        return Cost(3.0, 4.0, tokens=self.tokens)

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run: those of distillation, and branches beside
        weights.
        """
        beside = [
            "sparse weights have branches (boost), and adapters have no place beside them"
        ] * bool(branch_parameters(program))
        return super().requires(program) + beside

    def _prepare_model(
        self, model: nn.Module, student: Program, stays: bool, text: TrainingText, context: Context
    ) -> PreparedModel:
        """Put adapters into the projections; finishing merges them.

        Raises:
            PipelineError: no stock model, no projection, or peft is missing.
        """
        if stays:
            raise PipelineError(
                "adapt-lora: adapters go into linear modules, and no stock class holds this shape: "
                "prune to a shape "
                "that one holds, or use distill, which can train the graph itself"
            )
        targets = find_projections(model, student)
        if not targets:
            raise PipelineError(
                "adapt-lora: no linear module holds a weight of a coupled group: use distill"
            )
        peft = _import_peft()
        wanted = {}
        for name, parameter in student.named_parameters():
            wanted[name] = parameter.requires_grad
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            bias="none",
        )
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)  # of A; B is zero, so the model is what it was
            adapted = peft.get_peft_model(model, config)
        masks = _mask_adapters(model, student, peft.tuners.lora.Linear)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

        def finish_training() -> tuple[Program, JSON]:
            inputs = make_probe(text, model)
            before = _model_logits(model, inputs)
            adapted.merge_and_unload()
            _clear_masked(student, masks)
            gap = (
                before - _model_logits(model, inputs)
            ).abs().max() / before.abs().max().clamp_min(1.0)
            assert gap <= MERGED, f"merging changed the logits by {gap:.3g}"
            for name, parameter in student.named_parameters():
                parameter.requires_grad_(wanted[name])
            metrics = {
                "adapted": len(targets),
                "adapter_parameters": trained,
                "merge_difference": float(gap),
            }
            metrics |= {"under_masks": len(masks)} if masks else {}
            return student, metrics

        return PreparedModel(finish_training)


def find_projections(model: nn.Module, program: Program) -> list[str]:
    """Paths of the linear modules whose weight produces or consumes a coupled group, but for the
    head.

    Args:
        model: the stock model over the program's own Parameters.
        program: pruned.

    Returns:
        module paths.
    """
    roles = ("produces", "consumes")
    names = set()
    for group in coupled_groups(program):
        for m in group.members:
            if m.role in roles:
                names.add(m.parameter)
    holders = set()
    for name, parameter in program.named_parameters():
        if name in names:
            holders.add(id(parameter))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    projections: list[str] = []
    for path, module in model.named_modules():
        if module is not head and _is_linear(module) and id(module.weight) in holders:
            projections.append(path)
    return projections


def _mask_adapters(model: nn.Module, student: Program, kind: type[nn.Module]) -> dict[str, Tensor]:
    """Put the adapters of sparse weights under those weights' masks, in place.

    Args:
        kind: peft's adapted linear module.

    Returns:
        masks by parameter name.

    Raises:
        PipelineError: a sparse weight has adapters of another kind.
    """

    class UnderMask(kind):  # type: ignore[misc, valid-type]
        """m (W + s B A) x + b.  Dropout falls on the input of the adapters alone."""

        def forward(self, x: Tensor) -> Tensor:
            base = self.get_base_layer()
            (name,) = self.active_adapters
            mask = getattr(self, "weight" + SUFFIX)
            change = (self.lora_B[name].weight @ self.lora_A[name].weight) * self.scaling[name]
            dropout = self.lora_dropout[name]
            if not self.training or isinstance(dropout, nn.Identity):
                return F.linear(x, (base.weight + change) * mask, base.bias)
            return F.linear(x, base.weight, base.bias) + F.linear(dropout(x), change * mask)

    modules = {
        id(parameter): name
        for name, parameter in student.named_parameters()
        if name in student.sparse
    }
    adapters = {}
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        name = modules.get(id(getattr(base, "weight", None)))
        if base is None or name is None:
            continue
        if type(module) is not kind:
            raise PipelineError(
                f"adapt-lora: {name} is sparse, and a {type(base).__name__}: only Linear keeps "
                "its zeros"
            )
        adapters[name] = start_mask(base.weight, student.sparse[name])
        module.__class__ = UnderMask
        module.register_buffer("weight" + SUFFIX, adapters[name].clone())
    return adapters


@torch.no_grad()
def _clear_masked(student: Program, masks: Mapping[str, Tensor]) -> None:
    """Exact zeros wherever a mask has none of a merged weight."""
    for name, parameter in student.named_parameters():
        if name in masks:
            parameter.copy_(bake_mask(parameter, masks[name])[0])


def _is_linear(module: nn.Module) -> bool:
    """Whether adapters can be put into a module."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


@torch.no_grad()
def _model_logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Logits in evaluation mode, float64."""
    return select_logits(model.eval()(**inputs)).double()


def _import_peft() -> Any:
    """The package peft.

    Raises:
        PipelineError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise PipelineError(
            "adapt-lora needs the package peft: pip install 'secateur[train]'"
        ) from error
    return peft

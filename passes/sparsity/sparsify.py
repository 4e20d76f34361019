"""Make weights sparse: n of every m neighbours, or a share of each row.  One shot, layer after
layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field

from secateur.graph import Cut, Pattern, Program, Share, Sparse, parse_pattern, with_parameters
from secateur.graph.errors import PipelineError
from secateur.passes.base import Context, Cost, Pass, PassResult
from secateur.passes.calibration.lockstep import Lockstep, offload_tensor
from secateur.passes.language.options import OptionError
from secateur.passes.language.targets import (
    check_names,
    describe_unmatched,
    matching_names,
    parameter_aliases,
)
from secateur.passes.lowering.layers import (
    Layer,
    linear_layers,
    on_meta,
    parameter_values,
    sharing_input,
)
from secateur.passes.sparsity.budget import Budget, Damage, check_budget, choose_layers
from secateur.passes.sparsity.layer import LayerRecipe, SparseLayer, by_magnitude, sparsify_layers
from secateur.passes.storage.heap import trim_heap
from secateur.passes.storage.journal import Entry, Journal

Names = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    AfterValidator(check_names),
]
SWEEPS = 5
PatternText = Annotated[str, AfterValidator(lambda text: str(parse_pattern(text)))]


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set weights of linear layers to zero in a pattern that hardware can use.  Numerics: lossy.

    In the order of the graph, each weight on the inputs that the already sparse model produces.

    pattern: 2:4 (two of every four neighbouring inputs stay), any other n:m, or a share of zeros in
        each row (50%).
    metric: what stays: sparsegpt, wanda, ria (all three need calibration data) or magnitude.
    update: of sparsegpt: the weights that stay make up for those that go.
    refine: times that every group's choice and values are then made the best they can be by the
        inputs' Gram matrix; where it is not given, 5 with sparsegpt, its update and a pattern n:m,
        else none.
    targets: weights to make sparse: names or parts of names, globs, or re:...; none means every
        linear layer.
    ignore: weights to leave dense, in the same form.
    head: make the layer whose outputs the model returns sparse, too; not where it is tied to the
        embeddings.
    budget: part of these weights' dense bytes (or a number of bytes) that they may take, packed;
        those that are hurt most stay dense.
    damage: how hurt is measured: kl (of the model's predictions with that weight alone sparse) or
        output (the squared change of the layer's outputs, relative).
    damping: added to the diagonal of the Gram matrix, in parts of its mean; grows where it cannot
        be factored.
    block: inputs whose updates of later ones are gathered into one product.  A share of zeros by
        sparsegpt is spread evenly over these blocks, and in each over its rows: every row keeps as
        many.  (The paper ranks the entries of a block over all rows together, so that rows differ;
        a declared share is a promise for each row.)
    keep_removed: remember what was taken out, so that retraining can bring it back; it is never
        saved with a model.
    offload: hold activations and new weights in memory-mapped files.  Pages stay resident while
        memory is free and may be dropped where it is not; what must be held is one sequence and one
        layer.

    Source:
        Frantar & Alistarh 2023 (SparseGPT), arXiv:2301.00774; Sun et al. 2024 (Wanda),
        arXiv:2306.11695; Zhang et al. 2024 (RIA), ICLR 2024; the exact choice in each group is
        ours.
    """

    name: ClassVar[str] = "sparsify"
    numerics: ClassVar[Literal["exact", "close", "lossy"]] = "lossy"
    gives: ClassVar[frozenset[str]] = frozenset({"sparse", "cut"})
    ends: ClassVar[frozenset[str]] = frozenset({"scores"})

    pattern: PatternText = "2:4"
    metric: Literal["sparsegpt", "wanda", "ria", "magnitude"] = "sparsegpt"
    update: bool = True
    refine: Annotated[int, Field(ge=0)] | None = None
    targets: Names = ()
    ignore: Names = ()
    head: bool = False
    budget: Annotated[Budget | None, BeforeValidator(check_budget)] = None
    damage: Damage = "kl"
    damping: Annotated[float, Field(gt=0)] = 0.01
    block: Annotated[int, Field(ge=1)] = 128
    keep_removed: bool = True
    offload: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine and (not self.update or not isinstance(self.kind, Pattern)):
            if not self.update:
                why = "it changes the weights that stay (update=true)"
            else:
                why = "it needs a pattern n:m"
            raise OptionError(f"sparsify: refine={self.refine} cannot be: {why}", option="refine")

    @property
    def kind(self) -> Pattern | Share:
        """The pattern."""
        return parse_pattern(self.pattern)

    @property
    def recipe(self) -> LayerRecipe:
        """How one layer is made sparse."""
        return LayerRecipe(
            self.kind, self.metric, self.update, self.sweeps, self.damping, self.block
        )

    @property
    def sweeps(self) -> int:
        """How often groups are refined."""
        if self.refine is not None:
            return self.refine
        if self.metric == "sparsegpt" and self.update and isinstance(self.kind, Pattern):
            return SWEEPS
        return 0

    @property
    def needs_data(self) -> bool:
        return self.recipe.needs != "nothing" or self.budget is not None

    @property
    def cost(self) -> Cost:
        if self.offload:
            held = 0.0
        elif self.keep_removed:
            held = 8.0
        else:
            held = 4.0
        if not self.needs_data:
            return Cost(0.0, held)
        flops = (
            1.0
            + (1.0 if self.recipe.needs == "gram" else 0.1)
            + (2.0 if self.budget is not None else 0.0)
        )
        return Cost(
            flops,
            held,
            holds=0 if self.offload else 1,
            solves=4 if self.recipe.needs == "gram" else 0,
        )

    def requires(self, program: Program) -> list[str]:
        missing = ["the weights are on the meta device: open the model with weights"] * on_meta(
            program
        )
        return super().requires(program) + missing + self._check_names(program)

    def preview(self, program: Program) -> Program:
        """The Program that says its weights are sparse; under a budget, those that may become so.

        Raises:
            PipelineError: names or widths do not fit.
        """
        if faults := self._check_names(program):
            raise PipelineError(f"sparsify cannot run: {'; '.join(faults)}")
        made = {
            one.parameter: Sparse(self.kind, self.metric) for one in self._choose_layers(program)[0]
        }
        return program.replace(scores={}, sparse=MappingProxyType({**program.sparse, **made}))

    def _check_names(self, program: Program) -> list[str]:
        """What is wrong with the names, and with the weights that they mean."""
        named = []
        for several in parameter_aliases(program).values():
            for alias in several:
                named.append(alias)
        faults = describe_unmatched(self.targets, named, "targets") + describe_unmatched(
            self.ignore, named, "ignore"
        )
        if faults:
            return faults
        chosen, left = self._choose_layers(program)
        if not chosen:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
            return [f"no weight can be made sparse ({reasons})"]
        odd = [
            (one.parameter, reason)
            for one in chosen
            if (reason := self.kind.incompatibility(one.shape[1]))
        ]
        faults = [f"{name} cannot be {self.pattern}: {reason}" for name, reason in odd[:3]]
        faults += (
            ["prune widths to a multiple (round_to), or name such weights in ignore"] if odd else []
        )
        twice = [one.parameter for one in chosen if one.parameter in program.sparse]
        return faults + [f"{name} is sparse already: name it in ignore" for name in twice[:3]]

    def _choose_layers(self, program: Program) -> tuple[list[Layer], dict[str, str]]:
        """The layers that the names mean, in graph order, and why others are left dense."""
        layers, refused = linear_layers(program)
        names = parameter_aliases(program)
        wanted = {
            name
            for name, several in names.items()
            if not self.targets or matching_names(self.targets, several)
        }
        spared = {name for name, several in names.items() if matching_names(self.ignore, several)}
        left = {name: reason for name, reason in refused.items() if name in wanted - spared}
        left |= {
            one.parameter: why
            for one in layers
            if one.parameter in wanted and (why := self._reason_to_keep(one))
        }
        return [one for one in layers if one.parameter in wanted - spared - left.keys()], left

    def _reason_to_keep(self, layer: Layer) -> str:
        """Why a layer stays dense whatever its name; "" where it need not."""
        if layer.looked_up:
            return "it is the table of embeddings, too"
        if layer.head and not self.head:
            return "the model returns its outputs; head=true makes it sparse"
        return ""

    def call(self, program: Program, context: Context) -> PassResult:
        chosen, left = self._choose_layers(program)
        for name, reason in left.items():
            context.log.info("sparsify leaves %s dense: %s", name, reason)
        _warn_of_kernels(chosen, self.kind, context)
        plan: dict[str, Any] = {}
        if self.budget is not None:
            chosen, plan = choose_layers(
                self.budget, self.damage, self.recipe, program, chosen, context
            )
        journal = Journal(context.resume)
        with ExitStack() as stack:
            folder = None
            if self.offload:
                folder = Path(stack.enter_context(TemporaryDirectory(dir=journal.ensure_folder)))
            made = dict(self._sparsify_chosen(program, chosen, context, journal, folder))
            after = self._put_weights(program, made, folder)
        return PassResult(after, bool(made), self._collect_metrics(program, made, left) | plan)

    def _sparsify_chosen(
        self,
        program: Program,
        chosen: list[Layer],
        context: Context,
        journal: Journal,
        folder: Path | None,
    ) -> Iterator[tuple[str, SparseLayer]]:
        """Each weight made sparse, by name."""
        known = parameter_values(program)
        groups = sharing_input(chosen)
        if self.recipe.needs == "nothing":
            for one in context.progress(chosen, "sparsify", len(chosen)):
                solution = by_magnitude(one.parameter, known[one.parameter], self.kind)
                yield (
                    one.parameter,
                    replace(solution, weight=offload_tensor(solution.weight, folder)),
                )
            return
        data = context.data or ()
        run = Lockstep(program, data, folder)
        for sharing in context.progress(groups, "sparsify", len(groups)):
            run.advance_to(sharing[0].node.name)
            found = _load_layers(journal, sharing)
            if found is None:
                named = {one.parameter: known[one.parameter] for one in sharing}
                found = sparsify_layers(self.recipe, named, run, sharing[0].x.name, len(data))
                _store_layers(journal, sharing, found)
            for one in sharing:
                kept = replace(
                    found[one.parameter], weight=offload_tensor(found[one.parameter].weight, folder)
                )
                run.replace_parameter(one.parameter, kept.weight, one.chain)
                yield one.parameter, kept
            trim_heap()

    def _put_weights(
        self, program: Program, made: Mapping[str, SparseLayer], folder: Path | None
    ) -> Program:
        """The Program with the sparse weights."""
        known = parameter_values(program)
        sparse = dict(program.sparse)
        for name, one in made.items():
            removed = None
            if self.keep_removed:
                removed = offload_tensor(torch.where(one.weight == 0, known[name], 0), folder)
            sparse[name] = Sparse(self.kind, self.metric, one.norms, removed)
        after = with_parameters(program, {name: one.weight for name, one in made.items()})
        return after.replace(
            scores={}, sparse=MappingProxyType(sparse), cut=program.cut or Cut(program, {})
        )

    def _collect_metrics(
        self, program: Program, made: Mapping[str, SparseLayer], left: Mapping[str, str]
    ) -> dict[str, Any]:
        known = parameter_values(program)
        zeros = sum(int((one.weight == 0).sum()) for one in made.values())
        total = sum(one.weight.numel() for one in made.values())
        stay = total - zeros
        changed = sum(
            int(((one.weight != 0) & (one.weight != known[name])).sum())
            for name, one in made.items()
        )
        errors = [one.error for one in made.values() if one.error is not None]
        damped = {
            name: one.damping for name, one in made.items() if one.damping > self.damping * 1.001
        }
        found: dict[str, Any] = {
            "layers": len(made),
            "refined": self.sweeps,
            "sparsity": round(zeros / max(1, total), 6),
            "of_all_parameters": round(zeros / program.num_parameters, 6),
            "survivors_changed": round(changed / max(1, stay), 6),
            "left_dense": dict(left),
        }
        if errors:
            found["error"] = round(math.sqrt(sum(e * e for e in errors) / len(errors)), 5)
            found["errors"] = {name: round(one.error or 0.0, 5) for name, one in made.items()}
        return found | ({"more_damping": damped} if damped else {})


def _warn_of_kernels(chosen: list[Layer], kind: Pattern | Share, context: Context) -> None:
    """Tell once of widths that hold the pattern, and that fast kernels do not take."""
    if isinstance(kind, Pattern):
        odd = [one for one in chosen if one.shape[1] % 64]
    else:
        odd = []
    if odd:
        if any(one.shape[1] % 16 for one in odd):
            least = 16
        else:
            least = 64
        first = next(one for one in odd if one.shape[1] % least)
        context.log.warning(
            "sparsify: %d weights have inputs that are no multiple of %d (first: %s, %d): kernels "
            "pad them or run them "
            "dense",
            sum(one.shape[1] % least > 0 for one in odd),
            least,
            first.parameter,
            first.shape[1],
        )


def _journal_key(sharing: list[Layer]) -> str:
    return sharing[0].parameter


def _store_layers(journal: Journal, sharing: list[Layer], found: Mapping[str, SparseLayer]) -> None:
    tensors = {f"weight {one.parameter}": found[one.parameter].weight for one in sharing}
    norms = found[_journal_key(sharing)].norms
    tensors |= {} if norms is None else {"norms": norms}
    facts = {
        one.parameter: [found[one.parameter].error, found[one.parameter].damping] for one in sharing
    }
    journal.write(_journal_key(sharing), tensors, facts)


def _load_layers(journal: Journal, sharing: list[Layer]) -> dict[str, SparseLayer] | None:
    """What a run that was killed had found for these layers."""
    kept: Entry | None = journal.read(_journal_key(sharing))
    if kept is None or set(kept.facts) != {one.parameter for one in sharing}:
        return None
    return {
        name: SparseLayer(kept.tensors[f"weight {name}"], kept.tensors.get("norms"), *numbers)
        for name, numbers in kept.facts.items()
    }

"""One-shot sparsity of linear layers: n of every m neighbours, or a share of each row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field

from secateur.graph import Cut, Pattern, Program, Share, Sparse, parse_pattern, with_parameters
from secateur.graph.errors import PipelineError
from secateur.passes.base import JSON, Context, Cost, Pass, PassResult
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
        """Whether inputs are read: by the metric, or to measure damage under a budget."""
        return self.recipe.needs != "nothing" or self.budget is not None

    @property
    def cost(self) -> Cost:
        """Forward passes and memory by metric, budget and offload, for estimates."""
        if self.offload:
            bytes_per_parameter = 0.0
        elif self.keep_removed:
            bytes_per_parameter = 8.0
        else:
            bytes_per_parameter = 4.0
        keeps = 1.0 if self.keep_removed else 0.0
        if self.offload:
            offloaded = 1.0 + keeps
        else:
            offloaded = 0.0
        if not self.needs_data:
            return Cost(0.0, bytes_per_parameter, files=offloaded, keeps=keeps)
        if self.recipe.needs == "gram":
            flops = 2.0
            solves = 4
        else:
            flops = 1.1
            solves = 0
        if self.budget is not None:
            flops += 2.0
        return Cost(
            flops,
            bytes_per_parameter,
            holds=int(not self.offload),
            solves=solves,
            files=1.0 + offloaded,
            holds_files=int(self.offload),
            keeps=keeps,
        )

    def requires(self, program: Program) -> list[str]:
        """Reasons why the pass cannot run: no weights, or names and widths that do not fit.

        Args:
            program: to be made sparse.
        """
        reasons = super().requires(program)
        if on_meta(program):
            reasons.append("the weights are on the meta device: open the model with weights")
        return reasons + self._check_names(program)

    def preview(self, program: Program) -> Program:
        """The Program that says its weights are sparse; under a budget, those that may become so.

        Args:
            program: to be made sparse.

        Raises:
            PipelineError: names or widths do not fit.
        """
        if faults := self._check_names(program):
            raise PipelineError(f"sparsify cannot run: {'; '.join(faults)}")
        states = {}
        for layer in self._choose_layers(program)[0]:
            states[layer.parameter] = Sparse(self.kind, self.metric)
        return program.replace(scores={}, sparse=MappingProxyType({**program.sparse, **states}))

    def _check_names(self, program: Program) -> list[str]:
        """Faults of the patterns ``targets`` and ``ignore``, and of the weights they match."""
        named = []
        for several in parameter_aliases(program).values():
            named += several
        faults = describe_unmatched(self.targets, named, "targets") + describe_unmatched(
            self.ignore, named, "ignore"
        )
        if faults:
            return faults
        chosen, left_dense = self._choose_layers(program)
        if not chosen:
            reasons = "; ".join(
                f"{name}: {reason}" for name, reason in list(left_dense.items())[:3]
            )
            return [f"no weight can be made sparse ({reasons})"]
        odd = []
        for layer in chosen:
            if reason := self.kind.incompatibility(layer.shape[1]):
                odd.append((layer.parameter, reason))
        faults = [f"{name} cannot be {self.pattern}: {reason}" for name, reason in odd[:3]]
        if odd:
            faults.append("prune widths to a multiple (round_to), or name such weights in ignore")
        twice = []
        for layer in chosen:
            if layer.parameter in program.sparse:
                twice.append(layer.parameter)
        return faults + [f"{name} is sparse already: name it in ignore" for name in twice[:3]]

    def _choose_layers(self, program: Program) -> tuple[list[Layer], dict[str, str]]:
        """The layers that the names mean, in graph order, and why others are left dense."""
        layers, refused = linear_layers(program)
        names = parameter_aliases(program)
        wanted = set()
        for name, several in names.items():
            if not self.targets or matching_names(self.targets, several):
                wanted.add(name)
        spared = set()
        for name, several in names.items():
            if matching_names(self.ignore, several):
                spared.add(name)
        left_dense = {}
        for name, reason in refused.items():
            if name in wanted - spared:
                left_dense[name] = reason
        left_dense |= {
            layer.parameter: why
            for layer in layers
            if layer.parameter in wanted and (why := self._reason_to_keep(layer))
        }
        return [
            layer for layer in layers if layer.parameter in wanted - spared - left_dense.keys()
        ], left_dense

    def _reason_to_keep(self, layer: Layer) -> str:
        """Why a layer stays dense whatever its name; "" where it need not."""
        if layer.looked_up:
            return "it is the table of embeddings, too"
        if layer.head and not self.head:
            return "the model returns its outputs; head=true makes it sparse"
        return ""

    def call(self, program: Program, context: Context) -> PassResult:
        """Choose the layers and make them sparse, in graph order.

        Args:
            program: to be made sparse.
            context: with calibration data, where it is needed.

        Raises:
            EditError: even all weights sparse take more than the budget.
            CalibrationError, PatternError: inputs or weights are not finite.
        """
        chosen, left_dense = self._choose_layers(program)
        for name, reason in left_dense.items():
            context.log.info("sparsify leaves %s dense: %s", name, reason)
        _warn_of_kernels(chosen, self.kind, context)
        plan: JSON = {}
        if self.budget is not None:
            chosen, plan = choose_layers(
                self.budget, self.damage, self.recipe, program, chosen, context
            )
        journal = Journal(context.resume)
        with ExitStack() as stack:
            folder = None
            if self.offload:
                folder = Path(stack.enter_context(TemporaryDirectory(dir=journal.ensure_folder)))
            solutions = dict(self._sparsify_chosen(program, chosen, context, journal, folder))
            after = self._put_weights(program, solutions, folder)
        return PassResult(
            after, bool(solutions), self._collect_metrics(program, solutions, left_dense) | plan
        )

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
            for layer in context.progress(chosen, "sparsify", len(chosen)):
                solution = by_magnitude(layer.parameter, known[layer.parameter], self.kind)
                yield (
                    layer.parameter,
                    replace(solution, weight=offload_tensor(solution.weight, folder)),
                )
            return
        data = context.data or ()
        run = Lockstep(program, data, folder)
        for sharing in context.progress(groups, "sparsify", len(groups)):
            run.advance_to(sharing[0].node.name)
            solutions = _load_layers(journal, sharing)
            if solutions is None:
                named = {}
                for layer in sharing:
                    named[layer.parameter] = known[layer.parameter]
                solutions = sparsify_layers(self.recipe, named, run, sharing[0].x.name, len(data))
                _store_layers(journal, sharing, solutions)
            for layer in sharing:
                stored = replace(
                    solutions[layer.parameter],
                    weight=offload_tensor(solutions[layer.parameter].weight, folder),
                )
                run.replace_parameter(layer.parameter, stored.weight, layer.chain)
                yield layer.parameter, stored
            trim_heap()

    def _put_weights(
        self, program: Program, made: Mapping[str, SparseLayer], folder: Path | None
    ) -> Program:
        """The Program with the sparse weights."""
        known = parameter_values(program)
        sparse = dict(program.sparse)
        for name, solution in made.items():
            removed = None
            if self.keep_removed:
                removed = offload_tensor(torch.where(solution.weight == 0, known[name], 0), folder)
            sparse[name] = Sparse(self.kind, self.metric, solution.norms, removed)
        after = with_parameters(program, {name: solution.weight for name, solution in made.items()})
        return after.replace(
            scores={}, sparse=MappingProxyType(sparse), cut=program.cut or Cut(program, {})
        )

    def _collect_metrics(
        self, program: Program, made: Mapping[str, SparseLayer], left: Mapping[str, str]
    ) -> JSON:
        """Sparsity, errors and dampings for the history."""
        known = parameter_values(program)
        zeros = sum(int((solution.weight == 0).sum()) for solution in made.values())
        total = sum(solution.weight.numel() for solution in made.values())
        stay = total - zeros
        changed = sum(
            int(((solution.weight != 0) & (solution.weight != known[name])).sum())
            for name, solution in made.items()
        )
        errors = []
        for solution in made.values():
            if solution.error is not None:
                errors.append(solution.error)
        damped = {}
        for name, solution in made.items():
            if solution.damping > self.damping * 1.001:
                damped[name] = solution.damping
        metrics: JSON = {
            "layers": len(made),
            "refined": self.sweeps,
            "sparsity": round(zeros / max(1, total), 6),
            "of_all_parameters": round(zeros / program.num_parameters, 6),
            "survivors_changed": round(changed / max(1, stay), 6),
            "left_dense": dict(left),
        }
        if errors:
            metrics["error"] = round(math.sqrt(sum(e * e for e in errors) / len(errors)), 5)
            metrics["errors"] = {
                name: round(solution.error or 0.0, 5) for name, solution in made.items()
            }
        if damped:
            metrics["more_damping"] = damped
        return metrics


def _warn_of_kernels(chosen: list[Layer], kind: Pattern | Share, context: Context) -> None:
    """Warn of widths that fit the pattern but not the alignment of fast kernels."""
    if isinstance(kind, Pattern):
        odd = []
        for layer in chosen:
            if layer.shape[1] % 64:
                odd.append(layer)
    else:
        odd = []
    if odd:
        if any(layer.shape[1] % 16 for layer in odd):
            least = 16
        else:
            least = 64
        first = next(layer for layer in odd if layer.shape[1] % least)
        context.log.warning(
            "sparsify: %d weights have inputs that are no multiple of %d (first: %s, %d): kernels "
            "pad them or run them "
            "dense",
            sum(layer.shape[1] % least > 0 for layer in odd),
            least,
            first.parameter,
            first.shape[1],
        )


def _journal_key(sharing: list[Layer]) -> str:
    """The name of the journal entry of layers that share an input."""
    return sharing[0].parameter


def _store_layers(journal: Journal, sharing: list[Layer], found: Mapping[str, SparseLayer]) -> None:
    """Keep finished layers in the journal."""
    tensors = {}
    for layer in sharing:
        tensors[f"weight {layer.parameter}"] = found[layer.parameter].weight
    norms = found[_journal_key(sharing)].norms
    if norms is not None:
        tensors["norms"] = norms
    facts = {}
    for layer in sharing:
        facts[layer.parameter] = [found[layer.parameter].error, found[layer.parameter].damping]
    journal.write(_journal_key(sharing), tensors, facts)


def _load_layers(journal: Journal, sharing: list[Layer]) -> dict[str, SparseLayer] | None:
    """The finished layers of an interrupted run, or None."""
    entry: Entry | None = journal.read(_journal_key(sharing))
    if entry is None or set(entry.facts) != {layer.parameter for layer in sharing}:
        return None
    layers: dict[str, SparseLayer] = {}
    for name, numbers in entry.facts.items():
        layers[name] = SparseLayer(
            entry.tensors[f"weight {name}"], entry.tensors.get("norms"), *numbers
        )
    return layers

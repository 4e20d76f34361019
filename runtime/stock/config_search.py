"""From the shapes of a pruned model to the configuration of a stock one, without knowing any model.

Which numbers of a configuration have to change, and to what, is found by building the class on the
meta device with a number changed and looking which parameter dims move.  Every plan is proved in
the end: each parameter of the stock class has its name and exactly its shape.  Needs shapes only,
    so it can be asked before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, combinations, product

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from secateur.graph.program import Program
from secateur.runtime.stock.blueprint import (
    COUNT,
    Blueprint,
    Field,
    FieldLine,
    Key,
    Settings,
    Shapes,
    Sizes,
    Slot,
    Value,
    dotted_name,
    sizes_by_slot,
)
from secateur.runtime.stock.constants import Constant, find_changes
from secateur.runtime.stock.incompatibility import UnsupportedConfigError as UnsupportedConfigError
from secateur.runtime.stock.incompatibility import (
    explain_incompatibility,
    pattern_misfit,
    sub_block_misfit,
)
from secateur.runtime.stock.layers import (
    depth_settings,
    depth_thresholds,
    find_broken_settings,
    is_apart,
    layer_facts,
    new_order,
    renumber_names,
)
from secateur.runtime.stock.unseen import check_unseen

MAX_BUILDS = 2000
MAX_DOUBTFUL = 8


@dataclass(frozen=True)
class ConfigPlan:
    """A configuration under which the stock class has exactly the wanted shapes.

    cls, config: the class and its new configuration.
    changes: dotted field -> (value before, value after).
    names: name of each parameter (a tied one: its first) and buffer in the source model -> its name
        in the stock model: layers are numbered anew where some were dropped.
    refused: values that were needed otherwise, and why the class takes them not.
    constants: numbers that the class derives from the configuration and that would change (dotted
        name -> old and new): a plan that has any is doubtful, and only the outputs can tell."""

    cls: type[PreTrainedModel]
    config: PretrainedConfig
    changes: Mapping[str, tuple[object, object]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)


def plan_config(program: Program, shapes: Mapping[str, Sequence[int]] | None = None) -> ConfigPlan:
    """The configuration of the stock model that holds a program, or a planned edit of it.

    Several configurations can give the same shapes (half of the heads, or heads of half the size):
    the first is the one that changes no constant that the class derives (a scale of attention, for
    example), then the one that changes small counts before large ones; `raise_model` decides by the
    outputs.

    Args:
        program: with a stock class.
        shapes: parameter name -> target shape; None takes the program's own.

    Raises:
        UnsupportedConfigError: no configuration fits; says what would make one fit.
    """
    return next(iterate_plans(program, shapes))


def iterate_plans(
    program: Program, shapes: Mapping[str, Sequence[int]] | None = None
) -> Iterator[ConfigPlan]:
    """All configurations that fit, those that change no derived constant before those that do, the
    most likely first. Raises UnsupportedConfigError if there is none."""
    source = program.source
    if source.config is None or not isinstance(source.model, PreTrainedModel):
        raise UnsupportedConfigError(
            f"{type(source.model).__name__} is not a transformers model, so no stock class holds "
            "it: in Python, keep it with save_weights, or use the program itself"
        )
    check_unseen(program)
    first = first_names(source.model)
    wanted = {}
    for name, shape in (shapes or _program_shapes(program)).items():
        wanted[first.get(name, name)] = tuple(shape)
    blueprint = Blueprint(type(source.model), source.config)
    search = ConfigSearch(blueprint, wanted, [name for name, _ in source.model.named_buffers()])
    if lost := search.find_lost(first.get(name, name) for name in _removed_parameters(program)):
        raise UnsupportedConfigError(sub_block_misfit(type(source.model).__name__, lost))
    doubtful: list[ConfigPlan] = []
    has_solution = False
    wrong = dict[str, str]()
    for settings in search.iterate_solutions():
        has_solution = True
        if wrong := search.find_broken_settings(settings):
            continue
        plan = search.make_plan(settings)
        if not plan.constants:
            yield plan
            continue
        doubtful.append(plan)
        if len(doubtful) == MAX_DOUBTFUL:
            yield from doubtful
            doubtful.clear()
    yield from doubtful
    if not has_solution:
        raise UnsupportedConfigError(
            explain_incompatibility(search.blueprint, search.wanted, search.nearest, search.refused)
        )
    if wrong:
        raise UnsupportedConfigError(pattern_misfit(type(source.model).__name__, wrong))


class ConfigSearch:
    """Settings of a blueprint that give the wanted shapes.

    wanted: shapes by the names of the stock class.
    nearest: the settings with the fewest gaps so far.
    refused: values that would have closed a gap, and why the class takes them not.
    """

    def __init__(self, blueprint: Blueprint, shapes: Shapes, buffers: Sequence[str] = ()) -> None:
        self.blueprint = blueprint
        base = blueprint.parameter_shapes({}) or {}
        self.order = new_order(shapes, base)
        self.names = renumber_names([*shapes, *base, *buffers], self.order)
        self.wanted = {self.names[name]: shape for name, shape in shapes.items()}
        # Stacks of which the computation used nothing (another modality's) stay as they are.
        self.apart: dict[str, tuple[int, ...]] = {}
        for name, shape in base.items():
            if is_apart(name, shapes, self.order):
                self.apart[name] = shape
        self.depths = depth_settings(blueprint, shapes, base)
        start = self._with_thresholds(dict(self.depths))
        base = blueprint.parameter_shapes(start) or base
        # Parameters that the computation never used are not in the program; they keep their place.
        self.target = sizes_by_slot({**base, **self.apart, **self.wanted})
        self.passengers = base.keys() - self.wanted.keys()
        self.start: dict[Field, Value] = {**start, **self._explicit_values(start)}
        self.lines: dict[Field, FieldLine] = {}
        for path in self._all_fields():
            if path in start:
                continue
            line = blueprint.field_line(self.start, path)
            if line is not None:
                self.lines[path] = line
        self.nearest: Settings = self.start
        before = self.blueprint.slot_sizes(self.start) or {}
        self.ratios = self._size_ratios(before, self.find_gaps(before))
        self.refused: dict[str, str] = {}
        self.constants = blueprint.derived_constants({})
        self._tried: set[Key] = set()

    def iterate_solutions(self) -> Iterator[Settings]:
        """Proved settings, the most likely first, then those in which numbers that move no shape
        shrink as well."""
        plain = []
        for settings in self._solve_gaps(self.start):
            settings = self._shorten_settings(settings)
            key = tuple(sorted(settings.items(), key=str))
            if key not in self._tried:
                self._tried.add(key)
                plain.append(settings)
                yield settings
        for settings in plain[:3]:
            yield from self._silent_variants(settings)

    def find_lost(self, removed: Iterable[str]) -> list[str]:
        """Removed parameters that the class has all the same, because the rest of their layer
        stays."""
        renamed = {self.names[name] for name in removed if name in self.names}
        return sorted(self.passengers & renamed)

    def find_broken_settings(self, settings: Settings) -> dict[str, str]:
        """Where layers were dropped: settings by which the layers that stay would be of another
        kind."""
        if not self.depths:
            return {}
        before = layer_facts(self.blueprint.build_model({}))
        return find_broken_settings(before, self.blueprint.build_model(settings), self.order)

    def make_plan(self, settings: Settings) -> ConfigPlan:
        """The plan that these settings make."""
        changes: dict[str, tuple[object, object]] = {}
        for path, value in settings.items():
            before = self.blueprint.source_value(path)
            if isinstance(value, tuple):
                after = len(value)
            else:
                after = value
            if before != after:
                changes[dotted_name(path)] = (before, after)
        constants: dict[str, str] = {}
        if changes:
            derived = self.blueprint.derived_constants(settings)
            constants = find_changes(self._renamed_constants(), derived)
        config = self.blueprint.make_config(settings)
        return ConfigPlan(self.blueprint.cls, config, changes, self.names, self.refused, constants)

    def _with_thresholds(self, start: Settings) -> Settings:
        """With the numbers of first layers of another kind lowered where that gives the layers
        their kinds back."""
        unshared = self._count_unshared(start)
        if not unshared:
            return start
        for path, value in depth_thresholds(self.blueprint, self.depths).items():
            lowered = {**start, path: value}
            still_unshared = self._count_unshared(lowered)
            if still_unshared < unshared:
                start = lowered
                unshared = still_unshared
        return start

    def _count_unshared(self, settings: Settings) -> int:
        """How many parameters only one of the class and the program has."""
        shapes = self.blueprint.parameter_shapes(settings) or {}
        return len(shapes.keys() ^ (self.wanted.keys() | self.apart.keys()))

    def _renamed_constants(self) -> dict[str, Constant]:
        """The constants of the source under their new names."""
        names = renumber_names(self.constants, self.order)
        return {new: self.constants[old] for old, new in names.items()}

    def find_gaps(self, sizes: Sizes) -> list[Slot]:
        """Slots that these sizes and the target do not share."""
        slots = self.target.keys() | sizes.keys()
        return [slot for slot in slots if self.target.get(slot) != sizes.get(slot)]

    def _solve_gaps(self, settings: Settings) -> Iterator[Settings]:
        """Depth first: close the gap that the fewest fields can close, by the field of the smallest
        value.  Which field can close which gap is known from the start; how far, is asked again at
        every step."""
        sizes = self.blueprint.slot_sizes(settings)
        if sizes is None or self.blueprint.build_count > MAX_BUILDS:
            return
        gaps = self.find_gaps(sizes)
        self._remember_nearest(settings, len(gaps))
        if not gaps:
            yield settings
            return
        movers = self._fields_by_gap(gaps)
        slot = min(movers, key=lambda gap: (len(movers[gap]), gap == COUNT))
        lines = []
        for path in movers[slot]:
            line = self.blueprint.field_line(settings, path)
            if line:
                lines.append(line)
        others = list(dict.fromkeys(chain.from_iterable(movers.values())))
        for line in sorted(lines, key=lambda line: line.values[0]):
            for value in self._candidate_values(line, slot, sizes, gaps):
                for change in self._iterate_changes(line, value, settings, others, gaps):
                    closer = {**settings, **change}
                    closer_sizes = self.blueprint.slot_sizes(closer)
                    if closer_sizes is None and len(change) == 1:
                        setting = f"{dotted_name(line.field)} = {value}"
                        reason = self.blueprint.reason_of_refusal(closer)
                        self.refused.setdefault(setting, reason)
                    if closer_sizes is not None and len(self.find_gaps(closer_sizes)) < len(gaps):
                        yield from self._solve_gaps(closer)
                        break

    def _fields_by_gap(self, gaps: list[Slot]) -> dict[Slot, list[Field]]:
        """For each slot, in order, the fields that move it."""
        movers: dict[Slot, list[Field]] = {}
        for slot in sorted(gaps):
            movers[slot] = [path for path, line in self.lines.items() if line.moves_slot(slot)]
        return movers

    def _iterate_changes(
        self,
        line: FieldLine,
        value: int,
        settings: Settings,
        others: list[Field],
        gaps: list[Slot],
    ) -> Iterator[dict[Field, Value]]:
        """The field alone; or else with all that had its value (widths that a class wants equal);
        or else with one other in the same proportion, or with what another gap wants of it
        (numbers of which a class wants one to divide the other)."""
        yield {line.field: value}
        twins = []
        for path in self.lines:
            if self.blueprint.source_value(path) == self.blueprint.source_value(line.field):
                twins.append(path)
        if len(twins) > 1:
            yield dict.fromkeys(twins, value)
        for other in others:
            other_value = settings.get(other, self.blueprint.source_value(other))
            if isinstance(other_value, int):
                scaled = Fraction(other_value * value, line.values[0])
            else:
                scaled = Fraction(1, 2)
            if other != line.field and scaled.denominator == 1:
                yield {line.field: value, other: int(scaled)}
        for other in others:
            if other != line.field:
                for wanted in self._exact_values(other, gaps):
                    yield {line.field: value, other: wanted}

    def _exact_values(self, path: Field, gaps: list[Slot]) -> list[int]:
        """The values of a field that would each close one of the gaps alone."""
        line = self.lines[path]
        found = []
        for slot in gaps:
            if slot in self.target and line.moves_slot(slot):
                found.append(line.solve_for(slot, self.target[slot]))
        return [value for value in dict.fromkeys(found) if value is not None]

    def _candidate_values(
        self, line: FieldLine, slot: Slot, sizes: Sizes, gaps: list[Slot]
    ) -> list[int]:
        candidates: dict[int, None] = {}
        if slot in self.target:
            exact = line.solve_for(slot, self.target[slot])
            if exact is not None:
                candidates[exact] = None
        for ratio in [*self._size_ratios(sizes, gaps), *self.ratios]:
            scaled = line.values[0] * ratio
            if scaled.denominator == 1 and scaled > 0:
                candidates[int(scaled)] = None
        candidates.pop(line.values[0], None)
        return list(candidates)

    def _size_ratios(self, sizes: Sizes, gaps: list[Slot]) -> list[Fraction]:
        ratios: dict[Fraction, None] = {}
        for slot in sorted(gaps):
            want = self.target.get(slot)
            have = sizes.get(slot)
            if slot != COUNT and want and have:
                ratios[Fraction(want, have)] = None
        return list(ratios)

    def _explicit_values(self, start: Settings) -> dict[Field, int]:
        """Values of unset fields that change nothing: said aloud, they stay when the numbers they
        derive from move."""
        values: dict[Field, int] = {}
        base = self.blueprint.slot_sizes(start)
        for path in self.blueprint.unset:
            line = self.blueprint.field_line(start, path)
            slot = None
            if line:
                slot = next(iter(line.moved_slots), None)
            value = None
            if line and slot and base and slot in base:
                value = line.solve_for(slot, base[slot])
            if value is not None and self.blueprint.slot_sizes({**start, path: value}) == base:
                values[path] = value
        return values

    def _all_fields(self) -> list[Field]:
        unset = [path for path in self.start if path in self.blueprint.unset]
        return [*self.blueprint.fields, *unset]

    def _remember_nearest(self, settings: Settings, gaps: int) -> None:
        best = self.blueprint.slot_sizes(self.nearest)
        if best is None or gaps < len(self.find_gaps(best)):
            self.nearest = settings

    def _shorten_settings(self, settings: Settings) -> Settings:
        """Without the values that need not be said."""
        sizes = self.blueprint.slot_sizes(settings)
        for path in list(settings):
            fewer = dict(settings)
            del fewer[path]
            if self.blueprint.slot_sizes(fewer) == sizes:
                settings = fewer
        return settings

    def _silent_variants(self, settings: Settings) -> Iterator[Settings]:
        """The same shapes with one more number, or two, or all of one value in proportion: a class
        that derives the head size from the width can have fewer heads, or smaller ones."""
        sizes = self.blueprint.slot_sizes(settings)
        free: dict[Field, int] = {}
        for path in self.blueprint.fields:
            if path not in settings:
                free[path] = self.blueprint.source_value(path) or 0
        order = sorted(free, key=lambda path: free[path])
        order = [path for path in order if free[path] > 1]
        for ratio, fields in product(self.ratios, _field_sets(free, order)):
            scaled = {path: free[path] * ratio for path in fields}
            if any(value.denominator != 1 for value in scaled.values()):
                continue
            variant = {**settings, **{path: int(value) for path, value in scaled.items()}}
            if self.blueprint.slot_sizes(variant) == sizes:
                yield variant


def _field_sets(values: Mapping[Field, int], order: list[Field]) -> list[list[Field]]:
    """Each field alone, each pair, and all of one value where these are more than two.

    Args:
        values: of the fields, and of others.
        order: the fields, those of small values first.
    """
    sets = [[path] for path in order]
    sets += map(list, combinations(order, 2))
    for value in dict.fromkeys(values.values()):
        equal = [path for path in order if values[path] == value]
        if len(equal) > 2:
            sets.append(equal)
    return sets


def _removed_parameters(program: Program) -> set[str]:
    """Parameters that edits took out of the program."""
    if not program.cut:
        return set()
    dense = dict(program.cut.dense.named_parameters())
    return dense.keys() - dict(program.named_parameters()).keys()


def _program_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in program.named_parameters()}


def first_names(model: nn.Module) -> dict[str, str]:
    """For every name of every parameter, the first name of the same Parameter: ties have
    several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first[id(parameter)]
    return names

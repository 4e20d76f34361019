"""From the shapes of a pruned model to the configuration of a stock one, without knowing any model.

Which numbers of a configuration have to change, and to what, is found by building the class on the meta device with a
number changed and looking which parameter dims move.  Every plan is proved in the end: each parameter of the stock
class has its name and exactly its shape.  Needs shapes only, so it can be asked before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations, product
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from secateur.graph.errors import SecateurError
from secateur.graph.program import Program
from secateur.runtime.blueprint import (
    COUNT,
    Blueprint,
    Field,
    Line,
    Settings,
    Shapes,
    Sizes,
    Slot,
    Value,
    dotted,
    slots,
)
from secateur.runtime.constants import Constant, changed
from secateur.runtime.layers import broken, depth_settings, layer_facts, new_order, renumber, thresholds
from secateur.runtime.misfit import explain, pattern_misfit, sub_block_misfit

MAX_BUILDS = 2000
MAX_DOUBTFUL = 8


class StockMisfit(SecateurError):
    """No configuration gives the stock class these shapes; says which parameters do not fit and what would help."""


@dataclass(frozen=True)
class ConfigPlan:
    """A configuration under which the stock class has exactly the wanted shapes.

    cls, config: the class and its new configuration.
    changes: dotted field -> (value before, value after).
    names: name of each parameter (a tied one: its first) and buffer in the source model -> its name in the stock model:
        layers are numbered anew where some were dropped.
    refused: values that were needed otherwise, and why the class takes them not.
    constants: numbers that the class derives from the configuration and that would change (dotted name -> old and new):
        a plan that has any is doubtful, and only the outputs can tell."""

    cls: type[PreTrainedModel]
    config: PretrainedConfig
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)


def plan_config(program: Program, shapes: Mapping[str, Sequence[int]] | None = None) -> ConfigPlan:
    """The configuration of the stock model that holds a program, or a planned edit of it.

    Several configurations can give the same shapes (half of the heads, or heads of half the size): the first is the one
    that changes no constant that the class derives (a scale of attention, for example), then the one that changes small
    counts before large ones; `raise_model` decides by the outputs.
    Args:  shapes: parameter name -> target shape; None takes the program's own.
    Raises: StockMisfit: no configuration fits; says what would make one fit."""
    return next(plans(program, shapes))


def plans(program: Program, shapes: Mapping[str, Sequence[int]] | None = None) -> Iterator[ConfigPlan]:
    """All configurations that fit, those that change no derived constant before those that do, the most likely first.
    Raises StockMisfit if there is none."""
    source = program.source
    if source.config is None or not isinstance(source.model, PreTrainedModel):
        raise StockMisfit(
            f"{type(source.model).__name__} is not a transformers model, so no stock class holds it: keep it with "
            "save_weights, or use the program itself"
        )
    first = first_names(source.model)
    wanted = {first.get(name, name): tuple(shape) for name, shape in (shapes or _shapes(program)).items()}
    search = Search(Blueprint(type(source.model), source.config), wanted, [n for n, _ in source.model.named_buffers()])
    if lost := search.lost(first.get(name, name) for name in _removed(program)):
        raise StockMisfit(sub_block_misfit(type(source.model).__name__, lost))
    doubtful: list[ConfigPlan] = []
    found, wrong = False, dict[str, str]()
    for settings in search.solutions():
        found = True
        if wrong := search.broken(settings):
            continue
        plan = search.plan(settings)
        if not plan.constants:
            yield plan
            continue
        doubtful.append(plan)
        if len(doubtful) == MAX_DOUBTFUL:
            yield from doubtful
            doubtful.clear()
    yield from doubtful
    if not found:
        raise StockMisfit(explain(search.blueprint, search.wanted, search.nearest, search.refused))
    if wrong:
        raise StockMisfit(pattern_misfit(type(source.model).__name__, wrong))


class Search:
    """Settings of a blueprint that give the wanted shapes.

    wanted: shapes by the names of the stock class.   nearest: the settings with the fewest gaps so far.
    refused: values that would have closed a gap, and why the class takes them not."""

    def __init__(self, blueprint: Blueprint, shapes: Shapes, buffers: Sequence[str] = ()) -> None:
        self.blueprint = blueprint
        base = blueprint.shapes({}) or {}
        self.order = new_order(shapes, base)
        self.names = renumber([*shapes, *base, *buffers], self.order)
        self.wanted = {self.names[name]: shape for name, shape in shapes.items()}
        start: dict[Field, Value] = dict(depth_settings(blueprint, shapes, base))
        self.depths = {field: kept for field, kept in start.items() if isinstance(kept, tuple)}
        start = self._with_thresholds(start)
        base = blueprint.shapes(start) or base
        # Parameters that the computation never used are not in the program; they keep their place.
        self.target = slots({name: self.wanted.get(name, shape) for name, shape in base.items()} | self.wanted)
        self.passengers = base.keys() - self.wanted.keys()
        self.start: dict[Field, Value] = {**start, **self._explicit(start)}
        lines = {path: blueprint.line(self.start, path) for path in self._all_fields() if path not in start}
        self.lines = {path: line for path, line in lines.items() if line is not None}
        self.nearest: Settings = self.start
        before = self.blueprint.sizes(self.start) or {}
        self.ratios = self._ratios(before, self.gaps(before))
        self.refused: dict[str, str] = {}
        self.constants = blueprint.constants({})
        self._seen: set[tuple[Any, ...]] = set()

    def solutions(self) -> Iterator[Settings]:
        """Proved settings, the most likely first, then those in which numbers that move no shape shrink as well."""
        plain = []
        for settings in self._solve(self.start):
            settings = self._shortest(settings)
            if (key := tuple(sorted(settings.items(), key=str))) not in self._seen:
                self._seen.add(key)
                plain.append(settings)
                yield settings
        yield from (more for settings in plain[:3] for more in self._silent_variants(settings))

    def lost(self, removed: Iterable[str]) -> list[str]:
        """Removed parameters that the class has all the same, because the rest of their layer stays."""
        return sorted(self.passengers & {self.names[name] for name in removed if name in self.names})

    def broken(self, settings: Settings) -> dict[str, str]:
        """Where layers were dropped: settings by which the layers that stay would be of another kind."""
        if not self.depths:
            return {}
        before = layer_facts(self.blueprint.model({}))
        return broken(before, self.blueprint.model(settings), self.order)

    def plan(self, settings: Settings) -> ConfigPlan:
        """The plan that these settings make."""
        before = self.blueprint.value
        after = {path: len(v) if isinstance(v, tuple) else v for path, v in settings.items()}
        changes = {dotted(path): (before(path), value) for path, value in after.items() if before(path) != value}
        constants = changed(self._known_constants(), self.blueprint.constants(settings)) if changes else {}
        config = self.blueprint.config(settings)
        return ConfigPlan(self.blueprint.cls, config, changes, self.names, self.refused, constants)

    def _with_thresholds(self, start: dict[Field, Value]) -> dict[Field, Value]:
        """With the numbers of first layers of another kind lowered where that gives the layers their kinds back."""
        strange = self._strange(start)
        for path, value in thresholds(self.blueprint, self.depths).items() if strange else ():
            if (now := self._strange({**start, path: value})) < strange:
                start, strange = {**start, path: value}, now
        return start

    def _strange(self, settings: Settings) -> int:
        """How many parameters only one of the class and the program has."""
        shapes = self.blueprint.shapes(settings)
        return len((shapes.keys() if shapes is not None else set()) ^ self.wanted.keys())

    def _known_constants(self) -> dict[str, Constant]:
        """The constants of the source under their new names."""
        names = renumber(self.constants, self.order)
        return {new: self.constants[old] for old, new in names.items()}

    def gaps(self, sizes: Sizes) -> list[Slot]:
        """Slots that these sizes and the target do not share."""
        return [slot for slot in self.target.keys() | sizes.keys() if self.target.get(slot) != sizes.get(slot)]

    def _solve(self, settings: Settings) -> Iterator[Settings]:
        """Depth first: close the gap that the fewest fields can close, by the field of the smallest value.  Which field
        can close which gap is known from the start; how far, is asked again at every step."""
        sizes = self.blueprint.sizes(settings)
        if sizes is None or self.blueprint.builds > MAX_BUILDS:
            return
        gaps = self.gaps(sizes)
        self._remember(settings, len(gaps))
        if not gaps:
            yield settings
            return
        movers = {slot: [path for path, line in self.lines.items() if line.moves(slot)] for slot in sorted(gaps)}
        slot = min(movers, key=lambda s: (len(movers[s]), s == COUNT))
        lines = [line for path in movers[slot] if (line := self.blueprint.line(settings, path))]
        others = list(dict.fromkeys(path for paths in movers.values() for path in paths))
        for line in sorted(lines, key=lambda li: li.values[0]):
            for value in self._candidates(line, slot, sizes, gaps):
                for change in self._changes(line, value, settings, others):
                    closer = {**settings, **change}
                    now = self.blueprint.sizes(closer)
                    if now is None and len(change) == 1:
                        self.refused.setdefault(f"{dotted(line.field)} = {value}", self.blueprint.words(closer))
                    if now is not None and len(self.gaps(now)) < len(gaps):
                        yield from self._solve(closer)
                        break

    def _changes(self, line: Line, value: int, settings: Settings, others: list[Field]) -> Iterator[dict[Field, Value]]:
        """The field alone; or else with all that had its value (widths that a class wants equal); or else with one
        other in the same proportion (numbers of which a class wants one to divide the other)."""
        yield {line.field: value}
        twins = [path for path in self.lines if self.blueprint.value(path) == self.blueprint.value(line.field)]
        if len(twins) > 1:
            yield dict.fromkeys(twins, value)
        for other in others:
            now = settings.get(other, self.blueprint.value(other))
            scaled = Fraction(now * value, line.values[0]) if isinstance(now, int) else Fraction(1, 2)
            if other != line.field and scaled.denominator == 1:
                yield {line.field: value, other: int(scaled)}

    def _candidates(self, line: Line, slot: Slot, sizes: Sizes, gaps: list[Slot]) -> list[int]:
        exact = line.solve(slot, self.target[slot]) if slot in self.target else None
        scaled = [line.values[0] * ratio for ratio in [*self._ratios(sizes, gaps), *self.ratios]]
        counts = [int(value) for value in scaled if value.denominator == 1 and value > 0]
        return [v for v in dict.fromkeys([exact, *counts]) if v is not None and v != line.values[0]]

    def _ratios(self, sizes: Sizes, gaps: list[Slot]) -> list[Fraction]:
        pairs = ((self.target.get(slot), sizes.get(slot)) for slot in sorted(gaps) if slot != COUNT)
        return list(dict.fromkeys(Fraction(want, have) for want, have in pairs if want and have))

    def _explicit(self, start: Settings) -> dict[Field, int]:
        """Values of unset fields that change nothing: said aloud, they stay when the numbers they derive from move."""
        found: dict[Field, int] = {}
        base = self.blueprint.sizes(start)
        for path in self.blueprint.unset:
            line = self.blueprint.line(start, path)
            slot = next(iter(line.moved), None) if line else None
            value = line.solve(slot, base[slot]) if line and slot and base and slot in base else None
            if value is not None and self.blueprint.sizes({**start, path: value}) == base:
                found[path] = value
        return found

    def _all_fields(self) -> list[Field]:
        return [*self.blueprint.fields, *(path for path in self.start if path in self.blueprint.unset)]

    def _remember(self, settings: Settings, gaps: int) -> None:
        best = self.blueprint.sizes(self.nearest)
        if best is None or gaps < len(self.gaps(best)):
            self.nearest = settings

    def _shortest(self, settings: Settings) -> Settings:
        """Without the values that need not be said."""
        sizes = self.blueprint.sizes(settings)
        for path in list(settings):
            fewer = {key: value for key, value in settings.items() if key != path}
            if self.blueprint.sizes(fewer) == sizes:
                settings = fewer
        return settings

    def _silent_variants(self, settings: Settings) -> Iterator[Settings]:
        """The same shapes with one more number, or two, or all of one value in proportion: a class that derives the
        head size from the width can have fewer heads, or smaller ones."""
        sizes = self.blueprint.sizes(settings)
        free = {path: self.blueprint.value(path) or 0 for path in self.blueprint.fields if path not in settings}
        order = sorted((path for path, value in free.items() if value > 1), key=lambda path: free[path])
        equal = [[path for path in order if free[path] == value] for value in dict.fromkeys(free.values())]
        sets = [*([path] for path in order), *map(list, combinations(order, 2)), *(s for s in equal if len(s) > 2)]
        for ratio, fields in product(self.ratios, sets):
            if all((free[path] * ratio).denominator == 1 for path in fields):
                variant = {**settings, **{path: int(free[path] * ratio) for path in fields}}
                if self.blueprint.sizes(variant) == sizes:
                    yield variant


def _removed(program: Program) -> set[str]:
    """Parameters that edits took out of the program."""
    dense = program.cut.dense if program.cut else program
    return {name for name, _ in dense.named_parameters()} - {name for name, _ in program.named_parameters()}


def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in program.named_parameters()}


def first_names(model: nn.Module) -> dict[str, str]:
    """For every name of every parameter, the first name of the same Parameter: ties have several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}

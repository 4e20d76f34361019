"""The algebra of axes.

Every dim of every tensor is one Atom.  An Atom is

* a **leaf**: ``size`` independent units;
* a **product** of atoms, row-major: what ``view`` merges or factors;
* a **concatenation** of atoms: what ``cat`` joins and ``split``, ``slice``, ``select`` cut.

Ops tie axes together: ``Space.unify(a, b)`` says that position i of one axis is position i of the
other, refining both until their structures agree.  A leaf that is left at the end is a set of units
that stay or go together.  Nothing in this file knows an op, let alone an architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]


class Kind(Enum):
    LEAF = "leaf"
    PRODUCT = "product"
    CONCAT = "concat"


class Atom:
    """One axis of ``size`` positions.  Compare atoms after ``resolve()``: unification forwards one
    to another."""

    __slots__ = ("_forward", "kind", "locks", "marks", "number", "parts", "size")
    _count = 0

    def __init__(self, size: int, kind: Kind = Kind.LEAF, parts: Sequence[Atom] = ()) -> None:
        Atom._count += 1
        self.number = Atom._count
        self.size = size
        self.kind = kind
        self.parts: tuple[Atom, ...] = tuple(parts)
        self.marks: set[str] = set()
        self.locks: set[str] = set()
        self._forward: Atom | None = None

    def resolve(self) -> Atom:
        """The atom that stands for this one now."""
        root = self
        while root._forward is not None:
            root = root._forward
        atom = self
        while atom._forward is not None:
            atom._forward, atom = root, atom._forward
        return root

    def leaves(self) -> list[Atom]:
        """The leaves below, left to right, with repetitions."""
        atom = self.resolve()
        if atom.kind is Kind.LEAF:
            return [atom]
        return [leaf for part in atom.parts for leaf in part.leaves()]

    def factors(self) -> list[Atom]:
        """The atom as a row-major product of non-products, without sizes of one."""
        atom = self.resolve()
        if atom.kind is Kind.PRODUCT:
            return [f for part in atom.parts for f in part.factors()]
        if atom.size == 1:
            return []
        return [atom]

    def segments(self) -> list[Atom]:
        """The atom as a concatenation of non-concatenations."""
        atom = self.resolve()
        if atom.kind is Kind.CONCAT:
            return [s for part in atom.parts for s in part.segments()]
        return [atom]

    def __repr__(self) -> str:
        atom = self.resolve()
        if atom.kind is Kind.LEAF:
            return f"a{atom.number}:{atom.size}"
        if atom.kind is Kind.PRODUCT:
            sign = "*"
        else:
            sign = "+"
        return "(" + sign.join(map(repr, atom.parts)) + ")"


def make_product(parts: Iterable[Atom]) -> Atom:
    """Row-major product; sizes of one vanish."""
    kept = [p for p in (part.resolve() for part in parts) if p.size != 1]
    if not kept:
        return Atom(1)
    if len(kept) == 1:
        return kept[0]
    return Atom(math.prod(p.size for p in kept), Kind.PRODUCT, kept)


def make_concatenation(parts: Iterable[Atom]) -> Atom:
    """Concatenation; empty parts vanish."""
    kept = [p for p in parts if p.size > 0]
    if not kept:
        return Atom(0)
    if len(kept) == 1:
        return kept[0]
    return Atom(sum(p.size for p in kept), Kind.CONCAT, kept)


class Space:
    """The atoms of one analysis and what ties them.  ``where`` names the op at work, for
    messages."""

    def __init__(self) -> None:
        self.where = ""
        self.conflicts: list[str] = []

    # Facts about leaves
    def mark(self, atom: Atom, *marks: str) -> None:
        """Evidence about the use of an axis; it does not forbid anything."""
        for leaf in atom.leaves():
            leaf.marks.update(marks)

    def lock(self, atom: Atom, reason: str) -> None:
        """Forbid edits of every unit below, and say why."""
        for leaf in atom.leaves():
            leaf.locks.add(reason)

    def make_locked_leaf(self, size: int, reason: str) -> Atom:
        """A fresh leaf that is born locked."""
        atom = Atom(size)
        atom.locks.add(reason)
        return atom

    def _record_conflict(self, what: str, atoms: Iterable[Atom]) -> None:
        atoms = list(atoms)
        self.conflicts.append(f"{self.where}: {what}: {', '.join(map(repr, atoms))}")
        for atom in atoms:
            self.lock(atom, f"axes of {self.where} do not align")

    # Unification
    def unify(self, a: Atom, b: Atom) -> None:
        """Tie two axes position by position; sizes that differ are a conflict and lock both."""
        a = a.resolve()
        b = b.resolve()
        if a is b or a.size == b.size == 1:
            return
        if a.size != b.size:
            if all(leaf.locks for leaf in [*a.leaves(), *b.leaves()]):
                # sizes of data that are equal only at run time; nothing below may be edited anyway
                return
            return self._record_conflict("sizes differ", (a, b))
        if a.kind is Kind.LEAF:
            return self._forward_atom(a, b)
        if b.kind is Kind.LEAF:
            return self._forward_atom(b, a)
        if a.kind is b.kind:
            if a.kind is Kind.PRODUCT:
                take = Atom.factors
            else:
                take = Atom.segments
            cut = self._cut_factor if a.kind is Kind.PRODUCT else self._cut_segment
            if self._align_parts(a, b, take, cut) and a.resolve() is not b.resolve():
                self._forward_atom(b.resolve(), a.resolve())
            return None
        return self._unify_mixed(*((a, b) if a.kind is Kind.PRODUCT else (b, a)))

    def _forward_atom(self, old: Atom, new: Atom) -> None:
        old._forward = new
        for leaf in new.leaves() if old.marks or old.locks else ():
            leaf.marks |= old.marks
            leaf.locks |= old.locks

    def _unify_mixed(self, prod: Atom, cat: Atom) -> None:
        """A product equals a concatenation when the cuts fall between rows of its outermost
        factor."""
        segments = cat.segments()
        parts = self.split_concat(prod, [s.size for s in segments])
        if parts is None:
            return self._record_conflict(
                "a product cannot be cut like a concatenation", (prod, cat)
            )
        for part, segment in zip(parts, segments, strict=True):
            self.unify(part, segment)
        if cat.resolve() is not prod.resolve():
            self._forward_atom(cat.resolve(), prod.resolve())
        return None

    def _align_parts(
        self,
        a: Atom,
        b: Atom,
        take: Callable[[Atom], list[Atom]],
        cut: Callable[[Atom, int], tuple[Atom, Atom] | None],
    ) -> bool:
        """Walk two lists of parts, cutting the larger head to the size of the smaller, and unify
        the heads."""
        left = take(a)
        right = take(b)
        while left and right:
            left = take(left[0]) + left[1:]
            right = take(right[0]) + right[1:]
            if left[0].size > right[0].size:
                left, right = right, left
            small = left[0]
            large = right[0]
            if small.size == large.size:
                self.unify(small, large)
                left = left[1:]
                right = right[1:]
                continue
            pieces = cut(large, small.size)
            if pieces is None:
                self._record_conflict("structures do not align", [*left, *right])
                return False
            self.unify(pieces[0], small)
            left = left[1:]
            right = [pieces[1], *right[1:]]
        return True

    def _cut_factor(self, atom: Atom, outer: int) -> tuple[Atom, Atom] | None:
        if atom.size % outer:
            return None
        parts = self.split_product(atom, [outer, atom.size // outer])
        if parts:
            return (parts[0], parts[1])
        return None

    def _cut_segment(self, atom: Atom, first: int) -> tuple[Atom, Atom] | None:
        parts = self.split_concat(atom, [first, atom.size - first])
        if parts:
            return (parts[0], parts[1])
        return None

    # Refinement
    def _refine_leaf(self, leaf: Atom, kind: Kind, sizes: Sequence[int]) -> list[Atom]:
        parts = [Atom(size) for size in sizes]
        for part in parts:
            part.marks, part.locks = set(leaf.marks), set(leaf.locks)
        leaf.kind, leaf.parts = kind, tuple(parts)
        return parts

    def split_product(self, atom: Atom, sizes: Sequence[int]) -> list[Atom] | None:
        """Factor an axis row-major into ``sizes``; None when its structure forbids it."""
        atom = atom.resolve()
        if math.prod(sizes) != atom.size:
            return None
        if len(sizes) == 1:
            return [atom]
        if 1 in sizes:
            rest = self.split_product(atom, [s for s in sizes if s != 1] or [1])
            if rest is None:
                return None
            return [Atom(1) if s == 1 else rest.pop(0) for s in sizes]
        if atom.kind is Kind.LEAF:
            return self._refine_leaf(atom, Kind.PRODUCT, sizes)
        if atom.kind is Kind.PRODUCT:
            return self.regroup(atom.factors(), sizes)
        return self._factor_concat(atom, sizes)

    def regroup(self, factors: Sequence[Atom], sizes: Sequence[int]) -> list[Atom] | None:
        """Merge and cut a row-major list of factors into axes of ``sizes``: what ``view`` does."""
        queue = list(factors)
        out = []
        for size in sizes:
            taken: list[Atom] = []
            while size > 1:
                if not queue:
                    return None
                head = queue.pop(0).resolve()
                if size % head.size == 0:
                    taken.append(head)
                    size //= head.size
                    continue
                pieces = self._cut_factor(head, size)
                if pieces is None:
                    return None
                taken.append(pieces[0])
                queue[:0] = pieces[1].factors()
                size = 1
            out.append(make_product(taken))
        return out

    def _factor_concat(self, atom: Atom, sizes: Sequence[int]) -> list[Atom] | None:
        """Factor each segment by the same inner axis: ``(x*i + y*i)`` becomes ``(x + y) * i``."""
        inner = math.prod(sizes[1:])
        segments = atom.segments()
        if any(s.size % inner for s in segments):
            return None
        shared = Atom(inner)
        outers = []
        for segment in segments:
            parts = self.split_product(segment, [segment.size // inner, inner])
            if parts is None:
                return None
            self.unify(parts[1], shared)
            outers.append(parts[0])
        outer = make_concatenation(outers)
        whole = make_product([outer, shared])
        if atom.resolve() is not whole:
            atom.resolve()._forward = whole
        rest = self.split_product(shared, sizes[1:])
        if rest is None:
            return None
        return [outer, *rest]

    def split_concat(self, atom: Atom, sizes: Sequence[int]) -> list[Atom] | None:
        """Cut an axis into consecutive pieces of ``sizes``; None when its structure forbids it."""
        atom = atom.resolve()
        if sum(sizes) != atom.size:
            return None
        if len(sizes) == 1:
            return [atom]
        if 0 in sizes:
            rest = self.split_concat(atom, [s for s in sizes if s])
            if rest is None:
                return None
            return [rest.pop(0) if s else Atom(0) for s in sizes]
        if atom.kind is Kind.LEAF:
            return self._refine_leaf(atom, Kind.CONCAT, sizes)
        if atom.kind is Kind.PRODUCT:
            return self._cut_product(atom, sizes)
        queue = atom.segments()
        out = []
        for size in sizes:
            taken: list[Atom] = []
            while size > 0:
                head = queue.pop(0).resolve()
                if head.size > size:
                    pieces = self._cut_segment(head, size)
                    if pieces is None:
                        return None
                    head = pieces[0]
                    queue = [pieces[1], *queue]
                taken.append(head)
                size -= head.size
            out.append(make_concatenation(taken))
        return out

    def _cut_product(self, atom: Atom, sizes: Sequence[int]) -> list[Atom] | None:
        """Cut a product between rows of its outermost factor."""
        outer, *inner = atom.factors()
        row = math.prod(f.size for f in inner)
        if any(s % row for s in sizes):
            return None
        parts = self.split_concat(outer, [s // row for s in sizes])
        if parts is None:
            return None
        return [make_product([p, *inner]) for p in parts]


class Keep:
    """Which units stay, by leaf: an edit as the algebra sees it.

    masks: leaf -> [size] bool, True where the unit stays; leaves that are not named stay whole.  A
        leaf whose units are chosen for each coordinate of another has [size, coordinates] bool, as
        many True in every column.
    outers: that other leaf, for each leaf with such a mask.
    """

    def __init__(
        self, masks: Mapping[Atom, BoolArray], outers: Mapping[Atom, Atom] | None = None
    ) -> None:
        self._masks = {leaf.resolve(): mask for leaf, mask in masks.items()}
        self._outers = {leaf.resolve(): outer.resolve() for leaf, outer in (outers or {}).items()}

    def touches(self, atom: Atom) -> bool:
        """Whether any unit below the axis may go."""
        return any(leaf in self._masks for leaf in atom.leaves())

    def size(self, atom: Atom) -> int:
        """Positions of the axis that stay."""
        atom = atom.resolve()
        if atom.kind is Kind.LEAF:
            mask = self._masks.get(atom)
            if mask is None:
                return atom.size
            return int(mask.sum(0).max())
        sizes = [self.size(part) for part in atom.parts]
        if atom.kind is Kind.PRODUCT:
            return math.prod(sizes)
        return sum(sizes)

    def mask(self, atom: Atom) -> BoolArray:
        """[size] bool: which positions of the axis stay.

        Raises:
            AssertionError: units are chosen by coordinate, and the axis does not say which
                coordinate it is.
        """
        out = self._shared(atom)
        for leaf in dict.fromkeys(atom.leaves()):
            mask = self._masks.get(leaf)
            if mask is None or mask.ndim == 1:
                continue
            units = axis_labels(atom, leaf)
            coordinates = axis_labels(atom, self._outers[leaf])
            inside = units >= 0
            assert bool((coordinates[inside] >= 0).all()), (
                f"{atom} has units of {leaf} without a coordinate"
            )
            out = out.copy()
            out[inside] &= mask[units[inside], coordinates[inside]]
        return out

    def _shared(self, atom: Atom) -> BoolArray:
        """[size] bool: which positions stay by the units that go at every coordinate alike."""
        atom = atom.resolve()
        if atom.kind is Kind.LEAF:
            mask = self._masks.get(atom)
            if mask is None or mask.ndim > 1:
                return np.ones(atom.size, bool)
            return mask
        masks = [self._shared(part) for part in atom.parts]
        if atom.kind is Kind.CONCAT:
            return np.concatenate(masks)
        out = masks[0]
        for mask in masks[1:]:
            out = (out[:, None] & mask[None, :]).reshape(-1)
        return out

    def positions(self, atom: Atom) -> npt.NDArray[np.int64]:
        """Indices of the positions that stay, ascending."""
        return np.flatnonzero(self.mask(atom)).astype(np.int64)


def unit_positions(atom: Atom, leaf: Atom) -> npt.NDArray[np.int64]:
    """[leaf.size, k]: for each unit of the leaf, the positions of the axis that belong to it,
    ascending."""
    labels = _unit_labels(atom.resolve(), leaf.resolve())
    order = np.argsort(labels, kind="stable")
    return order[labels[order] >= 0].reshape(leaf.size, -1).astype(np.int64)


def axis_labels(atom: Atom, leaf: Atom) -> npt.NDArray[np.int64]:
    """[atom.size]: the unit of ``leaf`` at each position of an axis, -1 where the leaf has no
    part."""
    return _unit_labels(atom.resolve(), leaf.resolve())


def _unit_labels(atom: Atom, leaf: Atom) -> npt.NDArray[np.int64]:
    """[size]: the unit of ``leaf`` at each position, -1 where the leaf has no part."""
    if atom is leaf:
        return np.arange(atom.size)
    if atom.kind is Kind.LEAF:
        return np.full(atom.size, -1)
    labels = [_unit_labels(part.resolve(), leaf) for part in atom.parts]
    if atom.kind is Kind.CONCAT:
        return np.concatenate(labels)
    out = labels[0]
    for inner in labels[1:]:
        out = np.maximum(out[:, None], inner[None, :]).reshape(-1)
    return out

"""The algebra of axes, against brute force on labels."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from secateur.graph.axes.atoms import (
    Atom,
    Keep,
    Kind,
    Space,
    make_concatenation,
    make_product,
    unit_positions,
)

SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def _leaf_of_each_position(atom: Atom) -> list[Atom]:
    return [leaf for leaf in atom.leaves() for _ in range(leaf.size)]


def _random_keep(atoms: list[Atom], seed: int) -> Keep:
    generator = np.random.default_rng(seed)
    leaves = dict.fromkeys(leaf for atom in atoms for leaf in atom.leaves())
    return Keep({leaf: generator.random(leaf.size) < 0.6 for leaf in leaves})


@given(SIZES, st.randoms(use_true_random=False), st.integers(0, 1000))
def test_a_view_keeps_positions(sizes: list[int], random: object, seed: int) -> None:
    """However an axis list is viewed, the same positions of the flat tensor stay."""
    total = math.prod(sizes)
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    first = random.choice(divisors)  # type: ignore[attr-defined]
    space, axes = Space(), [Atom(s) for s in sizes]
    out = space.regroup([f for a in axes for f in a.factors()], [first, total // first])
    if out is None:  # a cut across a unit: nothing may be claimed
        assert any(
            first % math.prod(sizes[:i]) and math.prod(sizes[:i]) % first
            for i in range(len(sizes) + 1)
        )
        return
    keep = _random_keep(axes, seed)
    np.testing.assert_array_equal(keep.mask(make_product(out)), keep.mask(make_product(axes)))
    assert keep.size(make_product(out)) == int(keep.mask(make_product(axes)).sum())


@given(
    st.lists(st.integers(2, 6), min_size=1, max_size=4),
    st.lists(st.integers(2, 6), min_size=1, max_size=4),
)
def test_concatenations_align_at_all_their_cuts(a: list[int], b: list[int]) -> None:
    space = Space()
    a.append(max(0, sum(b) - sum(a)))
    b.append(max(0, sum(a) - sum(b)))
    left, right = make_concatenation([Atom(n) for n in a]), make_concatenation([Atom(n) for n in b])
    space.unify(left, right)
    assert not space.conflicts
    keep = _random_keep([left, right], 0)
    wide = np.repeat(True, left.size)  # a leaf of one unit may stand twice; it is no group
    wide[[i for i, leaf in enumerate(_leaf_of_each_position(left)) if leaf.size == 1]] = False
    np.testing.assert_array_equal(keep.mask(left)[wide], keep.mask(right)[wide])
    assert [leaf.size for leaf in left.leaves()] == [leaf.size for leaf in right.leaves()]


def test_rotating_halves_makes_pairs() -> None:
    """cat(-x[half:], x[:half]) added to x ties unit i to unit i + half."""
    space, axis = Space(), Atom(8)
    halves = space.split_concat(axis, [4, 4])
    assert halves is not None
    space.unify(make_concatenation(halves[::-1]), axis)
    assert len({leaf.number for leaf in axis.leaves()}) == 1
    np.testing.assert_array_equal(unit_positions(axis, axis.leaves()[0])[1], [1, 5])


def test_grouped_heads_are_found_in_a_fused_axis() -> None:
    space, fused, heads = Space(), Atom(24), Atom(3)
    parts = space.regroup(fused.factors(), [6, 4])
    assert parts is not None
    groups = space.split_product(parts[0], [3, 2])
    assert groups is not None
    space.unify(groups[0], heads)
    np.testing.assert_array_equal(unit_positions(fused, heads.resolve())[1], range(8, 16))


def test_a_product_is_cut_between_rows_and_not_inside_them() -> None:
    space = Space()
    axis = make_product([Atom(6), Atom(4)])
    parts = space.split_concat(axis, [8, 16])
    assert parts is not None and [p.kind for p in parts] == [Kind.PRODUCT, Kind.PRODUCT]
    assert space.split_concat(make_product([Atom(6), Atom(4)]), [6, 18]) is None


def test_sizes_that_differ_lock_both_sides() -> None:
    space = Space()
    a, b = Atom(6), Atom(4)
    space.unify(a, b)
    assert space.conflicts and a.resolve().locks and b.resolve().locks


def test_refined_and_merged_leaves_keep_what_is_known_of_them() -> None:
    space = Space()
    locked, marked = space.make_locked_leaf(6, "reason"), Atom(6)
    space.mark(marked, "mark")
    space.unify(locked, marked)
    parts = space.split_product(marked, [2, 3])
    assert parts is not None
    assert all(p.resolve().locks == {"reason"} and p.resolve().marks == {"mark"} for p in parts)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_positions_of_units_partition_the_axis(a: int, b: int, c: int) -> None:
    axis = make_product([Atom(a + 1), make_concatenation([Atom(b + 1), Atom(c + 1)])])
    for leaf in axis.leaves():
        positions = unit_positions(axis, leaf)
        assert positions.shape[0] == leaf.size
        assert len(set(positions.flatten().tolist())) == positions.size

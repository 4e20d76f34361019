"""A supernet: every group at several sizes at once, so that mixtures are tried without edits.

A group's units act through the weights that consume them.  A size is therefore a value of those
weights alone: refitted by least squares on the units that stay, and zero for the others.  A mixture
of sizes is the dense graph with these values in place of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from secateur.graph import CoupledGroup, Program
from secateur.graph.errors import EditError
from secateur.passes.base import JSON, Context
from secateur.passes.calibration.data import Sample
from secateur.passes.calibration.kl import KL, CachedLogProbs, predict_reference, select_logits
from secateur.passes.calibration.lockstep import Lockstep
from secateur.passes.calibration.observe import consumers
from secateur.passes.repair.sites import weight_uses
from secateur.passes.storage.journal import Journal
from secateur.passes.width.shares import select_units

RIDGE = 0.01  # of each input's energy
FLOOR = 1e-5  # of the mean energy


@dataclass(frozen=True, eq=False)
class Consumer:
    """A matrix that consumes a group.  x: node that it multiplies.
    chain: from its get_attr to the op that reads it.
    columns: [units, coordinates, k] positions along ``dim``.
    """

    parameter: str
    dim: int
    columns: Tensor
    x: fx.Node
    chain: tuple[fx.Node, ...]

    def columns_of(self, kept: Tensor) -> Tensor:
        """The positions of kept units, [n] for all coordinates or [n, coordinates] for each,
        flat.

        Args:
            kept: [n] or [n, coordinates] unit indices.

        Returns:
            positions along ``dim``, flat.
        """
        if kept.dim() == 1:
            return self.columns[kept].flatten()
        return self.columns[kept, torch.arange(kept.shape[1])].flatten()


@dataclass(frozen=True, eq=False)
class Level:
    """A group at one size.

    kept: units, ascending, [n] or [n, coordinates].
    columns: by parameter, the values of the columns that stay, in the order of
        ``Consumer.columns_of``.
    error: of what the consumers give, relative to its energy; 0 for the whole group.
    """

    kept: Tensor
    columns: Mapping[str, Tensor]
    error: float


def consumers_of(program: Program, group: CoupledGroup) -> list[Consumer]:
    """The matrices that consume the group.

    Args:
        program: the model.
        group: whose consumers are wanted.

    Returns:
        one entry for each parameter.

    Raises:
        EditError: no weight does, or one is no plain matrix: then its sizes cannot stand side by
            side.
    """
    uses = weight_uses(program)
    matrices = dict[str, Consumer]()
    for member in group.members:
        if member.role != "consumes" or member.parameter in matrices:
            continue
        places = consumers(program.gm, member.parameter, member.dim)
        chains = uses[member.parameter]
        if (
            len(places) != 1
            or len(chains) != 1
            or program.gm.get_parameter(member.parameter).dim() != 2
        ):
            raise EditError(
                f"allocate: {member.parameter}, which consumes {group.name}, is no matrix of one op"
            )
        matrices[member.parameter] = Consumer(
            member.parameter, member.dim, member.cells, places[0][0], chains[0].chain
        )
    if not matrices:
        raise EditError(f"allocate: no weight consumes {group.name}")
    return list(matrices.values())


def place_columns(weight: Tensor, consumer: Consumer, kept: Tensor, columns: Tensor) -> Tensor:
    """The consumer's whole weight with these columns where units stay and zeros elsewhere.

    Args:
        weight: dense value, for shape and dtype.
        consumer: the matrix.
        kept: units that stay.
        columns: values of the kept columns.

    Returns:
        a tensor of the weight's shape.
    """
    value = torch.zeros_like(weight)
    value.index_copy_(consumer.dim, consumer.columns_of(kept).to(weight.device), columns.to(weight))
    return value


class Supernet:
    """Levels of some groups of a Program, and the KL to the dense model of any mixture.

    groups: in the order of the graph.
    sizes: by group name, unit counts, the first the whole group.
    """

    def __init__(
        self, program: Program, groups: Sequence[CoupledGroup], sizes: Mapping[str, Sequence[int]]
    ) -> None:
        self.program = program
        self.sizes = sizes
        self.parameters = {name: p.detach() for name, p in program.named_parameters()}
        matrices = {}
        for group in groups:
            matrices[group.name] = consumers_of(program, group)
        order = {}
        for position, node in enumerate(program.gm.graph.nodes):
            order[node] = position
        self.consumers = dict(sorted(matrices.items(), key=lambda item: order[item[1][0].x]))
        self.levels: dict[str, list[Level]] = {}

    def make_levels(self, context: Context, journal: Journal) -> None:
        """Make every level, group after group, on what the dense model's consumers read; needs
        scores and data.

        Args:
            context: with data and progress.
            journal: where finished groups are kept.
        """
        data = context.data or ()
        dense = Lockstep(self.program, data)
        for name, readers in context.progress(
            list(self.consumers.items()), "levels", len(self.consumers)
        ):
            entry = journal.read(f"levels {name}")
            if entry is None:
                dense.advance_to(readers[0].x.name)
                grams = {}
                for c in readers:
                    grams[c.parameter] = _gram_matrix(dense, c, len(data))
                self.levels[name] = [
                    self._make_level(name, size, grams) for size in self.sizes[name]
                ]
                journal.write(f"levels {name}", *_pack_levels(self.levels[name]))
            else:
                self.levels[name] = _unpack_levels(entry.tensors, entry.facts, self.sizes[name])

    def mixture_values(self, mixture: Mapping[str, int]) -> dict[str, Tensor]:
        """Whole weights by parameter of a mixture: index of a level by group name; groups left out
        stay whole.

        Args:
            mixture: index of a level by group name.

        Returns:
            weights by parameter name.
        """
        values: dict[str, Tensor] = {}
        for name, index in mixture.items():
            level = self.levels[name][index]
            for consumer in self.consumers[name] if index else ():
                weight = self.parameters[consumer.parameter]
                values[consumer.parameter] = place_columns(
                    weight, consumer, level.kept, level.columns[consumer.parameter]
                )
        return values

    def _make_level(self, name: str, size: int, grams: Mapping[str, Tensor]) -> Level:
        """One level of a group: its units and refitted columns."""
        units = select_units(self.program, name, size)
        if size == len(self.program.scores[name]):
            return Level(units, {}, 0.0)
        columns = dict[str, Tensor]()
        error_sum = 0.0
        energy = 0.0
        for consumer in self.consumers[name]:
            weight = self.parameters[consumer.parameter].movedim(consumer.dim, -1).double()
            fitted, error, total = _refit_columns(
                weight, grams[consumer.parameter], consumer.columns_of(units)
            )
            columns[consumer.parameter] = fitted.to(
                self.parameters[consumer.parameter].dtype
            ).movedim(-1, consumer.dim)
            error_sum += error
            energy += total
        return Level(units, columns, error_sum / energy if energy > 0 else 0.0)


def _gram_matrix(dense: Lockstep, consumer: Consumer, samples: int) -> Tensor:
    """Sum over tokens of x x^T: [K, K] float64."""
    total: Tensor | None = None
    for sample in range(samples):
        x = dense.node_value(sample, consumer.x.name)
        rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        new = (rows.T @ rows).double()
        if total is None:
            total = new
        else:
            total = total + new
    assert total is not None
    return total


def _refit_columns(
    weight_NK: Tensor, gram_KK: Tensor, columns: Tensor
) -> tuple[Tensor, float, float]:
    """The values of the kept columns that change the output least, the squared error that is left,
    and the energy.

    The ridge pulls towards the dense values.

    Source:
        Meng et al. 2024 (OSSCAR), arXiv:2403.12983, section 3.
    """
    gram = gram_KK[columns][:, columns]
    penalty = RIDGE * gram.diagonal() + FLOOR * gram_KK.diagonal().mean()
    factor = torch.linalg.cholesky(gram + penalty.diag())
    own_columns = weight_NK[:, columns]
    wanted = weight_NK @ gram_KK[:, columns] + own_columns * penalty
    fitted = torch.cholesky_solve(wanted.T, factor).T
    change = weight_NK.clone()
    change[:, columns] -= fitted
    return (
        fitted,
        float(((change @ gram_KK) * change).sum()),
        float(((weight_NK @ gram_KK) * weight_NK).sum()),
    )


# Measuring mixtures
class Judge:
    """KL(dense || mixture) on some sequences.

    The dense model's predictions are kept in half precision, and its state at one place of the
    graph can be kept, too, so that mixtures that differ only after that place do not compute what
    stands before it.
    """

    def __init__(
        self,
        supernet: Supernet,
        samples: Sequence[Sample],
        context: Context,
        dense: tuple[CachedLogProbs, ...] | None = None,
    ) -> None:
        self.supernet = supernet
        self.samples = tuple(samples)
        self.dense = dense or predict_reference(
            supernet.program, self.samples, progress=context.progress
        )
        self.forward = Lockstep(supernet.program, self.samples)

    def advance_to(self, name: str) -> None:
        """Keep the dense state before the consumers of a group; groups must come in graph order.

        Args:
            name: of a group.
        """
        self.forward.advance_to(self.supernet.consumers[name][0].x.name)

    def measure_kl(self, mixture: Mapping[str, int], first: int | None = None) -> KL:
        """KL of a mixture whose smaller groups all stand after the kept state, on the first
        sequences or on all.

        Args:
            mixture: index of a level by group name.
            first: number of sequences; None: all.

        Returns:
            KL to the dense model, nats a token.
        """
        values = self.supernet.mixture_values(mixture)
        replaced = {}
        chains = []
        for matrices in self.supernet.consumers.values():
            for matrix in matrices:
                if matrix.parameter in values:
                    replaced[str(matrix.chain[0].target)] = values[matrix.parameter]
                    chains.append(matrix.chain)
        if first is None:
            count = len(self.samples)
        else:
            count = first
        divergences = []
        for sample, reference in enumerate(self.dense[:count]):
            output = self.forward.finish_sample(sample, replaced, chains)
            divergences.append(reference.kl(_as_rows(output)))
        return KL.from_sequences(divergences)


def _as_rows(output: Any) -> Tensor:
    """Logits as [T, V]."""
    logits = select_logits(output)
    return logits.reshape(-1, logits.shape[-1])


def _pack_levels(levels: Sequence[Level]) -> tuple[dict[str, Tensor], JSON]:
    """Levels as tensors and JSON, for the journal."""
    tensors = {}
    for index, level in enumerate(levels):
        tensors[f"{index} kept"] = level.kept
        tensors |= {f"{index} columns {name}": value for name, value in level.columns.items()}
    return tensors, {"errors": [level.error for level in levels]}


def _unpack_levels(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], sizes: Sequence[int]
) -> list[Level]:
    """The levels that ``_pack_levels`` wrote."""
    levels: list[Level] = []
    for index in range(len(sizes)):
        columns = {}
        for key, value in tensors.items():
            if key.startswith(f"{index} columns "):
                columns[key.split(" ", 2)[2]] = value
        levels.append(Level(tensors[f"{index} kept"], columns, facts["errors"][index]))
    return levels

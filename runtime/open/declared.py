"""What an artifact says of its sparse weights: pattern and metric of each, in the figures of its
manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from secateur.graph import Program, Sparse, parse_pattern
from secateur.graph.errors import ArtifactError, PatternError
from secateur.graph.program import JSON
from secateur.graph.reading import reason_of
from secateur.graph.sparse import NONE, SparseWeights
from secateur.runtime.save.artifact import MANIFEST, read_manifest

FIGURE = "sparse"


def to_json(sparse: SparseWeights) -> dict[str, JSON]:
    """Pattern and metric by parameter name; tensors are left out.

    Args:
        sparse: by parameter name.
    """
    values: dict[str, JSON] = {}
    for name, weight in sparse.items():
        values[name] = {"pattern": str(weight.pattern), "metric": weight.metric}
    return values


def from_json(value: Mapping[str, Mapping[str, str]]) -> SparseWeights:
    """The inverse of ``to_json``.

    Args:
        value: pattern and metric by parameter name.

    Raises:
        PatternError: a pattern does not parse.
        KeyError: a field is missing.
    """
    sparse: dict[str, Sparse] = {}
    for name, weight in value.items():
        sparse[name] = Sparse(parse_pattern(weight["pattern"]), weight["metric"])
    return sparse


def make_declaration(program: Program, holder: nn.Module) -> dict[str, JSON]:
    """What stands in the manifest, under the names that the stock model which holds the parameters
    gives them.

    Args:
        program: with sparse weights, or none.
        holder: the stock model over the program's parameters.

    Raises:
        ArtifactError: the stock model does not hold one as a parameter of its own.
    """
    owned = dict(program.named_parameters())
    names = {id(p): name for name, p in holder.named_parameters()}
    lost = [name for name in program.sparse if id(owned[name]) not in names]
    if lost:
        raise ArtifactError(
            f"{lost[0]} is sparse, and no parameter of {type(holder).__name__} is that weight"
        )
    return to_json({names[id(owned[name])]: weight for name, weight in program.sparse.items()})


def read_declared(folder: Path) -> SparseWeights:
    """The sparse weights of an artifact; none where the folder is no artifact, or nothing in it is
    sparse.

    Args:
        folder: of an artifact, or any other.

    Raises:
        ArtifactError: the manifest is damaged.
    """
    if not (folder / MANIFEST).is_file():
        return NONE
    try:
        return from_json(read_manifest(folder).figures.get(FIGURE, {}))
    except (PatternError, AttributeError, KeyError, TypeError) as error:
        why = reason_of(error)
        raise ArtifactError(
            f"{folder / MANIFEST} is damaged ({why}): save the artifact again"
        ) from error

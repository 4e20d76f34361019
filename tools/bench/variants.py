"""Variants of one dense checkpoint, made for timing: 2:4 and integer forms by magnitude alone, and
a pruned one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from secateur.graph import Program, capture, with_parameters
from secateur.graph.errors import ArtifactError
from secateur.passes import Pipeline
from secateur.passes.lowering.layers import linear_layers, parameter_values
from secateur.runtime.open.source import open_model
from secateur.runtime.save.artifact import read_manifest
from secateur.runtime.save.stock_checkpoint import save
from secateur.tools.bench.kernels import two_of_four

# By name: whether the weights are made 2:4 first, and the pipeline.  lower takes the options of the
# run.
RECIPES: Mapping[str, tuple[bool, str]] = MappingProxyType(
    {
        "2:4": (True, "lower{OPTIONS}"),
        "2:4+int8": (True, "quantize{bits=8},lower{OPTIONS}"),
        "2:4+int4": (True, "quantize{bits=4},lower{OPTIONS}"),
        "int8": (False, "quantize{bits=8},lower{OPTIONS}"),
        "int4": (False, "quantize{bits=4},lower{OPTIONS}"),
        "pruned": (False, "score{metric=random},prune-width{mlp=0.5}"),
    }
)


def make_variants(
    model: Path, names: list[str], work: Path, dtype: str, head: str, tell: Callable[[str], None]
) -> dict[str, Path]:
    """Folders of variants of a checkpoint, kept in ``work`` and made again only if they are not
    there.

    Args:
        names: of RECIPES.
        dtype: that the packed ones compute in.
        head: option of ``lower``.
    """
    options = f"smallest=true,dtype={dtype},head={head}"
    folders = {name: work / f"{name}-{dtype}-head-{head}".replace(":", "") for name in names}
    missing = [name for name in names if not _is_there(folders[name])]
    program = None
    if missing:
        program = capture(open_model(model), folder=model)
    for name in missing:
        assert program is not None
        tell(f"making {name} by magnitude, for timing only")
        sparse, text = RECIPES[name]
        source = program
        if sparse:
            source = all_24(program)
        variant = Pipeline.parse(text.replace("OPTIONS", options)).run(source)
        save(variant, folders[name], check=False)
    return folders


def all_24(program: Program) -> Program:
    """The program with the weights of all linear layers but heads and tables 2:4."""
    values = parameter_values(program)
    sparse = {}
    for layer in linear_layers(program)[0]:
        if not layer.head and not layer.looked_up:
            sparse[layer.parameter] = two_of_four(values[layer.parameter])
    return with_parameters(program, sparse)


def _is_there(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except ArtifactError:
        return False
    return True

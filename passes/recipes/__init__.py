"""Recipes by name: files of this folder, each a published practice with its source, to be used as it is or copied."""

from __future__ import annotations

from pathlib import Path

from secateur.graph.errors import PipelineError
from secateur.passes.options import did_you_mean
from secateur.passes.recipe import load_recipe

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def text(name: str) -> str:
    """The file of a recipe.

    Raises: PipelineError: no recipe has that name."""
    if name not in names():
        raise PipelineError(f"no recipe is named {name!r}; {did_you_mean(name, names())}")
    return (FOLDER / f"{name}.yaml").read_text("utf-8")


def told(name: str) -> dict[str, str]:
    """What a recipe is for (``about``) and where it was published (``source``)."""
    read = load_recipe(text(name))
    return {"about": read.about or "", "source": read.source or ""}

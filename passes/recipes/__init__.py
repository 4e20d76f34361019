"""Recipes by name: files of this folder, each a published practice with its source."""

from __future__ import annotations

from pathlib import Path

from secateur.graph.errors import PipelineError
from secateur.passes.language.options import did_you_mean
from secateur.passes.language.recipe import load_recipe

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The file of a recipe.

    Args:
        name: one of ``recipe_names``.

    Returns:
        the YAML text.

    Raises:
        PipelineError: no recipe has that name.
    """
    if name not in recipe_names():
        raise PipelineError(f"no recipe is named {name!r}; {did_you_mean(name, recipe_names())}")
    return (FOLDER / f"{name}.yaml").read_text("utf-8")


def describe_recipe(name: str) -> dict[str, str]:
    """What a recipe is for (``about``) and where it was published (``source``).

    Args:
        name: one of ``recipe_names``.

    Returns:
        texts by key, empty where the recipe has none.
    """
    read = load_recipe(recipe_text(name))
    return {"about": read.about or "", "source": read.source or ""}

"""Importances and passes of other people: by entry point of an installed package, or by
``module:Class``.

A pipeline text or a recipe names a plug-in by its name, like any other; only an installed package
or the person who starts the run can bring one in, never a file that came with a model: a module in
a model's folder is refused.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from secateur.graph.errors import PipelineError

log = logging.getLogger("secateur.passes")


class PluginError(PipelineError):
    """A plug-in that cannot be used: it is not found, is of the wrong kind, fails on import, or
    lies beside a model."""


def load_class(where: str, base: type[object] | tuple[type[object], ...]) -> type[Any]:
    """The class that ``module:Class`` names.

    Args:
        where: ``module:Class``.
        base: what it must be a subclass of.

    Returns:
        the class.

    Raises:
        PluginError: no such module or class, another kind of thing, or a module inside a model's
            folder; that is found out before any code of the module runs.
    """
    module, _, name = where.partition(":")
    if not module or not name.isidentifier():
        raise PluginError(f"{where!r} is no plug-in: write module:Class")
    check_place(module)
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except (
        Exception
    ) as error:  # code of others: whatever it raises, the run cannot go on without it
        raise PluginError(
            f"the plug-in {where} fails on import: {type(error).__name__}: {error}"
        ) from error
    if isinstance(base, tuple):
        bases = base
    else:
        bases = (base,)
    if not isinstance(cls, type) or not issubclass(cls, bases):
        wanted = " or ".join(parent.__name__ for parent in bases)
        raise PluginError(
            f"{where} is {_describe_kind(cls)}, expected a subclass of secateur.passes.{wanted}"
        )
    if not isinstance(getattr(cls, "name", None), str):
        raise PluginError(f"{where} has no name: give the class  name: ClassVar[str] = '...'")
    return cls


def _describe_kind(found: object) -> str:
    """What was found in place of a class, for messages."""
    if found is None:
        return "nothing"
    return f"a {type(found).__name__}"


def check_place(module: str) -> None:
    """Refuse a module that does not exist, or whose file lies in a folder that holds a model,
    before it is imported.

    Args:
        module: dotted name.
    """
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError) as error:
            raise PluginError(f"no module named {name!r}: {error}") from error
        if spec is None:
            raise PluginError(
                f"no module named {name!r}: install its package, or put its folder on PYTHONPATH"
            )
        for place in [spec.origin, *(spec.submodule_search_locations or ())]:
            holder = None
            if place and place not in ("built-in", "frozen"):
                holder = model_folder_above(Path(place))
            if holder is not None:
                raise PluginError(
                    f"{name} lies in {holder}, which holds a model: no code of a model's folder "
                    "is run"
                )


def model_folder_above(path: Path) -> Path | None:
    """The folder around a file that holds a model (its configuration or its weights), links
    followed or not.

    Args:
        path: of a file or folder.

    Returns:
        the nearest such folder, or None.
    """
    absolute = path.absolute()
    folders = dict.fromkeys([absolute, *absolute.parents, path.resolve(), *path.resolve().parents])
    return next((folder for folder in folders if folder.is_dir() and _holds_model(folder)), None)


def _holds_model(folder: Path) -> bool:
    """Whether a folder has weights, or a configuration with a model type."""
    if any(folder.glob("*.safetensors")):
        return True
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def list_installed(group: str) -> dict[str, EntryPoint]:
    """The plug-ins that installed packages bring to a table, by name.

    Args:
        group: of entry points.

    Returns:
        entry points by name.
    """
    return {point.name: point for point in entry_points(group=group)}


def load_installed(group: str, name: str, base: type[object]) -> type[Any] | None:
    """The class of an installed plug-in, or None where no package has one of this name.

    Args:
        group: of entry points.
        name: of the plug-in.
        base: what it must be a subclass of.

    Raises:
        PluginError: as ``load_class``; or the class calls itself otherwise.
    """
    point = list_installed(group).get(name)
    if point is None:
        return None
    cls = load_class(f"{point.module}:{point.attr}", base)
    if cls.name != name:
        raise PluginError(
            f"the entry point {name!r} of {group} gives a class named {cls.name!r}: use one name"
        )
    log.info(
        "%s comes from the installed package %s", name, getattr(point.dist, "name", point.module)
    )
    return cls

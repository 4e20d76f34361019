"""Secateur: a pruning compiler for language models.

::

    program = secateur.capture("path/to/model")
    groups = secateur.coupled_groups(program)
    program = secateur.Pipeline.parse("score{metric=taylor},prune-width{ratio=0.25}").run(program,
    data=windows) secateur.save(program, "path/to/smaller")
    model = secateur.load("path/to/smaller")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.graph import (
        CoupledGroup,
        Member,
        Program,
        SecateurError,
        coupled_groups,
        coupling_graph,
        keep,
        masked_call,
        verify,
    )
    from secateur.passes import Pipeline
    from secateur.runtime import (
        compress,
        load,
        open_engine,
        open_model,
        plan_config,
        running,
        save,
        save_weights,
        to_transformers,
        verify_folder,
    )
    from secateur.runtime.open.capturing import capture

__version__ = "0.2.0.dev0"

FOLDERS = ("graph", "kernels", "passes", "runtime", "tools")
HOMES = {
    "secateur.graph": (
        "CoupledGroup",
        "Member",
        "Program",
        "SecateurError",
        "coupled_groups",
        "coupling_graph",
        "keep",
        "masked_call",
        "verify",
    ),
    "secateur.passes": ("Pipeline",),
    "secateur.runtime": (
        "compress",
        "load",
        "open_engine",
        "open_model",
        "plan_config",
        "running",
        "save",
        "save_weights",
        "to_transformers",
        "verify_folder",
    ),
    "secateur.runtime.open.capturing": ("capture",),
}
"""Where each public name is defined: a folder is loaded when a name of it is first used, so that
the command line answers before torch is there."""
RENAMED = {"raise_model": "to_transformers"}
"""Names that earlier versions had, and what they are called now."""


if not TYPE_CHECKING:  # a checker shall see that other names are missing

    def __getattr__(name: str) -> object:
        if name in FOLDERS:
            return import_module(f"secateur.{name}")
        for home, names in HOMES.items():
            if name in names:
                value = getattr(import_module(home), name)
                globals()[name] = value
                return value
        if name in RENAMED:
            raise AttributeError(f"secateur.{name} is called secateur.{RENAMED[name]} now")
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted([*globals(), *FOLDERS, *__all__])


__all__ = [
    "CoupledGroup",
    "Member",
    "Pipeline",
    "Program",
    "SecateurError",
    "capture",
    "compress",
    "coupled_groups",
    "coupling_graph",
    "keep",
    "load",
    "masked_call",
    "open_engine",
    "open_model",
    "plan_config",
    "running",
    "save",
    "save_weights",
    "to_transformers",
    "verify",
    "verify_folder",
]

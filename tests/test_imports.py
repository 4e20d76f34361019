"""Imports point one way: tools -> runtime -> passes -> graph, and runtime -> kernels."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# "" is the public face, secateur/__init__.py, which itself imports all but the tools.
MAY_IMPORT: dict[str, set[str]] = {
    "graph": {"graph"},
    "kernels": {"kernels"},
    "passes": {"passes", "graph"},
    "runtime": {"runtime", "passes", "graph", "kernels"},
    "tools": {"tools", "runtime", "passes", "graph", "kernels", ""},
}
HEAVY_AND_OPTIONAL = {"gguf", "kernels", "triton"}


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted module) of every import of a module, wherever it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found += [
                (node.lineno, f"{base}.{alias.name}" if base == "secateur" else base)
                for alias in node.names
            ]
    return found


def offences(folder: str, source: str) -> list[str]:
    allowed, bad = MAY_IMPORT[folder], []
    for line, module in imported(ast.parse(source)):
        parts = module.split(".")
        if module.startswith("."):
            bad.append(f"{line}: relative import {module}: write secateur.{folder}...")
        elif parts[0] in MAY_IMPORT:
            bad.append(f"{line}: {module} is not the package: write secateur.{module}")
        elif parts[0] == "secateur" and (parts[1:2] or [""])[0] not in allowed:
            bad.append(f"{line}: {folder}/ must not import {module}")
    return bad


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_stands_below_it(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [
        f"{f.relative_to(ROOT)}:{bad}" for f in files for bad in offences(folder, f.read_text())
    ] == []


@pytest.mark.parametrize(
    "line",
    [
        "from secateur.passes.base import Pass",
        "import secateur.runtime",
        "from secateur import tools",
        "import secateur",
        "from ..passes import base",
        "import kernels",
        "def late():\n    from secateur.tools.cli import main",
    ],
)
def test_the_checker_sees(line: str) -> None:
    assert len(offences("graph", line)) == 1


def test_every_room_is_linked_into_the_package_by_a_relative_link() -> None:
    for folder in MAY_IMPORT:
        link = ROOT / "secateur" / folder
        assert link.is_symlink() and str(link.readlink()) == f"../{folder}"


def test_optional_packages_are_not_imported_when_a_module_is_loaded() -> None:
    for file in (
        f for folder in MAY_IMPORT for f in (ROOT / folder).rglob("*.py") if folder != "kernels"
    ):
        top = {
            name.split(".")[0]
            for node in ast.parse(file.read_text()).body
            for _, name in _top_level(node)
        }
        assert not top & HEAVY_AND_OPTIONAL, f"{file}: import it inside the function that needs it"


def _top_level(node: ast.stmt) -> list[tuple[int, str]]:
    return imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else []

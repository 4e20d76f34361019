"""Style metrics of Python sources: density of the code and the words of its names.

Run as a script to print a table: ``python -P tests/style/metrics.py [FOLDER ...]``.  The goals are
    held by
``test_style.py``.  All numbers are taken from the syntax tree with the same rules for every file.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("graph", "passes", "kernels", "runtime", "tools", "secateur")
MAX_COLUMNS = 100

# Local names that say nothing of what they hold.
VAGUE_NAMES = frozenset("found one at told kept made given held whole there here own left".split())
# Irregular participles and adjectives that do not name what a function does.
BARE_WORDS = frozenset(
    """
    told said kept whole dealt made given held found left meant bent cut built sent shown known
    drawn taken seen done gone read run written chosen frozen hidden broken own alone exact close
    same sparse dense equal alike legal idle empty loose free able available missing wrong right
    ready open unsafe safe known unknown
    """.split()
) - frozenset("read run cut open close free".split())  # these are verbs, too
VERBS_IN_ED = frozenset("need feed embed seed shed speed exceed proceed".split())


# Words that make a name of a participle no noun phrase: ``computed_from``, ``owned_by``.
PARTICLES = frozenset("after as at before by for from here in of on over there to under".split())


def is_bare_word(name: str) -> bool:
    """Tell whether a function name is a participle or an adjective without a noun."""
    first, *rest = name.strip("_").lower().split("_")
    if not first or first in VERBS_IN_ED:
        return False
    if rest and rest[0] not in PARTICLES:
        return False
    return first in BARE_WORDS or (first.endswith("ed") and len(first) > 3)


@dataclass
class Metrics:
    """Counts over a set of files; the ratios are properties."""

    files: int = 0
    lines: int = 0
    filled_lines: int = 0
    long_lines: int = 0
    nodes: int = 0
    functions: int = 0
    bare_functions: int = 0
    one_word_functions: int = 0
    assignments: int = 0
    vague_assignments: int = 0
    ternaries: int = 0
    comprehensions: int = 0
    parallel_assignments: int = 0
    annotations: int = 0
    any_annotations: int = 0
    public_functions: int = 0
    documented_functions: int = 0

    def add(self, other: Metrics) -> None:
        """Add the counts of ``other`` to these."""
        for field in fields(self):
            total = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, total)

    def ratios(self) -> dict[str, float]:
        """Return the measures that the goals are written in, by name."""
        return {
            "bare function names, %": _percent(self.bare_functions, self.functions),
            "one-word function names, %": _percent(self.one_word_functions, self.functions),
            "vague local names, %": _percent(self.vague_assignments, self.assignments),
            "ternaries / 1000 lines": _per_thousand(self.ternaries, self.lines),
            "comprehensions / 1000 lines": _per_thousand(self.comprehensions, self.lines),
            "parallel assignments / 1000 lines": _per_thousand(
                self.parallel_assignments, self.lines
            ),
            "syntax nodes / line": self.nodes / max(self.filled_lines, 1),
            f"lines over {MAX_COLUMNS} columns, %": _percent(self.long_lines, self.filled_lines),
            "annotations that hold Any, %": _percent(self.any_annotations, self.annotations),
            "public functions documented, %": _percent(
                self.documented_functions, self.public_functions
            ),
        }


def _percent(part: int, total: int) -> float:
    return 100.0 * part / max(total, 1)


def _per_thousand(count: int, lines: int) -> float:
    return 1000.0 * count / max(lines, 1)


def measure_source(source: str) -> Metrics:
    """Return the metrics of one module's text."""
    tree = ast.parse(source)
    metrics = Metrics(files=1)
    for line in source.splitlines():
        metrics.lines += 1
        if line.strip():
            metrics.filled_lines += 1
        if len(line) > MAX_COLUMNS:
            metrics.long_lines += 1
    for node in ast.walk(tree):
        metrics.nodes += 1
        _count_expression(node, metrics)
        _count_assignment(node, metrics)
        _count_annotations(node, metrics)
    for function, is_public in _functions(tree):
        _count_function(function, is_public, metrics)
    return metrics


def _count_expression(node: ast.AST, metrics: Metrics) -> None:
    if isinstance(node, ast.IfExp):
        metrics.ternaries += 1
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        metrics.comprehensions += 1


def _count_assignment(node: ast.AST, metrics: Metrics) -> None:
    if not isinstance(node, ast.Assign):
        return
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            metrics.parallel_assignments += 1
        for name in ast.walk(target):
            if isinstance(name, ast.Name):
                metrics.assignments += 1
                metrics.vague_assignments += name.id in VAGUE_NAMES


def _count_annotations(node: ast.AST, metrics: Metrics) -> None:
    annotations: list[ast.expr | None] = []
    if isinstance(node, ast.AnnAssign | ast.arg):
        annotations.append(node.annotation)
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        annotations.append(node.returns)
    for annotation in annotations:
        if annotation is not None:
            metrics.annotations += 1
            metrics.any_annotations += bool(re.search(r"\bAny\b", ast.unparse(annotation)))


def _functions(
    node: ast.AST, is_public: bool = True
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Yield every function with whether it is reachable by public names alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, is_public and not child.name.startswith("_")
            yield from _functions(child, False)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, is_public and not child.name.startswith("_"))
        else:
            yield from _functions(child, is_public)


def _count_function(
    function: ast.FunctionDef | ast.AsyncFunctionDef, is_public: bool, metrics: Metrics
) -> None:
    name = function.name
    if name.startswith("__") and name.endswith("__"):
        return
    metrics.functions += 1
    metrics.bare_functions += is_bare_word(name)
    metrics.one_word_functions += "_" not in name.strip("_")
    if is_public:
        metrics.public_functions += 1
        metrics.documented_functions += ast.get_docstring(function) is not None


def measure_folders(folders: tuple[str, ...] = FOLDERS, root: Path = ROOT) -> Metrics:
    """Return the metrics of all sources below ``folders``; links are not followed."""
    total = Metrics()
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in (file, *file.parents)):
                total.add(measure_source(file.read_text()))
    return total


def main(arguments: list[str]) -> None:
    """Print a table of the metrics, a column for each folder and one for all of them."""
    folders = tuple(arguments) or FOLDERS
    columns = {folder: measure_folders((folder,)).ratios() for folder in folders}
    columns["all"] = measure_folders(folders).ratios()
    print(f"{'':36}" + "".join(f"{folder:>12}" for folder in columns))
    for measure in columns["all"]:
        cells = "".join(f"{ratios[measure]:12.1f}" for ratios in columns.values())
        print(f"{measure:36}{cells}")


if __name__ == "__main__":
    main(sys.argv[1:])

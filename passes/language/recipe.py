"""Recipe files: a YAML list of passes, with where the data is and a seed.

about: what it is for (may be left out, as may source, seed and data)
source: where it was published
seed: 0
data: {file: calibration.txt, tokens: 10000, window: 256}
passes:
  - score: {metric: taylor}
  - prune-width: {mlp: 0.25}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.graph.errors import PipelineError
from secateur.graph.reading import MAX_DEPTH, reading, reason_of, shown
from secateur.passes.language.options import did_you_mean

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
"""Values of a recipe, aliases written out: a few lines of anchors can stand for billions."""
MAX_SEED = 2**32 - 1
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


class DataSpec(BaseModel):
    """Where calibration text is read from and how much of it: tokens in all, in windows of
    ``window`` tokens.

    file: one text file, or several; each may end in ``:SHARE``, its part of the tokens by weight.
    field: key or column of the text in rows of .jsonl, .json, .csv and .parquet.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str | tuple[str, ...] | None = None
    field: str = "text"
    tokens: int = Field(default=10_240, ge=1)
    window: int = Field(default=256, ge=2)


class Recipe(BaseModel):
    """The face of a recipe file; the entries of ``passes`` are checked by the passes themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    passes: list[Any] = Field(min_length=1)
    data: DataSpec | None = None
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    about: str | None = None
    source: str | None = None


class _Loader(yaml.SafeLoader):
    """The safe loader; reads 2e6 as a number, 2:4 as text, and refuses a key that is given
    twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[Any]()
        for entry, _ in node.value:
            key = self.construct_object(entry, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise PipelineError(
                    f"recipe: {shown(key)} is no name{_describe_mark(entry.start_mark)}"
                )
            if key in seen:
                raise PipelineError(
                    f"recipe: {shown(key)} is given twice{_describe_mark(node.start_mark)}"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper; quotes words that the loader above would read as numbers."""


_INT = "tag:yaml.org,2002:int"
_INTEGER = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)$")
_Loader.yaml_implicit_resolvers = {  # YAML 1.1 takes 2:4 for a number to the base sixty
    first: [(tag, pattern) for tag, pattern in found if tag != _INT]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, _INTEGER, list("-+0123456789"))
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(rf"{NUMBER.pattern}$"), list("-+.0123456789")
    )


def load_recipe(recipe: str | Path) -> Recipe:
    """A recipe from a file's path, or from YAML text (a string with a line end).

    Args:
        recipe: path or text.

    Raises:
        PipelineError: no such file, not YAML, not a map, a key that is unknown or of the wrong
            type.
    """
    if isinstance(recipe, str) and "\n" in recipe:
        text = recipe
    else:
        text = _read_file(Path(recipe))
    if len(text) > MAX_BYTES:
        raise PipelineError(f"recipe: {len(text):,} characters, at most {MAX_BYTES:,} are read")
    with reading("recipe", PipelineError, "Mend the file"):
        value = read_yaml(text, _Loader)
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise PipelineError(f"recipe: expected a map with the key 'passes', found {kind}")
        try:
            return Recipe.model_validate(value)
        except ValidationError as error:
            raise PipelineError(f"recipe: {_first_error(error)}") from None


def read_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The value of a YAML document whose anchors stand for no more values than a person would
    write.

    Args:
        text: the document.
        loader: a safe loader.

    Raises:
        PipelineError: not YAML, nested too deep, an anchor inside itself, or too many values.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        values = _count_values(node, {}, 0)
        if values > MAX_NODES:
            raise PipelineError(
                f"recipe: its anchors stand for {shown(values)} values, at most {MAX_NODES:,} "
                "are read"
            )
        return reader.construct_document(node)
    except yaml.YAMLError as error:
        place = _describe_mark(getattr(error, "problem_mark", None))
        why = getattr(error, "problem", None) or reason_of(error)
        raise PipelineError(f"recipe: not YAML{place}: {shown(why)[1:-1]}") from None
    except RecursionError:
        raise PipelineError(f"recipe: nested deeper than {MAX_DEPTH}") from None
    finally:
        reader.dispose()


def _count_values(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for with its aliases written out."""
    if depth > MAX_DEPTH:
        raise PipelineError(
            f"recipe: nested deeper than {MAX_DEPTH}{_describe_mark(node.start_mark)}"
        )
    if id(node) in known:
        return known[id(node)]
    total = 1
    if isinstance(node, yaml.CollectionNode):
        for entry in node.value:
            if isinstance(entry, tuple):
                parts = entry
            else:
                parts = (entry,)
            total += sum(_count_values(part, known, depth + 1) for part in parts)
    known[id(node)] = total
    return total


def dump_recipe(passes: list[object], data: DataSpec | None, seed: int) -> str:
    """The YAML of a recipe.

    Args:
        passes: entries as JSON values.
        data: where text is read from, or None.
        seed: of the run.
    """
    value: dict[str, object] = {"seed": seed, "passes": passes}
    if data is not None:
        value["data"] = data.model_dump()
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if not any(line_end in text for line_end in "\x85\u2028\u2029"):
        return text
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False
    )  # escapes them: as they stand, YAML reads them as blanks


def _read_file(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        PipelineError: too large, or it cannot be read.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PipelineError(
                f"recipe {path}: {path.stat().st_size:,} bytes, at most {MAX_BYTES:,} are read"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if path.suffix:
            hint = ""
        else:
            hint = "; `secateur recipes` lists those that have a name"
        name = shown(str(path))[1:-1]
        raise PipelineError(f"recipe {name}: cannot be read: {reason_of(error)}{hint}") from None


def _first_error(error: ValidationError) -> str:
    """The first complaint of a validator, in one sentence."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        model = DataSpec if first["loc"][0] == "data" else Recipe
        return (
            f"unknown key {shown(place)}; {did_you_mean(str(first['loc'][-1]), model.model_fields)}"
        )
    return f"{place}: {first['msg']}, found {shown(first['input'])}"


def _describe_mark(mark: yaml.Mark | None) -> str:
    """The line of a YAML mark, for messages; empty where unknown."""
    if mark is not None:
        return f" (line {mark.line + 1})"
    return ""

"""The calibration text of ``secateur compress``: which files, whose share of the tokens is how
large, and the windows in the tokens of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.graph import Program
from secateur.passes import DataSpec
from secateur.passes.calibration.windows import beginning_token
from secateur.passes.opening import open_tokenizer
from secateur.tools.evaluate.corpus import (
    TokenWindows,
    calibration_windows,
    mix_windows,
    read_documents,
    share_windows,
    shuffle_documents,
)
from secateur.tools.plan.advice import document_digests
from secateur.tools.report.console import BadInput


@dataclass(frozen=True)
class TextSource:
    """A text file and the weight of its part of the tokens."""

    path: Path
    share: float = 1.0


def choose_data(
    from_recipe: DataSpec | None,
    recipe: str | None,
    data: Sequence[str] | None,
    field: str | None,
    tokens: int | None,
    window: int | None,
) -> DataSpec:
    """Return the recipe's data, where the command line does not say otherwise.

    Args:
        from_recipe: what the recipe says of data, or None.
        recipe: name or file; the files that a recipe names are relative to it.
        data: of the command line, ``FILE`` or ``FILE:SHARE`` each.
        field: of the command line.
        tokens: of the command line.
        window: of the command line.
    """
    spec = from_recipe or DataSpec()
    files = list(data or ())
    if not files and recipe is not None:
        files = [str(Path(recipe).parent / name) for name in list_files(spec)]
    return DataSpec(
        file=tuple(files) or None,
        field=field or spec.field,
        tokens=tokens or spec.tokens,
        window=window or spec.window,
    )


def list_files(spec: DataSpec) -> list[str]:
    """Return the files of a specification as they were given, shares included."""
    if spec.file is None:
        return []
    if isinstance(spec.file, str):
        return [spec.file]
    return list(spec.file)


def parse_sources(spec: DataSpec) -> list[TextSource]:
    """Return the files and shares of a specification.

    Raises:
        BadInput: a file does not exist, or a share is no number above zero.
    """
    return [_parse_source(text) for text in list_files(spec)]


def _parse_source(text: str) -> TextSource:
    path = Path(text)
    share = 1.0
    name, colon, weight = text.rpartition(":")
    if colon and not path.is_file():
        path = Path(name)
        try:
            share = float(weight)
        except ValueError:
            share = math.nan
        if not 0 < share < math.inf:
            raise BadInput(f"--data {text}: no such file, and {weight!r} is no share above zero")
    if not path.is_file():
        raise BadInput(f"the calibration text {path} is no file")
    return TextSource(path, share)


def read_windows(
    program: Program, spec: DataSpec, seed: int
) -> tuple[TokenWindows, dict[str, Any]]:
    """Read calibration windows in the tokens of the model.

    Args:
        program: the captured model, whose folder holds the tokenizer.
        spec: files, field, tokens and window.
        seed: of the order of documents.

    Returns:
        The windows, and what the manifest will say of them.

    Raises:
        BadInput: no tokenizer.
        CorpusError: a file cannot be read, or holds too little text.
    """
    if program.source.folder is None:
        raise BadInput("the model came from no folder, so there is no tokenizer for the text")
    tokenizer = open_tokenizer(program.source.folder, BadInput)
    sources = parse_sources(spec)
    shares = [source.share for source in sources]
    counts = share_windows(spec.tokens // spec.window, shares)
    parts: list[TokenWindows] = []
    used: list[str] = []
    for source, count in zip(sources, counts, strict=True):
        documents = read_documents(
            [source.path],
            field=spec.field,
            render=lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False)),
        )
        windows = calibration_windows(
            documents,
            tokenizer,
            tokens=count * spec.window,
            window=spec.window,
            seed=seed,
            bos=beginning_token(tokenizer),
        )
        parts.append(windows)
        used += shuffle_documents(documents, seed)[: windows.documents]
    joined = mix_windows(parts)
    figures: dict[str, Any] = {**joined.describe(), "documents": document_digests(used)}
    if len(sources) > 1:
        figures["windows_by_file"] = {
            source.path.name: count for source, count in zip(sources, counts, strict=True)
        }
    return joined, figures

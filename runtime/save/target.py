"""Where output may go: never over, inside or around what it is made from, and never over a file
that was there."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.graph.errors import ArtifactError
from secateur.passes import Pipeline

READ_OPTIONS = frozenset({"teacher", "data"})
"""Options of passes that name a file or folder to read, with or without a separator in the name."""


def resolve_target(path: str | Path) -> Path:
    """The place that a path leads to, links resolved.

    Args:
        path: of a folder to be made.

    Raises:
        ArtifactError: a file is there, or a link that leads nowhere.
    """
    absolute = Path(path).expanduser().absolute()
    try:
        place = absolute.resolve()
        if place.is_file():
            raise ArtifactError(f"{absolute} is a file: give the name of a folder to be made")
        if absolute.is_symlink() and not place.is_dir():
            raise ArtifactError(f"{absolute} is a link that leads nowhere: give the folder itself")
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ArtifactError(f"{absolute} cannot be reached: {error}") from error
    return place


def refuse_inputs(place: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse a place that is, holds or lies in what the output is made from.

    Args:
        place: as ``resolve_target`` gives it.
        inputs: folders and files that are read; names that are no paths here are passed over.

    Raises:
        ArtifactError: names the input.
    """
    for name in inputs:
        source = None
        if name:
            source = Path(name).expanduser()
        if source is None or not source.exists():
            continue
        inside = source.is_dir() and _lies_in(place, source)
        around = any(_lies_in(file, place) for file in _real_files(source))
        if inside or around or (place.exists() and place.samefile(source)):
            raise ArtifactError(
                f"{place} is, holds or lies in {source}, which is read: nothing is written there; "
                "choose another place"
            )


def inputs_of(pipeline: Pipeline) -> list[str]:
    """The paths that the passes of a pipeline read: teachers, training texts."""
    paths = []
    for step in pipeline.passes:
        for option in dataclasses.fields(step):
            value = getattr(step, option.name)
            if isinstance(value, str) and (option.name in READ_OPTIONS or os.sep in value):
                paths.append(value)
    return paths


def check_files(
    files: Iterable[Path], *, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()
) -> None:
    """Refuse files that must not be written; touches nothing.

    Args:
        files: that will be written by ``new_file``.
        overwrite: whether a file of that name may be replaced.
        inputs: folders and files that are read.

    Raises:
        ArtifactError: names the file and the reason.
    """
    read = list(inputs)
    for file in files:
        place = file.expanduser().resolve()
        if place.is_dir():
            raise ArtifactError(f"{file} is a folder: give the name of a file")
        refuse_inputs(place, read)
        if place.exists() and not overwrite:
            raise ArtifactError(_is_there(file))


@contextmanager
def new_file(file: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a file that is whole or absent.

    Args:
        file: to be made, its folder too; a link is followed.
        overwrite: whether a file of that name may be replaced.

    Yields:
        A path beside it, with the same ending, to be written.

    Raises:
        ArtifactError: something stands there, and may not be replaced.
    """
    place = file.expanduser().resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(
        prefix=f".{place.stem}.", suffix=place.suffix, dir=place.parent
    )
    os.close(descriptor)
    part = Path(name)
    try:
        yield part
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        if overwrite:
            part.replace(place)
        else:
            os.link(part, place)
    except FileExistsError:
        raise ArtifactError(_is_there(file)) from None
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def _is_there(file: Path) -> str:
    return f"{file} is there already: choose another name, or replace it (--overwrite)"


def _real_files(source: Path) -> list[Path]:
    """A folder or file itself, and where the links inside a folder lead."""
    places = [source.resolve()]
    if source.is_dir():
        for path in source.iterdir():
            if path.is_symlink():
                places.append(path.resolve())
    return places


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies below it, by what the file system says they are."""
    if not folder.is_dir():
        return False
    return any(place.exists() and place.samefile(folder) for place in (path, *path.parents))

"""Opening of model folders and tokenizers that passes name.

Passes stand below the runtime, which opens models safely; it registers its opener here when it is
imported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.graph.errors import PipelineError, SecateurError, SourceError
from secateur.graph.reading import read_json_object, reading, shown

Opener = Callable[[Path], Any]
CONFIG = "tokenizer_config.json"
_openers = list[Opener]()


def use_opener(opener: Opener) -> None:
    """Register how model folders are opened; the runtime's ``open_model`` in all but tests.

    Args:
        opener: takes a folder and gives the stock model, all its weights checked.
    """
    _openers[:] = [opener]


def open_model_folder(folder: str | Path, what: str) -> Any:
    """The stock model of a folder, opened with all the checks of the model that is compressed.

    Args:
        folder: with config.json and safetensors.
        what: who asks, for messages: ``teacher``.

    Returns:
        the stock model, in eval mode.

    Raises:
        PipelineError: it is no model folder, or one of the checks failed.
    """
    place = Path(folder).expanduser()
    if not (place / "config.json").is_file():
        raise PipelineError(f"{what}={place} is no model folder (config.json, safetensors)")
    if not _openers:
        raise PipelineError(
            f"{what}={place} cannot be opened: import secateur.runtime, which knows how"
        )
    try:
        return _openers[0](place)
    except SourceError as error:
        raise PipelineError(f"{what}={place}: {error}") from error


def open_tokenizer(name: str | Path, kind: type[SecateurError] = SourceError) -> Any:
    """The tokenizer of a model folder, or of an id in the local cache; no code of it is run.

    Args:
        name: a folder, or a Hugging Face id.
        kind: the class of the error to raise.

    Raises:
        SecateurError: of that kind: there is none, it is damaged, or it names files elsewhere.
    """
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_dir():
        for file in sorted(folder.glob("*.json")):
            if file.name in (CONFIG, "special_tokens_map.json", "added_tokens.json"):
                _check_named_files(read_json_object(file, kind), file, kind)
    with reading(f"{name} has no tokenizer that opens: it", kind, "Fetch or save the model again"):
        return AutoTokenizer.from_pretrained(
            str(name), local_files_only=folder.is_dir(), trust_remote_code=False
        )


def _check_named_files(data: dict[str, Any], file: Path, kind: type[SecateurError]) -> None:
    """Refuse tokenizer fields that name files outside of the folder.

    Raises:
        SecateurError: of the given kind.
    """
    for field, value in data.items():
        if field.endswith("_file") and isinstance(value, str) and Path(value).name != value:
            raise kind(f"{file}: {field} names a file elsewhere ({shown(value)}): drop the field")

"""Files of a source folder that are data and travel with its result: tokenizer, processor, chat
template, licence, card, the modules of a sentence-transformers folder.

Code and pickles never travel, nor does what a link outside the folder leads to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.graph.errors import ArtifactError
from secateur.graph.reading import parse_json, read_json_object

CODE_MAP = "auto_map"
DATA_ENDINGS = frozenset(".json .jinja .model .tiktoken .vocab .bpe .spm".split())
DATA_NAMES = frozenset({"vocab.txt", "merges.txt", "README.md"})
LEGAL = ("license", "licence", "notice", "copying", "use_policy")
CARD = "README.md"
SOURCE_CARD = "SOURCE_README.md"
TEMPLATES = "additional_chat_templates"
MODULES = "modules.json"
WEIGHTS = ".safetensors"
WRITTEN_ANEW = frozenset({"config.json", "generation_config.json", "secateur.json"})
OF_OTHERS = frozenset(
    {"adapter_config.json", "trainer_state.json", "quantize_config.json", "hf_quant_config.json"}
)
"""They speak of an adapter, of a training or of a form of weights that the result has not."""
WIDTH_FIELDS = ("word_embedding_dimension",)


@dataclass
class SideFiles:
    """What became of the files beside the weights.

    copied: names, relative to the folder.
    changed: what was changed in them, a sentence each.
    left_behind: names and reasons.
    """

    copied: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    left_behind: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the entries that are not empty, for the manifest."""
        entries = {"changed": self.changed, "left_behind": self.left_behind}
        return {name: value for name, value in entries.items() if value}


def copy_side_files(
    source: Path, folder: Path, widths: Mapping[int, int] | None = None
) -> SideFiles:
    """Copy what is data from a source folder to the folder of its result.

    Args:
        source: folder of the source model.
        folder: folder of the result.
        widths: new hidden size by old one, for files that state it; None where it stayed.

    Returns:
        What was copied, changed and left behind.

    Raises:
        ArtifactError: a file cannot be read or written.
    """
    report = SideFiles()
    for file in _iterate_top_files(source):
        reason = _reason_to_leave(file, source)
        if reason is None:
            _copy_one(file, folder / _target_name(file), report)
        elif reason:
            report.left_behind[file.name] = reason
    for file in sorted((source / TEMPLATES).glob("*.jinja")):
        if _is_inside(file, source):
            _copy_one(file, folder / TEMPLATES / file.name, report)
    _copy_modules(source, folder, dict(widths or {}), report)
    return report


def _iterate_top_files(source: Path) -> Iterator[Path]:
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            yield file


def _target_name(file: Path) -> str:
    if file.name == CARD:
        return SOURCE_CARD
    return file.name


def _reason_to_leave(file: Path, source: Path) -> str | None:
    """Say why a file does not travel: None where it does, and the empty string where it is
    written anew."""
    name = file.name
    is_weights = file.suffix == WEIGHTS or name.endswith(".index.json")
    if is_weights or name in WRITTEN_ANEW:
        return ""
    if not _is_inside(file, source):
        return "a link that leads out of the folder"
    if name in OF_OTHERS:
        return "speaks of weights that the result has not"
    is_known = name in DATA_NAMES or name.lower().startswith(LEGAL)
    if is_known or file.suffix.lower() in DATA_ENDINGS:
        return None
    if file.suffix == ".py":
        return "code never travels"
    return "no kind of file that is known to be data alone"


def _is_inside(file: Path, source: Path) -> bool:
    """Tell whether a file lies in the folder, or among the blobs of a Hugging Face cache whose
    snapshot the folder is."""
    place = file.resolve()
    home = source.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    return any(place.is_relative_to(root) for root in roots)


def _copy_one(file: Path, target: Path, report: SideFiles) -> None:
    """Copy a file; a JSON object that names code of the source folder loses that entry."""
    if target.exists():
        report.left_behind[file.name] = "the result has a file of its own by that name"
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if file.suffix == ".json" and CODE_MAP in file.read_text("utf-8", errors="replace"):
            values = read_json_object(file, ArtifactError)
            if values.pop(CODE_MAP, None) is not None:
                _write_json(target, values)
                report.copied.append(target.name)
                report.changed.append(f"{target.name}: without {CODE_MAP}, whose code stays behind")
                return
        shutil.copyfile(file, target)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be copied: {error.strerror or error}") from error
    report.copied.append(target.name)


def _copy_modules(source: Path, folder: Path, widths: dict[int, int], report: SideFiles) -> None:
    """Copy the folders that a sentence-transformers ``modules.json`` names.

    A folder with weights of its own reads the hidden size: where that changed it cannot go along,
    and ``modules.json`` stays behind with it.
    """
    places = _module_folders(source)
    weighted = [place for place in places if any((source / place).glob("*" + WEIGHTS))]
    if weighted and widths:
        (folder / MODULES).unlink(missing_ok=True)
        report.copied.remove(MODULES)
        reason = f"{weighted[0]} has weights of the old hidden size"
        report.left_behind |= dict.fromkeys([MODULES, *places], reason)
        return
    for place in places:
        for file in sorted((source / place).iterdir()):
            known = file.suffix in DATA_ENDINGS or file.suffix == WEIGHTS
            if file.is_file() and known and _is_inside(file, source):
                target = folder / place / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if file.suffix == ".json":
                    _copy_with_widths(file, target, widths, report)
                else:
                    shutil.copyfile(file, target)
                report.copied.append(f"{place}/{file.name}")


def _module_folders(source: Path) -> list[str]:
    """List the sub-folders that hold modules beside the model itself."""
    file = source / MODULES
    if not file.is_file():
        return []
    modules = parse_json(file.read_bytes(), file, ArtifactError)
    places: list[str] = []
    if isinstance(modules, list):
        for module in modules:
            place = module.get("path") if isinstance(module, dict) else None
            if isinstance(place, str) and _is_sub_folder(source, place):
                places.append(place)
    return places or [
        path.name for path in sorted(source.glob("[0-9]_*")) if (path / "config.json").is_file()
    ]


def _is_sub_folder(source: Path, place: str) -> bool:
    return place not in ("", ".") and Path(place).name == place and (source / place).is_dir()


def _copy_with_widths(file: Path, target: Path, widths: dict[int, int], report: SideFiles) -> None:
    values = parse_json(file.read_bytes(), file, ArtifactError)
    if not isinstance(values, dict):
        shutil.copyfile(file, target)
        return
    for name in WIDTH_FIELDS:
        width = values.get(name)
        if isinstance(width, int) and width in widths:
            values[name] = widths[width]
            report.changed.append(
                f"{file.parent.name}/{file.name}: {name} {width} -> {values[name]}"
            )
    _write_json(target, values)


def _write_json(target: Path, values: object) -> None:
    target.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")

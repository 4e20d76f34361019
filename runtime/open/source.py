"""Opening a model safely: everything that can be wrong is looked for before a weight is read, and
no code of a model folder is ever run."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.graph.errors import SourceError
from secateur.graph.reading import printable, reading, shown
from secateur.passes.opening import use_opener
from secateur.runtime.open.allowed import allowed_config, read_generation
from secateur.runtime.open.checkpoint import (
    INDEX,
    SINGLE,
    TensorRecord,
    read_checkpoint,
    read_json,
)
from secateur.runtime.open.classes import (
    BUILD_FAILURES,
    build_on_meta,
    innermost_reason,
    model_class,
    silence_transformers,
)
from secateur.runtime.open.finite import check_finite
from secateur.runtime.open.ignored import describe_ignored, find_ignored
from secateur.runtime.open.special_floats import decode_special_floats

log = logging.getLogger(__name__)

CONFIG = "config.json"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_PATTERNS = ["*.json", "model*.safetensors", "*.jinja", "*.model", "*.txt"]
REFUSED_FIELDS: Mapping[str, str] = {
    "quantization_config": "its weights are quantized",
    "per_layer_config": "its layers differ, which the stock class does not honour",
}
DEQUANTIZED_ON_LOADING: Mapping[str, str] = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""Formats that transformers reads as floats, with the class that asks for it."""
SHOWN = 4


def open_model(
    path_or_id: str | Path,
    *,
    weights: bool = True,
    dtype: str | torch.dtype = "auto",
    allow_unexpected: bool = False,
) -> PreTrainedModel:
    """A stock transformers model from a folder or a Hugging Face id, in eval mode.  Never runs code
    of the folder, never reads a pickle.

    Args:
        path_or_id: folder with config.json, or an id in the local cache or on the hub.
        weights: False builds the model on the meta device from its configuration; a lone
            config.json is enough.
        dtype: of the parameters; "auto" keeps the stored one.
        allow_unexpected: leave stored tensors that the class does not use out, with a warning,
            instead of refusing.

    Raises:
        SourceError: no such model, damaged or unsafe files, or weights that disagree with the
            configuration.
    """
    folder = _resolve_folder(path_or_id, weights)
    config, cls = read_config(folder)
    if not weights:
        return _from_config(cls, config, folder, dtype)
    if (folder / "adapter_config.json").is_file():
        raise SourceError(
            f"{folder} holds a PEFT adapter: merge it into its model first (merge_and_unload), "
            "and save"
        )
    stored = read_checkpoint(folder)
    check_weights(cls, config, stored, folder, allow_unexpected=allow_unexpected)
    settings = read_generation(folder)
    with (
        reading(f"{folder}: the model", SourceError, "Fetch or save the model again"),
        silence_transformers(),
    ):
        loaded: Any = cls.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    _check_info(loaded[1], folder, allow_unexpected)
    check_finite(model.named_parameters(), folder)
    _warn_of_ignored(model, stored, folder)
    _set_generation(model, settings)
    model.eval()
    return model


def _warn_of_ignored(
    model: PreTrainedModel, stored: Mapping[str, TensorRecord], folder: Path
) -> None:
    """Tell of stored tensors that the class leaves out: no pass sees them."""
    ignored = find_ignored(model, stored)
    if ignored:
        log.warning(
            "%s: %s does not build what %s belong to: no pass sees them. A result carries them "
            "over where no size of the model changed; else it lacks them and does not announce "
            "them",
            folder,
            type(model).__name__,
            describe_ignored(ignored),
        )


def read_config(folder: Path) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The configuration of a model folder and the stock class that holds it.

    Raises:
        SourceError: no config.json, not JSON, an unknown model_type, remote code, values the class
            refuses.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise SourceError(
            f"{folder} has no {CONFIG}: it is not a model folder in the Hugging Face format"
        )
    return stock_class(read_json(file), file)


def stock_class(
    data: Mapping[str, object], file: Path
) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The same from what was read from a file.

    Raises:
        SourceError: an unknown model_type, remote code, values the class refuses.
    """
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise SourceError(_explain_unknown_type(file, kind, "auto_map" in data))
    for name, reason in REFUSED_FIELDS.items():
        if data.get(name):
            if name == "quantization_config":
                how = float_copy(data[name])
            else:
                how = ""
            raise SourceError(f"{file} has {name}: {reason}{how}")
    data = allowed_config(data, file)
    architectures = data.get("architectures")
    if not isinstance(architectures, list | None) or not all(
        isinstance(n, str) for n in architectures or ()
    ):
        raise SourceError(
            f"{file}: architectures is {shown(architectures)}, expected a list of class names"
        )
    if data.get("transformers_weights"):
        raise SourceError(
            f"{file} names another weights file (transformers_weights): rename that file, drop "
            "the field"
        )
    try:
        with silence_transformers():
            config = CONFIG_MAPPING[kind].from_dict(decode_special_floats(dict(data)))
        return config, model_class(config, architectures)
    except SourceError as error:
        raise SourceError(f"{file}: {error}") from None
    except BUILD_FAILURES as error:
        raise SourceError(
            f"{file} is refused by {CONFIG_MAPPING[kind].__name__}: {_why(error)}"
        ) from error


def check_weights(
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    stored: Mapping[str, TensorRecord],
    where: Path,
    *,
    allow_unexpected: bool = False,
) -> None:
    """Load the *headers* into the class on the meta device, by transformers' own rules for renamed,
    fused, tied and ignored tensors, and refuse whatever it would re-initialise, drop or convert to
    another kind of number.

    Raises:
        SourceError: names the first few tensors with both shapes.
    """
    expected = _build_model(cls, config, where).state_dict()
    for name, record in stored.items():
        if (
            name in expected
            and expected[name].is_floating_point()
            and not record.dtype.is_floating_point
        ):
            raise SourceError(
                f"{where}: {name} is stored as {record.dtype}, expected floating point numbers"
            )
    try:
        with silence_transformers():
            loaded: Any = cls.from_pretrained(
                None,
                config=config,
                state_dict={name: record.meta() for name, record in stored.items()},
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except ImportError as error:
        raise _missing_package(cls, error) from error
    except BUILD_FAILURES as error:
        raise SourceError(
            f"{where}: the stored tensors do not combine into the parameters of {cls.__name__} "
            f"({innermost_reason(error)}): config.json and weights disagree"
        ) from error
    _check_info(loaded[1], where, allow_unexpected)


def _check_info(info: Mapping[str, Any], where: Path, allow_unexpected: bool) -> None:
    """Refuse a load that left parameters to chance."""
    mismatched = []
    for name, have, want in info["mismatched_keys"]:
        mismatched.append(f"{name} is stored as {list(have)}, the configuration says {list(want)}")
    for what, names in (
        ("weights disagree with config.json", mismatched),
        ("parameters without stored weights", info["missing_keys"]),
        ("tensors could not be converted", info.get("error_msgs") or ()),
        (
            "" if allow_unexpected else "stored tensors that the class does not use",
            info["unexpected_keys"],
        ),
    ):
        if names and not what:
            log.warning("%s: left out: %s", where, _shorten_list(names))
        elif names:
            if what.startswith("stored"):
                hint = (
                    " To go on without them take them out of the folder, or in Python "
                    "call open_model(..., allow_unexpected=True)"
                )
            else:
                hint = ""
            raise SourceError(
                f"{where}: {what}: {_shorten_list(names)}. Mend config.json, or fetch the model "
                f"again.{hint}"
            )


def _resolve_folder(path_or_id: str | Path, weights: bool) -> Path:
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.name == CONFIG and not weights:
        return path.parent
    if path.is_file():
        raise SourceError(f"{path} is a file: give the model folder that holds {CONFIG}")
    if (
        isinstance(path_or_id, Path)
        or not HUB_ID.fullmatch(path_or_id)
        or path_or_id.startswith(".")
    ):
        raise SourceError(
            f"{path} is no folder: give a model folder, or a Hugging Face id such as owner/name"
        )
    return _download_snapshot(path_or_id, weights)


def _download_snapshot(name: str, weights: bool) -> Path:
    if weights:
        patterns = HUB_PATTERNS
    else:
        patterns = [CONFIG, "generation_config.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{name!r} is neither a folder nor a model that can be fetched "
            f"({type(error).__name__}): check the name, "
            "the network and HF_HUB_OFFLINE, or give a folder"
        ) from error


def _from_config(
    cls: type[PreTrainedModel], config: PretrainedConfig, folder: Path, dtype: str | torch.dtype
) -> PreTrainedModel:
    if dtype != "auto":
        if isinstance(dtype, str):
            config.dtype = getattr(torch, dtype)
        else:
            config.dtype = dtype
    model = _build_model(cls, config, folder)
    _set_generation(model, read_generation(folder))
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        _warn_of_ignored(model, read_checkpoint(folder), folder)
    return model


def _set_generation(model: PreTrainedModel, settings: Mapping[str, Any] | None) -> None:
    if settings is not None and model.can_generate():
        with silence_transformers():
            model.generation_config = GenerationConfig.from_dict(dict(settings))


def _build_model(
    cls: type[PreTrainedModel], config: PretrainedConfig, where: Path
) -> PreTrainedModel:
    try:
        return build_on_meta(cls, config)
    except ImportError as error:
        raise _missing_package(cls, error) from error
    except BUILD_FAILURES as error:
        raise SourceError(
            f"{where}: {cls.__name__} cannot be built from {CONFIG}: {innermost_reason(error)}"
        ) from error


def _missing_package(cls: type[PreTrainedModel], error: ImportError) -> SourceError:
    """What to say where transformers wants a package that is not there: nothing is wrong with the
    model."""
    return SourceError(
        f"{cls.__name__} needs a package that is not installed here: {innermost_reason(error)}"
    )


def float_copy(quantization: object) -> str:
    """How weights that were published quantized become numbers again, for a message.

    Args:
        quantization: the value of quantization_config.
    """
    if isinstance(quantization, dict):
        settings = quantization
    else:
        settings = {}
    method = settings.get("quant_method") or (
        "bitsandbytes" if settings.get("load_in_4bit") else None
    )
    known = isinstance(method, str)
    if known:
        name = f" ({shown(method)[1:-1]})"
    else:
        name = ""
    if known and str(method).split("_")[0] in DEQUANTIZED_ON_LOADING:
        return (
            f"{name}. Most such models were published as floats, too: use that one. Or write a "
            "float copy, where "
            "there is memory for it: AutoModelForCausalLM.from_pretrained(folder, "
            "dtype='bfloat16', "
            f"quantization_config={DEQUANTIZED_ON_LOADING[str(method).split('_')[0]]}(dequantize=True))"
            ".save_pretrained(new_folder)"
        )
    return (
        f"{name}, which pruning cannot read. Use the model that it was made from, which is usually "
        "published beside "
        "it in 16 bits; or load it with transformers, call model.dequantize() where its format has "
        "it, and save a "
        "float copy"
    )


def _explain_unknown_type(file: Path, kind: object, remote: bool) -> str:
    if remote:
        return (
            f"{file} brings its own model code (auto_map), and transformers "
            f"{transformers.__version__} has no class "
            f"for model_type {kind!r}: remote code is never run. Use a checkpoint of a stock class"
        )
    return (
        f"{file} has model_type {kind!r}, which transformers {transformers.__version__} does not "
        "know: mend the file, "
        "or update transformers"
    )


def _why(error: BaseException) -> str:
    text = printable(str(error)) or type(error).__name__
    if len(text) <= 600:
        return text
    return text[:600] + "..."


def _shorten_list(names: Iterable[str]) -> str:
    listed = sorted(names)
    if len(listed) > SHOWN:
        more = f" and {len(listed) - SHOWN} more"
    else:
        more = ""
    return "; ".join(listed[:SHOWN]) + more


use_opener(open_model)

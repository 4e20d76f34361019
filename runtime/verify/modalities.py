"""Example inputs of the modalities beside text, made from names of arguments and numbers of the
configuration alone."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.graph.errors import SecateurError
from secateur.runtime.open.classes import BUILD_FAILURES

log = logging.getLogger(__name__)

TEXT_TOKENS = 6
IMAGE_TOKEN = ("image_token_id", "image_token_index")
KINDS = ("mm_token_type_ids", "token_type_ids")
"""Arguments that say of each token whether it stands for a picture."""
SEED = 1
Inputs = dict[str, Any]
"""Arguments of a model's forward by name: tensors, and switches."""


def picture_inputs(model: PreTrainedModel) -> Inputs | None:
    """Inputs of one call with text and a picture, with which the model runs; None if it takes none.

    The picture is noise; its tokens stand after the first token of the text.

    Args:
        model: with weights.

    Raises:
        NoExample: the model takes pictures, and no example of one could be made.
        WrongWidth: a picture comes out of its encoder with another width than the text model has.
    """
    arguments = inspect.signature(model.forward).parameters
    if "pixel_values" not in arguments or "input_ids" not in arguments:
        return None
    token = _picture_token(model)
    if token is None:
        raise _no_example(model, "its configuration names no picture token")
    reason = ""
    for picture in _pictures(model, "image_grid_thw" in arguments):
        try:
            count = _count_features(model, picture)
            inputs = _with_text(model, picture, token, count)
            with torch.no_grad():
                model(**inputs)
            return inputs
        except SecateurError:
            raise
        except BUILD_FAILURES as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            log.debug("a picture %s does not run: %s", tuple(picture["pixel_values"].shape), error)
    raise _no_example(model, reason)


class NoExample(SecateurError):
    """A modality of which no example can be made."""


class WrongWidth(SecateurError):
    """An encoder does not fit its text model."""


def _picture_token(model: PreTrainedModel) -> int | None:
    for name in IMAGE_TOKEN:
        token = getattr(model.config, name, None)
        if isinstance(token, int):
            return token
    return None


def _no_example(model: PreTrainedModel, reason: str) -> NoExample:
    name = type(model).__name__
    return NoExample(f"no example of a picture could be made for {name}: {reason}")


def _pictures(model: PreTrainedModel, has_grid: bool) -> Iterator[dict[str, Tensor]]:
    """Pictures in the layouts that classes take, the plainest first."""
    vision = getattr(model.config, "vision_config", None)
    channels = _number(vision, "in_channels", "num_channels", "in_chans") or 3
    patch = _number(vision, "patch_size") or 1
    parameter = next(model.parameters())
    noise = torch.Generator().manual_seed(SEED)
    if has_grid:
        side = 2 * (_number(vision, "spatial_merge_size") or 1)
        depth = channels * (_number(vision, "temporal_patch_size") or 1) * patch**2
        pixels = torch.randn(side * side, depth, generator=noise)
        grid = torch.tensor([[1, side, side]], device=parameter.device)
        yield {"pixel_values": pixels.to(parameter), "image_grid_thw": grid}
    for side in dict.fromkeys([_number(vision, "image_size") or 4 * patch, 4 * patch]):
        for shape in ((1, channels, side, side), (1, 1, channels, side, side)):
            yield {"pixel_values": torch.randn(shape, generator=noise).to(parameter)}


def _count_features(model: PreTrainedModel, picture: Mapping[str, Tensor]) -> int:
    """Into how many tokens of the text model a picture is turned."""
    with torch.no_grad():
        output: Any = model.get_image_features(**picture)  # type: ignore[operator]
    features = getattr(output, "pooler_output", output)
    if isinstance(features, Tensor):
        features = [features]
    parts = [part for part in features if isinstance(part, Tensor)]
    embedding: Any = model.get_input_embeddings()
    width = embedding.weight.shape[1]
    for part in parts:
        if part.shape[-1] != width:
            raise WrongWidth(
                f"a picture becomes tokens of width {part.shape[-1]}, and {type(model).__name__} "
                f"embeds text in {width}: the model cannot read pictures. Prune it again from its "
                "source, with that width left as it is"
            )
    return sum(part.numel() // width for part in parts)


def _with_text(
    model: PreTrainedModel, picture: Mapping[str, Tensor], token: int, count: int
) -> Inputs:
    """The picture with a sentence around its tokens."""
    config = model.config
    special = set()
    for name, value in vars(config).items():
        if name.endswith(("_id", "_index")) and isinstance(value, int):
            special.add(value)
    vocabulary = config.get_text_config().vocab_size
    plain_tokens = (i for i in range(3, vocabulary) if i not in special)
    plain = list(itertools.islice(plain_tokens, TEXT_TOKENS))
    row = [plain[0]]
    start = getattr(config, "vision_start_token_id", None)
    if isinstance(start, int):
        row.append(start)
    row += [token] * count
    end = getattr(config, "vision_end_token_id", None)
    if isinstance(end, int):
        row.append(end)
    row += plain[1:]
    ids = torch.tensor([row], device=picture["pixel_values"].device)
    arguments = inspect.signature(model.forward).parameters
    kinds = {}
    for name in KINDS:
        if name in arguments:
            kinds[name] = (ids == token).int()
    return {"input_ids": ids, **picture, **kinds, "use_cache": False}


def _number(config: object, *names: str) -> int | None:
    """The first of these numbers that a configuration has; the first item of a list."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return None

"""Stock classes: which one a configuration asks for, and how to build it without its weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init

from secateur.graph.errors import SourceError

BUILD_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What a configuration or model class raises when it dislikes its values (they have no common
root)."""

ClassOrClasses = type[PreTrainedModel] | tuple[type[PreTrainedModel], ...]
FALLBACKS = ("AutoModelForCausalLM", "AutoModel")


def model_class(
    config: PretrainedConfig, architectures: Sequence[str] | None = None
) -> type[PreTrainedModel]:
    """The transformers class that `architectures` names, or else the causal language model of this
    configuration.

    Args:
        config: of the model.
        architectures: class names, as config.json has them; the first that transformers has is
            taken.

    Raises:
        SourceError: the named class is not one of transformers', or belongs to another
            configuration.
    """
    for name in architectures or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return _of_same_config(cls, config)
    if architectures:
        raise SourceError(
            f"architecture {architectures[0]!r} is not a class of transformers "
            f"{transformers.__version__}: "
            "model code from elsewhere is never run. Update transformers, or use a checkpoint of "
            "a stock class"
        )
    for auto in FALLBACKS:
        if type(config) in getattr(transformers, auto)._model_mapping:
            return _first_class(getattr(transformers, auto)._model_mapping[type(config)])
    raise SourceError(
        f"no stock model class for configuration {type(config).__name__}: name it in "
        "`architectures`"
    )


def build_on_meta(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The class with every parameter and buffer on the meta device, in eval mode.

    Args:
        cls: the stock class.
        config: of the model; its dtype is that of the parameters.
    """
    with _quiet_build(config), torch.device("meta"):
        return _tie_weights(cls(config))


def build_with_buffers(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The class with parameters on the meta device and the buffers that its constructor computes,
    in eval mode.

    Args:
        cls: the stock class.
        config: of the model; its dtype is that of the parameters.
    """
    with _quiet_build(config), _parameters_on_meta():
        return _tie_weights(cls(config))


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence transformers' reports and progress bars while it is asked something."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def innermost_reason(error: BaseException) -> str:
    """The first line of an exception's first cause."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quiet_build(config: PretrainedConfig) -> Iterator[None]:
    before = torch.get_default_dtype()
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        torch.set_default_dtype(dtype)
    try:
        with silence_transformers(), init.no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device the moment a module registers it: at most one is ever
    in memory."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _tie_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Without initialisation the constructor does not tie either."""
    model.tie_weights(recompute_mapping=False)
    model.eval()
    return model


def _of_same_config(cls: type[PreTrainedModel], config: PretrainedConfig) -> type[PreTrainedModel]:
    expected: Any = cls.config_class
    if expected is not None and not isinstance(config, expected):
        raise SourceError(
            f"architecture {cls.__name__} takes a {expected.__name__}, and model_type "
            f"{config.model_type!r} gives a "
            f"{type(config).__name__}: mend config.json"
        )
    return cls


def _first_class(classes: ClassOrClasses) -> type[PreTrainedModel]:
    if isinstance(classes, tuple):
        return classes[0]
    return classes

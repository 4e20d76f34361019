"""The state of a training run as tensors and JSON, from which it continues bit for bit."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

JSON = dict[str, Any]


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be spread over processes (then on the CPU); every process
    must call this.

    Args:
        tensor: local or distributed.

    Returns:
        a local tensor.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full.clone().cpu()  # the clone waits for what is still on its way


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A full tensor laid out as ``like``: over its processes, on its device, in its dtype.

    Args:
        value: local.
        like: local or distributed.
    """
    value = value.to(like.device, like.dtype)
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)  # type: ignore[attr-defined]


def gather_sharded_params(model: nn.Module) -> None:
    """Spread what a forward pass without a backward one left gathered; nothing to do in one
    process.

    Args:
        model: with or without FSDP2.
    """
    for module in model.modules():
        reshard: Any = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained and persistent buffers by name, each once, whole.

    Args:
        model: with or without FSDP2.

    Returns:
        local tensors by name.
    """
    gather_sharded_params(model)
    named: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            named[name] = p
    persistent = model.state_dict().keys()
    named |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    weights: dict[str, Tensor] = {}
    for name, tensor in named.items():
        weights[name] = full_tensor(tensor.detach())
    return weights


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """The inverse of ``weights_of``, in place.

    Args:
        model: with or without FSDP2.
        weights: local tensors by name.
    """
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(spread_like(value, named[name]))


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], JSON]:
    """Its tensors, named by parameter number and key, and its groups.

    Args:
        optimizer: with or without distributed parameters.

    Returns:
        (tensors, JSON).
    """
    state = optimizer.state_dict()
    tensors = {}
    for index, moments in state["state"].items():
        for key, value in moments.items():
            tensors[f"{index}.{key}"] = full_tensor(value)
    return tensors, {"groups": state["param_groups"]}


def put_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: JSON
) -> None:
    """The inverse of ``optimizer_state``; the optimizer has the same parameters in the same
    order.

    Args:
        optimizer: to be restored.
        tensors: as saved.
        facts: as saved.
    """
    parameters = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            parameters.append(p)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        like = parameters[int(index)]
        if value.shape == like.shape:
            state.setdefault(int(index), {})[key] = spread_like(value, like)
        else:
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})


def random_state() -> tuple[dict[str, Tensor], JSON]:
    """The generators of Python, numpy and torch (the current accelerator's, too)."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return tensors, {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def put_random_state(tensors: Mapping[str, Tensor], facts: JSON) -> None:
    """The inverse of ``random_state``.

    Args:
        tensors: as saved.
        facts: as saved.
    """
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, keys, gauss = facts["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, *rest = facts["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))


@contextmanager
def isolate_randomness() -> Iterator[None]:
    """Whatever is drawn or seeded in here does not show outside."""
    tensors, facts = random_state()
    try:
        yield
    finally:
        put_random_state(tensors, json.loads(json.dumps(facts)))


def add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names with a prefix, so that several sets share one file.

    Args:
        prefix: without the slash.
        tensors: by name.
    """
    prefixed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        prefixed[f"{prefix}/{name}"] = value
    return prefixed


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``add_prefix``: those of one set.

    Args:
        prefix: without the slash.
        tensors: by prefixed name.
    """
    chosen: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith(f"{prefix}/"):
            chosen[name.removeprefix(f"{prefix}/")] = value
    return chosen

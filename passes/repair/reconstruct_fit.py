"""Fitting of a part: least squares layer by layer, then Adam on all of its parameters.

Dims: T tokens of one sequence, N outputs, K inputs, H channels of the stream.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from secateur.graph.blocks.residual import trace_to_origin
from secateur.passes.lowering.layers import Layer, sharing_input
from secateur.passes.repair.reconstruct_part import FittedPart, Task
from secateur.passes.solvers.masked_least_squares import fit_masked
from secateur.passes.solvers.ridge import Products

WARM_UP = 0.05  # of the steps


def token_weights(wanted: Tensor) -> Tensor:
    """[T, 1]: what makes the squared error of each token relative to its own square.

    A norm reads the stream, so that what counts is the direction of each token; and a few first
    tokens, a thousand times longer than the others, would be all that is fitted.

    Args:
        wanted: the stream that is aimed at, [..., H].
    """
    rows = wanted.reshape(-1, wanted.shape[-1]).float()
    return rows.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def stream_error(fitted: FittedPart, task: Task, which: Sequence[int]) -> float:
    """Mean square of the error over the square of the stream, over the tokens of some sequences.

    Args:
        fitted: the part.
        task: sequences and targets.
        which: numbers of sequences.

    Returns:
        a relative squared error, 0 for equal streams.
    """
    total = 0.0
    count = 0
    with torch.no_grad():
        for index in which:
            loss = _stream_loss(fitted.run_to_stream(task.inputs[index]), task.wanted[index])
            tokens = _count_tokens(task.wanted[index])
            total += float(loss) * tokens
            count += tokens
    return total / max(count, 1)


def _stream_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean square of the error relative to the stream, a scalar."""
    gap = (found.float() - wanted.float()).reshape(-1, wanted.shape[-1])
    return (gap * token_weights(wanted)).square().mean()


def _count_tokens(stream: Tensor) -> int:
    """Number of tokens of a stream."""
    return stream.numel() // stream.shape[-1]


# Least squares
def fit_layers(fitted: FittedPart, task: Task, layers: Sequence[Layer]) -> None:
    """Refit the layers of a part in the order of its graph, each on what the ones before it now
    give.

    A layer whose result is added to the stream aims at the stream after the part, the others at
    their own results in the dense model.  Layers that share an input are one fit; they change only
    where the sequences held back gain by it.

    Args:
        fitted: the part; its masters change.
        task: sequences and targets.
        layers: of the part, in graph order.
    """
    for sharing in sharing_input(layers):
        names = [layer.parameter for layer in sharing]
        seen = _sum_products(fitted, task, sharing, task.fitting_sequences)
        held_back = _sum_products(fitted, task, sharing, sorted(task.back))
        mask = torch.cat([_mask_of(fitted, name) for name in names])
        delta_NK = fit_masked(seen, held_back, mask).delta_NK
        if delta_NK is None:
            continue
        for name, part in zip(names, _split_delta(delta_NK, fitted, names), strict=True):
            fitted.masters[name] = fitted.masters[name] + part


def _split_delta(delta_NK: Tensor, fitted: FittedPart, names: Sequence[str]) -> list[Tensor]:
    """The change of stacked rows, by weight."""
    return list(torch.split(delta_NK, [len(fitted.masters[name]) for name in names]))


def _mask_of(fitted: FittedPart, name: str) -> Tensor:
    """The mask of a parameter; ones where every entry may change."""
    mask = fitted.masks[name]
    if mask is None:
        return torch.ones_like(fitted.masters[name], dtype=torch.bool)
    return mask


def _sum_products(
    fitted: FittedPart, task: Task, sharing: Sequence[Layer], which: Sequence[int]
) -> Products:
    """Sums over the tokens of some sequences of what the layers' results lack."""
    weights = [fitted.masters[layer.parameter] for layer in sharing]
    products = Products(weights[0].shape[1], sum(map(len, weights)), False, weights[0].device)
    last = len(sharing) == 1 and _adds_to_stream(fitted, sharing[0])
    if last:
        nodes = [fitted.part.end]
    else:
        nodes = [layer.node.name for layer in sharing]
    for index in which:
        x, *now = fitted.peek_values(task.inputs[index], [sharing[0].x.name, *nodes])
        if last:
            wanted = [task.wanted[index]]
            by = token_weights(task.wanted[index])
        else:
            wanted = task.dense.peek_values(task.dense_inputs[index], nodes)
            by = torch.ones(1, device=x.device)
        lacks = torch.cat(
            [_as_rows(target) - _as_rows(other) for target, other in zip(wanted, now, strict=True)],
            1,
        )
        products.add_rows(_as_rows(x) * by, lacks * by)
    return products


def _adds_to_stream(fitted: FittedPart, layer: Layer) -> bool:
    """Whether a layer's result is what a branch adds to the stream."""
    return any(trace_to_origin(sub.branch.operand) is layer.node for sub in fitted.part.sub_blocks)


def _as_rows(value: Tensor) -> Tensor:
    """[..., channels] as [tokens, channels] float32."""
    return value.reshape(-1, value.shape[-1]).float()


# Adam
def train_part(
    fitted: FittedPart,
    task: Task,
    epochs: int,
    lr: float,
    seed: int,
    autocast: Callable[[], contextlib.AbstractContextManager[object]],
) -> None:
    """Adam on the stream after the part, one sequence a step; the state of the epoch that serves
    those held back best.

    Args:
        fitted: the part; its masters change.
        task: sequences and targets.
        epochs: passes over the sequences to fit on.
        lr: relative to the root mean square of each parameter's free entries; it falls to zero as a
            cosine.
        seed: of the order of sequences.
        autocast: makes the context of a forward pass.
    """
    groups = []
    for name, master in fitted.masters.items():
        groups.append(
            {
                "params": [_open_entries(master)],
                "lr": lr * _rms_of_entries(master, fitted.masks[name]),
            }
        )
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    steps = epochs * len(task.fitting_sequences)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine_rate(step, steps))
    best = stream_error(fitted, task, sorted(task.back))
    best_masters = _copy_masters(fitted)
    for order in _epoch_orders(task.fitting_sequences, epochs, seed):
        for index in order:
            with autocast():
                outputs = fitted.run_to_stream(task.inputs[index])
            optimizer.zero_grad()
            _stream_loss(outputs, task.wanted[index]).backward()
            for name, master in fitted.masters.items():
                mask = fitted.masks[name]
                if mask is not None and master.grad is not None:
                    master.grad.mul_(mask)
            optimizer.step()
            schedule.step()
        error = stream_error(fitted, task, sorted(task.back))
        if error < best:
            best = error
            best_masters = _copy_masters(fitted)
    fitted.masters = best_masters


def _open_entries(master: Tensor) -> Tensor:
    """The master as a leaf that takes gradients."""
    return master.requires_grad_(True)


def _copy_masters(fitted: FittedPart) -> dict[str, Tensor]:
    """Copies of all masters without gradient."""
    masters: dict[str, Tensor] = {}
    for name, master in fitted.masters.items():
        masters[name] = master.detach().clone()
    return masters


def _rms_of_entries(master: Tensor, mask: Tensor | None) -> float:
    """Root mean square of the entries that may change."""
    if mask is None:
        free = master.detach()
    else:
        free = master.detach()[mask]
    if free.numel():
        return float(free.square().mean().sqrt())
    return 0.0


def _cosine_rate(step: int, steps: int) -> float:
    """The part of the learning rate at a step: a short rise, then half a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _epoch_orders(seen: Sequence[int], epochs: int, seed: int) -> Iterator[list[int]]:
    """A seeded order of the sequences for each epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield [seen[index] for index in torch.randperm(len(seen), generator=generator).tolist()]

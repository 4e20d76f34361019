"""AdamW that pulls removed entries of masked weights towards zero, beside the momentum.

Source: Huang et al. 2025 (Adaptive Sparse Trainer), arXiv:2407.20584, section 3.2.  As there, for a
masked weight:

    m = b1 m + (1 - b1) g
    u = m + lambda (1 - mask) W
    v = b2 v + (1 - b2) u^2
    W = W (1 - lr decay) - lr / (1 - b1^t) u / (sqrt(v / (1 - b2^t)) + eps)

CAST (Huang et al. 2025, arXiv:2509.25996) moves what is removed by a mixture: u = (1 - a) m + a
lambda sign(W) there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Moment = Literal["gradient", "sum"]


@dataclass(frozen=True, eq=False)
class DecayPull:
    """On one weight.
    removed: of the weight's (local) shape, bool or 1 and 0.
    strength: lambda, a scalar tensor.

    share: None: lambda W is added.  A number a, 0..1: what is removed moves by (1 - a) m + a lambda
        sign(W) instead.
    """

    removed: Tensor
    strength: Tensor
    share: float | None = None


class Masks(Protocol):
    """The owner of the masks; called once before and once after each update."""

    def before_update(self) -> Mapping[int, DecayPull]:
        """The pulls by ``id`` of the Parameter.  Gradients are there."""
        ...

    def after_update(self) -> None:
        """Note that all weights were updated; masks may change now."""
        ...


class SideDecayAdamW(torch.optim.Optimizer):
    """AdamW; weights under a mask get a decay of what is removed, which never enters their first
    moment.

    masks: None, or no pull on a weight: exactly AdamW.
    moment: what the second moment of a pulled weight is made of: ``sum``, u as in the paper, whose
        steps are larger than those of AdamW (the first ones by 1 / (1 - b1)); or ``gradient``, g +
        lambda (1 - mask) W, which is AdamW wherever nothing is removed.
    Weights are updated in float32 or better; those spread over processes each where they lie.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        masks: Masks | None = None,
        moment: Moment = "gradient",
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.masks = masks
        self.moment = moment

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update, then masks may change.

        Args:
            closure: computes the loss again; None: not needed.

        Returns:
            the loss of the closure, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.masks:
            pulls = self.masks.before_update()
        else:
            pulls = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update_parameter(
                        parameter, parameter.grad, group, pulls.get(id(parameter))
                    )
        if self.masks:
            self.masks.after_update()
        return loss

    def _update_parameter(
        self,
        parameter: nn.Parameter,
        gradient: Tensor,
        group: dict[str, Any],
        pull: DecayPull | None,
    ) -> None:
        """One pass over memory, and for a pull a few more over the one weight.

        A fused update that is given m + p and g + p, p the pull, steps by b1 (m + p) + (1 - b1) (g
        + p): the new m and p.  Given u for both it steps by u.
        """
        (b1, b2), state = group["betas"], self._parameter_state(parameter)
        state["step"] += 1
        moments = []
        for tensor in (parameter, gradient, state["exp_avg"], state["exp_avg_sq"]):
            moments.append(local_part(tensor))
        used = [
            tensor.contiguous() for tensor in moments
        ]  # fused updates count in the order of memory
        weight, gradient, mean, square = used
        moving = mean
        measured = gradient
        if pull is not None:
            before = None
            if self.moment == "gradient":
                before = mean.clone()
            mean.lerp_(gradient, 1 - b1)
            term = _pull_term(weight, mean, pull, 1 - group["lr"] * group["weight_decay"])
            if before is None:
                moving = measured = term.add_(mean)
            else:
                moving = before.add_(term)
                measured = term.add_(gradient)
        torch._fused_adamw_(
            [weight],
            [measured],
            [moving],
            [square],
            [],
            [state["step"].to(weight.device)],
            lr=group["lr"],
            beta1=b1,
            beta2=b2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        for tensor, part in zip(moments, used, strict=True):
            if part is not tensor:
                tensor.copy_(part)

    def _parameter_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer state of a parameter, zero on first use."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _pull_term(weight: Tensor, mean: Tensor, pull: DecayPull, left: float) -> Tensor:
    """What is added to the first moment for this step alone, a new tensor; zero where a weight is
    kept.

    Args:
        left: of a weight after its decay.
    """
    if pull.share is None:
        return (weight * pull.removed).mul_(pull.strength * left)
    return weight.sign().mul_(pull.strength).sub_(mean).mul_(pull.share).mul_(pull.removed)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be spread over several; it shares memory.

    Args:
        tensor: of one process, or spread over several.
    """
    part: Any = getattr(tensor, "to_local", None)
    return tensor.detach() if part is None else part().detach()

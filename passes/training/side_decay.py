"""AdamW that pulls removed entries of masked weights towards zero, beside the momentum.

Source: Huang et al. 2025 (Adaptive Sparse Trainer), arXiv:2407.20584, section 3.2.  As there, for a masked weight:

    m = b1 m + (1 - b1) g
    u = m + lambda (1 - mask) W
    v = b2 v + (1 - b2) u^2
    W = W (1 - lr decay) - lr / (1 - b1^t) u / (sqrt(v / (1 - b2^t)) + eps)

CAST (Huang et al. 2025, arXiv:2509.25996) moves what is removed by a mixture: u = (1 - a) m + a lambda sign(W) there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Moment = Literal["gradient", "sum"]
ELEMENTS = 1 << 25  # of weights that are updated together; two temporaries of that size are held


@dataclass(frozen=True, eq=False)
class Pull:
    """On one weight.   removed: of the weight's (local) shape, bool or 1 and 0.   strength: lambda, a scalar tensor.

    share: None: lambda W is added.  A number a, 0..1: what is removed moves by (1 - a) m + a lambda sign(W) instead.
    """

    removed: Tensor
    strength: Tensor
    share: float | None = None


class Masks(Protocol):
    """Who knows the masks; asked once before and told once after each update."""

    def before_update(self) -> Mapping[int, Pull]:
        """The pulls by ``id`` of the Parameter.  Gradients are there."""
        ...

    def after_update(self) -> None: ...


class SideDecayAdamW(torch.optim.Optimizer):
    """AdamW; weights under a mask get a decay of what is removed, which never enters their first moment.

    masks: None, or no pull on a weight: exactly AdamW.
    moment: what the second moment of a pulled weight is made of: ``sum``, u as in the paper, whose steps are larger
        than those of AdamW (the first ones by 1 / (1 - b1)); or ``gradient``, g + lambda (1 - mask) W, which is AdamW
        wherever nothing is removed.
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
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.masks, self.moment = masks, moment

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update, then masks may change."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pulls = self.masks.before_update() if self.masks else {}
        for group in self.param_groups:
            for part in _parts([p for p in group["params"] if p.grad is not None]):
                self._update(part, group, pulls)
        if self.masks:
            self.masks.after_update()
        return loss

    def _update(self, part: Sequence[nn.Parameter], group: dict[str, Any], pulls: Mapping[int, Pull]) -> None:
        (b1, b2), lr = group["betas"], group["lr"]
        states = [self._state(p) for p in part]
        torch._foreach_add_([state["step"] for state in states], 1)
        weights = [local(p) for p in part]
        gradients = [local(p.grad) for p in part if p.grad is not None]
        means, squares = ([local(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq"))
        pulled = [at for at, p in enumerate(part) if id(p) in pulls]
        if not pulled and all(w.device.type == "cpu" for w in weights):  # one pass over memory for ten
            steps, decay = [state["step"] for state in states], group["weight_decay"]
            how = {"beta1": b1, "beta2": b2, "lr": lr, "weight_decay": decay, "eps": group["eps"]}
            torch._fused_adamw_(weights, gradients, means, squares, [], steps, amsgrad=False, maximize=False, **how)
            return
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(means, gradients, 1 - b1)
        step, measured = list(means), list(gradients)
        if pulled:
            own = [pulls[id(part[at])] for at in pulled]
            pull = _pull([weights[at] for at in pulled], [means[at] for at in pulled], own)
            for at, found in zip(pulled, pull, strict=True):
                if self.moment == "gradient":
                    measured[at] = found + gradients[at]
                step[at] = found.add_(means[at])
                if self.moment == "sum":
                    measured[at] = step[at]
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, measured, measured, 1 - b2)
        del measured
        times = [float(state["step"]) for state in states]
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, [(1 - b2**t) ** 0.5 for t in times])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(weights, step, denominators, [-lr / (1 - b1**t) for t in times])

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _pull(weights: list[Tensor], means: list[Tensor], pulls: Sequence[Pull]) -> list[Tensor]:
    """What is added to the first moment for this step alone, new tensors; zero where a weight is kept."""
    shares = [one.share for one in pulls]
    found = torch._foreach_sign(weights) if shares[0] is not None else torch._foreach_mul(weights, 1.0)
    torch._foreach_mul_(found, [one.strength for one in pulls])
    if shares[0] is not None:
        torch._foreach_sub_(found, means)
        torch._foreach_mul_(found, [share or 0.0 for share in shares])
    torch._foreach_mul_(found, [one.removed for one in pulls])
    return list(found)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be spread over several; it shares memory."""
    part: Any = getattr(tensor, "to_local", None)
    return tensor.detach() if part is None else part().detach()


def _parts(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in runs of about ELEMENTS."""
    part: list[nn.Parameter] = []
    count = 0
    for parameter in parameters:
        part.append(parameter)
        count += parameter.numel()
        if count >= ELEMENTS:
            yield part
            part, count = [], 0
    if part:
        yield part

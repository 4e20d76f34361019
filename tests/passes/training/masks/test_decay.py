"""AdamW with a pull beside the momentum: the paper's formula, and what must never happen to it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from secateur.passes.training.masks.decay import DecayPull, Moment, SideDecayAdamW

BETAS = (0.9, 0.95)
MOMENTS: list[Moment] = ["gradient", "sum"]


class Pulling:
    """Masks that stay, with a strength that stays."""

    def __init__(self, weights: Mapping[nn.Parameter, Tensor], strength: float) -> None:
        self.pulls = {
            id(p): DecayPull(~mask, torch.tensor(strength)) for p, mask in weights.items()
        }
        self.told = 0

    def before_update(self) -> dict[int, DecayPull]:
        return self.pulls

    def after_update(self) -> None:
        self.told += 1


def weight(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def gradients(steps: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(*shape, generator=generator) for _ in range(steps)]


MASK = torch.tensor([[True, False, True, False]]).expand(8, 4).contiguous()


@pytest.mark.parametrize("moment", MOMENTS)
def test_without_a_pull_it_is_adamw(moment: Moment) -> None:
    mine, theirs = [weight(8, 4), weight(5, seed=1)], [weight(8, 4), weight(5, seed=1)]
    options = {"lr": 3e-3, "betas": BETAS, "weight_decay": 0.1}
    one, two = SideDecayAdamW(mine, **options, moment=moment), torch.optim.AdamW(theirs, **options)
    for a, b in zip(gradients(30, 8, 4), gradients(30, 5), strict=True):
        for weights, optimizer in ((mine, one), (theirs, two)):
            weights[0].grad, weights[1].grad = a.clone(), b.clone()
            optimizer.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("strength", [1e-6, 1e-1])
def test_with_no_gradient_what_is_removed_shrinks_and_what_is_kept_stays(
    moment: Moment, strength: float
) -> None:
    """A mask as a number instead of a bool turns the pull round: removed weights then grow, and
    kept ones, too."""
    one = weight(8, 4)
    start = one.detach().clone()
    optimizer = SideDecayAdamW(
        [one], lr=1e-4, betas=BETAS, eps=1e-12, masks=Pulling({one: MASK}, strength), moment=moment
    )
    for _ in range(20):
        before = one.detach().abs()
        one.grad = torch.zeros_like(one)
        optimizer.step()
        assert (one.detach().abs() < before)[~MASK].all()
    assert torch.equal(one[MASK], start[MASK])
    assert (start.abs() - one.detach().abs())[~MASK].min() > 1e-3


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_pull_never_enters_the_momentum(moment: Moment) -> None:
    """So that an entry that comes back carries nothing of the time in which it was removed."""
    found = []
    for strength in (0.0, 5.0):
        one = weight(8, 4)
        masks = Pulling({one: MASK}, strength)
        optimizer = SideDecayAdamW([one], lr=1e-2, betas=BETAS, masks=masks, moment=moment)
        for at, gradient in enumerate(gradients(12, 8, 4)):
            if at == 8:
                masks.pulls = {id(one): DecayPull(MASK.clone(), torch.tensor(strength))}
            one.grad = gradient.clone()
            optimizer.step()
        found.append((optimizer.state[one]["exp_avg"].clone(), one.detach().clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("moment", MOMENTS)
def test_it_is_the_papers_formula(moment: Moment) -> None:
    one, strength, lr, decay, eps = weight(8, 4), 0.3, 1e-2, 0.1, 1e-8
    w = one.detach().double()
    m, v, (b1, b2) = torch.zeros_like(w), torch.zeros_like(w), BETAS
    masks = Pulling({one: MASK}, strength)
    optimizer = SideDecayAdamW(
        [one], lr=lr, betas=BETAS, eps=eps, weight_decay=decay, masks=masks, moment=moment
    )
    for t, gradient in enumerate(gradients(15, 8, 4), 1):
        one.grad = gradient.clone()
        optimizer.step()
        w = w * (1 - lr * decay)
        m = b1 * m + (1 - b1) * gradient
        u = m + strength * (~MASK) * w
        second = u if moment == "sum" else gradient + strength * (~MASK) * w
        v = b2 * v + (1 - b2) * second * second
        w = w - lr / (1 - b1**t) * u / (v.sqrt() / (1 - b2**t) ** 0.5 + eps)
    torch.testing.assert_close(one.detach().double(), w, rtol=1e-5, atol=1e-6)
    assert masks.told == 15


def test_a_mixture_trades_the_gradient_for_a_constant() -> None:
    one, strength, share, lr = weight(8, 4), 0.3, 0.25, 1e-2
    w = one.detach().double()
    m, v, (b1, b2) = torch.zeros_like(w), torch.zeros_like(w), BETAS
    masks = Pulling({one: MASK}, strength)
    masks.pulls = {id(one): DecayPull(~MASK, torch.tensor(strength), share)}
    optimizer = SideDecayAdamW([one], lr=lr, betas=BETAS, masks=masks, moment="sum")
    for t, gradient in enumerate(gradients(15, 8, 4), 1):
        one.grad = gradient.clone()
        optimizer.step()
        m = b1 * m + (1 - b1) * gradient
        u = torch.where(MASK, m, (1 - share) * m + share * strength * w.sign())
        v = b2 * v + (1 - b2) * u * u
        w = w - lr / (1 - b1**t) * u / (v.sqrt() / (1 - b2**t) ** 0.5 + 1e-8)
    torch.testing.assert_close(one.detach().double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("pulled", [False, True])
def test_the_order_in_memory_changes_nothing(moment: Moment, pulled: bool) -> None:
    """Weights may be transposed views or columns of a wider one; the bytes between them are no
    one's."""
    wide = torch.full((8, 7), 7.0)
    wide[:, 1:5] = weight(8, 4).detach()
    turned = nn.Parameter(weight(8, 4).detach().T.contiguous().T)
    weights = [weight(8, 4), turned, nn.Parameter(wide[:, 1:5]), weight(3)]
    masks = Pulling(dict.fromkeys(weights[:3], MASK) if pulled else {}, 0.5)
    optimizer = SideDecayAdamW(weights, lr=1e-2, weight_decay=0.1, masks=masks, moment=moment)
    for gradient in gradients(3, 8, 4):
        for one in weights[:3]:
            one.grad = gradient.clone()
        optimizer.step()
    assert weights[3] not in optimizer.state, "what has no gradient is left alone"
    for one in weights[1:3]:
        assert not one.is_contiguous()
        torch.testing.assert_close(one, weights[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            optimizer.state[one]["exp_avg"], optimizer.state[weights[0]]["exp_avg"]
        )
    assert (wide[:, [0, 5, 6]] == 7).all()

"""When masks change, and how strong the pull is: the schedule, alone and on sharded weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.graph import Pattern, Sparse
from secateur.passes.training.masks.decay import local_part
from secateur.passes.training.masks.masked import MaskedWeight, under_mask
from secateur.passes.training.masks.schedule import RECORDS, MaskError, MaskPlan, MaskSchedule

P24 = Pattern(2, 4)
PLAN = MaskPlan(strength=0.5, ramp=4, refresh=3, steps=8)


def site(name: str, rows: int = 8, scale: float = 1.0, seed: int = 0) -> MaskedWeight:
    torch.manual_seed(seed)
    module = nn.Linear(16, rows, bias=False)
    with torch.no_grad():
        module.weight.mul_(scale)
    first = P24.select_mask(module.weight.detach().abs())
    under_mask(module, first, "through")
    return MaskedWeight(name, module, "weight", Sparse(P24), first)


def stepped(schedule: MaskSchedule, steps: int, lr: float = 0.05) -> list[list[Tensor]]:
    """The masks after each step of an optimizer on random gradients."""
    optimizer = schedule.optimizer_class[0](
        [s.weight for s in schedule.sites], lr=lr, **schedule.optimizer_class[1]
    )
    generator, masks = torch.Generator().manual_seed(4), []
    for _ in range(steps):
        for one in schedule.sites:
            one.weight.grad = torch.randn(one.weight.shape, generator=generator)
        optimizer.step()
        masks.append([one.mask.clone() for one in schedule.sites])
    return masks


def test_masks_change_every_few_steps_in_place_and_not_after_the_last() -> None:
    schedule = MaskSchedule([site("a"), site("b", 4, seed=1)], replace(PLAN, steps=9))
    memory = [one.mask.data_ptr() for one in schedule.sites]
    masks = stepped(schedule, 9)
    changed = [
        at + 1
        for at, (old, new) in enumerate(
            zip([[s.first for s in schedule.sites], *masks], masks, strict=False)
        )
        if not all(map(torch.equal, old, new))
    ]
    assert changed == [3, 6], "step 9 is the last: nothing would be trained under a new mask"
    assert [one.mask.data_ptr() for one in schedule.sites] == memory
    bits = sum(one.mask.numel() for one in schedule.sites)
    flips = sum(int((a != b).sum()) for a, b in zip(masks[4], masks[5], strict=True))
    apart = sum(
        int((one.first != mask).sum()) for one, mask in zip(schedule.sites, masks[5], strict=True)
    )
    assert (
        schedule.record["flip_rate"] == flips / bits > 0
        and schedule.record["changed"] == apart / bits > 0
    )
    assert (
        0 < schedule.record["removed_mass"] < 0.5 and 0 < schedule.record["decay_to_gradient"] < 0.5
    )


def test_the_pull_has_no_dimension() -> None:
    """Weights and gradients of other scales: lambda rms(W) / rms(g) is the strength, up the
    ramp."""
    schedule = MaskSchedule(
        [site("a"), site("b", 4, scale=100.0, seed=1)], replace(PLAN, refresh=0)
    )
    for step in range(7):
        for one, scale in zip(schedule.sites, (1.0, 1e-3), strict=True):
            one.weight.grad = scale * torch.randn(one.weight.shape)
        pulls = schedule.before_update()
        assert (step == 0) == (not pulls)
        for one in schedule.sites if pulls else ():
            weight, gradient = one.weight.detach(), one.weight.grad
            assert gradient is not None
            ratio = float(
                pulls[id(one.weight)].strength
                * weight.square().mean().sqrt()
                / gradient.square().mean().sqrt()
            )
            assert ratio == pytest.approx(0.5 * min(1.0, step / 4), rel=1e-5)
            assert torch.equal(pulls[id(one.weight)].removed.bool(), ~one.mask)
        schedule.after_update()


def test_without_a_ramp_the_pull_is_full_at_once_and_zero_weights_are_not_pulled() -> None:
    one = site("a", scale=0.0)
    schedule = MaskSchedule([one], replace(PLAN, ramp=0))
    one.weight.grad = torch.ones_like(one.weight)
    assert float(schedule.before_update()[id(one.weight)].strength) == 0.0
    with torch.no_grad():
        one.weight.fill_(2.0)
    assert float(schedule.before_update()[id(one.weight)].strength) == pytest.approx(0.5 / 2)
    one.weight.grad = None
    other = site("b")
    other.weight.grad = torch.ones_like(other.weight)
    assert list(MaskSchedule([one, other], replace(PLAN, ramp=0)).before_update()) == [
        id(other.weight)
    ]


def test_a_mixture_grows_from_step_to_step() -> None:
    one = site("a", scale=50.0)
    schedule = MaskSchedule([one], replace(PLAN, refresh=0, mixed=True, moment="sum"))
    for step in range(4):
        one.weight.grad = 3.0 * torch.ones_like(one.weight)
        pull = schedule.before_update()[id(one.weight)]
        assert pull.share == step / 8 and float(pull.strength) == pytest.approx(0.5 * 3.0)
        schedule.after_update()


def test_a_schedule_goes_on_where_it_was() -> None:
    straight, early = MaskSchedule([site("a")], PLAN), MaskSchedule([site("a")], PLAN)
    stepped(straight, 5)
    stepped(early, 5)
    late = MaskSchedule([site("a")], PLAN)
    late.restore(early.facts())
    assert (late.step, late.record) == (straight.step, straight.record) and set(late.record) == set(
        RECORDS
    )
    assert late.fingerprint() == early.fingerprint() == straight.fingerprint()
    assert MaskSchedule([site("a")], replace(PLAN, refresh=4)).fingerprint() != late.fingerprint()
    assert MaskSchedule([site("a", seed=2)], PLAN).fingerprint() != late.fingerprint()


def test_a_score_that_is_no_number_names_step_and_weight() -> None:
    one = site("layers.3.weight")
    with torch.no_grad():
        one.weight[2, 5] = math.nan
    with pytest.raises(
        MaskError, match=r"step 3: layers\.3\.weight: .*row 2, input 5 is NaN.*lower lr"
    ):
        stepped(MaskSchedule([one], PLAN), 3)


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_sharded_weights_have_the_masks_of_whole_ones(mesh: Any) -> None:
    """FSDP2 in one process: DTensors everywhere; two processes are a slow proof of the pass."""
    from torch.distributed.fsdp import fully_shard

    whole, sharded = MaskSchedule([site("a")], PLAN), MaskSchedule([site("a")], PLAN)
    fully_shard(sharded.sites[0].owner, mesh=mesh)
    optimizers = [
        s.optimizer_class[0]([s.sites[0].weight], lr=0.05, **s.optimizer_class[1])
        for s in (whole, sharded)
    ]
    generator = torch.Generator().manual_seed(4)
    for _ in range(7):
        x = torch.randn(5, 16, generator=generator)
        for schedule, optimizer in zip((whole, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            schedule.sites[0].owner(x).square().sum().backward()
            optimizer.step()
        assert torch.equal(whole.sites[0].mask, sharded.sites[0].mask)
        torch.testing.assert_close(
            whole.sites[0].weight, local_part(sharded.sites[0].weight), rtol=1e-6, atol=1e-7
        )
    assert hasattr(sharded.sites[0].weight, "full_tensor") and sharded.record["changed"] > 0
    assert sharded.record == pytest.approx(whole.record)

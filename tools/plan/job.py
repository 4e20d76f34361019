"""What a run itself would take: time, memory and disk, and in words what of it is too much."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.passes import Pass, Pipeline
from secateur.passes.importance import Taylor
from secateur.tools.plan.footprint import Footprint
from secateur.tools.report.units import format_bytes, format_duration

PROBE = 768
DISK_BYTES_PER_SECOND = 300e6
PROOF_SECONDS = 10.0
"""Starting the fresh process that opens the result, which imports all libraries again."""
LONG_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class PassShare:
    """One pass's share of the job: seconds, and bytes beside the weights, in memory and on the
    disk."""

    name: str
    seconds: float
    bytes: int
    disk_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """Rough needs of the job itself.

    peak_bytes: this process and its libraries, the weights before and after, and what the hungriest
        pass holds beside
        them: parameters and their gradients or moments, the activations of one sequence (kept for
        the backward pass where there is one) or of all calibration tokens at one place of the
        graph, and products of inputs; or, if that is more, both processes while the result is
        proved.
    seconds: from the counted FLOPs and the speed of a short matrix product on this machine, half of
        which is taken to be reached; plus capture, disk and proof.  Rough: expect a factor of two
        either way.
    gflops: the measured speed of that product, 1e9 a second, float32.
    passes: what each takes.
    disk_bytes: most that lies on the disk at once: what is kept to resume from, offloaded tensors,
        and the result.
    result_bytes: of the result alone, packed weights included.
    """

    tokens: int
    peak_bytes: int
    seconds: float
    gflops: float
    passes: tuple[PassShare, ...] = ()
    disk_bytes: int = 0
    result_bytes: int = 0


def estimate_job(
    pipeline: Pipeline,
    footprints: Sequence[Footprint],
    *,
    tokens: int,
    window: int,
    capture_seconds: float = 0.0,
    process_bytes: int = 0,
    width: int = 0,
    packed_bytes: int = 0,
) -> Job:
    """Rough memory, time and disk of running a pipeline.

    Args:
        footprints: of the Program before the first pass and after the last, or after each.
        tokens, window: calibration tokens in all, and in one sequence.
        capture_seconds: what capturing took here.
        process_bytes: what this process holds without the weights.
        width: inputs of the widest op that is refitted.
        packed_bytes: of the packed weights beside the result.
    """
    before = footprints[0]
    after = footprints[-1]
    speed = probe_gflops()
    if not pipeline.needs_data:
        tokens = 0
    shares = [_estimate_pass(one, before, tokens, window, width, speed) for one in pipeline.passes]
    in_memory = max((share.bytes for share in shares), default=0)
    smaller = after.bytes if after.parameters < before.parameters else 0
    running = before.bytes + max(smaller + in_memory, after.bytes)
    proving = before.bytes + smaller + process_bytes + after.bytes
    peak = process_bytes + max(running, proving)
    result = after.bytes + packed_bytes
    disk = _estimate_disk(pipeline, shares, before, after, result)
    read_and_written = before.bytes + 3 * after.bytes + disk
    seconds = sum(share.seconds for share in shares) + capture_seconds + PROOF_SECONDS
    seconds += read_and_written / DISK_BYTES_PER_SECOND
    return Job(
        tokens,
        round(peak),
        round(seconds, 1),
        round(speed, 1),
        tuple(shares),
        round(disk),
        round(result),
    )


def _estimate_pass(
    one: Pass, before: Footprint, tokens: int, window: int, width: int, speed: float
) -> PassShare:
    """What one pass takes; speed: 1e9 FLOPs a second, half of which it is taken to reach."""
    cost = one.cost
    if cost.tokens is not None:
        run = cost.tokens
    elif one.needs_data:
        run = tokens
    else:
        run = 0
    memory = cost.bytes_per_parameter * before.parameters + cost.solves * 8 * width**2
    if cost.holds:
        memory += cost.holds * tokens * before.live_bytes_per_token
    elif run:
        if cost.bytes_per_parameter:
            kept = before.activation_bytes_per_token
        else:
            kept = 0
        memory += window * (kept + 3 * before.largest_bytes_per_token)
    disk = cost.files * before.bytes + 2 * cost.checkpoints * before.parameters
    disk += cost.holds_files * tokens * before.live_bytes_per_token
    seconds = cost.flops * before.flops_per_token * run / (0.5e9 * speed)
    return PassShare(one.name, round(seconds, 1), round(memory), round(disk))


def _estimate_disk(
    pipeline: Pipeline,
    shares: Sequence[PassShare],
    before: Footprint,
    after: Footprint,
    result: float,
) -> float:
    """The most that lies in the work folder and the output at once: the Program that the pass
    before left, the files of the pass that runs, the Program that it leaves; or the last Program
    and the result."""
    stored = 0.0
    kept_beside = 0.0
    peak = 0.0
    for one, share in zip(pipeline.passes, shares, strict=True):
        kept_beside += one.cost.keeps * before.bytes
        stored_next = stored
        if one.numerics != "exact" or one.cost.keeps:
            stored_next = before.bytes + kept_beside
        peak = max(peak, stored + share.disk_bytes + stored_next)
        stored = stored_next
    last = min(stored, after.bytes + kept_beside)
    return max(peak, last + result)


def probe_gflops(seconds: float = 0.2) -> float:
    """Measured speed of a float32 matrix product on this machine, 1e9 FLOPs a second: the middle
    one of several, so that a busy moment does not count."""
    a = torch.randn(PROBE, PROBE)
    a @ a
    times = list[float]()
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times) < 3:
        begun = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begun)
    return 2 * PROBE**3 / sorted(times)[len(times) // 2] / 1e9


def describe_excess(pipeline: Pipeline, job: Job, *, memory_bytes: int | None) -> list[str]:
    """The memory and the time of a job that this machine does not have, in words and with what to
    do.

    Args:
        memory_bytes: of the machine, or None where unknown.
    """
    said = []
    if memory_bytes is not None and job.peak_bytes > memory_bytes:
        said.append(
            f"the run would need about {format_bytes(job.peak_bytes)} of memory and this machine "
            f"has {format_bytes(memory_bytes)}: {_spare_memory(pipeline, job)}"
        )
    if job.seconds > LONG_SECONDS:
        longest = max(job.passes, key=lambda share: share.seconds)
        said.append(
            f"the run would take about {format_duration(job.seconds)} at the speed of this "
            f"processor, most of it {longest.name}: give fewer tokens, or a machine with an "
            "accelerator"
        )
    return said


def describe_full_disk(pipeline: Pipeline, job: Job, disk_free: int | None) -> list[str]:
    """Why a job does not fit on the disk, in words and with what to do; empty where it does.

    Args:
        disk_free: bytes free where the output goes, or None where it is not known.
    """
    if disk_free is None or job.disk_bytes <= disk_free:
        return []
    return [
        f"the run would need about {format_bytes(job.disk_bytes)} of disk at once (the result "
        f"alone {format_bytes(job.result_bytes)}) and {format_bytes(disk_free)} are free: "
        f"{_spare_disk(pipeline)}"
    ]


def _spare_memory(pipeline: Pipeline, job: Job) -> str:
    """What would make the hungriest pass need less."""
    hungriest = max(job.passes, key=lambda share: share.bytes, default=None)
    ways = []
    for one in pipeline.passes:
        if hungriest is None or one.name != hungriest.name:
            continue
        if getattr(one, "offload", None) is False:
            ways.append(f"{one.name}{{offload=true}} keeps it in files")
        metric = getattr(one, "metric", None)
        if isinstance(metric, Taylor) and not metric.by_block:
            ways.append(f"{one.name}{{metric={{taylor={{by_block=true}}}}}} goes block by block")
        if getattr(one, "checkpointing", None) is False:
            ways.append(f"{one.name}{{checkpointing=true}} computes activations again")
        if one.cost.holds:
            ways.append("fewer --tokens hold less")
        elif one.needs_data or one.cost.tokens:
            ways.append("a shorter --window holds less")
    ways.append("or run it on a machine with more")
    return "; ".join(dict.fromkeys(ways))


def _spare_disk(pipeline: Pipeline) -> str:
    """What would make the run write less."""
    ways = []
    for one in pipeline.passes:
        if getattr(one, "keep_removed", None) is True:
            ways.append(f"{one.name}{{keep_removed=false}} leaves a copy out")
        if getattr(one, "offload", None) is True:
            ways.append(f"{one.name}{{offload=false}} holds its tensors in memory instead")
    ways.append("free some, or choose another disk (-o)")
    return "; ".join(dict.fromkeys(ways))

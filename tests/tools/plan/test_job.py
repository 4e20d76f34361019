"""What of a job is too much, in words; and what lies on the disk."""

from __future__ import annotations

import pytest

from secateur.graph import Program
from secateur.passes import Pipeline
from secateur.tools.plan.footprint import measure_footprint
from secateur.tools.plan.job import (
    Job,
    PassShare,
    describe_excess,
    describe_full_disk,
    estimate_job,
)
from secateur.tools.report.units import format_duration

GIB = 1024**3


def excess(text: str, job: Job) -> list[str]:
    pipeline = Pipeline.parse(text)
    return describe_excess(pipeline, job, memory_bytes=24 * GIB)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("score{metric=wanda},sparsify", "sparsify{offload=true} keeps it in files"),
        ("score{metric=taylor},sparsify{offload=true}", "machine with more"),
        ("distill", "distill{checkpointing=true}"),
    ],
)
def test_memory_beyond_the_machine_is_told_with_what_to_do(text: str, advice: str) -> None:
    shares = []
    for one in Pipeline.parse(text).passes:
        shares.append(PassShare(one.name, 1.0, 100 * GIB if one.name != "score" else 0))
    (said,) = excess(text, Job(10, 125 * GIB, 60.0, 10.0, tuple(shares)))
    assert "125 GiB of memory and this machine has 24 GiB" in said and advice in said
    assert excess(text, Job(10, 20 * GIB, 60.0, 10.0, tuple(shares))) == []


def test_taylor_is_told_to_go_block_after_block() -> None:
    job = Job(10, 125 * GIB, 60.0, 10.0, (PassShare("score", 1.0, 99 * GIB),))
    assert "by_block=true" in excess("score{metric=taylor}", job)[0]


def test_time_and_disk_beyond_reason_are_told() -> None:
    shares = (PassShare("sparsify", 1.0, 0), PassShare("distill", 5e8, 0))
    job = Job(10, GIB, 5.6e8, 10.0, shares, disk_bytes=11 * GIB, result_bytes=2 * GIB)
    (disk,) = describe_full_disk(Pipeline.parse("sparsify,distill"), job, 10 * GIB)
    assert describe_full_disk(Pipeline.parse("sparsify,distill"), job, 12 * GIB) == []
    (seconds,) = excess("sparsify,distill", job)
    assert "11 GiB of disk at once" in disk and "sparsify{keep_removed=false}" in disk
    assert "18 years" in seconds and "most of it distill" in seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (47 * 3600, "47 h"),
        (49 * 3600, "2 days 1 h"),
        (240 * 3600, "10 days"),
        (156126 * 3600 + 57 * 60, "18 years"),
    ],
)
def test_long_durations_in_days_and_years(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_disk_holds_what_is_kept_beside_the_result(llama: Program) -> None:
    size = measure_footprint(llama)

    def disk(text: str) -> float:
        pipeline = Pipeline.parse(text)
        job = estimate_job(pipeline, (size, size), tokens=0, window=64)
        assert job.disk_bytes >= job.result_bytes == size.bytes
        return job.disk_bytes / size.bytes

    assert disk("score{metric=random}") == 1
    assert disk("sparsify{metric=magnitude}") == 3  # weights and what was removed; the result
    assert disk("sparsify{offload=true}") == 5  # offloaded, both; in the journal; as kept, both
    assert disk("sparsify{offload=true,keep_removed=false}") == 3
    assert disk("repair") == 2
    assert disk("distill") == pytest.approx(7, abs=0.01)  # two checkpoints of three copies

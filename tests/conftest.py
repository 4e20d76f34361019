"""Shared by all tests: quiet, offline, deterministic; and the real model where a test is marked
``real``."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTHONSAFEPATH", "1")

import pytest
import torch

ROOT = Path(__file__).parents[1]

# torch's structured trace is formatted for whoever captures logs: a tenth of every capture.
logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)
# Graphs hold very many objects that live as long as they do: look for cycles less often.
gc.set_threshold(200_000, 20, 50)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The demo's model as a stock fp32 checkpoint folder (`make assets` prepares it; `make test`
    does so by itself)."""
    folder = (
        Path(os.environ.get("SECATEUR_CACHE", ROOT / ".cache" / "secateur"))
        / "smollm2-135m-instruct"
    )
    if not (folder / "config.json").is_file():
        pytest.skip("the real model is not prepared: run `make assets`")
    return folder


EXPECTED_SKIPS = (
    "the CPU kernels need AVX-512",
    "root may write anywhere",
    "no CUDA device",
    "another C library",
)
"""Reasons of the machine. Any other skip means that something is missing which `make setup`
installs: no test may vanish because a compiler, Triton or an extra is not there."""


def unexpected_skips(reasons: list[str]) -> list[str]:
    """Return the reasons that no machine excuses, each once."""
    found = []
    for reason in dict.fromkeys(reasons):
        if not any(known in reason for known in EXPECTED_SKIPS):
            found.append(reason)
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a strict run (SECATEUR_STRICT_SKIPS=1, as in `make test`) in which something was skipped
    that should have run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or os.environ.get("SECATEUR_STRICT_SKIPS") != "1":
        return
    reasons = []
    for report in reporter.stats.get("skipped", []):
        reasons.append(str(report.longrepr[2]) if report.longrepr else "")
    unexpected = unexpected_skips(reasons)
    if unexpected:
        reporter.ensure_newline()
        reporter.write_line("skipped for no good reason: " + "; ".join(unexpected), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

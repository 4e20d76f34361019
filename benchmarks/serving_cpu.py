"""The bars of serving on a CPU: a small model with 2:4 weights against torch's dense fp32 and bf16,
in one run.

Run ``python benchmarks/serving_cpu.py --out benchmarks/results`` on a quiet machine after ``make
assets`` (about 25 minutes on two cores, most of it compiling, once).  Writes serving_cpu.json and
serving_cpu.md: what ``secateur bench`` measured, and each bar with its number.  ``--quick`` times
the eager models only, in few rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.tools.demo.assets import default_cache, make_checkpoint

VARIANTS = "2:4,2:4+int8,2:4+int4,int8,int4"
LEAST = {"float32": 1.3, "bfloat16": 1.5}  # times the decode tokens/s of torch's dense model
MOST = {
    "2:4": 0.5625,
    "2:4+int8": 0.3125,
    "2:4+int4": 0.1954,
}  # of dense bf16, linear layers but the head


def measure(model: Path, work: Path, quick: bool) -> dict[str, Any]:
    """One run of ``secateur bench`` in a fresh process."""
    rounds = (
        ["--rounds", "3", "--new-tokens", "16"]
        if quick
        else ["--rounds", "15", "--new-tokens", "64", "--compiled"]
    )
    command = [
        sys.executable,
        "-P",
        "-m",
        "secateur",
        "bench",
        str(model),
        "--variants",
        VARIANTS,
        "--shapes",
        "none",
    ]
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [*command, *rounds, "--work", str(work), "--device", "cpu", "-o", out], check=True
        )
        found: dict[str, Any] = json.loads((Path(out) / "speed.json").read_text("utf-8"))
        return found | {"page": (Path(out) / "speed.md").read_text("utf-8")}


def bars(rows: Sequence[Mapping[str, Any]], dense: str) -> list[tuple[str, float, float, bool]]:
    """(what, measured, bar, reached).  The dense model is taken at its best: eager or compiled,
    whichever is faster."""
    found = []
    speed = {row["name"]: row["decode"]["median"] for row in rows if row["decode"]}
    for dtype, least in LEAST.items():
        base = max(value for name, value in speed.items() if name.startswith(f"{dense} {dtype}"))
        best = max(value for name, value in speed.items() if name.startswith("2:4 packed"))
        found.append(
            (
                f"decode, 2:4 over dense {dtype} at its best",
                best / base,
                least,
                best / base >= least,
            )
        )
    for kind, most in MOST.items():
        row = next(row for row in rows if row["name"] == f"{kind} packed eager")
        part = row["body_bytes"] / row["dense_bytes"]
        found.append(
            (f"bytes of the linear layers, {kind} over dense bf16", part, most, part <= most)
        )
    for row in rows:
        if row["name"].split(" ")[0] in MOST:
            found.append(
                (
                    f"tokens like dense-shaped, {row['name']}: {row['tokens_equal']}",
                    1.0,
                    1.0,
                    not row["fault"],
                )
            )
    return found


def page(found: Mapping[str, Any], told: Sequence[tuple[str, float, float, bool]]) -> str:
    """The measurements and the bars."""
    lines = [
        f"| {what} | {value:.4f} | {bar} | {'yes' if reached else 'no'} |"
        for what, value, bar, reached in told
    ]
    head = ["## Bars", "", "| what | measured | bar | reached |", "|---|---:|---:|---|"]
    return "\n".join([str(found["page"]), *head, *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", type=Path, default=Path(".cache/secateur/bench"))
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    model = make_checkpoint(default_cache())
    found = measure(model, given.work, given.quick)
    told = bars(found["models"], model.name)
    given.out.mkdir(parents=True, exist_ok=True)
    text = page(found, told)
    (given.out / "serving_cpu.md").write_text(text, "utf-8")
    record = {**{k: v for k, v in found.items() if k != "page"}, "bars": told}
    (given.out / "serving_cpu.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()

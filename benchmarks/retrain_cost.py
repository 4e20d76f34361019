"""What training under masks costs: steps of one model, dense and masked, in turns, in CPU seconds.

Run ``python benchmarks/retrain_cost.py --out FILE.json`` after ``make assets``, on a quiet machine.
A step is forward, backward and update; the refresh of all masks is timed apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import secateur
from secateur.passes.training.masks.decay import SideDecayAdamW
from secateur.passes.training.masks.masked import add_branch, put_masks, take_masks
from secateur.passes.training.masks.schedule import MaskPlan, MaskSchedule
from secateur.runtime import to_transformers
from secateur.tools.demo.assets import MODEL_FOLDER, default_cache
from secateur.tools.machine import describe_machine

KINDS = (
    "dense",
    "fixed",
    "fixed-boost-16",
    "adaptive",
    "adaptive-boost-16",
    "adaptive-boost-16-trained",
)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of a step (forward, backward, update) of one model, dense and under masks, in
    turns; medians."""
    dense = secateur.capture(default_cache() / MODEL_FOLDER)
    sparse = secateur.Pipeline.parse("sparsify{metric=magnitude}")(dense)
    stock = to_transformers(sparse)
    ids = torch.randint(
        0, 1000, (1, options.batch_tokens), generator=torch.Generator().manual_seed(0)
    )
    parameters = list(stock.parameters())
    plain, plan = (
        SideDecayAdamW(parameters, lr=1e-6),
        MaskPlan(strength=0.1, ramp=0, refresh=0, steps=10**9),
    )
    times: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "refresh")}
    for _ in range(options.rounds + 1):
        for kind in KINDS:
            adaptive = kind.startswith("adaptive")
            sites = (
                []
                if kind == "dense"
                else put_masks(stock, sparse, way="through" if adaptive else "kept")
            )
            if "boost" in kind:
                made = [add_branch(site, 16, kind.endswith("trained")) for site in sites]
                plain.add_param_group(
                    {"params": [p for pair in made for p in pair if p is not None]}
                )
            schedule = MaskSchedule(sites, plan)
            plain.masks = schedule if adaptive else None
            begun = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
                logits = stock(input_ids=ids, use_cache=False).logits
            F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
            plain.step()
            plain.zero_grad()
            times[kind].append(time.process_time() - begun)
            if kind == "adaptive":
                schedule.plan = replace(plan, refresh=1)
                begun = time.process_time()
                schedule.after_update()
                times["refresh"].append(time.process_time() - begun)
            take_masks(stock, sites)
            del plain.param_groups[1:]
    medians = {kind: statistics.median(values[1:]) for kind, values in times.items()}
    found = {
        "tokens": options.batch_tokens,
        "precision": options.precision,
        "cpu_seconds": medians,
        "to_dense": {kind: medians[kind] / medians["dense"] for kind in KINDS[1:]},
        "adaptive_with_refresh_every_10_to_dense": (medians["adaptive"] + medians["refresh"] / 10)
        / medians["dense"],
        "machine": describe_machine(),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--precision", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

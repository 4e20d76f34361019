"""Every causal language model of transformers, tiny and random: captured, grouped, every unlocked
group cut by 30 % at once, compared with the oracle.  Nothing in secateur knows these names.

    python -P benchmarks/architectures.py [--only llama,gpt2] [--json FILE]

A line an architecture: pass (difference <= 1e-4 of the largest logit), wrong, refused (secateur
says why), or not built (this script's one set of tiny sizes does not suit the architecture: the
model itself cannot be built or run).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from transformers import AutoModelForCausalLM, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo.checks import captured, check_all_at_once
from zoo.models import CLASSES, NAMED, PLAIN, tiny_config, tiny_model

from secateur import SecateurError

LARGEST, SECONDS = 30_000_000, 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="names with commas between")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    everything = dict.fromkeys([*NAMED, *PLAIN, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])
    rows = []
    for kind in options.only.split(",") if options.only else everything:
        rows.append(row(kind))
        print(" ".join(str(v) for v in rows[-1].values()), flush=True)
        captured.cache_clear()
    counts = Counter(r["result"] for r in rows)
    print(dict(counts))
    if options.json:
        options.json.write_text(json.dumps({"counts": counts, "rows": rows}, indent=1) + "\n")


def row(kind: str) -> dict[str, Any]:
    started = time.process_time()
    try:
        with time_limit():
            if kind not in PLAIN:
                build(kind)
    except Exception as error:
        return {"result": "not built", "kind": kind, "why": short(error)}
    try:
        with time_limit():
            figures = check_all_at_once(kind)
    except SecateurError as error:
        return {"result": "refused", "kind": kind, "why": short(error)}
    except Exception as error:
        return {"result": "wrong", "kind": kind, "why": short(error)}
    good = figures.difference <= 1e-4 and figures.eager <= 1e-4
    return {
        "result": "pass" if good else "wrong",
        "kind": kind,
        "difference": float(f"{figures.difference:.1e}"),
        "moved": round(figures.moved, 2),
        "free": ",".join(sorted(figures.families)),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def build(kind: str) -> None:
    """Build it on the meta device first: a configuration that did not shrink would fill the
    memory."""
    with torch.device("meta"):
        model = CLASSES.get(kind, AutoModelForCausalLM).from_config(tiny_config(kind))
    size = sum(p.numel() for p in model.parameters())
    if size > LARGEST:
        raise ValueError(
            f"{size / 1e6:.0f} M parameters: the tiny sizes do not reach its nested configuration"
        )
    model = tiny_model(kind)
    if model.main_input_name == "input_ids" and not model.config.is_encoder_decoder:
        model(input_ids=torch.arange(3, 25).reshape(2, 11))


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


if __name__ == "__main__":
    main()

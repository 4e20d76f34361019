"""A whole pipeline on the demo's model, killed with SIGKILL at random moments and started again:
nothing may be lost.

Run ``python benchmarks/kill_resume.py --out FOLDER`` after ``make assets``.  It runs the pipeline
once undisturbed, then with kills until there were ``--kills`` of them, in series: each series ends
with a run that is left alone, whose weights must have the SHA-256 of the undisturbed ones.  Writes
kill_resume.json and kill_resume.md, row by row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from secateur.tools.demo.assets import MODEL_FOLDER, default_cache, load_text
from secateur.tools.machine import describe_machine

PIPELINE = (
    "score{metric=wanda},prune-width{mlp=0.25},repair,"
    "distill{tokens=8192,batch_tokens=1024,save_every=2,evaluations=2,held_out=2}"
)


def command(options: argparse.Namespace, target: Path) -> list[str]:
    base = [
        sys.executable,
        "-P",
        "-m",
        "secateur",
        "compress",
        str(options.model),
        "-p",
        options.pipeline,
    ]
    sizes = ["--tokens", str(options.tokens), "--window", str(options.window)]
    return [
        *base,
        "--data",
        str(options.out / "calibration.jsonl"),
        *sizes,
        "-o",
        str(target),
        "--overwrite",
    ]


def run(arguments: list[str], log: Path, lives: float | None) -> tuple[int, float]:
    """One process, killed after so many seconds; its exit code and how long it lived."""
    began = time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(arguments, stdout=stream, stderr=stream, start_new_session=True)
        try:
            process.wait(lives)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, time.perf_counter() - began


def weights(folder: Path) -> str:
    with (folder / "model.safetensors").open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def kept(target: Path) -> str:
    """What lies in the work folder, shortly."""
    work = target.with_name(target.name + ".work")
    names = sorted(path.name for path in work.iterdir()) if work.is_dir() else []
    return ", ".join(name for name in names if name != "fingerprint.json") or "nothing"


def went_on(log: Path) -> str:
    told = " ".join(log.read_text(errors="replace").split())
    return (
        told.split("going on ", 1)[1].split(", as kept")[0]
        if "going on " in told
        else "from the beginning"
    )


def write(out: Path, report: dict[str, Any]) -> None:
    head = ["| series | lived s | went on | ended | then kept |", "|---:|---:|---|---|---|"]
    rows = [
        f"| {row['series']} | {row['lived_s']:.1f} | {row['went_on']} | {row['ended']} | "
        f"{row['kept']} |"
        for row in report["rows"]
    ]
    facts = {**report["protocol"], **report["machine"], "result": report["result"]}
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    for name, body in {
        "kill_resume.json": json.dumps(report, indent=1) + "\n",
        "kill_resume.md": "\n".join(["# Killed and resumed", "", *lines, "", *head, *rows]) + "\n",
    }.items():
        part = out / f"{name}.part"
        part.write_text(body, encoding="utf-8")
        os.replace(part, out / name)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    out, moments = options.out, random.Random(options.seed)
    code, whole_s = run(command(options, out / "whole"), out / "whole.log", None)
    if code:
        raise SystemExit((out / "whole.log").read_text()[-2000:])
    expected = weights(out / "whole")
    report: dict[str, Any] = {
        "protocol": {
            "model": options.model.name,
            "pipeline": options.pipeline,
            "calibration": f"{options.tokens} tokens in windows of {options.window}",
            "undisturbed_s": round(whole_s, 1),
            "weights_sha256": expected,
            "seed_of_moments": options.seed,
        },
        "machine": describe_machine(),
        "rows": [],
        "result": "not finished",
    }
    kills = equal = series = 0
    while kills < options.kills:
        series += 1
        target = out / f"killed-{series}"
        for left in range(min(options.a_series, options.kills - kills), -1, -1):
            lives = moments.uniform(0.05, 0.95) * whole_s if left else None
            code, lived = run(command(options, target), out / "killed.log", lives)
            kills += code == -signal.SIGKILL
            ended = {0: "by itself", -signal.SIGKILL: "killed"}.get(code, f"with code {code}")
            same = code == 0 and weights(target) == expected
            ended += ", equal weights" if same else ", OTHER WEIGHTS" if code == 0 else ""
            row = {
                "series": series,
                "lived_s": lived,
                "went_on": went_on(out / "killed.log"),
                "ended": ended,
            }
            report["rows"].append({**row, "kept": kept(target)})
            print(report["rows"][-1], flush=True)
            write(out, report)
            if code not in (0, -signal.SIGKILL):
                raise SystemExit((out / "killed.log").read_text()[-2000:])
            if code == 0:
                equal += same
                break
        shutil.rmtree(target)
    report["result"] = (
        f"{kills} kills in {series} series; {equal} of {series} ended with equal weights"
    )
    write(out, report)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=default_cache() / MODEL_FOLDER)
    parser.add_argument("--pipeline", default=PIPELINE)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--a-series", type=int, default=6, help="kills before a run is left alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out, options.model = options.out.absolute(), options.model.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": document}) for document in load_text(default_cache()).calibration]
    (options.out / "calibration.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report = measure(options)
    print(report["result"])
    raise SystemExit("OTHER WEIGHTS" in json.dumps(report["rows"]))


if __name__ == "__main__":
    main()

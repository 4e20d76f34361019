"""Run as a script in a fresh process: proves that plain transformers opens a folder and computes
what was saved.

It imports nothing of this package, so what it proves needs nothing of this package.  Arguments: the
model folder, and a folder with ``probe.json`` and ``probe.safetensors``.  Prints one JSON object:
``faults`` (empty if all is well) and figures."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

SHOWN = 3
NEW_TOKENS = 8
TIE = 1e-3
"""Two next tokens whose logits differ by less may swap between runs with and without a cache."""


def prove_reload(folder: Path, probe: Path) -> dict[str, Any]:
    """Load with the stock class and compare keys, every parameter bit for bit, outputs, and
    generated tokens."""
    spec = json.loads((probe / "probe.json").read_text("utf-8"))
    tensors = load_file(probe / "probe.safetensors")
    started = time.perf_counter()
    loader = getattr(transformers, spec["loader"])
    model, info = loader.from_pretrained(
        folder,
        dtype="auto",
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    model.eval()
    figures: dict[str, Any] = {
        "loader": spec["loader"],
        "load_seconds": time.perf_counter() - started,
    }
    inputs = dict(spec["inputs"]) | _under("input:", tensors)
    expected = _under("output:", tensors)
    faults = _compare_keys(info) + _compare_parameters(model, spec["parameters"])
    faults += _compare_outputs(model, inputs, expected, spec["tolerance"], figures)
    for place, call in enumerate(spec["calls"]):
        given = dict(call["inputs"]) | _under(f"call {place} input:", tensors)
        wanted = _under(f"call {place} output:", tensors)
        found: dict[str, Any] = {}
        wrong = _compare_outputs(model, given, wanted, spec["tolerance"], found)
        figures[f"difference with {call['what']}"] = found["difference"]
        faults += [f"with {call['what']}: {fault}" for fault in wrong]
    if spec["generate"] and not faults:
        faults += _compare_generation(model, inputs, figures)
    return {"faults": faults, **figures}


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, under the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    data = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{data.dtype} {list(data.shape)} ".encode())
    found.update(data.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _compare_keys(info: dict[str, Any]) -> list[str]:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return [
        f"{kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:SHOWN]}"
        for kind in kinds
        if info.get(kind)
    ]


def _compare_parameters(model: torch.nn.Module, expected: dict[str, str]) -> list[str]:
    found = {name: hash_tensor(parameter) for name, parameter in model.named_parameters()}
    names = sorted(found.keys() ^ expected.keys())
    changed = sorted(
        name for name in found.keys() & expected.keys() if found[name] != expected[name]
    )
    if names:
        faults = [f"parameters appeared or vanished: {names[:SHOWN]}"]
    else:
        faults = []
    return faults + (
        [f"{len(changed)} parameters differ from those saved: {changed[:SHOWN]}"] if changed else []
    )


def _compare_outputs(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    expected: dict[str, torch.Tensor],
    tolerance: float,
    figures: dict[str, Any],
) -> list[str]:
    with torch.no_grad():
        output = model(**inputs)
    faults = []
    figures["difference"] = 0.0
    for name, want in expected.items():
        have = output[name]
        scale = max(1.0, want.abs().max().item())
        if have.shape == want.shape:
            gap = (have.double() - want.double()).abs().max().item() / scale
        else:
            gap = float("inf")
        figures["difference"] = max(figures["difference"], gap)
        if not gap <= tolerance:
            faults.append(
                f"{name} differs from the program's by {gap:.3g}, allowed {tolerance:.3g}"
            )
    return faults


def _compare_generation(model: Any, inputs: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    """Greedy tokens with the cache must be those without it, but for ties."""
    runs = [
        _generate_greedily(model, inputs["input_ids"][:1], use_cache=use) for use in (True, False)
    ]
    (cached, _), (plain, logits) = runs
    figures["generated"] = cached[0].tolist()
    for step, (one, other) in enumerate(zip(cached[0].tolist(), plain[0].tolist(), strict=False)):
        if one != other:
            gap = abs((logits[step][0, one] - logits[step][0, other]).item())
            if gap < TIE:
                return []
            return [f"generation with the cache gives token {one} at step {step}, without {other}"]
    return []


def _generate_greedily(
    model: Any, ids: torch.Tensor, use_cache: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        **_decoder_start(model),
    )
    return found.sequences[:, -NEW_TOKENS:], found.logits


def _decoder_start(model: Any) -> dict[str, int]:
    """A first token for decoders whose settings name none."""
    settings = model.generation_config
    named = settings.decoder_start_token_id is not None or settings.bos_token_id is not None
    if model.config.is_encoder_decoder and not named:
        return {"decoder_start_token_id": 0}
    return {}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.stdout.write(json.dumps(prove_reload(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")

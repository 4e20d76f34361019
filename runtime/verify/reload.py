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

JSON = dict[str, Any]
Inputs = dict[str, Any]
SHOWN = 3
NEW_TOKENS = 8
TIE = 1e-3
"""Two next tokens whose logits differ by less may swap between runs with and without a cache."""


def prove_reload(folder: Path, probe: Path) -> JSON:
    """Load with the stock class and compare keys, every parameter bit for bit, outputs, and
    generated tokens.

    Args:
        folder: of the model.
        probe: folder with ``probe.json`` and ``probe.safetensors``.

    Returns:
        ``faults``, and figures.
    """
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
    figures: JSON = {
        "loader": spec["loader"],
        "load_seconds": time.perf_counter() - started,
    }
    inputs = dict(spec["inputs"]) | _under("input:", tensors)
    expected = _under("output:", tensors)
    faults = _compare_keys(info) + _compare_parameters(model, spec["parameters"])
    faults += _compare_outputs(model, inputs, expected, spec["tolerance"], figures)
    for place, call in enumerate(spec["calls"]):
        call_inputs = dict(call["inputs"]) | _under(f"call {place} input:", tensors)
        call_outputs = _under(f"call {place} output:", tensors)
        call_figures: JSON = {}
        call_faults = _compare_outputs(
            model, call_inputs, call_outputs, spec["tolerance"], call_figures
        )
        figures[f"difference with {call['what']}"] = call_figures["difference"]
        faults += [f"with {call['what']}: {fault}" for fault in call_faults]
    if spec["generate"] and not faults:
        faults += _compare_generation(model, inputs, figures)
    return {"faults": faults, **figures}


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, under the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes.

    Args:
        tensor: on any device.

    Returns:
        Hex digits.
    """
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {list(data.shape)} ".encode())
    digest.update(data.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _compare_keys(info: JSON) -> list[str]:
    faults = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            faults.append(f"{kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:SHOWN]}")
    return faults


def _compare_parameters(model: torch.nn.Module, expected: dict[str, str]) -> list[str]:
    loaded = {name: hash_tensor(parameter) for name, parameter in model.named_parameters()}
    faults = []
    if names := sorted(loaded.keys() ^ expected.keys()):
        faults.append(f"parameters appeared or vanished: {names[:SHOWN]}")
    shared = loaded.keys() & expected.keys()
    if changed := sorted(name for name in shared if loaded[name] != expected[name]):
        faults.append(f"{len(changed)} parameters differ from those saved: {changed[:SHOWN]}")
    return faults


def _compare_outputs(
    model: torch.nn.Module,
    inputs: Inputs,
    expected: dict[str, torch.Tensor],
    tolerance: float,
    figures: JSON,
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


def _compare_generation(model: Any, inputs: Inputs, figures: JSON) -> list[str]:
    """Greedy tokens with the cache must be those without it, but for ties."""
    ids = inputs["input_ids"][:1]
    cached = _generate_greedily(model, ids, use_cache=True)[0][0].tolist()
    plain_sequences, logits = _generate_greedily(model, ids, use_cache=False)
    figures["generated"] = cached
    tokens = zip(cached, plain_sequences[0].tolist(), strict=False)
    for step, (with_cache, without) in enumerate(tokens):
        if with_cache != without:
            gap = abs((logits[step][0, with_cache] - logits[step][0, without]).item())
            if gap < TIE:
                return []
            return [
                f"generation with the cache gives token {with_cache} at step {step}, "
                f"without {without}"
            ]
    return []


def _generate_greedily(
    model: Any, ids: torch.Tensor, use_cache: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    output = model.generate(
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
    return output.sequences[:, -NEW_TOKENS:], output.logits


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

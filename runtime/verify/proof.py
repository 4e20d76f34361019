"""What a folder must compute when plain transformers opens it in a fresh process, and what is found
there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from secateur.graph.program import JSON
from secateur.runtime.verify import reload

RELOAD_SECONDS = 3600
AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageClassification",
    "AutoModel",
)
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Call:
    """One more call, and what comes out of it.

    what: in words, such as "a picture".
    """

    what: str
    inputs: Mapping[str, object]
    outputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class ExpectedFolder:
    """What the fresh process must find.

    loader: the transformers class that opens the folder.
    inputs: of one call, by name.   outputs: of that call.
    parameters: name -> ``reload.digest``.
    tolerance: of outputs, relative to their largest magnitude where that is above one.
    generate: greedy tokens with the cache must be those without it.
    calls: more calls, with other modalities.
    """

    loader: str
    inputs: Mapping[str, object]
    outputs: Mapping[str, Tensor]
    parameters: Mapping[str, str]
    tolerance: float
    generate: bool
    calls: tuple[Call, ...] = ()

    def write_for_process(self, folder: Path) -> None:
        """Write what is expected as the fresh process reads it.

        Args:
            folder: gets ``probe.json`` and ``probe.safetensors``.
        """
        tensors: dict[str, Tensor] = {}
        plain_inputs = _put_call(tensors, "", self.inputs, self.outputs)
        calls = list[JSON]()
        for place, call in enumerate(self.calls):
            more_inputs = _put_call(tensors, f"call {place} ", call.inputs, call.outputs)
            calls.append({"what": call.what, "inputs": more_inputs})
        save_file(tensors, folder / "probe.safetensors")
        spec = {
            "loader": self.loader,
            "inputs": plain_inputs,
            "parameters": dict(self.parameters),
            "tolerance": self.tolerance,
            "generate": self.generate,
            "calls": calls,
        }
        (folder / "probe.json").write_text(json.dumps(spec), "utf-8")


def _put_call(
    tensors: dict[str, Tensor],
    prefix: str,
    inputs: Mapping[str, object],
    outputs: Mapping[str, Tensor],
) -> JSON:
    """Add the tensors of a call under names with a prefix; returns the inputs that are none."""
    plain_inputs: JSON = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}input:{name}"] = value.detach().cpu().contiguous().clone()
        else:
            plain_inputs[name] = value
    for name, output in outputs.items():
        tensors[f"{prefix}output:{name}"] = output.detach().cpu().contiguous().clone()
    return plain_inputs


def prove_folder(folder: Path, expected: ExpectedFolder) -> tuple[list[str], JSON]:
    """Open a folder in a fresh process with plain transformers: what differs from the expected, and
    figures.

    Args:
        folder: of a checkpoint.
        expected: what the process must find.

    Returns:
        Faults, a sentence each, and figures of the process.
    """
    with tempfile.TemporaryDirectory(prefix="secateur-probe-") as probe:
        expected.write_for_process(Path(probe))
        command = [sys.executable, "-P", str(Path(reload.__file__)), str(folder), probe]
        try:
            ran = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=os.environ | OFFLINE,
                timeout=RELOAD_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [f"a fresh process took over {RELOAD_SECONDS} s"], {}
    if ran.returncode != 0:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        return [f"a fresh process could not open the model: {last}"], {}
    figures: JSON = json.loads(ran.stdout.strip().splitlines()[-1])
    return figures.pop("faults"), figures


def loader_name(config: PretrainedConfig, cls: type) -> str:
    """The Auto class that leads from a configuration to a model class, or else that class
    itself.

    Args:
        config: of the model.
        cls: its class.
    """
    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping and mapping[type(config)] is cls:
            return name
    return cls.__name__

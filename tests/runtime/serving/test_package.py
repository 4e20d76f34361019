"""An ahead-of-time package, compiled once for all tests, and run in a fresh process without the
model's code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runtime_models import SMALL, tiny
from zoo.sparse import made_24

import secateur
from secateur.graph import capture
from secateur.graph.errors import ArtifactError
from secateur.passes import Pipeline
from secateur.runtime.serving.engine import PackagedEngine, StockEngine, open_engine
from secateur.runtime.serving.package import FILE, PackageError, load_package, write_package

PROMPT = torch.tensor([[5, 9, 31, 7]])
FRESH = """
import json, sys, torch
from secateur.runtime.serving.engine import open_engine
engine = open_engine(sys.argv[1])
found = engine.generate(torch.tensor(json.loads(sys.argv[2])), max_new_tokens=8, ignore_end=True)
code = [m for m in sys.modules if ".models.llama.modeling" in m]
print(json.dumps({"ids": found.ids.tolist(), "code": code}))
"""


def made(base: Path) -> tuple[Path, Path]:
    """(lowered artifact, its package): one layer, 2:4 and 4 bits, tied embeddings."""
    model = tiny("LlamaConfig", **{**SMALL, "num_hidden_layers": 1}, tie_word_embeddings=True)
    program = Pipeline.parse("quantize{bits=4},lower{smallest=true}").run(made_24(capture(model)))
    secateur.save(program, base / "lowered", check=False)
    write_package(secateur.load(base / "lowered"), base / "package", length=24)
    return base / "lowered", base / "package"


def test_a_package(tmp_path: Path) -> None:
    """One test, since compiling takes longer than all that is looked at."""
    folders = made(tmp_path)
    a_fresh_process_generates_the_same_tokens_without_the_model_s_code(folders)
    both_steps_hold_one_set_of_weights_and_the_ops_of_ours(folders)
    prompts_of_any_length_fit_but_not_more_than_the_cache(folders)
    a_package_of_another_machine_or_a_changed_one_is_refused(folders, tmp_path)


def a_fresh_process_generates_the_same_tokens_without_the_model_s_code(
    folders: tuple[Path, Path],
) -> None:
    lowered, package = folders
    wanted = (
        open_engine(lowered, device="cpu").generate(PROMPT, max_new_tokens=8, ignore_end=True).ids
    )
    command = [sys.executable, "-P", "-c", FRESH, str(package), json.dumps(PROMPT.tolist())]
    root = str(Path(secateur.__file__).parents[1])
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    assert found == {"ids": wanted.tolist(), "code": []}


def both_steps_hold_one_set_of_weights_and_the_ops_of_ours(folders: tuple[Path, Path]) -> None:
    lowered, package = folders
    packaged, stock = open_engine(package), open_engine(lowered, device="cpu")
    assert isinstance(packaged, PackagedEngine) and isinstance(stock, StockEngine)
    assert 0.9 * stock.nbytes < packaged.nbytes <= 1.2 * stock.nbytes
    names = set(packaged.packaged._weights)
    assert sum(name.endswith(".mask") for name in names) == 4, (
        "q, k, v and gate, up are one product each"
    )
    assert packaged.packaged.facts.ops and packaged.packaged.facts.end == (2,)


def prompts_of_any_length_fit_but_not_more_than_the_cache(folders: tuple[Path, Path]) -> None:
    lowered, package = folders
    packaged, model = load_package(package), secateur.load(lowered)
    for length in (1, 2, 7, 24):
        ids = torch.randint(3, 96, (1, length))
        with torch.no_grad():
            assert torch.allclose(packaged.prefill(ids), model(ids).logits[:, -1], atol=1e-4)
    with pytest.raises(PackageError, match="1 sequences of 24 tokens; 1 of 25"):
        packaged.decode(PROMPT[:, :1])
    with pytest.raises(PackageError, match="another batch or length"):
        packaged.prefill(PROMPT.expand(2, 4))


def a_package_of_another_machine_or_a_changed_one_is_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders[1], copy)
    (copy / FILE).write_text((copy / FILE).read_text().replace("torch 2", "torch 1"))
    with pytest.raises(ArtifactError, match="is not what its manifest says"):
        load_package(copy)
    with pytest.raises(PackageError, match="package it again"):
        load_package(copy, verify=False, trust_code=True)

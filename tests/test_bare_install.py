"""The wheel works with what it declares and nothing else: inspect, compress and generate on a tiny
model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from zoo.folders import save_tiny_model, write_letters

ROOT = Path(__file__).parents[1]
COMMANDS = """
import sys
from secateur.tools.cli import run_command
model, text, out = sys.argv[1:]
pipeline = "score{metric=wanda},prune-width{mlp=0.5},repair"
sizes = ["--tokens", "256", "--window", "64"]
for arguments in (
    ["inspect", model, "--json"],
    ["compress", model, "-p", pipeline, "--data", text, "-o", out, *sizes],
    ["generate", out, "--prompt", "abcabc", "--max-new-tokens", "4", "--json"],
):
    code = run_command(arguments)
    if code:
        sys.exit(f"{arguments[0]} ended with {code}")
"""


def built_wheel(folder: Path) -> Path:
    """The wheel of this checkout, built by the installed setuptools from a copy, since building
    leaves files behind."""
    copy = folder / "checkout"
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "demo-out", "tests", "benchmarks"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
    ]
    done = subprocess.run(
        [*command, "-w", str(folder), str(copy)],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl"))


def normalised(name: str) -> str:
    """The name of a distribution as comparisons take it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requires: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The distributions that a list of requirements brings, directly or through others, by name.

    Raises:
        PackageNotFoundError: one of them is not installed here.
    """
    reached: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requires]
    while waiting:
        requirement, asked_extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": asked_extra}):
            continue
        name = normalised(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            distribution = metadata.distribution(name)
            reached[name] = distribution
            waiting += [(Requirement(text), extra) for text in distribution.requires or []]
    return reached


def link_distribution(distribution: metadata.Distribution, site: Path) -> None:
    """Show a distribution of this environment in another one."""
    for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        link = site / top
        if not link.is_symlink():
            link.symlink_to(Path(str(distribution.locate_file(top))))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_wheel(tmp_path_factory.mktemp("wheel"))


def new_environment(home: Path) -> Path:
    """The site-packages of a new and empty environment."""
    venv.create(home, with_pip=False, symlinks=True)
    return next((home / "lib").glob("python3*/site-packages"))


def run_commands(home: Path, work: Path) -> None:
    """Open, compress and run a tiny model by the interpreter of an environment, and look at the
    result."""
    save_tiny_model(work / "model")
    write_letters(work / "text.txt")
    python = str(home / "bin" / "python")
    command = [
        python,
        "-I",
        "-c",
        COMMANDS,
        *(str(work / name) for name in ("model", "text.txt", "out")),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=work, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert json.loads((work / "out" / "config.json").read_text())["intermediate_size"] == 48


def test_the_wheel_works_with_what_it_declares(wheel: Path, tmp_path: Path) -> None:
    site = new_environment(tmp_path / "home")
    zipfile.ZipFile(wheel).extractall(site)
    (declared,) = metadata.distributions(name="secateur", path=[str(site)])
    distributions = closure(declared.requires or [])
    assert {"torch", "transformers", "safetensors"} <= set(distributions)
    assert not {"pytest", "peft", "lm-eval", "mypy"} & set(distributions)
    for distribution in distributions.values():
        link_distribution(distribution, site)
    run_commands(tmp_path / "home", tmp_path)


@pytest.mark.slow
def test_the_wheel_works_where_pip_installed_it(wheel: Path, tmp_path: Path) -> None:
    """A real installation; pip is pointed at a CPU build of torch by the environment, or brings
    CUDA libraries."""
    new_environment(tmp_path / "home")
    python = str(tmp_path / "home" / "bin" / "python")
    command = [sys.executable, "-P", "-m", "pip", "--python", python, "install", "-q"]
    command += ["-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(command, check=True, cwd=tmp_path)
    run_commands(tmp_path / "home", tmp_path)

"""The package works from the root, installed in editable mode, and from a wheel; and shadows
nobody."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("graph", "kernels", "passes", "runtime", "tools")
SHOW_KERNELS = (
    "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
)


def python(code: str, *, exe: str = sys.executable, cwd: Path = ROOT, **env: str) -> str:
    """What ``code`` prints in a fresh interpreter that starts in ``cwd`` with a safe path."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    result = subprocess.run(
        [exe, "-P", "-c", code], cwd=cwd, env=clean | env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def fake_kernels(folder: Path) -> Path:
    """A stand-in for the PyPI package ``kernels``, as a folder that can be put on the path."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("__version__ = '9'\n")
    return folder


def sources(top: Path) -> set[str]:
    return {str(p.relative_to(top)) for room in ROOMS for p in (top / room).rglob("*.py")}


def test_this_test_run_does_not_put_the_root_on_the_path() -> None:
    assert str(ROOT) not in sys.path and "" not in sys.path


def test_a_safe_path_leaves_the_name_kernels_to_the_pypi_package(tmp_path: Path) -> None:
    other = fake_kernels(tmp_path / "site")
    assert python(SHOW_KERNELS) in ("None", "") or "site-packages" in python(SHOW_KERNELS)
    assert python(SHOW_KERNELS, PYTHONPATH=str(other)).startswith(str(other))
    both = python(
        "import secateur.kernels, kernels; print(kernels.__file__, secateur.kernels.__file__)",
        PYTHONPATH=f"{other}{os.pathsep}{ROOT}",
    ).split()
    assert both[0].startswith(str(other)) and both[1] == str(
        ROOT / "secateur" / "kernels" / "__init__.py"
    )


def test_the_makefile_and_the_demo_ask_for_a_safe_path() -> None:
    assert "export PYTHONSAFEPATH = 1" in (ROOT / "Makefile").read_text()


def test_metadata_names_the_licence_the_command_and_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()
    assert project["requires-python"] == ">=3.11"
    assert {"torch>=2.11", "transformers>=5.17", "networkx>=3.2"} <= set(project["dependencies"])
    assert project["scripts"]["secateur"] == "secateur.tools.cli:main"


def test_constraints_pin_exact_versions_and_no_local_builds() -> None:
    lines = [
        x
        for x in (ROOT / "constraints.txt").read_text().splitlines()
        if x and not x.startswith("#")
    ]
    assert "torch==2.13.0" in lines
    assert all("==" in line and "+" not in line and "@" not in line for line in lines)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_links_of_the_pages_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    assert [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel built from that archive."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-P", "-m", "build", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment without secateur that sees this one's other packages."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, with_pip=False)
    site = next(p for p in sys.path if p.endswith("site-packages"))
    target = next((home / "lib").glob("python3*/site-packages"))
    (target / "borrowed.pth").write_text(site + "\n")
    return home / "bin" / "python"


@pytest.mark.slow
def test_archive_and_wheel_hold_real_files_of_every_room(built: Path) -> None:
    wanted = {f"secateur/{name}" for name in sources(ROOT)} | {
        "secateur/__main__.py",
        "secateur/py.typed",
    }
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    assert wanted <= set(wheel.namelist())
    assert {n.split("/")[0] for n in wheel.namelist()} == {
        "secateur",
        next(iter(built.glob("*.whl"))).name[:-17] + ".dist-info",
    }
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    assert wanted <= files


@pytest.mark.slow
def test_the_wheel_imports_without_the_checkout(built: Path, bare: Path, tmp_path: Path) -> None:
    target = tmp_path / "lib"
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(target)
    code = (
        "import secateur.graph.program as p, secateur.kernels as k; print(p.__file__, k.__file__)"
    )
    for file in python(code, exe=str(bare), cwd=tmp_path, PYTHONPATH=str(target)).split():
        assert file.startswith(str(target))


@pytest.mark.slow
def test_an_editable_install_follows_the_checkout_and_keeps_the_root_off_the_path(
    bare: Path, tmp_path: Path
) -> None:
    home = bare.parents[1]
    site = next((home / "lib").glob("python3*/site-packages"))
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "--python",
        str(bare),
        "install",
        "--no-deps",
        "-q",
        "-e",
        str(ROOT),
    ]
    subprocess.run(command, check=True, cwd=tmp_path)
    code = "import sys, secateur.graph as g; print(g.__file__); print(*sys.path)"
    file, path = python(code, exe=str(bare), cwd=tmp_path).splitlines()
    assert Path(file).resolve() == ROOT / "graph" / "__init__.py" and str(ROOT) not in path.split()
    other = fake_kernels(site)
    assert python(SHOW_KERNELS, exe=str(bare), cwd=tmp_path).startswith(str(other))

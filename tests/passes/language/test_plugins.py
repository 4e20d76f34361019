"""Plug-ins come from installed packages or from whoever starts the run, never from a model's
folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.graph import Program
from secateur.graph.errors import PipelineError
from secateur.passes import IMPORTANCES, PASSES, Pipeline, Score
from secateur.passes.importance import Importance
from secateur.passes.language.options import OptionError
from secateur.passes.language.plugins import PluginError, load_class, model_folder_above
from secateur.passes.registry import add_plugin

CODE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.passes import Importance, Pass, PassResult


@dataclass(frozen=True)
class Ramp(Importance):
    """The number of the unit, times something."""

    name: ClassVar[str] = "{name}"
    needs: ClassVar[str] = "nothing"
    times: float = 1.0

    def members(self, program, groups, context):
        return {{group.name: [self.times * torch.arange(group.units)] for group in groups}}


@dataclass(frozen=True)
class Nothing(Pass):
    """Does nothing."""

    name: ClassVar[str] = "{name}-pass"
    numerics: ClassVar[str] = "exact"

    def call(self, program, context):
        return PassResult(program, modified=False)


class Stranger:
    name = "stranger"
'''
INSTALLED = """[secateur.importances]
{name} = {module}:Ramp
[secateur.passes]
{name}-pass = {module}:Nothing
"""


def install(folder: Path, module: str, name: str, entry_points: str = INSTALLED) -> None:
    """A package as an installer leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(CODE.format(name=name))
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points.format(module=module, name=name))


@pytest.fixture(autouse=True)
def tables_as_before() -> Iterator[None]:
    before = [(table, dict(table.classes)) for table in (PASSES, IMPORTANCES)]
    modules = set(sys.modules)
    yield
    for table, classes in before:
        table.classes.clear()
        table.classes.update(classes)
    for module in set(sys.modules) - modules:
        if module.startswith("plug_"):
            del sys.modules[module]


def test_an_installed_package_brings_an_importance_and_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_layers: Program
) -> None:
    install(tmp_path, "plug_a", "ramp")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "plug_a" not in sys.modules and {"ramp"} <= IMPORTANCES.names()
    pipeline = Pipeline.parse("score{metric=ramp{times=2}},ramp-pass")
    assert (
        Pipeline.from_recipe(pipeline.to_recipe()) == pipeline
        and "ramp{times=2.0}" in pipeline.to_text()
    )
    found = pipeline.run(two_layers)
    assert found.scores["mlp#2"].tolist() == [0, 2, 4, 6, 8]
    assert [step.name for step in found.history] == ["score", "ramp-pass"]
    with pytest.raises(PipelineError, match="did you mean 'ramp'"):
        Pipeline.parse("score{metric=ramb}")
    assert {"ramp-pass"} <= {cls.name for cls in PASSES}


def test_whoever_starts_the_run_may_name_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_layers: Program
) -> None:
    (tmp_path / "plug_b.py").write_text(CODE.format(name="mine"))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PipelineError, match="'mine' is not the name"):
        Pipeline.parse("score{metric=mine}")
    add_plugin("plug_b:Ramp")
    add_plugin("plug_b:Nothing")
    add_plugin("plug_b:Ramp")
    assert Pipeline.parse("score{metric=mine},mine-pass").run(two_layers).scores[
        "mlp#2"
    ].tolist() == [0, 1, 2, 3, 4]


def test_an_instance_needs_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_layers: Program
) -> None:
    (tmp_path / "plug_c.py").write_text(CODE.format(name="other"))
    monkeypatch.syspath_prepend(str(tmp_path))
    metric = load_class("plug_c:Ramp", Importance)(times=3.0)
    assert Score(metric)(two_layers).scores["mlp#2"].tolist() == [0, 3, 6, 9, 12]


def test_a_pipeline_text_cannot_name_a_module() -> None:
    for text in ("score{metric=os:path}", "os:path"):
        with pytest.raises(PipelineError, match="is not the name of"):
            Pipeline.parse(text)


@pytest.mark.parametrize("marks", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("deep", [False, True])
def test_no_code_of_a_models_folder_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marks: str, deep: bool
) -> None:
    model = tmp_path / "model"
    place = model / "inner" if deep else model
    install(place, "plug_d", "sly")
    code = place / "plug_d.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n" + code.read_text())
    (model / marks).write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.syspath_prepend(str(place))
    for load in (lambda: add_plugin("plug_d:Ramp"), lambda: Pipeline.parse("score{metric=sly}")):
        with pytest.raises(PipelineError, match="which holds a model"):
            load()
    assert not (tmp_path / "ran").exists()


def test_a_link_out_of_or_into_a_models_folder_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, snapshot, elsewhere = (tmp_path / name for name in ("blobs", "snapshot", "elsewhere"))
    for folder in (blobs, snapshot, elsewhere):
        folder.mkdir()
    (blobs / "abc").write_text(CODE.format(name="sly"))
    (snapshot / "plug_e.py").symlink_to(blobs / "abc")
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    (elsewhere / "plug_f.py").symlink_to(snapshot / "plug_e.py")
    assert model_folder_above(snapshot / "plug_e.py") == snapshot
    monkeypatch.syspath_prepend(str(snapshot))
    with pytest.raises(PluginError, match="which holds a model"):
        load_class("plug_e:Ramp", Importance)
    assert model_folder_above(elsewhere / "x.py") is None


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("plug_g", "write module:Class"),
        (":Ramp", "write module:Class"),
        ("plug_none:Ramp", "no module named 'plug_none'"),
        ("plug_g.sub:Ramp", "no module named"),
        ("plug_g:Missing", "is nothing"),
        ("plug_g:Stranger", "expected a subclass of secateur.passes.Importance"),
        ("plug_h:Ramp", "fails on import: ZeroDivisionError"),
    ],
)
def test_what_is_no_plug_in_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, message: str
) -> None:
    (tmp_path / "plug_g.py").write_text(CODE.format(name="g"))
    (tmp_path / "plug_h.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=message):
        load_class(where, Importance)


def test_a_taken_name_and_an_entry_point_of_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plug_i.py").write_text(CODE.format(name="taylor"))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match="is named 'taylor'"):
        add_plugin("plug_i:Ramp")
    install(
        tmp_path,
        "plug_j",
        "right",
        INSTALLED.replace("{name} = {module}:Ramp", "wrong = {module}:Ramp"),
    )
    with pytest.raises(PipelineError, match="use one name"):
        Pipeline.parse("score{metric=wrong}")


def test_ours_go_before_installed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "plug_k", "wanda")
    monkeypatch.syspath_prepend(str(tmp_path))
    (score,) = Pipeline.parse("score{metric=wanda}").passes
    assert "plug_k" not in sys.modules and isinstance(score, Score)
    with pytest.raises(OptionError):
        IMPORTANCES.build("nothing-such")

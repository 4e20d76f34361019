"""Packing, the side file, and models that run on packed weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runtime_models import SMALL, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo.sparse import keep_two_of_four, made_24

import secateur
from secateur.graph import Program, capture, keep
from secateur.graph.errors import ArtifactError
from secateur.kernels.sparse24 import PackedLinear, StackedPart, ops
from secateur.passes import Pipeline
from secateur.passes.lowering.cost import DENSE, KINDS, weight_bytes
from secateur.passes.lowering.lower import LayerPlan, Lower, last_lowering
from secateur.passes.solvers.integer_grid import grid_of
from secateur.runtime.packed.store import (
    FOLDER,
    PLAN,
    WEIGHTS,
    lower_model,
    op_name,
    pack_layers,
    pack_weight,
    running,
    unpack_weight,
)
from secateur.runtime.packed.weights import (
    PackedLayer,
    iterate_packed_modules,
    rearrange_for_gpu,
    stack_layers,
)
from secateur.runtime.serving.engine import open_engine

PIPELINES = {
    "2:4": "lower{smallest=true}",
    "2:4+int8": "quantize{bits=8},lower{smallest=true}",
    "2:4+int4": "quantize{bits=4},lower{smallest=true}",
}
GENERATION = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}


def row(kind: str, weight: Tensor, **changes: object) -> LayerPlan:
    shape = (weight.shape[0], weight.shape[1])
    size = weight_bytes(kind, *shape, weight.dtype)
    return LayerPlan(
        "layer.weight", kind, shape, size, weight.nbytes, 0.0, 0.0, False, "", **changes
    )


def weight_for(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape)
    if kind.startswith("2:4"):
        columns = -(-shape[1] // 4) * 4
        weight = keep_two_of_four(torch.randn(shape[0], columns))[:, : shape[1]]
    bits = 8 if kind.endswith("int8") else 4 if kind.endswith("int4") else None
    weight = weight.to(dtype)
    return grid_of(weight, bits).round_to_grid(weight) if bits else weight


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != DENSE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8), (63, 130), (16, 256)])
def test_a_packed_weight_is_the_weight_and_has_the_planned_bytes(
    kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = weight_for(kind, shape, dtype)
    layer = pack_weight(row(kind, weight), weight, dtype)
    assert torch.equal(unpack_weight(kind, shape, layer.tensors, dtype), weight)
    assert layer.count_bytes == weight_bytes(kind, *shape, dtype)
    module = stack_layers([layer], [None])[0]
    x = torch.randn(2, 3, shape[1], dtype=dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    wanted = nn.functional.linear(x.double(), weight.double())
    assert ((module(x).double() - wanted).abs().max() / wanted.abs().max()) < tolerance


def test_a_weight_that_changed_after_the_plan_is_refused() -> None:
    weight = weight_for("2:4+int8", (8, 16), torch.float32)
    pack_weight(row("2:4+int8", weight), weight, torch.float32)
    for changed in (weight * torch.randn(8, 1), torch.randn(8, 16), weight[:4]):
        with pytest.raises(ArtifactError, match="put lower last"):
            pack_weight(row("2:4+int8", weight), changed, torch.float32)


def stack(
    kind: str = "2:4", sizes: tuple[int, ...] = (8, 4, 12), biased: bool = True
) -> tuple[list, list, list]:
    weights = [weight_for(kind, (n, 16), torch.float32) for n in sizes]
    layers = [
        PackedLayer(str(i), kind, tuple(w.shape), pack_weight(row(kind, w), w, w.dtype).tensors)
        for i, w in enumerate(weights)
    ]
    biases = [torch.randn(n) if biased else None for n in sizes]
    return stack_layers(layers, biases), weights, biases


@pytest.mark.parametrize("kind", ["2:4", "2:4+int8", "2:4+int4", "int8"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,), (1, 2, 0, 0, 2), (0, 1, 1, 2)])
def test_stacked_layers_give_the_same_in_any_order_and_for_any_input(
    kind: str, order: tuple[int, ...]
) -> None:
    modules, weights, biases = stack(kind)
    x, other = torch.randn(5, 16), torch.randn(5, 16)
    for given in (x, other, x.clone(), x):
        for index in order:
            wanted = nn.functional.linear(given, weights[index], biases[index])
            assert torch.allclose(modules[index](given), wanted, atol=1e-5)


def test_stacked_layers_multiply_once_and_hold_nothing_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules, _, _ = stack(biased=False)
    calls, plain = [], ops.linear
    monkeypatch.setattr(ops, "linear", lambda *args: calls.append(args) or plain(*args))
    x = torch.randn(2, 16)
    results = [module(x) for module in modules]
    assert (
        len(calls) == 1 and modules[0].held is None and [r.shape[1] for r in results] == [8, 4, 12]
    )
    names = {name for name, _ in nn.ModuleList(modules).named_buffers()}
    assert names == {"0.values", "0.mask"}, "the stacked tensors are held once"


@pytest.mark.parametrize("kind", ["2:4", "2:4+int8", "2:4+int4"])
def test_tensors_laid_out_for_a_gpu_give_the_same(kind: str) -> None:
    sizes = (16, 8, 32)
    weights = [weight_for(kind, (n, 128), torch.bfloat16) for n in sizes]
    layers = [
        PackedLayer(str(i), kind, tuple(w.shape), pack_weight(row(kind, w), w, w.dtype).tensors)
        for i, w in enumerate(weights)
    ]
    biases = [torch.randn(n).bfloat16() for n in sizes]
    modules = nn.ModuleList(stack_layers(layers, biases))
    x = torch.randn(3, 128).bfloat16()
    before = [module(x) for module in modules]
    held = modules[0].nbytes
    rearrange_for_gpu(modules)
    rearrange_for_gpu(modules)
    assert op_name(modules[0]) == "linear_24_fragment" and modules[0].nbytes <= 1.1 * held + 512
    for found, wanted in zip(
        [modules[2](x), modules[0](x), modules[1](x), modules[2](x)],
        [before[i] for i in (2, 0, 1, 2)],
        strict=True,
    ):
        assert torch.allclose(found.float(), wanted.float(), atol=2e-2)


def test_casting_a_model_leaves_scales_alone() -> None:
    modules, _, _ = stack("2:4+int8")
    before = modules[0].scale.clone()
    modules[0].to(torch.bfloat16)
    assert modules[0].scale.dtype == torch.float32 and torch.equal(modules[0].scale, before)
    assert modules[0].bias.dtype == torch.bfloat16


def test_what_differs_is_not_stacked() -> None:
    first, second = (
        pack_weight(row("2:4", w), w, w.dtype)
        for w in (weight_for("2:4", (8, n), torch.float32) for n in (16, 24))
    )
    with pytest.raises(ValueError, match="cannot be one product"):
        stack_layers([first, second], [None, None])
    with pytest.raises(ValueError, match="cannot be one product"):
        stack_layers([first, first], [None, torch.zeros(8)])


@pytest.fixture(scope="module")
def sparse() -> Program:
    return made_24(capture(tiny("LlamaConfig", **SMALL)))


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_saved_model_opens_packed_and_generates_the_same_tokens(
    kind: str, sparse: Program, tmp_path: Path
) -> None:
    program = Pipeline.parse(PIPELINES[kind]).run(sparse)
    report = secateur.save(program, tmp_path / "out", check=False)
    assert report.packed["kinds"] == {kind: 14, DENSE: 1}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "sparsity_config"} & set(config)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert all(torch.equal(p, stock.get_parameter(n)) for n, p in program.named_parameters())
    packed = secateur.load(tmp_path / "out")
    ids = torch.randint(3, 96, (2, 7))
    with torch.no_grad():
        assert torch.allclose(packed(ids).logits, stock(ids).logits, atol=1e-4)
    assert torch.equal(packed.generate(ids, **GENERATION), stock.generate(ids, **GENERATION))
    held = sum(m.nbytes for _, m in iterate_packed_modules(packed) if isinstance(m, PackedLinear))
    assert held == report.packed["bytes"] < 0.6 * report.packed["dense_bytes"]
    assert sum(1 for _, m in iterate_packed_modules(packed) if isinstance(m, StackedPart)) == 6
    assert not list(iterate_packed_modules(secateur.load(tmp_path / "out", packed=False)))


def test_what_runs_where_is_told_for_every_layer(sparse: Program, tmp_path: Path) -> None:
    program = Lower(smallest=True)(sparse)
    model = lowered_copy(program)
    rows = {told.layer: told for told in running(model, last_lowering(program.history))}
    assert (
        len(rows) == 15 and rows["lm_head"].kind == DENSE and "head=dense" in rows["lm_head"].reason
    )
    told = rows["model.layers.1.self_attn.v_proj"]
    assert (told.kind, told.op) == ("2:4", "secateur::linear_24") and told.backend
    assert (
        told.bytes == weight_bytes("2:4", 32, 64, torch.float32) and told.dense_bytes == 32 * 64 * 4
    )


def lowered_copy(program: Program) -> PreTrainedModel:
    model = secateur.runtime.to_transformers(program)
    layers, plan = pack_layers(program, last_lowering(program.history), model)
    lower_model(model, layers, plan)
    return model


def test_the_plan_s_dtype_is_the_model_s(sparse: Program, tmp_path: Path) -> None:
    secateur.save(Lower(smallest=True, dtype="bfloat16")(sparse), tmp_path / "out", check=False)
    model = secateur.load(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    held = [m.values.dtype for _, m in iterate_packed_modules(model) if isinstance(m, PackedLinear)]
    assert set(held) == {torch.bfloat16}


def test_a_tied_head_can_be_a_rounded_copy(tmp_path: Path) -> None:
    program = capture(tiny("LlamaConfig", **SMALL, tie_word_embeddings=True))
    secateur.save(Lower(head="int8", smallest=True)(program), tmp_path / "out", check=False)
    model = secateur.load(tmp_path / "out")
    assert isinstance(model.lm_head, PackedLinear) and model.lm_head.kind == "int8"
    assert model.model.embed_tokens.weight.dtype == torch.float32
    secateur.save(Lower(smallest=True)(made_24(program)), tmp_path / "dense-head", check=False)
    told = {row.layer: row for row in open_engine(tmp_path / "dense-head", device="cpu").layers}
    assert "head=dense" in told["lm_head"].reason, "a tied head has its reason under its own name"
    ids = torch.randint(3, 96, (1, 7))
    stock = secateur.load(tmp_path / "out", packed=False)
    with torch.no_grad():
        gap = (model(ids).logits - stock(ids).logits).norm() / stock(ids).logits.norm()
    assert 0 < gap < 0.02


def test_pruning_after_lowering_is_refused_and_nothing_is_left(
    sparse: Program, tmp_path: Path
) -> None:
    lowered = Lower(smallest=True)(sparse)
    group = next(g for g in secateur.coupled_groups(lowered) if not g.locked and g.family == "mlp")
    others = [g for g in secateur.coupled_groups(lowered) if g.family == "mlp"]
    pruned = keep(lowered, {g: list(range(1, group.units - 3)) for g in others})
    with pytest.raises(ArtifactError, match="put lower last"):
        secateur.save(pruned, tmp_path / "out", check=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["version", "row", "tensor", "json"])
def test_a_damaged_side_file_is_told(sparse: Program, tmp_path: Path, damage: str) -> None:
    from secateur.runtime.packed.store import read_layers

    secateur.save(Lower(smallest=True)(sparse), tmp_path / "out", check=False)
    folder = tmp_path / "out" / FOLDER
    read_layers(folder)
    plan = json.loads((folder / PLAN).read_text())
    if damage == "version":
        plan["version"] = 99
    elif damage == "row":
        plan["layers"][0]["shape"] = [4, 4]
    elif damage == "tensor":
        (folder / WEIGHTS).unlink()
    (folder / PLAN).write_text("{" if damage == "json" else json.dumps(plan))
    with pytest.raises(ArtifactError, match=r"save (it|the model) again"):
        read_layers(folder)

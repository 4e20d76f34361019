"""Tiny random models of many architectures, by configuration alone, and two written in plain
torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

# Sizes that every configuration is shrunk to, where it has the field.  No two axes share a size by
# accident of rank.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"),
        64,
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("num_dense_layers", "first_k_dense_replace"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "attention_window_size"), 16),
    "num_experts_per_tok": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "rotary_dim": 8,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 16,
    "time_step_rank": 4,
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_conv", "linear_conv_kernel_dim"), 4),
    "mamba_expand": 2,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "num_channels": 3,
    "image_size": 32,
    "patch_size": 8,
}
MAY_BE_NONE = {
    "pad_token_id",
    "n_inner",
    "num_key_value_heads",
    "head_dim",
    "bos_token_id",
    "eos_token_id",
}

# What one shape of sizes cannot serve.
OVERRIDES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "falcon": {"multi_query": True, "new_decoder_architecture": False},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "mpt": {"n_heads": 4, "n_layers": 2, "d_model": 64, "expansion_ratio": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8},
    "t5": {"decoder_start_token_id": 0},
    "dots1": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "zaya": {"num_experts_per_tok": 1},
    "axk2": {"head_dim": 8, "num_key_value_heads": 4},
    "minicpm3": {"head_dim": 8, "num_key_value_heads": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "head_dim": 8, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 8, "num_key_value_heads": 4},
    "deepseek_v32": {"head_dim": 8, "num_key_value_heads": 4},
    "axk1": {"head_dim": 8, "num_key_value_heads": 4},
    "glm4_moe_lite": {"head_dim": 8, "num_key_value_heads": 4},
    "glm_moe_dsa": {"head_dim": 8, "num_key_value_heads": 4},
    "youtu": {"head_dim": 8, "num_key_value_heads": 4},
}
CLASSES: dict[str, Any] = {
    "bert": AutoModelForMaskedLM,
    "roberta": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
    "vit": AutoModelForImageClassification,
}
NAMED = tuple(
    """
        llama mistral mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3_text gpt2 gpt_neox gptj opt bloom
        falcon phi phi3 stablelm olmo2 cohere starcoder2 granite smollm3 deepseek_v3 bert t5 vit
        """.split()
)


def tiny_config(kind: str, **overrides: Any) -> Any:
    """The configuration of an architecture, shrunk to SIZES wherever it has the field."""
    base = AutoConfig.for_model(kind)
    fields = base.to_dict()
    changes: dict[str, Any] = {}
    for name, size in SIZES.items():
        known = name in fields or _has(base, name)
        derived = isinstance(getattr(type(base), name, None), property)
        renamed = (
            name in base.attribute_map and base.attribute_map[name] in fields and name not in fields
        )
        if not known:
            continue
        unset = (
            fields.get(name) is None
            and getattr(base, name, None) is None
            and name not in MAY_BE_NONE
        )
        if not derived and not renamed and not unset:
            changes[name] = size
    layers = fields.get("layer_types")
    if layers:
        changes["layer_types"] = None
    changes |= OVERRIDES.get(kind, {}) | overrides
    try:
        return AutoConfig.for_model(kind, **changes)
    except Exception:
        if not layers:
            raise
        return AutoConfig.for_model(kind, **changes | {"layer_types": [layers[0], layers[-1]]})


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # a field that may differ between layers refuses to be read as one
        return False


def tiny_model(
    kind: str, attention: str = "sdpa", seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A tiny model in eval mode; every parameter is perturbed, so that no identity norm or zero
    bias hides a fault."""
    torch.manual_seed(seed)
    config = tiny_config(kind, **overrides)
    maker = CLASSES.get(kind, AutoModelForCausalLM)
    try:
        model = maker.from_config(config, attn_implementation=attention)
    except ValueError as error:
        if "att" not in str(error):
            raise
        model = maker.from_config(config, attn_implementation="eager")
    return perturb(model)


def perturb(model: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(torch.randn_like(module.running_mean) * 0.1)
                module.running_var.add_(torch.rand_like(module.running_var))
    return model.eval()


class NanoAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, width))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), NanoAttention(width, heads)
        self.norm_2, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class NanoGPT(nn.Module):
    """A GPT in plain torch: fused qkv, learned positions, tied head."""

    def __init__(
        self, vocabulary: int = 128, width: int = 64, heads: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(128, width)
        self.blocks = nn.ModuleList(NanoBlock(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.size(1), device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ResidualUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv_1, self.norm_1 = (
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.conv_2, self.norm_2 = (
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm_1(self.conv_1(x)))
        return F.relu(self.norm_2(self.conv_2(y)) + self.skip(x))


class ConvNet(nn.Module):
    """A small residual convolutional net."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.units = nn.Sequential(
            ResidualUnit(16, 16, 1), ResidualUnit(16, 32, 2), ResidualUnit(32, 32, 1)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(image))), 2)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.units(x), 1), 1))


PLAIN: dict[str, tuple[type[nn.Module], Tensor]] = {
    "nano_gpt": (
        NanoGPT,
        torch.randint(3, 120, (2, 11), generator=torch.Generator().manual_seed(0)),
    ),
    "conv_net": (ConvNet, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))),
}

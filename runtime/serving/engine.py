"""Generation: one face over a stock model (dense, pruned or on packed weights) and over an
ahead-of-time package.

- A package decodes by its compiled steps: a call of machine code a token.
- A stock model goes through transformers' ``generate``, so everything that its generation settings
say holds; on CUDA
  with a static cache and a compiled decode step, on CPU as it is, unless compiling is asked for:
  compiling takes a minute or two in every process, a package takes it once.

Dims: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from secateur.graph.errors import SecateurError
from secateur.graph.reading import reason_of, shown
from secateur.passes.calibration.seq2seq import decoder_start
from secateur.runtime.packed.store import FOLDER as PACKED
from secateur.runtime.packed.store import LayerReport, read_plan, running, runs_packed
from secateur.runtime.packed.weights import iterate_packed_modules, rearrange_for_gpu
from secateur.runtime.save.artifact import MANIFEST
from secateur.runtime.save.branches import checkpoint_in, open_with_branches
from secateur.runtime.save.stock_checkpoint import load
from secateur.runtime.serving.package import PackagedModel, is_package, load_package

log = logging.getLogger(__name__)

OnToken = Callable[[Tensor], None]
Settings = dict[str, Any]
"""Arguments of transformers' ``generate`` by name."""


class GenerateError(SecateurError):
    """What was asked for cannot be generated."""


@dataclass(frozen=True)
class Generation:
    """What came out.

    ids: [B, prompt + new].
    prompt_tokens, new_tokens: of one sequence.
    prefill_seconds: until the first new token;
    decode_seconds: from the first to the last.
    """

    ids: Tensor
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens after the first, of all sequences, over their time; 0 for a single one."""
        steps = (self.new_tokens - 1) * self.ids.shape[0]
        if steps > 0 and self.decode_seconds > 0:
            return steps / self.decode_seconds
        return 0.0


class Engine(Protocol):
    """Something that generates."""

    @property
    def name(self) -> str:
        """What it is, for people."""
        ...

    @property
    def device(self) -> torch.device:
        """Where prompts belong."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        ...

    def generate(
        self,
        ids_BT: Tensor,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        ignore_end: bool = False,
        on_token: OnToken | None = None,
    ) -> Generation:
        """Add tokens to prompts of one length until each said an end token, or ``max_new_tokens``.

        Args:
            ids_BT: prompts.
            max_new_tokens: new tokens of each, at most.
            temperature: 0 takes the likeliest token; above, tokens are drawn from the softmax of
                logits over it.
            seed: of the draws.
            ignore_end: never choose an end token.
            on_token: is shown each new column [B].

        Raises:
            GenerateError: no prompt, or no room.
        """
        ...


def open_engine(
    path: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    packed: bool | None = None,
    compiled: bool | None = None,
    trust_code: bool = False,
) -> Engine:
    """The engine for a folder: a package, an artifact of ours, or any checkpoint (or Hugging Face
    id).

    Args:
        path: folder, or Hugging Face id.
        device: cpu or cuda; None is cuda where there is one.
        dtype: of a stock model; None is the stored one.
        packed: run on packed weights; None does where ``lower`` chose so.
        compiled: compile the decode step of a stock model; None does so on CUDA only.
        trust_code: run a package's machine code from elsewhere.

    Raises:
        GenerateError: a dtype for packed weights, which have theirs.   What ``load`` and
            ``open_model`` raise.
    """
    folder = Path(path).expanduser()
    if is_package(folder):
        return PackagedEngine(load_package(folder, trust_code=trust_code))
    device = device_named(device)
    checkpoint = checkpoint_in(folder)
    on_packed = runs_packed(checkpoint, packed)
    if on_packed and dtype is not None:
        raise GenerateError(
            f"the packed weights of {folder} have a dtype: lower the model anew, or run it dense"
        )
    if dtype is None and has_manifest(folder):
        model: Any = load(folder, packed=on_packed)
    else:
        model = open_with_branches(path, dtype=dtype or "auto")
    plan = None
    if on_packed:
        plan = read_plan(checkpoint / PACKED)
    moved = model.to(device)
    if device.startswith("cuda"):
        rearrange_for_gpu(moved)
    if compiled is None:
        compiled = device == "cuda"
    return StockEngine(moved, compiled, tuple(running(moved, plan)))


def device_named(name: str | None) -> str:
    """A device that is there: the one asked for, or cuda where there is one.

    Args:
        name: as torch names it, or None.

    Raises:
        GenerateError: no such device, or this machine has none.
    """
    if name is None:
        if torch.cuda.is_available():
            return "cuda"
        return "cpu"
    try:
        torch.empty(1, device=torch.device(name))
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        raise GenerateError(
            f"--device {shown(name)[1:-1]} cannot be used here: {reason_of(error)}"
        ) from error
    return name


def has_manifest(folder: Path) -> bool:
    """Whether a folder is an artifact of ours."""
    return (folder / MANIFEST).is_file()


class _Clock(BaseStreamer):
    """Notes when tokens come, and shows them."""

    def __init__(self, on_token: OnToken | None) -> None:
        self.on_token = on_token
        self.times = list[float]()
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.times.append(time.perf_counter())
        if self.on_token is not None:
            self.on_token(value)

    def end(self) -> None:
        """Nothing is left to do."""


class StockEngine:
    """transformers' ``generate`` on a stock model.

    layers: what each linear layer runs on.
    """

    def __init__(
        self, model: PreTrainedModel, compiled: bool = False, layers: tuple[LayerReport, ...] = ()
    ) -> None:
        self.model = model
        self.compiled = compiled
        self.layers = layers

    @property
    def name(self) -> str:
        """The class, its weights and their dtype, and how it decodes."""
        weights = "dense weights"
        if any(True for _ in iterate_packed_modules(self.model)):
            weights = "packed weights"
        decoding = "eager"
        if self.compiled:
            decoding = "compiled decoding, static cache"
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{type(self.model).__name__}, {weights}, {dtype}, {decoding}"

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self.model.device
        return device

    @property
    def nbytes(self) -> int:
        """Bytes of unique parameters and buffers."""
        tensors = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(tensor.nbytes for tensor in tensors.values())

    def generate(
        self,
        ids_BT: Tensor,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        ignore_end: bool = False,
        on_token: OnToken | None = None,
    ) -> Generation:
        """Add tokens to prompts; see ``Engine.generate``."""
        _check_prompt(ids_BT, max_new_tokens)
        _check_rows(ids_BT, self.model.get_input_embeddings())
        clock = _Clock(on_token)
        torch.manual_seed(seed)
        settings: Settings = {
            "max_new_tokens": max_new_tokens,
            "use_cache": True,
            **self._sampling_options(temperature),
        }
        if self.model.config.is_encoder_decoder:
            settings["decoder_start_token_id"] = decoder_start(self.model.config)
        if ignore_end:
            settings["min_new_tokens"] = max_new_tokens
        if self.compiled:
            settings |= {
                "cache_implementation": "static",
                "compile_config": _compile_config(self.device),
            }
        if ids_BT.shape[0] == 1:
            settings["streamer"] = clock
        started = time.perf_counter()
        model: Any = self.model
        out: Any = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **settings)
        ended = time.perf_counter()
        if self.model.config.is_encoder_decoder:
            out = torch.cat([ids_BT, out[:, 1:]], dim=1)  # the decoder's own first token is no text
        first = ended
        if clock.times:
            first = clock.times[0]
        prompt_tokens = ids_BT.shape[1]
        new_tokens = out.shape[1] - prompt_tokens
        return Generation(out, prompt_tokens, new_tokens, first - started, ended - first)

    def _sampling_options(self, temperature: float) -> Settings:
        pad = self.model.generation_config.pad_token_id
        end = self.model.generation_config.eos_token_id
        if pad is None:
            pad = end
            if isinstance(end, list):
                pad = end[0]
        if pad is None:
            pad = 0
        if temperature > 0:
            return {"pad_token_id": pad, "do_sample": True, "temperature": temperature}
        return {
            "pad_token_id": pad,
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }


class PackagedEngine:
    """The loop over a package's compiled steps."""

    def __init__(self, packaged: PackagedModel) -> None:
        self.packaged = packaged

    @property
    def name(self) -> str:
        """Its dtype, and what it was compiled for."""
        facts = self.packaged.facts
        return f"ahead-of-time package, {facts.dtype}, compiled for {facts.compiled_for}"

    @property
    def device(self) -> torch.device:
        """The device that it was compiled for."""
        return torch.device(self.packaged.facts.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of both steps, held once."""
        return self.packaged.nbytes

    @torch.no_grad()
    def generate(
        self,
        ids_BT: Tensor,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        ignore_end: bool = False,
        on_token: OnToken | None = None,
    ) -> Generation:
        """Add tokens to prompts; see ``Engine.generate``."""
        _check_prompt(ids_BT, max_new_tokens)
        facts = self.packaged.facts
        if ids_BT.shape[1] + max_new_tokens - 1 > facts.length:
            raise GenerateError(
                f"the package holds {facts.length} tokens; {ids_BT.shape[1]} of prompt and "
                f"{max_new_tokens} new were "
                "asked for: ask for fewer, or package the model with a greater length"
            )
        draws = torch.Generator(device=self.device).manual_seed(seed)
        end = torch.tensor(facts.end, dtype=torch.int64, device=self.device)
        done = torch.zeros(len(ids_BT), dtype=torch.bool, device=self.device)
        columns = [ids_BT]
        started = time.perf_counter()
        logits = self.packaged.prefill(ids_BT)
        first = 0.0
        for remaining in range(max_new_tokens, 0, -1):
            if ignore_end:
                logits[:, end] = float("-inf")
            token = choose_token(logits, temperature, draws)
            if facts.end and not ignore_end:
                token = torch.where(done, end[0], token)
                done |= torch.isin(token, end)
            columns.append(token[:, None])
            first = first or time.perf_counter()
            if on_token is not None:
                on_token(token)
            if remaining == 1 or bool(done.all()):
                break
            logits = self.packaged.decode(token[:, None])
        ended = time.perf_counter()
        ids = torch.cat(columns, 1)
        return Generation(ids, ids_BT.shape[1], len(columns) - 1, first - started, ended - first)


def choose_token(logits_BV: Tensor, temperature: float, draws: torch.Generator) -> Tensor:
    """The next token [B]: the likeliest, or one drawn from the softmax of logits over
    temperature.

    Args:
        logits_BV: of the next token.
        temperature: 0 takes the likeliest.
        draws: generator on the device of the logits.
    """
    if temperature <= 0:
        return logits_BV.argmax(-1)
    probabilities_BV = (logits_BV.float() / temperature).softmax(-1)
    return torch.multinomial(probabilities_BV, 1, generator=draws)[:, 0]


def _check_prompt(ids_BT: Tensor, max_new_tokens: int) -> None:
    if ids_BT.dim() != 2 or not ids_BT.numel() or max_new_tokens < 1:
        raise GenerateError(
            "expected prompts [batch, tokens] with a token at least and one new token or "
            "more, found "
            f"{list(ids_BT.shape)} and {max_new_tokens}"
        )


def _check_rows(ids_BT: Tensor, embedding: object) -> None:
    rows = getattr(embedding, "num_embeddings", None)
    if isinstance(rows, int) and int(ids_BT.max()) >= rows:
        raise GenerateError(
            f"the prompt has the token {int(ids_BT.max())}, and the model has rows for {rows:,}: "
            "the tokenizer in its "
            "folder is another model's"
        )


def _compile_config(device: torch.device) -> CompileConfig:
    """CUDA graphs where there is CUDA; transformers compiles on accelerators only, unless told."""
    mode = "default"
    if device.type == "cuda":
        mode = "reduce-overhead"
    config: Any = CompileConfig(fullgraph=False, mode=mode)
    if device.type == "cpu" and hasattr(config, "_compile_all_devices"):
        config._compile_all_devices = True
    compile_config: CompileConfig = config
    return compile_config

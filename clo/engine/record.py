"""Records an attention trace from a real model: prefill, then teacher-forced decoding of the text's own continuation.

Any decoder of `transformers` built like Llama or Qwen (separate query projection, optional query norm, grouped heads,
rotary positions) is observed through the library's own attention registry and through hooks on its layers; the
model's results are not changed. Knows nothing about offloading, machines or time.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from clo.engine.smollm2 import MODEL_NAME, ensure_smollm2
from clo.errors import NotFoundError, SpecError
from clo.trace import NO_PAGE, AttentionTrace, TraceHeader, candidate_pages

ATTENTION_NAME = "clo_record"
HUB_PATIENCE_S = 5.0
SELECTORS = ("exact", "page_minmax")
PREFILL_CHUNK_TOKENS = 512
GROUP_FOLD = (
    "exact: attention mass of the page (softmax over all tokens), mean over the group's query heads; "
    "page_minmax: softmax over candidate pages of the page's upper bound on q.k * scale, mean over the group"
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSettings:
    """What to record. Tokens and pages; `context_tokens` counts the first recorded step's own token."""

    context_tokens: int
    num_steps: int
    page_size: int = 16
    max_budget_pages: int = 64
    selectors: tuple[str, ...] = SELECTORS
    lookaheads: tuple[int, ...] = (1, 2)
    num_sink_tokens: int = 4
    recent_window_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("context_tokens", "num_steps", "page_size", "max_budget_pages", "recent_window_tokens"):
            if getattr(self, name) < 1:
                raise SpecError(f"record.{name} = {getattr(self, name)}: must be at least 1")
        if not 0 <= self.num_sink_tokens <= self.page_size:
            raise SpecError(f"record.num_sink_tokens = {self.num_sink_tokens}: must fit the first page")
        if unknown := set(self.selectors) - set(SELECTORS):
            raise SpecError(f"record.selectors: {', '.join(sorted(unknown))}: known are {', '.join(SELECTORS)}")
        if not self.selectors:
            raise SpecError("record.selectors: at least one is needed")
        if any(distance < 1 for distance in self.lookaheads):
            raise SpecError(f"record.lookaheads = {self.lookaheads}: must be layers ahead, at least 1")
        if list(self.lookaheads) != sorted(set(self.lookaheads)):
            raise SpecError(f"record.lookaheads = {self.lookaheads}: must ascend")
        if self.candidates(0) < 1:
            raise SpecError(
                f"record.context_tokens = {self.context_tokens}: no page of {self.page_size} tokens lies between the "
                f"first page and the window of {self.recent_window_tokens} tokens"
            )

    def candidates(self, step: int) -> int:
        """Candidate pages of a step: see `clo.trace.candidate_pages`."""
        return candidate_pages(self.context_tokens + step, self.page_size, self.recent_window_tokens)


def default_text() -> str:
    """A long English text that every Python carries: the language reference as `pydoc` shows it."""
    import pydoc_data.topics

    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics.values())


def record(
    model: str | Path,
    text: str,
    *,
    context_tokens: int,
    num_steps: int,
    page_size: int = 16,
    max_budget_pages: int = 64,
    selectors: tuple[str, ...] = SELECTORS,
    lookaheads: tuple[int, ...] = (1, 2),
    text_source: str = "given text",
    progress: Progress | None = None,
) -> AttentionTrace:
    """Run `model` over `text` and return the trace of `num_steps` decode steps at `context_tokens` and beyond.

    `model` is `smollm2-135m`, a Hugging Face folder, or a hub name; `progress(phase, done, total)` is called with
    tokens ("prefill") and steps ("decode"). Raises `SpecError` for a text that is too short, a context beyond the
    model's positions or a model built differently, and `NotFoundError` for an unknown model or missing packages.
    """
    settings = RecordSettings(
        context_tokens=context_tokens,
        num_steps=num_steps,
        page_size=page_size,
        max_budget_pages=max_budget_pages,
        selectors=tuple(selectors),
        lookaheads=tuple(lookaheads),
    )
    network, tokenizer = load_model(model)
    token_ids = _token_ids(network, tokenizer, text, settings)
    recorder = AttentionRecorder(network, settings)
    nll = _run(network, recorder, token_ids, settings, progress or _no_progress)
    about = {
        "model": model if str(model) == MODEL_NAME else Path(model).name,
        "text_source": text_source,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "nll_per_token": nll,
        "recorded_at": datetime.now(UTC).date().isoformat(),
        "versions": package_versions(),
    }
    return recorder.trace(about)


def package_versions() -> dict[str, str]:
    """What made a measurement: Python and the packages that compute."""
    packages = {name: version(name) for name in ("clo-offload", "torch", "transformers", "numpy")}
    # the default text is that of the Python
    return {"python": platform.python_version(), **packages}


def load_model(model: str | Path) -> tuple[Any, Any]:
    """A float32 `transformers` model and its tokenizer, attention set to the recording function.

    Raises `NotFoundError` if there is no such folder or hub model, or the `models` extra is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise NotFoundError(
            f'recording needs torch and transformers ({error.name} is missing): pip install "clo-offload[models]"'
        ) from None
    register_attention()
    source = str(ensure_smollm2()) if str(model) == MODEL_NAME else str(model)
    transformers.utils.logging.disable_progress_bar()
    folder = Path(source).is_dir()
    if isinstance(model, Path) and not folder:
        raise NotFoundError(f"model {model}: no such model folder")
    if folder and not (Path(source) / "config.json").is_file():
        raise NotFoundError(f"model {model}: not a model folder: no config.json in it")
    away = not folder and not _hub_answers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=away)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation=ATTENTION_NAME, local_files_only=away
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if away:
            reason = "the hub does not answer, and its cache here has no such model"
        raise NotFoundError(f"model {model}: no model folder, and no hub model that can be loaded: {reason}") from None
    return network.eval(), tokenizer


def _hub_answers() -> bool:
    """Asked once: its own client would ask for most of a minute where there is no network."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE_S)
    except Exception:  # of whichever library the client uses
        return False
    return True


def register_attention() -> None:
    """Make `clo_record` known to `transformers`: SDPA that also shows decode steps to the layer's recorder."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        observer = getattr(module, "clo_observer", None)
        if observer is not None:
            observer(module, query, key, value, options.get("scaling"))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


class AttentionRecorder:
    """Collects one decode step after another from a model's layers. Use `attached()` around the recorded steps."""

    def __init__(self, network: Any, settings: RecordSettings) -> None:
        self.settings = settings
        self._layers = decoder_layers(network)
        if max(settings.lookaheads, default=0) >= len(self._layers):
            raise SpecError(f"record.lookaheads = {settings.lookaheads}: the model has only {len(self._layers)} layers")
        attention = self._layers[0].self_attn
        self._head_dim = int(attention.head_dim)
        self._num_query_heads = attention.q_proj.weight.shape[0] // self._head_dim
        self._num_kv_heads = attention.k_proj.weight.shape[0] // self._head_dim
        self._step = 0
        self._approximate: dict[tuple[int, int], Any] = {}
        self._index = [PageIndex(settings.page_size) for _ in self._layers]
        self._allocate()

    def _allocate(self) -> None:
        keep, steps, layers = self.settings, self.settings.num_steps, len(self._layers)
        query_shape = (steps, layers, self._num_query_heads, self._head_dim)
        page_shape = (steps, layers, self._num_kv_heads, keep.max_budget_pages)
        ahead = [(selector, distance) for selector in keep.selectors for distance in keep.lookaheads]
        self._queries = np.zeros(query_shape, np.float32)
        self._lookahead_queries = {distance: np.zeros(query_shape, np.float32) for distance in keep.lookaheads}
        self._pages = {selector: np.full(page_shape, NO_PAGE, np.uint16) for selector in keep.selectors}
        self._lookahead_pages = {key: np.full(page_shape, NO_PAGE, np.uint16) for key in ahead}
        self._page_mass = np.zeros(page_shape, np.float32)
        self._resident_mass = np.zeros(page_shape[:3], np.float32)
        self._output_norms = np.zeros((layers, self._num_query_heads), np.float64)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe every forward pass inside the block; each must feed exactly one token."""
        handles = [
            layer.register_forward_pre_hook(self._input_hook(index), with_kwargs=True)
            for index, layer in enumerate(self._layers)
        ]
        for layer in self._layers:
            layer.self_attn.clo_observer = self._observe
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in self._layers:
                del layer.self_attn.clo_observer

    def next_step(self) -> None:
        """The forward pass of a step is over."""
        self._step += 1
        self._approximate.clear()

    def trace(self, about: dict[str, Any]) -> AttentionTrace:
        """Everything recorded; `about` gives the header fields that the recorder cannot know."""
        keep = self.settings
        header = TraceHeader.parse(
            {
                **about,
                "num_layers": len(self._layers),
                "num_query_heads": self._num_query_heads,
                "num_kv_heads": self._num_kv_heads,
                "head_dim": self._head_dim,
                "group_fold": GROUP_FOLD,
                **asdict(keep),
            }
        )
        return AttentionTrace.from_arrays(
            header,
            queries=self._queries,
            lookahead_queries=self._lookahead_queries,
            pages=self._pages,
            lookahead_pages=self._lookahead_pages,
            page_mass=self._page_mass if "exact" in keep.selectors else None,
            resident_mass=self._resident_mass,
            head_importance=(self._output_norms / self._output_norms.mean()).astype(np.float32),
        )

    def _input_hook(self, layer: int) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            for distance in self.settings.lookaheads:
                target = layer + distance
                if target < len(self._layers):
                    query = project_query(self._layers[target], hidden, kwargs["position_embeddings"])
                    self._approximate[target, distance] = query[0, :, 0]

        return hook

    def _observe(self, module: Any, query: Any, key: Any, value: Any, scaling: float) -> None:
        layer, step = int(module.layer_idx), self._step
        tokens = self.settings.context_tokens + step
        if query.shape[2] != 1 or key.shape[2] != tokens:
            raise SpecError(
                f"model layer {layer} attends to {key.shape[2]} of {tokens} tokens: "
                "models with sliding-window layers cannot be recorded"
            )
        keys, values, real = key[0].float(), value[0].float(), query[0, :, 0].float()
        self._index[layer].extend(keys)
        self._queries[step, layer] = real.numpy()
        self._record_attention(layer, real, keys, values, scaling, module.o_proj.weight)
        self._record_pages(layer, None, real, keys, scaling)
        for distance in self.settings.lookaheads:
            if (approximate := self._approximate.get((layer, distance))) is not None:
                self._lookahead_queries[distance][step, layer] = approximate.float().numpy()
                self._record_pages(layer, distance, approximate.float(), keys, scaling)

    def _record_attention(
        self, layer: int, query: Any, keys: Any, values: Any, scaling: float, output_weight: Any
    ) -> None:
        mass = attention_mass(query, keys, scaling)
        heads_out = (mass @ values).reshape(self._num_query_heads, self._head_dim)
        weight = output_weight.float().reshape(-1, self._num_query_heads, self._head_dim)
        contribution = (weight * heads_out).sum(-1).norm(dim=0)
        self._output_norms[layer] += contribution.double().numpy() / self.settings.num_steps
        in_pages = page_sums(mass.mean(1), self.settings.page_size, self.settings.candidates(self._step))
        self._resident_mass[self._step, layer] = (1.0 - in_pages.sum(-1)).clamp(0, 1).numpy()
        best = in_pages.sort(dim=-1, descending=True).values[:, : self.settings.max_budget_pages]
        self._page_mass[self._step, layer, :, : best.shape[1]] = best.numpy()

    def _record_pages(self, layer: int, distance: int | None, query: Any, keys: Any, scaling: float) -> None:
        candidates = self.settings.candidates(self._step)
        for selector in self.settings.selectors:
            if selector == "exact":
                mass = attention_mass(query, keys, scaling).mean(1)
                scores = page_sums(mass, self.settings.page_size, candidates)
            else:
                scores = self._index[layer].scores(query, scaling, candidates)
            order = scores.argsort(dim=-1, descending=True, stable=True)[:, : self.settings.max_budget_pages] + 1
            out = self._pages[selector] if distance is None else self._lookahead_pages[selector, distance]
            out[self._step, layer, :, : order.shape[1]] = order.numpy().astype(np.uint16)


class PageIndex:
    """Elementwise minimum and maximum of the rotated keys of each full page of one layer, as pages fill."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._low: Any = None
        self._high: Any = None

    def extend(self, keys: Any) -> None:
        """Take in the pages that have filled up; `keys` is [num_kv_heads, tokens, head_dim]."""
        import torch

        known = 0 if self._low is None else self._low.shape[1]
        full = keys.shape[1] // self._page_size
        if full == known:
            return
        fresh = keys[:, known * self._page_size : full * self._page_size]
        fresh = fresh.unflatten(1, (full - known, self._page_size))
        low, high = fresh.amin(2), fresh.amax(2)
        self._low = low if known == 0 else torch.cat([self._low, low], 1)
        self._high = high if known == 0 else torch.cat([self._high, high], 1)

    def scores(self, query: Any, scaling: float, candidates: int) -> Any:
        """Scores [num_kv_heads, candidates] of pages 1..candidates for `query` [num_query_heads, head_dim]."""
        low, high = self._low[:, None, 1 : candidates + 1], self._high[:, None, 1 : candidates + 1]
        folded = query.reshape(low.shape[0], -1, 1, query.shape[-1])
        bound = (folded.clamp(min=0) * high + folded.clamp(max=0) * low).sum(-1) * scaling
        return bound.softmax(-1).mean(1)


def attention_mass(query: Any, keys: Any, scaling: float) -> Any:
    """Softmax over all tokens: [num_kv_heads, group_size, tokens].

    `query` is [num_query_heads, head_dim], `keys` [num_kv_heads, tokens, head_dim].
    """
    grouped = query.reshape(keys.shape[0], -1, query.shape[-1])
    return (grouped @ keys.transpose(1, 2) * scaling).softmax(-1)


def page_sums(mass: Any, page_size: int, candidates: int) -> Any:
    """Sums [num_kv_heads, candidates] of `mass` [num_kv_heads, tokens] over pages 1..candidates."""
    tokens = mass[:, page_size : (candidates + 1) * page_size]
    return tokens.unflatten(1, (candidates, page_size)).sum(-1)


def decoder_layers(network: Any) -> list[Any]:
    """The decoder layers, checked to be built as the recorder needs. Raises `SpecError` naming the missing part."""
    layers = list(getattr(getattr(network, "model", None), "layers", []))
    if not layers:
        raise SpecError(f"model {type(network).__name__}: no decoder layers at model.layers")
    for part in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"):
        for layer in layers:
            if not _has(layer, part):
                raise SpecError(f"model {type(network).__name__}: layers lack {part}: not a Llama or Qwen-style model")
    return layers


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None


def project_query(layer: Any, hidden: Any, position_embeddings: tuple[Any, Any]) -> Any:
    """The rotated query [batch, num_query_heads, tokens, head_dim] that `layer` would form from `hidden`."""
    attention = layer.self_attn
    query = attention.q_proj(layer.input_layernorm(hidden)).unflatten(-1, (-1, attention.head_dim))
    if getattr(attention, "q_norm", None) is not None:
        query = attention.q_norm(query)
    query = query.transpose(1, 2)
    # the model's own function, for models that rotate only a part or in another order
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(query, query, *position_embeddings)[0]


def _token_ids(network: Any, tokenizer: Any, text: str, settings: RecordSettings) -> Any:
    needed = settings.context_tokens + settings.num_steps - 1
    limit = int(network.config.max_position_embeddings)
    if needed > limit:
        raise SpecError(
            f"record.context_tokens = {settings.context_tokens} and num_steps = {settings.num_steps} need {needed} "
            f"positions: the model has {limit}"
        )
    # the text is used from its start; more than this many characters a token does not occur in prose
    token_ids = tokenizer(text[: 40 * needed], return_tensors="pt", verbose=False).input_ids
    if token_ids.shape[1] < needed:
        raise SpecError(
            f"text: {token_ids.shape[1]} tokens, but record.context_tokens = {settings.context_tokens} and "
            f"num_steps = {settings.num_steps} need {needed}"
        )
    return token_ids[:, :needed]


def _run(
    network: Any, recorder: AttentionRecorder, token_ids: Any, settings: RecordSettings, progress: Progress
) -> float:
    """Prefill all but the first recorded token, then one token a step. Returns the mean NLL of the decoded text."""
    import torch

    with torch.inference_mode():
        cache = _prefill(network, token_ids[:, : settings.context_tokens - 1], progress)
        losses: list[float] = []
        with recorder.attached():
            for step in range(settings.num_steps):
                at = settings.context_tokens - 1 + step
                logits = network(token_ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
                if step + 1 < settings.num_steps:
                    losses.append(-float(logits[0, -1].log_softmax(-1)[token_ids[0, at + 1]]))
                recorder.next_step()
                progress("decode", step + 1, settings.num_steps)
    return sum(losses) / max(1, len(losses))


def _prefill(network: Any, token_ids: Any, progress: Progress) -> Any:
    from transformers import DynamicCache

    cache, total = DynamicCache(), token_ids.shape[1]
    for start in range(0, total, PREFILL_CHUNK_TOKENS):
        chunk = token_ids[:, start : start + PREFILL_CHUNK_TOKENS]
        network(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        progress("prefill", start + chunk.shape[1], total)
    return cache


def _no_progress(phase: str, done: int, total: int) -> None:
    """Show nothing."""

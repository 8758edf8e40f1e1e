"""Observes the layers of a model decoding token by token, and collects what their heads ask for.

Through the library's own attention registry and through hooks; the model's results are not changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from clo.engine.models.anatomy import project_query
from clo.engine.recording.page_scores import PageIndex, attention_mass, page_sums
from clo.engine.recording.settings import RecordSettings
from clo.errors import SpecError
from clo.trace import NO_PAGE, AttentionTrace, TraceHeader

ATTENTION_NAME = "clo_record"
ATTENTION_WITH_SINKS_NAME = "clo_record_with_sinks"

GROUP_FOLD = (
    "exact: attention mass of the page (softmax over all tokens), mean over the group's query heads; "
    "page_minmax: softmax over candidate pages of the page's upper bound on q.k * scale, mean over the group"
)


def register_attention() -> None:
    """Make two attentions known to `transformers` that also show decode steps to the layer's recorder: SDPA, and the
    model's own for one with sinks, which SDPA leaves out."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        _show(module, query, key, options)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def attend_with_sinks(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        _show(module, query, key, options)
        own = sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    AttentionInterface.register(ATTENTION_WITH_SINKS_NAME, attend_with_sinks)
    AttentionMaskInterface.register(ATTENTION_WITH_SINKS_NAME, eager_mask)


def _show(module: Any, query: Any, key: Any, options: dict[str, Any]) -> None:
    observer = getattr(module, "clo_observer", None)
    if observer is not None:
        observer(module, query, key, options.get("scaling"))


class AttentionRecorder:
    """Collects one decode step after another from those of a model's layers that keep the whole context.

    Use `attached()` around the recorded steps. Layers with a window or linear attention choose nothing. From now on the
    model attends by one of the two attentions of `register_attention`, which give what its own gives.
    """

    def __init__(self, model: Any, settings: RecordSettings) -> None:
        from clo.engine.models.network import Network  # needs torch, which the commands ask for by name

        self.network = Network(model, whole=True)
        self._layers, spec = self.network.layers, self.network.spec
        if max(settings.lookaheads, default=0) >= len(self._layers):
            raise SpecError(f"record.lookaheads = {settings.lookaheads}: the model has only {len(self._layers)} layers")
        # where every layer that is recorded lies among the first, none lies so far behind another
        last = spec.whole_layers[-1]
        self.settings = replace(settings, lookaheads=tuple(each for each in settings.lookaheads if each <= last))
        if self.settings.lookaheads:
            self.network.check_predicts()
        self.network.decoder.set_attn_implementation(
            ATTENTION_WITH_SINKS_NAME if self.network.has_sinks else ATTENTION_NAME
        )
        self._rows = {layer: row for row, layer in enumerate(spec.whole_layers)}
        self._head_dim, self._num_query_heads = spec.head_dim, spec.num_query_heads
        self._value_dim = spec.head_dim if spec.latent is None else spec.latent.value_dim
        self._vectors: dict[int, Any] = {}
        self._num_kv_heads = spec.num_kv_heads
        self._step = 0
        self._approximate: dict[tuple[int, int], Any] = {}
        self._index = [PageIndex(settings.page_size) for _ in self._rows]
        self._allocate()

    def _allocate(self) -> None:
        keep, steps, layers = self.settings, self.settings.num_steps, len(self._rows)
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
        attentions = {row: self._layers[layer].self_attn for layer, row in self._rows.items()}
        for row, attention in attentions.items():
            attention.clo_observer = self._observe
            if self.network.spec.latent is not None:
                attention.expand_kv = self._seeing_vectors(row, attention.expand_kv)
            handles.append(attention.o_proj.register_forward_pre_hook(self._output_hook(row)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for attention in attentions.values():
                del attention.clo_observer
                vars(attention).pop("expand_kv", None)

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
                "num_layers": len(self._rows),
                "recorded_layers": () if len(self._rows) == len(self._layers) else tuple(self._rows),
                "model_layers": len(self._layers),
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
            rotation, positions = kwargs["position_embeddings"], kwargs.get("position_ids")
            for distance in self.settings.lookaheads:
                row = self._rows.get(layer + distance)
                if row is not None:
                    target = layer + distance
                    turned = self.network.rotation_for(target, layer, rotation, hidden, positions)
                    query = project_query(self._layers[target], hidden, turned)
                    self._approximate[row, distance] = query[0, :, 0]

        return hook

    def _output_hook(self, row: int) -> Callable[..., None]:
        """What attention gives, after sinks and gates took their part, is what its output projection reads."""

        def hook(projection: Any, args: tuple[Any, ...]) -> None:
            heads_out = args[0][0, -1].float().reshape(self._num_query_heads, self._value_dim)
            weight = projection.weight.float().reshape(-1, self._num_query_heads, self._value_dim)
            contribution = (weight * heads_out).sum(-1).norm(dim=0)
            self._output_norms[row] += contribution.double().numpy() / self.settings.num_steps

        return hook

    def _seeing_vectors(self, row: int, expand: Callable[..., Any]) -> Callable[..., Any]:
        def seeing(values: Any, rest: Any) -> Any:
            import torch

            self._vectors[row] = torch.cat([values, rest], -1)
            return expand(values, rest)

        return seeing

    def _observe(self, module: Any, query: Any, key: Any, scaling: float) -> None:
        layer, step = int(module.layer_idx), self._step
        tokens = self.settings.context_tokens + step
        if query.shape[2] != 1 or key.shape[2] != tokens:
            raise SpecError(f"model layer {layer} attends to {key.shape[2]} of {tokens} tokens: it cannot be recorded")
        row, real = self._rows[layer], self.network.of_cache(layer, query)[0, :, 0].float()
        # latent attention caches none of the keys that it attends to, but the vectors that they are made from
        keys = self._vectors.pop(row, key)[0].float()
        self._index[row].extend(keys)
        self._queries[step, row] = real.numpy()
        self._record_mass(row, real, keys, scaling)
        self._record_pages(row, None, real, keys, scaling)
        for distance in self.settings.lookaheads:
            if (approximate := self._approximate.get((row, distance))) is not None:
                self._lookahead_queries[distance][step, row] = approximate.float().numpy()
                self._record_pages(row, distance, approximate.float(), keys, scaling)

    def _record_mass(self, layer: int, query: Any, keys: Any, scaling: float) -> None:
        mass = attention_mass(query, keys, scaling)
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

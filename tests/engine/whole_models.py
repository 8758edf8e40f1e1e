"""What models that `offload` leaves whole are held to: their own tokens, and attention in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import GROUP, PAGE, design, prompt
from small import WINDOW as RECENT

from clo import presets
from clo.engine import mount
from clo.engine.models.library import as_cache
from clo.specs import Design
from clo_kernels.layout import NO_PAGE, window_start


def everything(name: str, **changes: Any) -> Design:
    """A design under which every token is attended."""
    chosen = presets.load_design(name)
    whole: dict[str, Any] = {"budget_fraction": 1.0, "slot_budgets": 1.0} if chosen.selects else {}
    return design(name, **whole | ({"tau": 2.0} if chosen.gated else {}) | changes)


def batch(tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.stack([prompt(tokens, seed), prompt(tokens, seed + 1)])


def generated(model: Any, ids: torch.Tensor, cache: Any, tokens: int, **options: Any) -> Any:
    """Its tokens and the logits of each."""
    return model.generate(
        ids,
        **as_cache(model, cache),
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def assert_same(found: Any, wanted: Any) -> None:
    assert found.sequences.tolist() == wanted.sequences.tolist()
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)


class Attention:
    """Every key and value that a model makes, and what its attention gives for the newest token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Any) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.given: list[SimpleNamespace] = []
        self._cache, self._attend, self._update = cache, mount._attend_by, type(cache).update
        monkeypatch.setattr(type(cache), "update", self._updating)
        monkeypatch.setattr(mount, "_attend_by", self._attending)

    def _updating(self, key: torch.Tensor, value: torch.Tensor, layer: int, *rest: Any, **more: Any) -> Any:
        for kept, new in ((self.keys, key), (self.values, value)):
            kept[layer] = torch.cat([kept[layer], new], dim=2) if layer in kept else new
        return self._update(self._cache, key, value, layer, *rest, **more)

    def _attending(self, own: Any, module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        output, weights = self._attend(own, module, query, *rest, **options)
        layer = module.layer_idx
        if self._cache.decodes:
            windowed = layer in self._cache.plan.model.windowed_layers
            pages = None if windowed else self._cache.layer(layer).selection.pages.clone()
            about = {"layer": layer, "query": query[:, :, -1], "output": output[:, -1], "pages": pages}
            about["tokens"], about["scale"] = self.keys[layer].shape[2], options["scaling"]
            about["window"] = self._cache.plan.model.window_tokens
            self.given.append(SimpleNamespace(**about, sinks=options.get("s_aux")))
        return output, weights

    def in_float64(self, one: SimpleNamespace, sequence: int, head: int) -> torch.Tensor:
        kv_head = head // GROUP
        seen = attended_tokens(one, sequence, kv_head)
        keys, values = (kept[one.layer][sequence, kv_head, seen].double() for kept in (self.keys, self.values))
        logits = keys @ one.query[sequence, head].double() * one.scale
        if one.sinks is not None:
            logits = torch.cat([logits, one.sinks[head, None].double()])
        return logits.softmax(0)[: len(keys)] @ values


def attended_tokens(one: SimpleNamespace, sequence: int, kv_head: int) -> list[int]:
    """In a window itself and those before it; else the first page, selected pages, and the recent ones."""
    if one.pages is None:
        return list(range(max(0, one.tokens - one.window), one.tokens))
    chosen = [int(page) for page in one.pages[sequence, kv_head] if page != NO_PAGE]
    start = window_start(one.tokens, RECENT + 1, PAGE)
    assert all(0 < page < start // PAGE for page in chosen)
    assert len(chosen) == 2
    of_pages = [token for page in chosen for token in range(page * PAGE, (page + 1) * PAGE)]
    return [*range(PAGE), *of_pages, *range(start, one.tokens)]

"""Models that choose what they attend to (DeepSeek-V3.2, GLM-5), really decoded, against the library's attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refuse, run
from forced import CLOSE, STEPS, TEXTS, assert_timeline_is_the_schedules, forced
from hypothesis import given
from hypothesis import strategies as st
from latent import INDEXER, WITH_INDEXER, latent_model
from latent import indexer_design as design
from small import prompt
from test_memory import held
from transformers import DynamicCache

from clo import presets
from clo.engine import offload, prefill
from clo.engine.answers.evaluate import evaluate
from clo.engine.answers.tasks import EvaluationSettings
from clo.engine.decoder import Decoder
from clo.engine.heads import heads_for
from clo.engine.inline_decoder import InlineDecoder
from clo.engine.layers import OffloadedLayer
from clo.engine.layers.indexed import IndexerSelection, best_pages
from clo.engine.memory import cache_bytes
from clo.engine.models import indexer as models_indexer
from clo.engine.models.library import as_cache
from clo.engine.models.network import Network
from clo.engine.models.probe import check_taken_apart
from clo.engine.prompts import read_prompt
from clo.engine.random_weights import random_prompt
from clo.errors import SpecError
from clo_kernels.layout import NO_PAGE

FRESH = ("resident-sparse", "resolve", "lru-cpu")
"""Designs that attend to what the indexer chooses in this step; so do gated ones whose queries never seem alike."""
SPARSE = tuple(name for name in presets.names("designs") if name not in ("resident", "streamed"))
TOP = INDEXER["index_topk"]


def cut(texts: tuple[torch.Tensor, ...] = TEXTS) -> list[torch.Tensor]:
    return [text[:-STEPS] for text in texts]


class Wider:
    """The library's own attention, to what the model's indexers choose and to what a decoder attends besides: the first
    token and the newest two. Only while tokens are decoded: prompts are read as the model reads them."""

    def __init__(self, model: Any) -> None:
        self.model, self.decodes = model, False
        for layer in model.model.layers:
            if layer.self_attn.indexer is not None:
                self._widen(layer.self_attn.indexer)

    def _widen(self, indexer: Any) -> None:
        own = indexer.forward

        def wider(hidden: Any, low: Any, rotation: Any, mask: Any, positions: Any, **options: Any) -> torch.Tensor:
            chosen, tokens = own(hidden, low, rotation, mask, positions, **options), mask.shape[-1]
            besides = torch.tensor([0, tokens - 2, tokens - 1], dtype=chosen.dtype)
            return torch.cat([chosen, besides.expand(*chosen.shape[:2], 3)], -1) if self.decodes else chosen

        indexer.forward = wider

    def logits(self, text: torch.Tensor) -> torch.Tensor:
        """`[steps, vocabulary]` of what follows each of the last tokens."""
        cache, rows = DynamicCache(config=self.model.config), []
        with torch.inference_mode():
            self.decodes = False
            rows.append(self.model(text[None, :-STEPS], **as_cache(self.model, cache), use_cache=True).logits[0, -1])
            self.decodes = True
            for at in range(-STEPS, 0):
                token = text[None, at : at + 1] if at < -1 else text[None, -1:]
                rows.append(self.model(token, **as_cache(self.model, cache), use_cache=True).logits[0, -1])
        return torch.stack(rows)


@pytest.mark.parametrize("kind", WITH_INDEXER)
class TestEveryKind:
    def test_it_is_taken_apart_rightly(self, kind: str) -> None:
        network = Network(latent_model(kind))
        check_taken_apart(network)
        indexer = network.spec.indexer
        assert indexer is not None
        shared = (1, 3) if kind == "GlmMoeDsa" else ()
        assert (indexer.num_heads, indexer.head_dim, indexer.top_tokens) == (16, 16, TOP)
        assert indexer.shared_layers == shared

    @pytest.mark.parametrize("name", FRESH)
    def test_it_attends_to_what_the_model_chooses(self, kind: str, name: str) -> None:
        """Two sequences of different lengths. Nobody's answer changes where the KV lies."""
        model = latent_model(kind)
        network = Network(model)
        with Decoder(network, design(name, network), max_new_tokens=STEPS, prefill_chunk_tokens=32) as decoder:
            found = forced(decoder, cut())
            moved = decoder.traffic.fetched_pages
        wanted = torch.stack([Wider(latent_model(kind)).logits(text) for text in TEXTS], dim=1)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        # the choice matters: full attention says something else
        full = latent_model(kind, index_topk=256)
        with torch.inference_mode():
            dense = torch.stack([full(text[None]).logits[0, -STEPS - 1 :][:, None] for text in TEXTS], 1)[:, :, 0]
        assert (found - dense).abs().max() > 0.1
        assert (moved > 0) == (name != "resident-sparse")

    @pytest.mark.parametrize("name", SPARSE)
    def test_an_indexer_that_chooses_everything_is_full_attention(self, kind: str, name: str) -> None:
        model = latent_model(kind, index_topk=256)
        network = Network(model)
        with Decoder(network, design(name, network), max_new_tokens=STEPS) as decoder:
            found = forced(decoder, cut())
        with torch.inference_mode():
            wanted = torch.stack([model(text[None]).logits[0, -STEPS - 1 :] for text in TEXTS], dim=1)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("changes", [{"prefetch_depth": 0}, {"prefetch_depth": 1}, {"on_miss": "replace"}])
    def test_without_reuse_a_gate_changes_nothing(self, kind: str, changes: dict[str, Any]) -> None:
        if kind == "GlmMoeDsa":
            changes = changes | {"prefetch_depth": 0}
        network = Network(latent_model(kind))
        with Decoder(network, design("clo", network, tau=2.0, **changes), max_new_tokens=STEPS) as decoder:
            found = forced(decoder, cut())
        with Decoder(network, design("resolve", network), max_new_tokens=STEPS) as decoder:
            torch.testing.assert_close(found, forced(decoder, cut()), **CLOSE)

    @pytest.mark.parametrize("name", SPARSE)
    def test_one_thread_says_what_the_machine_says(self, kind: str, name: str) -> None:
        network = Network(latent_model(kind))
        chosen = design(name, network, **{"tau": 0.9} if design(name, network).gated else {})
        ready = [read_prompt(network, text) for text in cut()]
        with Decoder(network, chosen, max_new_tokens=STEPS) as decoder:
            found = forced(decoder, ready)
            traffic = decoder.traffic
        alone = InlineDecoder(network, chosen, max_new_tokens=STEPS)
        assert torch.equal(forced(alone, ready), found)
        assert alone.traffic.h2d_bytes == traffic.h2d_bytes
        assert alone.traffic.requested_pages == traffic.requested_pages > 0

    def test_every_attended_token_is_the_prompts_own(self, kind: str) -> None:
        """Whatever was fetched, kept and overwritten: bit by bit."""
        network = Network(latent_model(kind))
        text = TEXTS[0]
        with Decoder(network, design("resolve", network, slot_pages=TOP + 3), max_new_tokens=STEPS) as decoder:
            forced(decoder, [read_prompt(network, text[:-STEPS])], (text,))
            for layer in decoder.layers:
                assert isinstance(layer, OffloadedLayer)
                chosen, slots = layer.selection.pages[0, 0], layer.residency.slots[0, 0]
                there = chosen != NO_PAGE
                assert 0 < int(there.sum()) <= TOP
                held_pages = layer.kv.slots[0, 0, slots[there].long()]
                assert torch.equal(held_pages, layer.host_pages[0, chosen[there].long(), 0])

    def test_keys_of_the_indexer_are_the_librarys(self, kind: str) -> None:
        """Those of the prompt and of every token since."""
        model, text = latent_model(kind, index_topk=256), TEXTS[0]
        network = Network(model)
        with Decoder(network, design("clo", network, tau=0.5), max_new_tokens=STEPS) as decoder:
            forced(decoder, cut()[:1], (text,))
            found = {at: each.selection for at, each in enumerate(decoder.layers) if isinstance(each, OffloadedLayer)}
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            model(text[None], **as_cache(model, cache), use_cache=True)
        for layer, selection in found.items():
            if isinstance(selection, IndexerSelection):
                wanted = cache.layers[layer].indexer_keys[0]
                if layer == 0:  # later layers have seen what reuse did to earlier ones
                    torch.testing.assert_close(selection.index[0, : len(text)], wanted, **CLOSE)
                torch.testing.assert_close(selection.index[0, : len(text) - STEPS], wanted[:-STEPS], **CLOSE)

    def test_its_timeline_has_the_operations_of_the_schedule(self, kind: str) -> None:
        network, ahead = Network(latent_model(kind)), {"prefetch_depth": int(kind == "DeepseekV32")}
        with Decoder(network, design("clo", network, **ahead), max_new_tokens=4) as decoder:
            names = assert_timeline_is_the_schedules(decoder)
        assert "index_tokens" in names
        assert ("share_pages" in names) == (kind == "GlmMoeDsa")

    @pytest.mark.parametrize("name", ["clo", "resident-sparse", "staged"])
    def test_memory_is_what_was_planned(self, kind: str, name: str) -> None:
        network = Network(latent_model(kind))
        with Decoder(network, design(name, network), max_new_tokens=20) as decoder:
            decoder.prefill([prompt(70), prompt(40)])
            assert decoder.plan is not None
            needed = cache_bytes(decoder.plan, 90)
            assert (needed.device, needed.host) == held(decoder)

    @pytest.mark.parametrize("shared", [0, 40, 69])
    def test_a_prompt_that_begins_as_one_that_was_read(self, kind: str, shared: int) -> None:
        network, first, second = Network(latent_model(kind)), prompt(70), prompt(70, 1)
        second[:shared] = first[:shared]
        known = read_prompt(network, first, chunk_tokens=32)
        found = read_prompt(network, second, known=known, shared=shared, chunk_tokens=32)
        wanted = read_prompt(network, second, chunk_tokens=32)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
        for keys, other in zip(found.indexer_keys, wanted.indexer_keys, strict=True):
            assert (keys is None) == (other is None)
            if keys is not None:
                torch.testing.assert_close(keys, other, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("sync", ["host", "events", "flags", "graph"])
    @pytest.mark.parametrize("transfer", ["page_copies", "staged", "cpu_zero_copy", "gpu_zero_copy"])
    def test_same_logits_whoever_moves_the_pages(self, kind: str, transfer: str, sync: str) -> None:
        network = Network(latent_model(kind))
        plain = design("clo", network, tau=0.7, prefetch_depth=int(kind == "DeepseekV32"))
        ready = [read_prompt(network, text) for text in cut()]
        with Decoder(network, plain, max_new_tokens=STEPS) as decoder:
            wanted = forced(decoder, ready)
        with Decoder(network, plain.with_fields(transfer=transfer, sync=sync), max_new_tokens=STEPS) as decoder:
            assert torch.equal(forced(decoder, ready), wanted)

    def test_pages_by_another_selector(self, kind: str) -> None:
        """Of any size; the prompt is read as the model reads it."""
        network = Network(latent_model(kind))
        chosen = presets.load_design("resolve").with_fields(
            selector="key_4bit", page_size=4, recent_window_tokens=8, budget_pages=3, min_budget_pages=1
        )
        with Decoder(network, chosen, max_new_tokens=STEPS) as decoder:
            found = forced(decoder, cut())
        assert bool(torch.isfinite(found).all())
        torch.testing.assert_close(found[0, 0], Wider(network.model).logits(TEXTS[0])[0], rtol=1e-3, atol=1e-3)

    def test_what_leaves_a_model_whole_does_not_take_it(self, kind: str) -> None:
        with pytest.raises(SpecError, match="a model's own indexer chooses is decoded step by step only"):
            offload(latent_model(kind), "clo")


@given(
    st.lists(st.permutations(range(12)), min_size=1, max_size=3),
    st.integers(1, 12),
    st.lists(st.integers(0, 11), min_size=3, max_size=3),
    st.integers(1, 12),
)
def test_the_best_of_what_was_chosen(orders: list[list[int]], top: int, candidates: list[int], budget: int) -> None:
    chosen = torch.tensor(orders)[:, :top]
    found = best_pages(chosen, torch.tensor(candidates[: len(orders)], dtype=torch.int32), budget)
    for row, order, last in zip(found.tolist(), orders, candidates, strict=False):
        pages = sorted([page for page in order[:top] if 1 <= page <= last][:budget])
        assert row == pages + [NO_PAGE] * (budget - len(pages))


@pytest.mark.parametrize("name", ["resident", "streamed"])
def test_attention_to_everything_is_refused(name: str) -> None:
    network = Network(latent_model("DeepseekV32"))
    with (
        Decoder(network, name, max_new_tokens=4) as decoder,
        pytest.raises(SpecError, match=f"design {name}: attend = full is not what Deep"),
    ):
        decoder.prefill([prompt(40)])


def test_a_choice_that_is_made_too_late_to_fetch_ahead() -> None:
    network = Network(latent_model("GlmMoeDsa"))
    with (
        Decoder(network, design("clo", network, prefetch_depth=1), max_new_tokens=4) as decoder,
        pytest.raises(SpecError, match=r"prefetch_depth = 1: layer 1 of .* shares the choice of a layer before it"),
    ):
        decoder.prefill([prompt(40)])


def test_a_made_up_prompt_has_keys_for_the_indexer() -> None:
    network = Network(latent_model("GlmMoeDsa"))
    with Decoder(network, design("resolve", network), max_new_tokens=3) as decoder:
        decoder.prefill([random_prompt(network, tokens, seed=tokens) for tokens in (70, 40)])
        assert bool(torch.isfinite(decoder.step(torch.tensor([1, 2]))).all())


@pytest.mark.parametrize(
    "changes", [("page_size=1",), ("selector=key_4bit", "page_size=2"), ("budget_pages=4",), ("slot_pages=40",)]
)
def test_choices_that_suit_such_models_only(changes: tuple[str, ...], tmp_path: Path) -> None:
    shape = tmp_path / "small.json"
    shape.write_text(json.dumps(latent_model("DeepseekV32").config.to_dict()))
    settings = [part for change in changes for part in ("--set", f"design.{change}")]
    run("run", "--model", shape, "--design", "resolve", "--context", 90, "--steps", 2, *settings)


def test_what_no_model_could_take_is_refused_before_one_is_loaded() -> None:
    said = refuse("run", "--weights", "no-such-model", "--design", "resolve", "--set", "design.page_size=0")
    assert "design.page_size" in said
    said = refuse("run", "--layers", "2", "--design", "resolve", "--set", "design.page_size=1")
    assert "num_sink_tokens = 4 must fit the first page of 1 tokens" in said


def test_keys_that_are_held_while_a_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    network, held_keys = Network(latent_model("DeepseekV32")), []
    own = prefill._PrefillCache.hand_over

    def counted(cache: Any) -> None:
        held_keys.append(sum(layer.indexer_keys.nbytes for layer in cache.layers))
        own(cache)

    monkeypatch.setattr(prefill._PrefillCache, "hand_over", counted)
    with Decoder(network, design("resolve", network), max_new_tokens=4) as decoder:
        decoder.prefill([prompt(80)])
        assert decoder.plan is not None
        assert cache_bytes(decoder.plan, 84).prefill == held_keys[0] + 2 * 80 * 4 * network.spec.head_dim


def test_what_a_head_profile_would_be_needed_for() -> None:
    with pytest.raises(SpecError, match=r"is not recorded: set design\.gqa_fold = mean"):
        heads_for(presets.load_design("clo-v1"), Network(latent_model("DeepseekV32")).spec)


def test_nothing_else_takes_what_cannot_be_taken_apart() -> None:
    model = latent_model("DeepseekV32", rope_interleave=False)
    with (
        Decoder(model, "resolve", max_new_tokens=4) as decoder,
        pytest.raises(SpecError, match=r"than those of the models that are known here$"),
    ):
        decoder.prefill([prompt(40)])


def test_a_real_run_of_a_small_shape(tmp_path: Path) -> None:
    """What the design's file leaves open is as the model attends, from the command line too."""
    shape, out = tmp_path / "small.json", tmp_path / "result.json"
    shape.write_text(json.dumps(latent_model("DeepseekV32").config.to_dict()))
    run("run", "--model", shape, "--design", "resolve", "--context", 90, "--steps", 3, "--out", out)
    result = json.loads(out.read_text())
    assert result["ops"]["index_tokens"]["calls"] == 4
    assert "score_pages" not in result["ops"]
    assert 0 < result["hit_rate"] < 1


@pytest.mark.parametrize("old", ["5.15.0", "5.17.3"])
def test_a_library_that_is_too_old(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = latent_model("DeepseekV32")
    monkeypatch.setattr(models_indexer.transformers, "__version__", old)
    with pytest.raises(SpecError, match=rf"own indexer needs transformers 5\.18 or newer, this is {old}: before"):
        Network(model)


def test_there_is_no_full_attention_to_compare_answers_with() -> None:
    settings = EvaluationSettings(context_tokens=64, num_texts=1, decoded_tokens=4, num_passkeys=0)
    with pytest.raises(SpecError, match="answers are compared with full attention, which is not what Deep"):
        evaluate(Network(latent_model("DeepseekV32")), len, "", (), settings)


def test_blocks_that_heads_choose_are_simulated_only() -> None:
    said = refuse("run", "--model", "minimax-m3", "--layers", "4")
    assert "an indexer without latent attention is simulated only: the real decoder has none" in said

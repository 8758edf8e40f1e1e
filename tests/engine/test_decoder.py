"""The decoder against the model's own attention, against an independent sparse attention, and against itself."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch
from small import PAGE, WINDOW, dense_logits, design, prompt, small_model

from clo import presets
from clo.engine.decoder import Decoder
from clo.engine.heads import HeadProfile
from clo.engine.layers import OffloadedLayer
from clo.errors import EngineError, SpecError
from clo.schedule.ops import Stage
from clo.specs import Design, Selector
from clo_kernels.page_index import IndexKind, dequantized, differing_bits

NAMES = presets.names("designs")
OFFLOADING = [name for name in NAMES if "resident" not in name]
FETCHING = [name for name in OFFLOADING if name != "streamed"]
ENGINES = ["page_copies", "staged", "cpu_zero_copy", "gpu_zero_copy"]
SYNCS = ["host", "events", "flags", "graph"]


def forced_logits(model: Any, chosen: Design, tokens: torch.Tensor, start: int, **options: Any) -> torch.Tensor:
    """Logits of decoding `tokens` one by one after a prompt of the first `start` of them."""
    with Decoder(model, chosen, max_new_tokens=len(tokens) - start, **options) as decoder:
        rows = [decoder.prefill([tokens[:start]])[0]]
        rows += [decoder.step(token[None])[0].clone() for token in tokens[start:]]
    return torch.stack(rows)


class TestFullAttention:
    @pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
    @pytest.mark.parametrize("name", NAMES)
    def test_a_budget_of_everything_is_full_attention(self, kind: str, name: str) -> None:
        model, tokens = small_model(kind), prompt(90)
        chosen = design(name)
        if chosen.selects:
            chosen = chosen.with_fields(budget_fraction=1.0, slot_budgets=1.0, slot_pages=None, tau=2.0)
        # the budget is that of the prompt: what leaves the window afterwards must still fit it
        found = forced_logits(model, chosen, tokens, 70)
        torch.testing.assert_close(found, dense_logits(model, tokens)[69:], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("selector", Selector)
    @pytest.mark.parametrize("name", ["clo", "clo-v1", "resident-sparse"])
    def test_with_every_selector(self, name: str, selector: Selector) -> None:
        model, tokens = small_model(), prompt(90)
        chosen = design(name, selector=selector, budget_fraction=1.0, tau=2.0)
        if chosen.offloads:
            chosen = chosen.with_fields(slot_budgets=1.0, slot_pages=None)
        found = forced_logits(model, chosen, tokens, 70)
        torch.testing.assert_close(found, dense_logits(model, tokens)[69:], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_dtypes(self, dtype: torch.dtype) -> None:
        model, tokens = small_model(dtype=dtype), prompt(60)
        chosen = design("clo", budget_fraction=1.0, slot_budgets=1.0, tau=2.0)
        found = forced_logits(model, chosen, tokens, 50).float()
        exact = dense_logits(small_model(), tokens)[49:]
        own = dense_logits(model, tokens)[49:].float()
        # no further from the truth than the model's own attention in the same precision, give or take
        assert (found - exact).abs().max() <= 2.0 * (own - exact).abs().max()

    @pytest.mark.parametrize("tokens", [1, 3, WINDOW, WINDOW + 1, WINDOW + PAGE, WINDOW + 2 * PAGE + 1])
    @pytest.mark.parametrize("name", ["resolve", "clo", "streamed", "staged"])
    def test_contexts_shorter_than_the_window(self, name: str, tokens: int) -> None:
        model, text = small_model(), prompt(tokens + 8)
        chosen = design(name)
        if chosen.selects:
            chosen = chosen.with_fields(budget_pages=None, budget_fraction=1.0, slot_budgets=1.0, tau=2.0)
        with Decoder(model, chosen, max_new_tokens=8) as decoder:
            rows = [decoder.prefill([text[:tokens]])[0]]
            rows += [decoder.step(token[None])[0].clone() for token in text[tokens : tokens + 2]]
        torch.testing.assert_close(torch.stack(rows), dense_logits(model, text)[tokens - 1 : tokens + 2], **CLOSE)

    @pytest.mark.parametrize("name", ["resident", "streamed", "clo"])
    def test_up_to_the_last_position_of_the_model(self, name: str) -> None:
        model, text = small_model(), prompt(256)
        assert model.config.max_position_embeddings == len(text)
        chosen = design(name)
        if chosen.selects:
            chosen = chosen.with_fields(budget_fraction=1.0, slot_budgets=1.0, slot_pages=None, tau=2.0)
        found = forced_logits(model, chosen, text, 248)
        torch.testing.assert_close(found, dense_logits(model, text)[247:], **CLOSE)

    @pytest.mark.parametrize("tokens", range(50, 50 + PAGE))
    def test_a_window_that_is_no_whole_number_of_pages(self, tokens: int) -> None:
        """Prompts that fill the window's ring differently: none may lose its newest token."""
        model, text = small_model(), prompt(tokens + 2)
        chosen = design("clo", budget_fraction=1.0, slot_budgets=1.0, slot_pages=None, tau=2.0)
        found = forced_logits(model, chosen, text, tokens)
        torch.testing.assert_close(found, dense_logits(model, text)[tokens - 1 :], **CLOSE)


CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Sparse:
    """Attention in float64 of one step over the pages that the decoder says it attends, from the prompt's own keys."""

    def __init__(self, model: Any, tokens: torch.Tensor) -> None:
        self.model = model.double()
        from transformers import DynamicCache

        self.cache = DynamicCache()
        with torch.inference_mode():
            model(tokens[None], past_key_values=self.cache, use_cache=True)

    def attend(self, layer: int, head: int, query: torch.Tensor, pages: list[int], length: int) -> torch.Tensor:
        keys, values = self.cache.layers[layer].keys[0, head], self.cache.layers[layer].values[0, head]
        start = max(0, length - WINDOW - 1) // PAGE * PAGE
        held = sorted({*range(min(PAGE, start)), *range(start, length)})
        held += [token for page in pages for token in range(page * PAGE, (page + 1) * PAGE)]
        assert len(set(held)) == len(held)
        weights = (query.double() @ keys[held].T * keys.shape[-1] ** -0.5).softmax(-1)
        return weights @ values[held]


class TestWhatIsAttended:
    @pytest.mark.parametrize("name", FETCHING)
    def test_every_attended_page_is_the_source_bit_for_bit(self, name: str) -> None:
        model, tokens = small_model(), prompt(150)
        chosen = design(name, budget_pages=4, slot_budgets=1.5 if name not in ("staged",) else None)
        with Decoder(model, chosen, max_new_tokens=60) as decoder:
            decoder.prefill([tokens[:90]])
            poison(decoder)
            for token in tokens[90:]:
                decoder.step(token[None])
                check_slots(decoder)

    @pytest.mark.parametrize("name", ["resolve", "clo", "lru-cpu", "staged", "recall", "resident-sparse"])
    def test_first_offloaded_layer_attends_the_selection(self, name: str) -> None:
        model, tokens = small_model(), prompt(120)
        chosen = design(name, budget_pages=3)
        with Decoder(model, chosen, max_new_tokens=30) as decoder:
            decoder.prefill([tokens[:90]])
            for token in tokens[90:]:
                decoder.step(token[None])
            layer, operations = decoder.layers[1], decoder._operations
            assert isinstance(layer, OffloadedLayer)
            assert operations is not None
            query = operations._real[1][0]
            found = layer.attend(query[None], operations.lengths)[0]
            # layer 1 sees what full attention saw: the only layer before it is dense
            oracle = Sparse(small_model(), tokens)
            for head in range(2):
                pages = [page for page in layer.selection.pages[0, head].tolist() if page >= 0]
                assert len(pages) == 3
                want = oracle.attend(1, head, query[head * 3 : head * 3 + 3], pages, len(tokens))
                torch.testing.assert_close(found[head * 3 : head * 3 + 3].double(), want, rtol=1e-4, atol=1e-5)

    def test_the_exact_selector_takes_the_pages_of_most_mass(self) -> None:
        model, tokens = small_model(), prompt(120)
        with Decoder(model, design("resolve", selector="exact", budget_pages=3), max_new_tokens=30) as decoder:
            decoder.prefill([tokens[:90]])
            for token in tokens[90:]:
                decoder.step(token[None])
            layer, operations = decoder.layers[1], decoder._operations
            assert isinstance(layer, OffloadedLayer)
            assert operations is not None
            keys = Sparse(small_model(), tokens).cache.layers[1].keys[0]
            start = (len(tokens) - WINDOW - 1) // PAGE * PAGE
            for head in range(2):
                query = operations._real[1][0, head * 3 : head * 3 + 3].double()
                mass = (query @ keys[head].T * keys.shape[-1] ** -0.5).softmax(-1).mean(0)
                pages = mass[PAGE:start].unflatten(0, (-1, PAGE)).sum(-1)
                best = sorted((pages.argsort(descending=True)[:3] + 1).tolist())
                assert layer.selection.pages[0, head].tolist() == best

    @pytest.mark.parametrize(("stage", "same"), [(Stage.PREFETCH, True), (Stage.DEMAND, False)])
    def test_what_is_chosen_ahead_is_chosen_without_the_layers_newest_key(self, stage: Stage, same: bool) -> None:
        """Which is being stored meanwhile: else the choice would depend on who is faster."""
        model, tokens = small_model(), prompt(120)
        chosen = design("resolve", selector="exact", budget_pages=3, prefetch_depth=1)
        with Decoder(model, chosen, max_new_tokens=30) as decoder:
            decoder.prefill([tokens[:90]])
            decoder.step(tokens[90:91])
            layer, operations = decoder.layers[2], decoder._operations
            assert isinstance(layer, OffloadedLayer)
            assert operations is not None
            selection, everyone = layer.selection, torch.ones(1, 2, dtype=torch.bool)
            scores = []
            with torch.inference_mode():
                for _ in range(2):
                    selection.score(stage, operations._real[2], operations.lengths, everyone)
                    scores.append(selection.scores[stage].clone())
                    selection.keys[:, :, 90] = 100 * operations._real[2][:, ::3]
        assert torch.equal(*scores) == same

    @pytest.mark.parametrize("selector", [s for s in Selector if s is not Selector.EXACT])
    @pytest.mark.parametrize("transfer", ["gpu_zero_copy", "cpu_zero_copy"])
    def test_the_index_grows_as_if_read_at_once(self, transfer: str, selector: Selector) -> None:
        """Pages that left the window while decoding are indexed as those of a prompt, by whoever stores them."""
        model, tokens = small_model(), prompt(120)
        sync = "graph" if transfer == "gpu_zero_copy" else "events"
        chosen = design("clo", selector=selector, budget_fraction=1.0, slot_budgets=1.0, transfer=transfer, sync=sync)
        indexes = []
        for start in (60, 119):
            with Decoder(model, chosen.with_fields(tau=2.0), max_new_tokens=70) as decoder:
                decoder.prefill([tokens[:start]])
                for token in tokens[start:]:
                    decoder.step(token[None])
                layer = decoder.layers[1]
                assert isinstance(layer, OffloadedLayer)
                indexes.append(layer.selection.index[0, :, 1 : (120 - WINDOW) // PAGE])
        grown, at_once = indexes
        if layer.selection.kind is IndexKind.SIGN_HASH:
            differ = differing_bits(grown, at_once)
        elif layer.selection.kind is IndexKind.KEY_4BIT:
            differ = (dequantized(grown) - dequantized(at_once)).abs() > 1e-2 * dequantized(at_once).abs().max()
        else:
            differ = (grown - at_once).abs() > 1e-4
        # keys differ by rounding: hardly ever by a bit or a code
        assert differ.float().mean() < 0.01

    def test_tau_above_one_is_the_selector_without_reuse(self) -> None:
        model, tokens = small_model(), prompt(120)
        exact = {"selector": "exact", "budget_pages": 3, "prefetch_depth": 0}
        resolve = forced_logits(model, design("resolve", **exact), tokens, 90)
        never = forced_logits(model, design("clo", tau=1.01, **exact), tokens, 90)
        often = forced_logits(model, design("clo", tau=0.5, **exact), tokens, 90)
        assert torch.equal(resolve, never)
        assert not torch.equal(resolve, often)


def poison(decoder: Decoder) -> None:
    """Whatever is read from a slot that holds no page turns everything into NaN."""
    for layer in decoder.layers:
        if isinstance(layer, OffloadedLayer):
            empty = layer.residency.table.page_of_slot < 0
            layer.kv.slots[empty] = float("nan")


def check_slots(decoder: Decoder) -> None:
    """Every selected page lies in its slot as it lies on the host."""
    for layer in decoder.layers:
        if not isinstance(layer, OffloadedLayer):
            continue
        for b, h in ((b, h) for b in range(layer.shape.batch) for h in range(layer.shape.num_kv_heads)):
            pages, slots = layer.selection.pages[b, h], layer.residency.slots[b, h]
            for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
                assert (page >= 0) == (slot >= 0)
                if page >= 0:
                    assert torch.equal(layer.kv.slots[b, h, slot], layer.host_pages[b, page, h])


class TestEnginesAndSyncs:
    """How pages move and who waits for whom never changes an answer."""

    @pytest.mark.parametrize("sync", SYNCS)
    @pytest.mark.parametrize("transfer", ENGINES)
    def test_same_logits_whoever_moves_the_pages(self, transfer: str, sync: str) -> None:
        model, tokens = small_model(), prompt(110)
        for resolve_on in ("gpu", "cpu"):
            chosen = design("clo", budget_pages=3, tau=0.7, transfer=transfer, sync=sync, resolve_on=resolve_on)
            found = forced_logits(model, chosen, tokens, 90)
            assert torch.equal(found, forced_logits(model, design("clo", budget_pages=3, tau=0.7), tokens, 90))

    @pytest.mark.parametrize("depth", [0, 1, 2])
    @pytest.mark.parametrize("name", ["resolve", "lru-cpu"])
    def test_prefetch_changes_no_answer_of_an_exact_cache(self, name: str, depth: int) -> None:
        model, tokens = small_model(), prompt(110)
        plain = design(name, budget_pages=3, prefetch_depth=0, slot_budgets=2)
        ahead = plain.with_fields(prefetch_depth=depth)
        assert torch.equal(forced_logits(model, ahead, tokens, 90), forced_logits(model, plain, tokens, 90))

    def test_pinned_heads_attend_everything(self) -> None:
        model, tokens = small_model(), prompt(90)
        chosen = design("clo", budget_pages=1, pinned_head_fraction=1.0)
        found = forced_logits(model, chosen, tokens, 70)
        torch.testing.assert_close(found, dense_logits(model, tokens)[69:], **CLOSE)

    def test_the_heads_that_a_profile_names_are_pinned(self) -> None:
        model, tokens = small_model(), prompt(120)
        chosen = design("resolve", budget_pages=1, pinned_head_fraction=0.5)
        heads = HeadProfile(pinned=tuple((1, 0) for _ in range(4)))
        with Decoder(model, chosen, max_new_tokens=30, heads=heads) as decoder:
            decoder.prefill([tokens[:90]])
            for token in tokens[90:]:
                decoder.step(token[None])
            layer, operations = decoder.layers[1], decoder._operations
            assert isinstance(layer, OffloadedLayer)
            assert operations is not None
            query = operations._real[1][0]
            found = layer.attend(query[None], operations.lengths)[0].double()
        whole = list(range(len(tokens) // PAGE))[1 : (len(tokens) - WINDOW - 1) // PAGE]
        everything = Sparse(small_model(), tokens).attend(1, 1, query[3:], whole, len(tokens))
        torch.testing.assert_close(found[3:], everything, rtol=1e-4, atol=1e-5)
        other = Sparse(small_model(), tokens).attend(1, 0, query[:3], whole, len(tokens))
        assert not torch.allclose(found[:3], other, rtol=1e-2)


class TestBatch:
    @pytest.mark.parametrize("name", ["resident", "resolve", "clo", "streamed", "recall", "staged"])
    def test_sequences_of_a_batch_do_not_touch_each_other(self, name: str) -> None:
        model, chosen = small_model(), design(name)
        if chosen.selects:
            chosen = chosen.with_fields(budget_pages=2, slot_budgets=None, slot_pages=None)
        texts = [prompt(50 + extra, seed) for seed, extra in enumerate((0, 7, 33))]
        with Decoder(model, chosen, max_new_tokens=20) as decoder:
            rows = [decoder.prefill([text[:-20] for text in texts])]
            for at in range(-20, 0):
                rows.append(decoder.step(torch.stack([text[at] for text in texts])).clone())
        for sequence, text in enumerate(texts):
            alone = forced_logits(model, chosen, text, len(text) - 20)
            together = torch.stack([row[sequence] for row in rows])
            torch.testing.assert_close(together, alone, **CLOSE)


class TestTraffic:
    def test_bytes_in_the_timeline_are_those_of_the_counts(self) -> None:
        model, tokens = small_model(), prompt(110)
        for name in OFFLOADING:
            chosen = design(name, **({"budget_pages": 3} if name != "streamed" else {}))
            with Decoder(model, chosen, max_new_tokens=20) as decoder:
                decoder.prefill([tokens[:90]])
                for token in tokens[90:]:
                    decoder.step(token[None])
                    assert decoder.timeline is not None
                    outward = [span for span in decoder.timeline.spans if span.name in ("append_kv", "write_back")]
                    back, traffic = sum(span.num_bytes for span in outward), decoder.traffic
                    moved = sum(span.num_bytes for span in decoder.timeline.spans) - back
                    assert back == traffic.written_back_pages * traffic.page_bytes
                    if name == "streamed":
                        assert moved == 4 * 2 * 2 * 16 * 4 * (decoder.lengths[0] - 1)
                    else:
                        assert moved == traffic.h2d_bytes

    def test_reuse_moves_less_than_resolve_and_resolve_less_than_refetching(self) -> None:
        model, tokens = small_model(), prompt(200)
        moved = {}
        for name in ("clo", "resolve", "staged"):
            changes = {"slot_budgets": 1.0} if name != "staged" else {}
            with Decoder(
                model, design(name, budget_pages=6, tau=0.3, prefetch_depth=0, **changes), max_new_tokens=50
            ) as decoder:
                decoder.prefill([tokens[:150]])
                moved[name] = 0.0
                for token in tokens[150:]:
                    decoder.step(token[None])
                    moved[name] += decoder.traffic.h2d_bytes
        assert moved["clo"] < moved["resolve"] < moved["staged"]


class TestRefusals:
    def test_a_prompt_longer_than_the_model(self) -> None:
        with (
            Decoder(small_model(), design("clo"), max_new_tokens=200) as decoder,
            pytest.raises(
                SpecError, match=r"prompt of 100 tokens and max_new_tokens = 200 need 300 positions: .* has 256"
            ),
        ):
            decoder.prefill([prompt(100)])

    def test_more_tokens_than_there_is_room_for(self) -> None:
        with Decoder(small_model(), design("clo"), max_new_tokens=1) as decoder:
            decoder.prefill([prompt(40)])
            decoder.step(torch.tensor([1]))
            with pytest.raises(EngineError, match=r"room for 41 tokens .*max_new_tokens \(now 1\)"):
                decoder.step(torch.tensor([1]))

    def test_a_step_without_a_prompt(self) -> None:
        with Decoder(small_model(), design("clo")) as decoder, pytest.raises(EngineError, match="call prefill first"):
            decoder.step(torch.tensor([1]))

    def test_too_little_memory_names_the_need_and_the_field(self) -> None:
        chosen = design("clo", slot_budgets=2)
        with (
            Decoder(small_model(), chosen, max_new_tokens=5, kv_memory_bytes=1e4) as decoder,
            pytest.raises(
                SpecError, match=r"needs .* of device memory.*lower design\.budget_fraction, design\.slot_bud"
            ),
        ):
            decoder.prefill([prompt(200)])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"target_hit_rate": 0.5}, "design.target_hit_rate: .* head profile"),
            ({"tau_importance_power": 0.5}, "design.tau_importance_power: .* head profile"),
            ({"gqa_fold": "importance"}, "design.gqa_fold = importance: .* head profile"),
        ],
    )
    def test_what_needs_something_that_is_not_there(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            Decoder(small_model(), design("clo", **changes))


class TestInput:
    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (torch.tensor([7]), r"tokens: torch.int64 of shape \[1\], expected integers \[2\], one a sequence"),
            (torch.tensor([[7], [8]]), r"of shape \[2, 1\]"),
            (torch.tensor([1.0, 2.0]), "torch.float32"),
            (torch.tensor([3, -1]), "tokens: ids from -1 to 3, the model has 0 to"),
        ],
    )
    def test_what_are_no_tokens_is_refused_and_the_next_step_works(self, tokens: torch.Tensor, message: str) -> None:
        with Decoder(small_model(), "clo", max_new_tokens=4) as decoder:
            decoder.prefill([prompt(40), prompt(50)])
            with pytest.raises(SpecError, match=message):
                decoder.step(tokens)
            assert decoder.step(torch.tensor([1, 2])).shape[0] == 2

    def test_a_prompt_of_another_vocabulary(self) -> None:
        with Decoder(small_model(), "clo", max_new_tokens=4) as decoder:
            with pytest.raises(SpecError, match="prompt: ids from 1 to 1000000"):
                decoder.prefill([torch.tensor([1, 10**6])])
            with pytest.raises(EngineError, match="no prompt yet"):
                _ = decoder.traffic

    def test_no_room(self) -> None:
        with pytest.raises(SpecError, match="max_new_tokens = 0: must be at least 1"):
            Decoder(small_model(), "clo", max_new_tokens=0)
        with pytest.raises(SpecError, match="prefill_chunk_tokens = 0: must be at least 1"):
            Decoder(small_model(), "clo", prefill_chunk_tokens=0)

    def test_a_profile_of_another_model(self) -> None:
        heads = HeadProfile(tau=torch.zeros(2, 99))
        with pytest.raises(SpecError, match=r"heads\.tau: shape \[2, 99\], .* has \["):
            Decoder(small_model(), "clo", heads=heads)

    @pytest.mark.parametrize("name", ["clo", "staged"])
    def test_a_closed_decoder_says_so(self, name: str) -> None:
        decoder = Decoder(small_model(), name, max_new_tokens=4)
        decoder.close()
        with pytest.raises(EngineError, match="the decoder is closed: make a new one"):
            decoder.prefill([prompt(40)])

    @pytest.mark.parametrize("transfer", ["staged", "gpu_zero_copy"])
    def test_the_threads_of_a_decoder_that_is_dropped_end(self, transfer: str) -> None:
        before = set(threading.enumerate())
        decoder = Decoder(small_model(), design("clo", budget_pages=3, transfer=transfer), max_new_tokens=4)
        for tokens in (40, 50):
            decoder.prefill([prompt(tokens)])
            decoder.step(torch.tensor([1]))
        its_own = set(threading.enumerate()) - before
        assert its_own
        cache = weakref.ref(decoder.layers[1])
        del decoder
        for thread in its_own:
            thread.join(30)
            assert not thread.is_alive()
        assert cache() is None

    def test_tokens_of_earlier_prompts_do_not_go_on(self) -> None:
        with Decoder(small_model(), "clo", max_new_tokens=4) as decoder:
            earlier = decoder.generate([prompt(40)])
            next(earlier)
            assert len(list(decoder.generate([prompt(50)]))) == 4
            with pytest.raises(EngineError, match="given other prompts"):
                next(earlier)

"""What is attended, against an independent sparse attention and against the source."""

from __future__ import annotations

import pytest
import torch
from forced import CLOSE, forced_logits
from small import PAGE, SELECTORS, WINDOW, dense_logits, design, prompt, small_model
from sparse_oracle import Sparse

from clo import presets
from clo.engine.decoder import Decoder
from clo.engine.heads import HeadProfile
from clo.engine.layers import OffloadedLayer
from clo.engine.operations import Operations
from clo.schedule.ops import Stage
from clo.specs import Selector
from clo_kernels.page_index import IndexKind, dequantized, differing_bits

FETCHING = [name for name in presets.names("designs") if "resident" not in name and name != "streamed"]


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


def second_layer(decoder: Decoder, tokens: torch.Tensor) -> tuple[OffloadedLayer, Operations]:
    """The first offloaded one, and its operations, once all tokens were decoded: a prompt of 90 and the others."""
    decoder.prefill([tokens[:90]])
    for token in tokens[90:]:
        decoder.step(token[None])
    layer, operations = decoder.layers[1], decoder._operations
    assert isinstance(layer, OffloadedLayer)
    assert operations is not None
    return layer, operations


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
            layer, operations = second_layer(decoder, tokens)
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
            layer, operations = second_layer(decoder, tokens)
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
                    lengths, usable = operations.lengths, operations._candidates
                    selection.score(stage, operations._real[2], lengths, usable, everyone)
                    scores.append(selection.scores[stage].clone())
                    selection.keys[:, :, 90] = 100 * operations._real[2][:, ::3]
        assert torch.equal(*scores) == same

    @pytest.mark.parametrize("selector", [s for s in SELECTORS if s is not Selector.EXACT])
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


class TestPinnedHeads:
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
            layer, operations = second_layer(decoder, tokens)
            query = operations._real[1][0]
            found = layer.attend(query[None], operations.lengths)[0].double()
        whole = list(range(len(tokens) // PAGE))[1 : (len(tokens) - WINDOW - 1) // PAGE]
        everything = Sparse(small_model(), tokens).attend(1, 1, query[3:], whole, len(tokens))
        torch.testing.assert_close(found[3:], everything, rtol=1e-4, atol=1e-5)
        other = Sparse(small_model(), tokens).attend(1, 0, query[:3], whole, len(tokens))
        assert not torch.allclose(found[:3], other, rtol=1e-2)

"""Designs whose pages are kept in 8 bits, against float64 over the pages as they come back, and against the source."""

from __future__ import annotations

import pytest
import torch
from forced import forced_logits
from small import DIM, KV_HEADS, LAYERS, PAGE, WINDOW, dense_logits, design, prompt, small_model
from sparse_oracle import Sparse
from test_attended_pages import FETCHING, check_slots, second_layer

from clo.engine import offload
from clo.engine.answers.fidelity import Fidelity
from clo.engine.decoder import Decoder
from clo.engine.inline_decoder import InlineDecoder
from clo.engine.layers import OffloadedLayer
from clo.engine.memory import cache_bytes
from clo.engine.models.library import as_cache
from clo.engine.models.network import Network
from clo.engine.prompts import read_prompt
from clo.errors import EngineError, SpecError
from clo.specs import Cache, Design, PageCoding
from clo_kernels.coded_pages import coded_width, decode, encode

SELECTING = [*FETCHING, "resident-sparse"]


def coded(name: str, **changes: object) -> Design:
    return design(name, page_coding="int8", **changes)


def everything(name: str, coding: str = "int8") -> Design:
    whole = {"budget_pages": None, "budget_fraction": 1.0, "slot_budgets": None, "tau": 2.0}
    return design(name, page_coding=coding, **whole)


def poison(decoder: Decoder) -> None:
    """Whatever is read from a slot that holds no page turns everything into NaN: all bits set are a step of NaN."""
    for layer in decoder.layers:
        if isinstance(layer, OffloadedLayer) and layer.design.cache is not Cache.RESIDENT:
            layer.kv.slots[layer.residency.table.page_of_slot < 0] = -1
            assert decode(torch.full((1, coded_width(DIM)), -1, dtype=torch.int8), torch.float32).isnan().all()


class CodedOracle(Sparse):
    """The same attention where pages between the first and the window come back as they are kept."""

    def attend(self, layer: int, head: int, query: torch.Tensor, pages: list[int], length: int) -> torch.Tensor:
        kept = self.cache.layers[layer]
        exact = kept.keys, kept.values
        start = max(0, length - WINDOW - 1) // PAGE * PAGE
        kept.keys, kept.values = exact[0].clone(), exact[1].clone()
        for values, source in zip((kept.keys, kept.values), exact, strict=True):
            values[:, :, PAGE:start] = decode(encode(source[:, :, PAGE:start].float()), torch.float64)
        try:
            return super().attend(layer, head, query, pages, length)
        finally:
            kept.keys, kept.values = exact


class TestPages:
    @pytest.mark.parametrize("name", SELECTING)
    def test_every_attended_page_is_the_hosts_and_the_host_has_the_source(self, name: str) -> None:
        model, tokens = small_model(), prompt(150)
        chosen = coded(name, budget_pages=4, slot_budgets=1.5 if name not in ("staged", "resident-sparse") else None)
        with Decoder(model, chosen, max_new_tokens=60) as decoder:
            decoder.prefill([tokens[:90]])
            poison(decoder)
            for token in tokens[90:]:
                logits = decoder.step(token[None])
                check_slots(decoder)
                assert logits.isfinite().all()
            layer = decoder.layers[1]
            assert isinstance(layer, OffloadedLayer)
            # layer 1 sees what full attention saw: the only layer before it is dense
            cache = Sparse(small_model(), tokens).cache.layers[1]
            gone = (150 - WINDOW) // PAGE
            source = torch.stack([cache.keys[0], cache.values[0]], 1)[:, :, : gone * PAGE].float()
            expected = decode(encode(source), torch.float32).unflatten(2, (gone, PAGE)).permute(2, 0, 1, 3, 4)
            found = decode(layer.host_pages[0, :gone], torch.float32)
            # rounding of the same sums in another order moves a value by a step at most
            step = source.unflatten(2, (gone, PAGE)).permute(2, 0, 1, 3, 4).abs().amax(-1, keepdim=True) / 127
            assert ((found - expected).abs() <= 1.01 * step + 1e-5).all()
            assert (found != expected).float().mean() < 0.02

    @pytest.mark.parametrize("name", ["resolve", "clo", "lru-cpu", "staged", "recall", "resident-sparse"])
    def test_attention_is_over_the_pages_as_they_come_back(self, name: str) -> None:
        model, tokens = small_model(), prompt(120)
        with Decoder(model, coded(name, budget_pages=3), max_new_tokens=30) as decoder:
            layer, operations = second_layer(decoder, tokens)
            query = operations._real[1][0]
            found = layer.attend(query[None], operations.lengths)[0]
            oracle, plain = CodedOracle(small_model(), tokens), Sparse(small_model(), tokens)
            for head in range(KV_HEADS):
                pages = [page for page in layer.selection.pages[0, head].tolist() if page >= 0]
                group = slice(head * 3, head * 3 + 3)
                want = oracle.attend(1, head, query[group], pages, len(tokens))
                torch.testing.assert_close(found[group].double(), want, rtol=1e-3, atol=1e-3)
                exact = plain.attend(1, head, query[group], pages, len(tokens))
                assert not torch.equal(want, exact)
                torch.testing.assert_close(found[group].double(), exact, rtol=0.05, atol=0.05)


class TestAnswers:
    @pytest.mark.parametrize("name", SELECTING)
    def test_with_everything_attended_little_is_lost(self, name: str) -> None:
        model, tokens = small_model(), prompt(110)
        full, found = dense_logits(model, tokens)[79:], forced_logits(model, everything(name), tokens, 80)
        error = (found - full).norm() / full.norm()
        assert 1e-6 < error < 0.05

    @pytest.mark.parametrize("transfer", ["page_copies", "staged", "cpu_zero_copy", "gpu_zero_copy"])
    @pytest.mark.parametrize("sync", ["host", "events", "flags", "graph"])
    def test_whoever_moves_pages_the_answers_are_the_same(self, transfer: str, sync: str) -> None:
        model, tokens = small_model(), prompt(120)
        moved = coded("clo", budget_pages=3, slot_budgets=1.0, tau=0.9, transfer=transfer, sync=sync)
        usual = coded("clo", budget_pages=3, slot_budgets=1.0, tau=0.9)
        found, expected = (forced_logits(model, chosen, tokens, 90) for chosen in (moved, usual))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_offload_generates_what_the_decoder_does(self) -> None:
        model, tokens = small_model(), prompt(90)
        chosen = coded("clo", budget_pages=3)
        with Decoder(model, chosen, max_new_tokens=20) as decoder:
            logits = decoder.prefill([tokens])
            expected = []
            for _ in range(20):
                expected.append(int(logits[0].argmax()))
                logits = decoder.step(torch.tensor(expected[-1:]))
        with offload(model, chosen, max_new_tokens=20) as cache:
            found = model.generate(tokens[None], **as_cache(model, cache), max_new_tokens=20, do_sample=False)
        assert found[0, 90:].tolist() == expected

    def test_pinned_heads_lose_nothing(self) -> None:
        model, tokens = small_model(), prompt(90)
        chosen = coded("clo", budget_pages=1, pinned_head_fraction=1.0)
        found = forced_logits(model, chosen, tokens, 70)
        torch.testing.assert_close(found, dense_logits(model, tokens)[69:], rtol=1e-4, atol=1e-4)

    def test_a_prompt_read_in_one_chunk_is_read_exactly(self) -> None:
        model, tokens = small_model(), prompt(100)
        with Decoder(model, coded("clo", budget_pages=3), max_new_tokens=2) as decoder:
            found = decoder.prefill([tokens])[0]
        torch.testing.assert_close(found, dense_logits(model, tokens)[-1], rtol=1e-4, atol=1e-4)

    def test_a_prompt_read_in_chunks_reads_earlier_ones_as_they_are_kept(self) -> None:
        model, tokens = small_model(), prompt(100)
        with Decoder(model, coded("clo", budget_pages=3), max_new_tokens=2, prefill_chunk_tokens=32) as decoder:
            found = decoder.prefill([tokens])[0]
        exact = dense_logits(model, tokens)[-1]
        error = (found - exact).norm() / exact.norm()
        assert 1e-6 < error < 0.02

    def test_of_a_prompt_read_in_chunks_the_device_keeps_what_was_computed(self) -> None:
        model, tokens = small_model(), prompt(70)
        source = Sparse(small_model(), tokens).cache.layers[0]
        computed = torch.stack([source.keys[0], source.values[0]], 1).float()
        chosen = coded("clo", budget_pages=1, dense_layers=0, pinned_head_fraction=0.5, selector="exact")
        with Decoder(model, chosen, max_new_tokens=2, prefill_chunk_tokens=32) as decoder:
            decoder.prefill([tokens])
            layer = decoder.layers[0]
            assert isinstance(layer, OffloadedLayer)
            close = {"rtol": 1e-5, "atol": 1e-5}
            (head,) = layer.heads.pinned
            torch.testing.assert_close(layer.kv.sinks[0], computed[:, :, :PAGE], **close)
            torch.testing.assert_close(layer.kv.pinned[0, 0, :, :70], computed[head], **close)
            torch.testing.assert_close(layer.selection.keys[0, :, :70], computed[:, 0], **close)

    def test_batches_of_different_lengths(self) -> None:
        model, tokens = small_model(), prompt(120)
        chosen = coded("clo", budget_pages=2)
        prompts = [tokens[:9], tokens[:90], tokens[:41]]
        with Decoder(model, chosen, max_new_tokens=20) as decoder:
            decoder.prefill(prompts)
            together = [decoder.step(tokens[100 + i].repeat(3)).clone() for i in range(15)]
        for row, one in enumerate(prompts):
            with Decoder(model, chosen, max_new_tokens=20) as decoder:
                decoder.prefill([one])
                alone = [decoder.step(tokens[100 + i][None]).clone()[0] for i in range(15)]
            torch.testing.assert_close(torch.stack(together)[:, row], torch.stack(alone), rtol=1e-3, atol=1e-3)

    def test_a_spoilt_page_is_named(self) -> None:
        model, tokens = small_model(), prompt(90)
        with Decoder(model, everything("resolve"), max_new_tokens=20) as decoder:
            decoder.prefill([tokens])
            layer = decoder.layers[2]
            assert isinstance(layer, OffloadedLayer)
            layer.kv.slots[0, 1, :, 1, 0, DIM:] = -1
            with pytest.raises(EngineError, match=r"layer 2.*KV head 1"):
                decoder.step(tokens[:1])


class TestFidelity:
    @pytest.mark.parametrize("name", ["resolve", "resident-sparse"])
    def test_a_budget_of_everything_has_no_error(self, name: str) -> None:
        """What sinks and window hold as computed is so in full attention, too."""
        network, seen = Network(small_model()), Fidelity(every=1)
        decoder = InlineDecoder(network, everything(name), max_new_tokens=20, observer=seen)
        decoder.prefill([read_prompt(network, prompt(70))])
        for token in prompt(20, 1):
            decoder.step(token[None])
        assert seen.output_error == pytest.approx(0.0, abs=1e-5)
        assert seen.mass_recalled == pytest.approx(1.0)


class TestMemory:
    @pytest.mark.parametrize("name", ["clo", "resolve", "resident-sparse"])
    def test_what_is_taken_is_what_was_planned(self, name: str) -> None:
        model = small_model()
        with Decoder(model, coded(name, budget_pages=3, selector="page_minmax"), max_new_tokens=20) as decoder:
            decoder.prefill([prompt(90)])
            layers = [layer for layer in decoder.layers if isinstance(layer, OffloadedLayer)]
            kept = sum(layer.host_pages.nbytes for layer in layers)
            assert len(layers) == LAYERS - 1
            # where nothing is offloaded the slots are all there is
            host = kept if decoder.plan.design.offloads else 0
            assert cache_bytes(decoder.plan, 110).host == pytest.approx(host, rel=0.05)
            for layer in layers:
                assert layer.host_pages.dtype is torch.int8
                assert layer.host_pages.shape[-1] == layer.kv.slots.shape[-1] == coded_width(DIM)

    def test_no_page_is_moved_whole(self) -> None:
        """Bytes counted are bytes kept: 1.125 a value instead of float32's 4."""
        model, tokens = small_model(), prompt(110)
        moved = {}
        for coding in PageCoding:
            chosen = design("resolve", budget_pages=3, slot_budgets=1.0, page_coding=coding)
            with Decoder(model, chosen, max_new_tokens=40) as decoder:
                decoder.prefill([tokens[:80]])
                assert decoder.plan.page_bytes == 2 * PAGE * DIM * {"none": 4.0, "int8": 1.125}[coding]
                for token in tokens[80:]:
                    decoder.step(token[None])
                moved[coding] = decoder.plan.page_bytes
        assert moved["int8"] / moved["none"] == 1.125 / 4

    def test_heads_that_do_not_group_are_refused(self) -> None:
        model = small_model(head_dim=24)
        with pytest.raises(SpecError, match=r"design.page_coding = int8: model.head_dim = 24"):
            Decoder(model, coded("clo", budget_pages=3), max_new_tokens=2).prefill([prompt(40)])

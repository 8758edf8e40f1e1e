"""The decoder against itself: engines, batches, traffic."""

from __future__ import annotations

import pytest
import torch
from forced import CLOSE, forced_logits
from small import DIM, KV_HEADS, LAYERS, design, prompt, small_model

from clo import presets
from clo.engine.decoder import Decoder
from clo.engine.measure import run_steps
from clo.engine.run import result_of

ENGINES = ["page_copies", "staged", "cpu_zero_copy", "gpu_zero_copy"]
SYNCS = ["host", "events", "flags", "graph"]


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

    @pytest.mark.parametrize("sync", SYNCS)
    @pytest.mark.parametrize("transfer", ENGINES)
    def test_nor_where_all_pages_stay_on_the_device(self, transfer: str, sync: str) -> None:
        """Pages that leave the window while decoding are attended later, and go nowhere."""
        model, tokens, chosen = small_model(), prompt(110), design("resident-sparse", budget_pages=3)
        found = forced_logits(model, chosen.with_fields(transfer=transfer, sync=sync), tokens, 60)
        assert torch.equal(found, forced_logits(model, chosen, tokens, 60))

    @pytest.mark.parametrize("depth", [0, 1, 2])
    @pytest.mark.parametrize("name", ["resolve", "lru-cpu"])
    def test_prefetch_changes_no_answer_of_an_exact_cache(self, name: str, depth: int) -> None:
        model, tokens = small_model(), prompt(110)
        plain = design(name, budget_pages=3, prefetch_depth=0, slot_budgets=2)
        ahead = plain.with_fields(prefetch_depth=depth)
        assert torch.equal(forced_logits(model, ahead, tokens, 90), forced_logits(model, plain, tokens, 90))


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


def test_the_last_token_is_given_out_and_not_decoded() -> None:
    with Decoder(small_model(), design("clo"), max_new_tokens=4) as decoder:
        assert len(list(decoder.generate([prompt(40)]))) == 4
        assert decoder.lengths == [43]


class TestTraffic:
    def test_bytes_in_the_timeline_are_those_of_the_counts(self) -> None:
        model, tokens = small_model(), prompt(110)
        for name in presets.names("designs"):
            chosen = design(name, **({"budget_pages": 3} if presets.load_design(name).selects else {}))
            with Decoder(model, chosen, max_new_tokens=20) as decoder:
                decoder.prefill([tokens[:90]])
                for token in tokens[90:]:
                    decoder.step(token[None])
                    assert decoder.timeline is not None
                    outward = [span for span in decoder.timeline.spans if span.name in ("append_kv", "write_back")]
                    back, traffic = sum(span.num_bytes for span in outward), decoder.traffic
                    moved = sum(span.num_bytes for span in decoder.timeline.spans) - back
                    assert back == traffic.written_back_pages * traffic.page_bytes
                    assert not back or chosen.offloads
                    if name == "streamed":
                        assert moved == 4 * 2 * 2 * 16 * 4 * (decoder.lengths[0] - 1)
                    else:
                        assert moved == traffic.h2d_bytes

    @pytest.mark.parametrize("sync", ["events", "graph"])
    def test_a_streamed_layer_sends_its_new_token_back_and_keeps_no_sets(self, sync: str) -> None:
        with Decoder(small_model(), design("streamed", sync=sync), max_new_tokens=20) as decoder:
            found = result_of(run_steps(decoder, [prompt(50), prompt(30)], steps=3))
        assert found.d2h_bytes_per_step == 2 * LAYERS * KV_HEADS * 2 * DIM * 4
        assert found.reuse_rate == found.hit_rate == 0.0

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

"""The decoder on a CUDA device, against itself on the CPU. Skipped where there is none; **not yet run**."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from kinds import EVERY, WITH_INDEXER
from latent import indexer_design, latent_model
from small import dense_logits, design, prompt, small_model

from clo import presets
from clo.engine import offload
from clo.engine.cuda import bar
from clo.engine.cuda.machine import CudaMachine
from clo.engine.decoder import Decoder
from clo.engine.models.library import as_cache
from clo.engine.models.network import Network
from clo.errors import EngineError, SpecError
from clo.schedule import Lane, record_step
from clo.specs import Design

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SYNCS = ["host", "events", "flags", "graph"]
HAS_BAR = torch.cuda.is_available() and bar.is_installed(torch.device("cuda"))
TRANSFERS = ["page_copies", "staged", "gpu_zero_copy", *(["cpu_zero_copy"] if HAS_BAR else [])]


def on_cuda(preset: str, **changes: Any) -> Design:
    """A preset, with page copies in the place of stores through the BAR where GDRCopy is not installed."""
    chosen = design(preset, **changes)
    if chosen.selects:
        chosen = chosen.with_fields(budget_pages=4, slot_budgets=None, slot_pages=None)
    stores = chosen.transfer == "cpu_zero_copy"
    return chosen.with_fields(transfer="page_copies") if stores and not HAS_BAR else chosen


DESIGNS = [
    *[on_cuda(name) for name in presets.names("designs")],
    on_cuda("streamed", sync="graph").with_fields(name="streamed, graph"),
    on_cuda("clo", pinned_head_fraction=0.5).with_fields(name="pinned"),
    *[
        on_cuda("clo", transfer=transfer, sync=sync, resolve_on=on).with_fields(name=f"clo, {transfer}, {sync}, {on}")
        for transfer in TRANSFERS
        for sync in SYNCS
        for on in ("gpu", "cpu")
    ],
    *[on_cuda("clo", selector=one).with_fields(name=f"clo, {one}") for one in ("page_mean", "key_4bit", "sign_hash")],
]
named = [pytest.param(one, id=one.name) for one in DESIGNS]


def decoded(model: Any, chosen: Design, tokens: torch.Tensor, start: int, **options: Any) -> torch.Tensor:
    """Logits of decoding `tokens` one by one after a prompt of the first `start`, on the CPU."""
    with Decoder(model, chosen, max_new_tokens=len(tokens) - start, **options) as decoder:
        rows = [decoder.prefill([tokens[:start]])[0].cpu()]
        for token in tokens[start:]:
            rows.append(decoder.step(token[None])[0].cpu().clone())
    return torch.stack(rows)


class TestAnswers:
    @pytest.mark.parametrize("chosen", named)
    def test_every_design_decodes_what_the_cpu_decodes(self, chosen: Design) -> None:
        tokens = prompt(120)
        expected = decoded(small_model(), chosen, tokens, 80)
        found = decoded(small_model().cuda(), chosen, tokens, 80)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("transfer", TRANSFERS)
    @pytest.mark.parametrize("sync", SYNCS)
    def test_coded_pages(self, transfer: str, sync: str) -> None:
        """A key that differs in its last bit may round to the next code: one part in 127 of it."""
        tokens, model = prompt(120), small_model()
        chosen = on_cuda("clo", transfer=transfer, sync=sync, page_coding="int8", tau=2.0)
        expected = decoded(model, chosen, tokens, 80)
        found = decoded(model.cuda(), chosen, tokens, 80)
        assert (found - expected).norm() < 0.01 * expected.norm()

    def test_coded_pages_that_stay_on_the_device(self) -> None:
        tokens, model = prompt(120), small_model()
        chosen = on_cuda("resident-sparse", page_coding="int8")
        expected = decoded(model, chosen, tokens, 80)
        found = decoded(model.cuda(), chosen, tokens, 80)
        assert (found - expected).norm() < 0.01 * expected.norm()

    @pytest.mark.parametrize("name", ["clo", "resolve", "resident", "resident-sparse"])
    def test_two_hundred_replays(self, name: str) -> None:
        chosen, tokens = on_cuda(name), prompt(250)
        expected = decoded(small_model(), chosen, tokens, 45)
        found = decoded(small_model().cuda(), chosen, tokens, 45, timed=False)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))

    def test_sequences_of_different_lengths(self) -> None:
        texts = [prompt(50 + extra, seed) for seed, extra in enumerate((0, 7, 33))]
        rows = []
        for model in (small_model(), small_model().cuda()):
            with Decoder(model, on_cuda("clo"), max_new_tokens=20) as decoder:
                logits = [decoder.prefill([text[:-20] for text in texts]).cpu()]
                logits += [
                    decoder.step(torch.stack([text[at] for text in texts])).cpu().clone() for at in range(-20, 0)
                ]
            rows.append(torch.stack(logits))
        torch.testing.assert_close(rows[1], rows[0], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("name", ["clo", "resolve", "streamed", "lru-cpu"])
    def test_prompts_in_chunks(self, name: str) -> None:
        """Of each layer earlier chunks come back from the host, while the layer before is computed."""
        tokens, chosen = prompt(130), on_cuda(name)
        rows = []
        for model in (small_model(), small_model().cuda()):
            with Decoder(model, chosen, max_new_tokens=4, prefill_chunk_tokens=24) as decoder:
                logits = [decoder.prefill([tokens[:-4]])[0].cpu()]
                logits += [decoder.step(token[None])[0].cpu().clone() for token in tokens[-4:]]
            rows.append(torch.stack(logits))
        torch.testing.assert_close(rows[1], rows[0], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_dtypes(self, dtype: torch.dtype) -> None:
        """With a budget of everything no further from the truth than the model's own attention, give or take."""
        tokens, model = prompt(90), small_model(dtype=dtype).cuda()
        chosen = design("clo", budget_fraction=1.0, slot_budgets=1.0, slot_pages=None, tau=2.0)
        exact = dense_logits(small_model(), tokens)[69:]
        own = dense_logits(model, tokens.cuda())[69:].float().cpu()
        found = decoded(model, chosen, tokens, 70).float()
        assert (found - exact).abs().max() <= 4.0 * (own - exact).abs().max()


class TestOffload:
    """The library's own `generate`."""

    @pytest.mark.parametrize("name", ["clo", "resolve", "recall", "streamed"])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_it_says_what_it_says_on_the_cpu(self, name: str, batch: int) -> None:
        """Of two sequences the second is shorter, and padded in front."""
        tokens = torch.stack([prompt(90, seed) for seed in range(batch)])
        mask = torch.ones_like(tokens)
        mask[1:, :21] = 0
        said = []
        for model in (small_model(), small_model().cuda()):
            given = {"input_ids": tokens.to(model.device), "attention_mask": mask.to(model.device)}
            with offload(model, on_cuda(name), max_new_tokens=16) as cache:
                out = model.generate(**given, **as_cache(model, cache), max_new_tokens=16, do_sample=False)
            said.append(out[:, 90:].tolist())
        assert said[1] == said[0]


class TestOtherKinds:
    """Models with experts, windows, sinks, gates and states."""

    @pytest.mark.parametrize("kind", EVERY)
    @pytest.mark.parametrize(
        "chosen", [on_cuda("clo"), on_cuda("resident"), on_cuda("lru-cpu")], ids=lambda one: one.name
    )
    def test_they_decode_what_the_cpu_decodes(self, kind: str, chosen: Design) -> None:
        tokens, model = prompt(110), EVERY[kind]()
        # in single precision torch loops over experts on the host, unless each has a product of its own
        model.config._experts_implementation = "batched_mm"
        expected = decoded(model, chosen, tokens, 80)
        found = decoded(model.cuda(), chosen, tokens, 80)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("selector", ["page_minmax", "page_mean", "key_4bit", "sign_hash"])
    def test_latent_attention_by_every_selector(self, selector: str) -> None:
        tokens, model = prompt(110), latent_model("Youtu")
        expected = decoded(model, on_cuda("clo", selector=selector), tokens, 80)
        found = decoded(model.cuda(), on_cuda("clo", selector=selector), tokens, 80)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)

    def test_latent_attention_over_coded_pages(self) -> None:
        tokens, model = prompt(110), latent_model("Youtu", kv_lora_rank=32, qk_rope_head_dim=16)
        chosen = on_cuda("clo", page_coding="int8", tau=2.0)
        expected = decoded(model, chosen, tokens, 80)
        found = decoded(model.cuda(), chosen, tokens, 80)
        assert (found - expected).norm() < 0.01 * expected.norm()

    @pytest.mark.parametrize("kind", WITH_INDEXER)
    @pytest.mark.parametrize("name", ["clo", "resolve", "resident-sparse"])
    @pytest.mark.parametrize("sync", ["events", "graph"])
    def test_what_the_model_s_own_indexer_chooses(self, kind: str, name: str, sync: str) -> None:
        tokens, model = prompt(110), WITH_INDEXER[kind]()
        model.config._experts_implementation = "batched_mm"
        chosen = indexer_design(name, Network(model), sync=sync)
        expected = decoded(model, chosen, tokens, 80)
        found = decoded(model.cuda(), chosen, tokens, 80)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("kind", EVERY)
    def test_norms_and_rotations_are_one_launch_each(self, kind: str) -> None:
        network = Network(EVERY[kind](dtype=torch.bfloat16).cuda())
        assert len(network._norms) > 2 * len(network.spec.whole_layers)
        # complex numbers, and in single precision
        assert (network._turn is None) == (kind in ("DeepseekV2", "Olmo3"))

    @pytest.mark.parametrize("kind", EVERY)
    def test_in_bfloat16_a_step_is_recorded_and_replayed(self, kind: str) -> None:
        with Decoder(EVERY[kind](dtype=torch.bfloat16).cuda(), on_cuda("clo"), max_new_tokens=40) as decoder:
            logits = decoder.prefill([prompt(80), prompt(30)])
            for _ in range(30):
                logits = decoder.step(logits.argmax(-1))
                assert torch.isfinite(logits).all()
            machine = decoder._machine
            assert isinstance(machine, CudaMachine)
            assert machine.replays


class TestTimelines:
    @pytest.mark.parametrize("chosen", named)
    def test_it_has_the_operations_that_the_simulator_prices(self, chosen: Design) -> None:
        with Decoder(small_model().cuda(), chosen, max_new_tokens=8) as decoder:
            decoder.prefill([prompt(80)])
            for token in (1, 2, 3, 4):
                decoder.step(torch.tensor([token]))
            found = decoder.timeline
            assert decoder.plan is not None
            assert found is not None
            for lane in Lane:
                recorded = [
                    (node.op.name, node.op.layer) for node in record_step(decoder.plan).nodes if node.lane is lane
                ]
                spans = [span for span in found.spans if span.lane == lane.value]
                assert [(span.name, span.layer) for span in spans] == recorded
            if chosen.selects or chosen.offloads:
                traffic = decoder.traffic
                # a layer that is streamed moves tokens and counts pages: the last one of a head may be part of a page
                parts = 0.0 if chosen.selects else traffic.offloaded_heads * traffic.page_bytes
                assert sum(span.num_bytes for span in found.spans) > traffic.h2d_bytes - max(parts, 1.0)

    def test_a_replayed_step_waits_for_the_host_nowhere(self) -> None:
        with Decoder(small_model().cuda(), on_cuda("clo"), max_new_tokens=8) as decoder:
            decoder.prefill([prompt(80)])
            for token in (1, 2, 3, 4):
                decoder.step(torch.tensor([token]))
            found, machine = decoder.timeline, decoder._machine
            assert isinstance(machine, CudaMachine)
            assert machine.replays
            assert found is not None
            host = [span.name for span in found.spans if span.lane == Lane.LAUNCH.value]
            assert host == ["graph_launch", "read_back"]
            main = [span for span in found.spans if span.lane == Lane.MAIN.value]
            assert not any({"sync", "launch"} & dict(span.waits).keys() for span in main[1:])


class TestFaults:
    @pytest.mark.skipif(HAS_BAR, reason="GDRCopy is installed")
    def test_stores_through_the_bar_are_refused(self) -> None:
        with (
            Decoder(small_model().cuda(), design("clo-v2"), max_new_tokens=8) as decoder,
            pytest.raises(SpecError, match="simulated only"),
        ):
            decoder.prefill([prompt(80)])

    @pytest.mark.parametrize("sync", SYNCS)
    def test_a_failed_operation_is_named_and_the_next_prompt_works(
        self, monkeypatch: pytest.MonkeyPatch, sync: str
    ) -> None:
        before = threading.active_count()
        chosen = on_cuda("clo", transfer="staged", sync=sync)
        with Decoder(small_model().cuda(), chosen, max_new_tokens=8, patience_s=5) as decoder:
            for healthy_steps in (0, 1, 2):
                decoder.prefill([prompt(80)])
                for token in range(healthy_steps):
                    decoder.step(torch.tensor([token]))
                operations = decoder._operations
                assert operations is not None
                healthy = operations.run

                def run(op: Any, healthy: Any = healthy) -> None:
                    if op.name.endswith("host_gather") and op.layer == 2:
                        raise SystemExit("killed")
                    healthy(op)

                monkeypatch.setattr(operations, "run", run)
                with pytest.raises(EngineError, match=r"operation .*host_gather of layer 2: killed"):
                    decoder.step(torch.tensor([1]))
            decoder.prefill([prompt(80)])
            assert torch.isfinite(decoder.step(torch.tensor([1]))).all()
        assert threading.active_count() == before

    def test_a_flag_that_never_comes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        chosen = on_cuda("clo", transfer="page_copies")
        with Decoder(small_model().cuda(), chosen, max_new_tokens=8, patience_s=4) as decoder:
            decoder.prefill([prompt(80)])
            for token in (1, 2):
                decoder.step(torch.tensor([token]))
            machine = decoder._machine
            assert isinstance(machine, CudaMachine)
            assert machine._flags is not None
            monkeypatch.setattr(machine._flags, "publish", lambda site: None)
            with pytest.raises(EngineError, match=r"waited for number 3, it stands at 2|not done in 4 s"):
                decoder.step(torch.tensor([3]))
            decoder.prefill([prompt(80)])
            assert torch.isfinite(decoder.step(torch.tensor([1]))).all()

    def test_numbers_that_are_none(self) -> None:
        model = small_model().cuda()
        with Decoder(model, on_cuda("clo"), max_new_tokens=8) as decoder:
            decoder.prefill([prompt(80)])
            for token in (1, 2):
                decoder.step(torch.tensor([token]))
            with torch.no_grad():
                model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
            with pytest.raises(EngineError, match=r"operation lm_head .* logits are not finite"):
                decoder.step(torch.tensor([1]))

"""The decoder on models with experts, windows, sinks, gates and linear attention, taken apart into the schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refuse, run
from forced import CLOSE, STEPS, TEXTS, assert_timeline_is_the_schedules, forced, forced_logits
from hybrid import FULL, LINEAR, hybrid_model
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import EVERY, HYBRID, ONE_OF_EACH, THAT_SEE, WITH_EXPERTS
from small import VOCABULARY, dense_logits, design, prompt, small_model
from test_memory import held
from whole_models import everything, generated
from windowed import windowed_model

from clo import presets
from clo.engine import offload
from clo.engine.answers.fidelity import Fidelity
from clo.engine.checks import check_recordable
from clo.engine.decoder import Decoder
from clo.engine.inline_decoder import InlineDecoder
from clo.engine.layers import LayerShape, LinearLayer, OffloadedLayer, WindowedLayer
from clo.engine.measure import run_steps
from clo.engine.memory import cache_bytes, local_machine
from clo.engine.models.network import Network
from clo.engine.models.probe import check_taken_apart
from clo.engine.prompts import read_prompt
from clo.engine.run import result_of
from clo.errors import EngineError, SpecError
from clo.operation_costs import price_key
from clo.plan import make_plan
from clo.schedule import record_step
from clo.specs import Workload

DESIGNS = presets.names("designs")


def own_logits(model: Any) -> torch.Tensor:
    """The same of the model's full attention, without a cache."""
    return torch.stack([dense_logits(model, text)[-STEPS - 1 :] for text in TEXTS], dim=1)


def prompts() -> list[torch.Tensor]:
    return [text[:-STEPS] for text in TEXTS]


@pytest.mark.parametrize("kind", EVERY)
class TestEveryKind:
    @pytest.mark.parametrize("name", DESIGNS)
    def test_everything_attended_is_the_models_own_answer(self, kind: str, name: str) -> None:
        """Two sequences of different lengths: what their windows, states and experts are is their own."""
        model = EVERY[kind]()
        with Decoder(model, everything(name), max_new_tokens=STEPS, prefill_chunk_tokens=32) as decoder:
            torch.testing.assert_close(forced(decoder, prompts()), own_logits(model), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("name", ["clo", "resolve", "staged", "recall", "streamed"])
    def test_one_thread_says_what_the_machine_says(self, kind: str, name: str) -> None:
        network = Network(EVERY[kind]())
        chosen = design(name) if name == "streamed" else design(name, budget_pages=2)
        ready = [read_prompt(network, text) for text in prompts()]
        with Decoder(network, chosen, max_new_tokens=STEPS) as decoder:
            found = forced(decoder, ready)
            traffic = decoder.traffic
        alone = InlineDecoder(network, chosen, max_new_tokens=STEPS)
        assert torch.equal(forced(alone, ready), found)
        # whether a streamed layer was fetched ahead is the machine's affair
        assert alone.traffic.h2d_bytes == traffic.h2d_bytes
        assert alone.traffic.requested_pages == traffic.requested_pages > 0

    def test_offload_says_what_the_decoder_says(self, kind: str) -> None:
        """One takes the model apart, the other leaves it whole."""
        model, chosen, text = EVERY[kind](), design("clo", budget_pages=3, prefetch_depth=0), TEXTS[0]
        with offload(model, chosen, max_new_tokens=40) as cache:
            told = generated(model, text[None], cache, 12)
        found = forced_logits(model, chosen, told.sequences[0, :-1], len(text))
        torch.testing.assert_close(found, torch.cat(told.logits), rtol=1e-3, atol=1e-3)

    def test_its_timeline_has_the_operations_of_the_schedule(self, kind: str) -> None:
        with Decoder(EVERY[kind](), design("clo", budget_pages=3), max_new_tokens=4) as decoder:
            assert_timeline_is_the_schedules(decoder)

    @pytest.mark.parametrize("name", ["clo", "resident", "streamed"])
    def test_memory_is_what_was_planned(self, kind: str, name: str) -> None:
        chosen = design(name, budget_pages=2) if name == "clo" else design(name)
        with Decoder(EVERY[kind](), chosen, max_new_tokens=20) as decoder:
            decoder.prefill([prompt(70), prompt(40)])
            states = [each for layer in decoder.layers if isinstance(layer, LinearLayer) for each in layer.kept]
            device, host = held(decoder)
            assert decoder.plan is not None
            needed = cache_bytes(decoder.plan, 90)
        assert (needed.device, needed.host) == (device + sum(each.nbytes for each in states), host)

    def test_it_is_taken_apart_rightly(self, kind: str) -> None:
        check_taken_apart(Network(EVERY[kind]()))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
class TestOneOfEach:
    @pytest.mark.parametrize("sync", ["host", "events", "flags", "graph"])
    @pytest.mark.parametrize("transfer", ["page_copies", "staged", "cpu_zero_copy", "gpu_zero_copy"])
    def test_same_logits_whoever_moves_the_pages(self, kind: str, transfer: str, sync: str) -> None:
        model, tokens = EVERY[kind](), prompt(100)
        plain = design("clo", budget_pages=3, tau=0.7, prefetch_depth=1)
        found = forced_logits(model, plain.with_fields(transfer=transfer, sync=sync), tokens, 90)
        assert torch.equal(found, forced_logits(model, plain, tokens, 90))

    def test_sequences_of_a_batch_do_not_touch_each_other(self, kind: str) -> None:
        """Lengths on both sides of a window, and far beyond it."""
        model, chosen = EVERY[kind](), design("resolve", budget_pages=2)
        texts = tuple(prompt(length + STEPS, seed) for seed, length in enumerate((3, 12, 61)))
        with Decoder(model, chosen, max_new_tokens=STEPS) as decoder:
            together = forced(decoder, [text[:-STEPS] for text in texts], texts)
        for sequence, text in enumerate(texts):
            alone = forced_logits(model, chosen, text, len(text) - STEPS)
            torch.testing.assert_close(together[:, sequence], alone, **CLOSE)

    @pytest.mark.parametrize("chunk", [1, 5, 16, 69])
    def test_a_prompt_in_chunks(self, kind: str, chunk: int) -> None:
        model, tokens = EVERY[kind](), prompt(80)
        found = forced_logits(model, everything("resolve"), tokens, 70, prefill_chunk_tokens=chunk)
        torch.testing.assert_close(found, dense_logits(model, tokens)[69:], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("shared", [0, 40, 69])
    def test_a_prompt_that_begins_as_one_that_was_read(self, kind: str, shared: int) -> None:
        network, first, second = Network(EVERY[kind]()), prompt(70), prompt(70, 1)
        second[:shared] = first[:shared]
        known = read_prompt(network, first, chunk_tokens=32)
        found = read_prompt(network, second, known=known, shared=shared, chunk_tokens=32)
        wanted = read_prompt(network, second, chunk_tokens=32)
        assert found.num_tokens == 70
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
        for pair, other in zip(found.kv, wanted.kv, strict=True):
            torch.testing.assert_close(pair, other, rtol=1e-4, atol=1e-4)

    def test_no_error_where_everything_is_attended(self, kind: str) -> None:
        """Against full attention in float64, with its sinks."""
        network, seen = Network(EVERY[kind]()), Fidelity(every=1)
        decoder = InlineDecoder(network, everything("resolve"), max_new_tokens=STEPS, observer=seen)
        forced(decoder, [read_prompt(network, text) for text in prompts()])
        assert seen.output_error == pytest.approx(0.0, abs=1e-5)
        assert seen.mass_recalled == pytest.approx(1.0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_dtypes(self, kind: str, dtype: torch.dtype) -> None:
        """No further from the truth than the model's own attention, give or take."""
        text, narrow = TEXTS[0], EVERY[kind](dtype=dtype)
        exact = dense_logits(EVERY[kind](), text)[-STEPS - 1 :]
        own = (dense_logits(narrow, text)[-STEPS - 1 :].float() - exact).norm()
        found = forced_logits(narrow, everything("clo"), text, len(text) - STEPS).float()
        assert (found - exact).norm() < 2 * own + 0.01 * exact.norm()

    def test_a_second_prompt_knows_nothing_of_the_first(self, kind: str) -> None:
        model = EVERY[kind]()
        with Decoder(model, design("clo", budget_pages=2), max_new_tokens=STEPS) as decoder:
            wanted = forced(decoder, prompts())
            forced(decoder, [text.flip(0) for text in prompts()])
            assert torch.equal(forced(decoder, prompts()), wanted)

    def test_its_result_counts_what_moved(self, kind: str) -> None:
        with Decoder(EVERY[kind](), design("resolve", budget_pages=2), max_new_tokens=20) as decoder:
            result = result_of(run_steps(decoder, prompts(), steps=4))
            assert decoder.plan is not None
            calls = {op.name for op in (node.op for node in record_step(decoder.plan).nodes)}
        assert set(result.ops) == calls
        assert result.h2d_bytes_per_step > 0
        assert 0 < result.hit_rate < 1


@pytest.mark.parametrize("kind", THAT_SEE)
def test_the_text_of_a_model_that_sees(kind: str) -> None:
    model, text = THAT_SEE[kind](), prompt(78).clamp(max=VOCABULARY - 5)
    found = forced_logits(model, everything("clo"), text, 70)
    torch.testing.assert_close(found, dense_logits(model, text)[69:], rtol=1e-3, atol=1e-3)


class TestWindow:
    @settings(max_examples=40, deadline=None)
    @given(
        window=st.integers(1, 9),
        room=st.integers(3, 24),
        chunks=st.lists(st.integers(1, 7), min_size=1, max_size=3),
        steps=st.integers(1, 12),
        sinks=st.booleans(),
    )
    def test_it_attends_to_the_last_tokens(
        self, window: int, room: int, chunks: list[int], steps: int, sinks: bool
    ) -> None:
        """Against a softmax in float64 over a plain list of all tokens."""
        source = torch.Generator().manual_seed(window + 31 * room)
        room = max(room, sum(chunks) + steps)
        shape = LayerShape(
            batch=2,
            num_query_heads=4,
            num_kv_heads=2,
            head_dim=8,
            max_tokens=room,
            dtype=torch.float32,
            device=torch.device("cpu"),
            scale=0.4,
        )
        layer, logits = WindowedLayer(shape, window), torch.randn(4, generator=source) if sinks else None
        kv = torch.randn(2, 2, 2, room, 8, generator=source)
        # the second sequence has one chunk less
        lengths = [sum(chunks), sum(chunks[:-1]) or chunks[0]]
        for sequence, length in enumerate(lengths):
            first = 0
            for chunk in chunks:
                if first < length:
                    part = kv[sequence, :, :, first : first + chunk]
                    layer.load(sequence, part[:, 0], part[:, 1], first=first)
                    first += chunk
        for _ in range(steps):
            newest = torch.stack([kv[sequence, :, :, length] for sequence, length in enumerate(lengths)])
            lengths = [length + 1 for length in lengths]
            layer.begin(lengths)
            layer.append(newest[:, :, 0], newest[:, :, 1], torch.tensor(lengths, dtype=torch.int32))
            query = torch.randn(2, 4, 8, generator=source)
            found = layer.attend(query, torch.tensor(lengths, dtype=torch.int32), logits)
            for sequence, length in enumerate(lengths):
                seen = kv[sequence, :, :, max(0, length - window) : length].double().repeat_interleave(2, 0)
                weights = (seen[:, 0] @ query[sequence, :, :, None].double())[..., 0] * 0.4
                if logits is not None:
                    weights = torch.cat([weights, logits[:, None].double()], -1)
                weights = weights.softmax(-1)[:, : seen.shape[2]]
                wanted = (weights[:, None] @ seen[:, 1])[:, 0].float()
                torch.testing.assert_close(found[sequence], wanted, rtol=1e-4, atol=1e-5)


class TestNumbersThatAreNone:
    @pytest.mark.parametrize(
        ("make", "weight", "row", "message"),
        [
            (HYBRID["Qwen3_5"], "2.self_attn.q_proj.weight", 0, "first in layer 2: its query of the newest token"),
            (HYBRID["Qwen3_5"], "0.linear_attn.in_proj_qkv.weight", 0, "first in layer 0: its projections of the new"),
            (HYBRID["Qwen3_5"], "1.linear_attn.A_log", 0, "first in layer 1: its states"),
            (
                HYBRID["Qwen3_5"],
                "2.mlp.down_proj.weight",
                0,
                "first in layer 3: its projections, .*: look at layer 2's",
            ),
            (
                WITH_EXPERTS["Qwen3Moe"],
                "1.mlp.gate.weight",
                0,
                "first in layer 2: its query, key and value, .*layer 1's",
            ),
            (EVERY["Gemma3"], "0.self_attn.v_proj.weight", 0, "first in layer 0: its value of the newest token"),
        ],
    )
    def test_where_they_were_first(self, make: Any, weight: str, row: int, message: str) -> None:
        model = make()
        with Decoder(model, design("clo", budget_pages=2), max_new_tokens=4) as decoder:
            decoder.prefill([prompt(60)])
            model.get_parameter(f"model.layers.{weight}").data[row] = float("nan")
            with pytest.raises(EngineError, match=f"the logits are not finite, {message}"):
                decoder.step(torch.tensor([1]))

    @pytest.mark.parametrize(
        ("make", "weight", "message"),
        [
            (HYBRID["Qwen3_5"], "0.linear_attn.in_proj_qkv.weight", "first in layer 0: its projections of the newest"),
            (HYBRID["Qwen3_5"], "1.linear_attn.A_log", "first in layer 1: its states"),
            (HYBRID["Qwen3_5"], "0.mlp.down_proj.weight", "first in layer 1: its projections, and so its input: look"),
            (EVERY["Gemma3"], "0.self_attn.v_proj.weight", r"first in layer 0: a value \(window row 0 of KV head 0"),
        ],
    )
    def test_in_a_prompt(self, make: Any, weight: str, message: str) -> None:
        model = make()
        model.get_parameter(f"model.layers.{weight}").data[0] = float("nan")
        with (
            Decoder(model, design("clo", budget_pages=2), max_new_tokens=4) as decoder,
            pytest.raises(EngineError, match=f"prefill: the logits are not finite, {message}"),
        ):
            decoder.prefill([prompt(60)])


class TestRefused:
    def test_logits_that_are_capped_behind_the_head(self) -> None:
        """Gemma 2 embeds and caps in ways that no operation of the schedule has."""
        with (
            Decoder(windowed_model("Gemma2"), design("clo", budget_pages=2), max_new_tokens=4) as decoder,
            pytest.raises(SpecError, match="taken apart it computes something else"),
        ):
            decoder.prefill([prompt(40)])

    def test_experts_that_are_not_what_the_config_says(self) -> None:
        model = small_model("Qwen3Moe")
        model.model.layers[2].mlp = small_model("qwen3").model.layers[2].mlp
        with pytest.raises(SpecError, match=r"layer 2 has other MLPs or experts than .* use clo\.engine\.offload"):
            Network(model)

    def test_a_router_that_is_missing(self) -> None:
        model = small_model("Qwen3Moe")
        model.model.layers[1].mlp.gate = None
        with pytest.raises(SpecError, match=r"layers lack mlp\.gate: .* clo\.engine\.offload leaves it whole"):
            Network(model)

    def test_a_graph_of_experts_called_one_by_one(self) -> None:
        recorded, cuda = design("clo"), torch.device("cuda")
        with pytest.raises(SpecError, match=r"one by one cannot be recorded: load the model in bfloat16 .*batched_mm"):
            check_recordable(recorded, True, cuda)
        check_recordable(recorded, False, cuda)
        check_recordable(recorded, True, torch.device("cpu"))
        check_recordable(design("clo", sync="events"), True, cuda)

    @pytest.mark.parametrize(
        ("dtype", "how", "seen"),
        [
            (torch.bfloat16, "eager", True),
            (torch.bfloat16, "grouped_mm", False),
            (torch.float32, "grouped_mm", True),
            (torch.float32, "batched_mm", False),
        ],
    )
    def test_whose_host_must_know_what_was_chosen(self, dtype: torch.dtype, how: str, seen: bool) -> None:
        for kind in ("Qwen3Moe", "llama"):
            model = small_model(kind, dtype=dtype)
            model.config._experts_implementation = how
            assert Network(model).host_sees_experts == (seen and kind != "llama")


class TestCommands:
    def test_a_real_run_of_a_small_hybrid(self, tmp_path: Path) -> None:
        shape, out = tmp_path / "small.json", tmp_path / "result.json"
        config = hybrid_model("Qwen3_5", layers=(LINEAR, FULL, LINEAR, FULL)).config
        shape.write_text(json.dumps(config.to_dict()))
        small = {"page_size": 4, "recent_window_tokens": 8, "dense_layers": 0, "min_budget_pages": 2}
        changes = [part for field, value in small.items() for part in ("--set", f"design.{field}={value}")]
        run("run", "--model", shape, "--context", 96, "--steps", 3, "--out", out, *changes)
        ops = json.loads(out.read_text())["ops"]
        assert {ops[name]["calls"] for name in ("linear_attention", "linear_proj", "attention")} == {2}
        assert ops["output_gate"]["calls"] == 4

    def test_layers_without_one_that_could_be_offloaded(self) -> None:
        assert "take at least 6" in refuse("run", "--model", "gemma-3-27b", "--layers", "4")


def test_offloaded_are_the_layers_that_the_plan_says() -> None:
    for kind, make in EVERY.items():
        with Decoder(make(), design("clo", budget_pages=2), max_new_tokens=4) as decoder:
            decoder.prefill([prompt(60)])
            assert decoder.plan is not None
            offloaded = [index for index, layer in enumerate(decoder.layers) if isinstance(layer, OffloadedLayer)]
            windowed = [index for index, layer in enumerate(decoder.layers) if isinstance(layer, WindowedLayer)]
            assert offloaded == list(decoder.plan.sparse_layers), kind
            assert windowed == list(decoder.plan.model.windowed_layers), kind


@pytest.mark.parametrize("kind", ["Gemma3", "GptOss"])
@pytest.mark.parametrize("chunk", [7, 512])
def test_a_window_of_the_new_token_only(kind: str, chunk: int) -> None:
    """The library's own cache then keeps everything."""
    model, tokens = windowed_model(kind, window=1), prompt(80)
    found = forced_logits(model, everything("clo"), tokens, 70, prefill_chunk_tokens=chunk)
    torch.testing.assert_close(found, dense_logits(model, tokens)[69:], rtol=1e-3, atol=1e-3)


def test_one_thread_does_not_go_on_after_a_step_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(HYBRID["Qwen3_5"]())
    decoder, ready = InlineDecoder(network, design("clo", budget_pages=2), max_new_tokens=STEPS), []
    ready = [read_prompt(network, text) for text in prompts()]
    wanted = forced(decoder, ready)
    decoder.prefill(ready)
    with monkeypatch.context() as patch:
        patch.setattr(network, "post_norm", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.step(torch.tensor([1, 2]))
    with pytest.raises(EngineError, match="the last step failed half-way: call prefill again"):
        decoder.step(torch.tensor([1, 2]))
    assert torch.equal(forced(decoder, ready), wanted)


def test_a_window_is_priced_as_one_whatever_is_attended_elsewhere() -> None:
    """Also where a budget has as many tokens as a window."""
    spec = Network(windowed_model("Qwen3", window=64)).spec
    for budget in (12, 13, 14):
        chosen = design("resolve", budget_pages=budget, dense_layers=0, slot_budgets=None, slot_pages=None)
        plan = make_plan(spec, local_machine(torch.device("cpu")), chosen, Workload(context_tokens=200))
        keys = {
            node.op.layer: price_key("attention", node.op.work, plan)
            for node in record_step(plan).nodes
            if node.op.name == "attention"
        }
        for layer, key in keys.items():
            assert key == ("attention:dense" if layer in spec.windowed_layers else "attention:sparse")

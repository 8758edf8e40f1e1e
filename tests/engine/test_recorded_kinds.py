"""Traces of models with experts, windows, sinks, gates and linear attention: of the layers that keep the context."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kinds import EVERY, ONE_OF_EACH, THAT_SEE
from latent import NOPE, in_vectors
from small import DIM, GROUP, KV_HEADS, VOCABULARY, design, prompt, small_model
from transformers import AttentionInterface
from windowed import FULL, SLIDES, windowed_model

import clo_sim
from clo.engine.decoder import Decoder
from clo.engine.heads import head_profile, measure_heads
from clo.engine.models.network import Network
from clo.engine.recording import record as record_module
from clo.engine.recording.attention_recorder import AttentionRecorder, register_attention
from clo.engine.recording.record import _run
from clo.engine.recording.settings import RecordSettings
from clo.errors import SpecError, TraceError
from clo.specs import Workload
from clo.trace import AttentionTrace
from clo.trace_stats import describe
from clo_sim.stand_in import TrafficSource
from clo_sim.synthetic import fit_synthetic

CONTEXT, STEPS, PAGE = 60, 8, 4
KEEP = RecordSettings(
    context_tokens=CONTEXT,
    num_steps=STEPS,
    page_size=PAGE,
    max_budget_pages=8,
    num_sink_tokens=2,
    recent_window_tokens=10,
)
TOKENS = prompt(CONTEXT + STEPS - 1, 3).clamp(max=VOCABULARY - 5)[None]
LOAD = Workload(context_tokens=CONTEXT, steps=4, warmup_steps=2)
ABOUT = {
    "model": "small",
    "text_source": "made up",
    "text_sha256": "0" * 64,
    "nll_per_token": 1.0,
    "recorded_at": "2026-01-01",
    "versions": {},
}


def recorded(model: Any, settings: RecordSettings = KEEP) -> AttentionTrace:
    register_attention()
    recorder = AttentionRecorder(model, settings)
    _run(recorder, TOKENS, settings, lambda *_: None)
    return recorder.trace(ABOUT)


class Whole:
    """One forward pass over all tokens without a cache, attention in float64: what every step must have seen."""

    def __init__(self, model: Any) -> None:
        self.network = Network(model, whole=True)
        self.latent = self.network.spec.latent is not None
        self.seen: dict[int, SimpleNamespace] = {}
        self.inputs: list[torch.Tensor] = []
        self.contributions: dict[int, torch.Tensor] = {}
        hooks = [layer.register_forward_pre_hook(self._entered, with_kwargs=True) for layer in self.network.layers]
        places = self.network.spec.whole_layers
        for layer in places:
            out = self.network.layers[layer].self_attn.o_proj
            hooks.append(
                out.register_forward_pre_hook(lambda module, args, layer=layer: self._left(layer, module, args))
            )
        AttentionInterface.register("float64", self._attend)
        self.network.decoder.set_attn_implementation("float64")
        with torch.inference_mode():
            model(TOKENS, use_cache=False)
        for hook in hooks:
            hook.remove()

    def _entered(self, _module: Any, args: Any, kwargs: Any) -> None:
        self.inputs.append(args[0] if args else kwargs["hidden_states"])

    def _left(self, layer: int, module: Any, args: Any) -> None:
        heads = args[0][0].double().unflatten(-1, (KV_HEADS * GROUP, -1))
        weight = module.weight.double().unflatten(-1, (KV_HEADS * GROUP, -1))
        self.contributions[layer] = torch.einsum("thd,ohd->tho", heads, weight).norm(dim=-1)

    def _attend(self, module: Any, query: Any, key: Any, value: Any, _mask: Any, **options: Any) -> Any:
        layer = module.layer_idx
        keys, values = (each[0].double().repeat_interleave(query.shape[1] // key.shape[1], 0) for each in (key, value))
        logits = query[0].double() @ keys.transpose(1, 2) * options["scaling"]
        at = torch.arange(query.shape[2])
        hidden = at[None, :] > at[:, None]
        if layer in self.network.spec.windowed_layers:
            hidden |= at[None, :] <= at[:, None] - self.network.spec.window_tokens
        logits = logits.masked_fill(hidden, float("-inf"))
        asked = in_vectors(module, query[0]) if self.latent else query[0]
        self.seen[layer] = SimpleNamespace(query=asked, mass=logits.softmax(-1))
        if (sinks := options.get("s_aux")) is not None:
            logits = torch.cat([logits, sinks.double()[:, None, None].expand(-1, len(at), 1)], -1)
        given = logits.softmax(-1)[..., : len(at)] @ values
        return given.transpose(0, 1)[None].to(query.dtype), None

    def predicted(self, layer: int, distance: int) -> torch.Tensor:
        """What `layer` would ask by the input of one `distance` before it, `[tokens, heads, head_dim]`."""
        decoder, attention = self.network.decoder, self.network.layers[layer].self_attn
        hidden, positions = self.inputs[layer - distance], torch.arange(TOKENS.shape[1])[None]
        if hasattr(decoder.rotary_emb, "mrope_section"):  # of text, and of both sides of images
            positions = positions.expand(3, -1, -1)
        kinds = getattr(decoder.config, "layer_types", None)
        by_kind = (kinds[layer],) if self.network._rotates_by_kind else ()
        turned = decoder.rotary_emb(hidden, positions, *by_kind)
        norm = getattr(self.network.layers[layer], "input_layernorm", None)
        if self.latent:
            return self._predicted_in_vectors(attention, norm(hidden), turned)
        asked = _queries(attention, hidden if norm is None else norm(hidden))
        if self.network.spec.gated_attention:
            asked = asked.unflatten(-1, (-1, 2, DIM))[..., 0, :].flatten(-2)
        if (own := getattr(attention, "q_norm", None)) is not None:
            whole = own.weight.shape[-1] != DIM
            asked = own(asked) if whole else own(asked.unflatten(-1, (-1, DIM))).flatten(-2)
        asked = asked.unflatten(-1, (-1, DIM)).transpose(1, 2)
        return self.network.rotate(asked, asked, turned)[0][0].transpose(0, 1)

    def _predicted_in_vectors(self, attention: Any, normed: torch.Tensor, turned: Any) -> torch.Tensor:
        """The same of latent attention."""
        low = attention.q_lora_rank is not None
        asked = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(normed))) if low else None
        asked = (attention.q_proj(normed) if asked is None else asked).unflatten(-1, (KV_HEADS * GROUP, -1))
        plain, end = asked[0].transpose(0, 1).split([NOPE, asked.shape[-1] - NOPE], dim=-1)
        library = sys.modules[type(attention).__module__]
        if isinstance(turned, torch.Tensor):
            end = library.apply_rotary_emb(end[None], end[None], turned)[0][0]
        else:
            end = library.apply_rotary_pos_emb_interleave(end[None], end[None], *turned)[0][0]
        return in_vectors(attention, torch.cat([plain, end], -1)).transpose(0, 1)


def _queries(attention: Any, normed: torch.Tensor) -> torch.Tensor:
    """Phi's come first in what one matrix gives."""
    if hasattr(attention, "q_proj"):
        return attention.q_proj(normed)
    return attention.qkv_proj(normed)[..., : KV_HEADS * GROUP * DIM]


ALL = EVERY | {f"{kind} that sees": make for kind, make in THAT_SEE.items()}


@torch.inference_mode()
@pytest.mark.parametrize("kind", ALL)
def test_what_is_recorded_is_what_attention_saw(kind: str) -> None:
    model = ALL[kind]()
    trace, places = recorded(model), Network(model, whole=True).spec.whole_layers
    header = trace.header
    assert (header.places, header.layers_of_model, header.num_layers) == (places, len(model_layers(model)), len(places))
    whole = Whole(model)
    importance = np.stack([whole.contributions[layer][CONTEXT - 1 :].mean(0).numpy() for layer in places])
    np.testing.assert_allclose(trace.head_importance, importance / importance.mean(), rtol=2e-3)
    for row, layer in enumerate(places):
        seen = whole.seen[layer]
        for step in range(STEPS):
            at, candidates = CONTEXT - 1 + step, KEEP.candidates(step)
            close(trace.queries[step, row], seen.query[:, at])
            mass = seen.mass[:, at].unflatten(0, (header.num_kv_heads, -1)).mean(1)
            pages = mass[:, PAGE : (candidates + 1) * PAGE].unflatten(-1, (candidates, PAGE)).sum(-1)
            best = pages.sort(descending=True).values[:, :8]
            chosen = torch.from_numpy(trace.pages["exact"][step, row].astype(np.int64)) - 1
            torch.testing.assert_close(pages.gather(1, chosen), best, rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(trace.resident_mass[step, row], 1 - pages.sum(-1).numpy(), atol=2e-3)
            for distance in header.lookaheads:
                found = trace.lookahead_queries[distance][step, row]
                if row < header.first_predicted(distance):
                    assert not found.any()
                else:
                    close(found, whole.predicted(layer, distance)[at])


def model_layers(model: Any) -> Any:
    return Network(model, whole=True).layers


def close(found: np.ndarray, wanted: torch.Tensor) -> None:
    """Codes keep directions: cosines to 0.002."""
    exact = wanted.double().numpy()
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(exact, axis=-1)
    assert ((found * exact).sum(-1) / norms).min() > 0.995


@pytest.mark.parametrize("kind", ONE_OF_EACH)
class TestWhatItIsGoodFor:
    def test_it_replays_head_by_head_for_its_own_model(self, kind: str) -> None:
        """Each layer that keeps the context has its own recorded heads, and misses as they do."""
        model = EVERY[kind]()
        trace, spec = recorded(model), Network(model, whole=True).spec
        scene = clo_sim.make_scene(spec, "h200", workload=LOAD)
        chosen = design("resolve", budget_pages=3, slot_pages=4, slot_budgets=None, prefetch_depth=1, dense_layers=0)
        plan, source = scene.plan(chosen), TrafficSource(trace, resample_heads=False)
        traffic = source.traffic(plan)
        assert not any("stand for" in note and "heads" in note for note in traffic.assumptions)
        moving = np.flatnonzero((traffic.demand_heads + traffic.spec_heads).sum(0))
        assert set(moving) == set(spec.whole_layers)
        predicted = {layer for layer in spec.whole_layers if layer >= 1}
        assert set(np.flatnonzero(traffic.spec_heads.sum(0))) == predicted
        other = first_rotated(trace)
        assert not np.array_equal(
            TrafficSource(other, resample_heads=False).traffic(plan).demand_pages, traffic.demand_pages
        )

    def test_its_heads_have_a_profile(self, kind: str) -> None:
        model = EVERY[kind]()
        trace, network = recorded(model), Network(model)
        found = measure_heads(trace)
        assert np.isnan(found.prefetchability).sum() == trace.header.num_kv_heads * trace.header.first_predicted(1)
        chosen = design("clo", target_hit_rate=0.5, gqa_fold="importance", pinned_head_fraction=0.5, budget_pages=2)
        profile = head_profile(trace, chosen, network.spec)
        for row, layer in enumerate(trace.header.places):
            assert profile.importance is not None
            np.testing.assert_allclose(profile.importance[layer].numpy(), trace.head_importance[row], rtol=1e-6)
        with Decoder(network, chosen, heads=profile, max_new_tokens=4) as decoder:
            decoder.prefill([prompt(70)])
            assert bool(torch.isfinite(decoder.step(torch.tensor([1]))).all())

    def test_it_is_saved_summed_up_and_drawn_from(self, kind: str, tmp_path: Any) -> None:
        trace = recorded(EVERY[kind]())
        trace.save(tmp_path / "trace.npz")
        again = AttentionTrace.load(tmp_path / "trace.npz")
        assert again.header == trace.header
        np.testing.assert_array_equal(again.lookahead_queries[2], trace.lookahead_queries[2])
        assert [row["layer"] for row in describe(again)["layers"]] == list(trace.header.places)
        synthetic = fit_synthetic(again).generate(num_steps=12)
        assert synthetic.header.places == trace.header.places


def first_rotated(trace: AttentionTrace) -> AttentionTrace:
    """The same with its layers in another order."""
    order = np.roll(np.arange(trace.header.num_layers), 1)
    keep = trace.header
    ahead = [(selector, distance) for selector in keep.selectors for distance in keep.lookaheads]
    return AttentionTrace.from_arrays(
        keep,
        queries=trace.queries[:, order],
        lookahead_queries=dict.fromkeys(keep.lookaheads, trace.queries[:, order]),
        pages={selector: trace.pages[selector][:, order] for selector in keep.selectors},
        lookahead_pages={(selector, distance): trace.pages[selector][:, order] for selector, distance in ahead},
        resident_mass=trace.resident_mass[:, order],
        head_importance=trace.head_importance[order],
    )


class TestStandingForOthers:
    def test_a_hybrids_heads_for_a_plain_model(self) -> None:
        """All of them are predicted: they stand for no layer that is not."""
        trace, spec = recorded(EVERY["Qwen3_5"]()), Network(small_model()).spec
        scene = clo_sim.make_scene(spec, "h200", workload=LOAD.with_fields(batch=2))
        ahead = design("resolve", budget_pages=3, prefetch_depth=1, dense_layers=0)
        with pytest.raises(TraceError, match=r"none can stand for layer 0 of .*: raise design\.dense_layers to 1"):
            TrafficSource(trace).traffic(scene.plan(ahead))
        for chosen in (ahead.with_fields(dense_layers=1), ahead.with_fields(prefetch_depth=0)):
            traffic = TrafficSource(trace).traffic(scene.plan(chosen))
            assert (traffic.demand_heads + traffic.spec_heads)[:, chosen.dense_layers :].all()
        with pytest.raises(TraceError, match=r"4 of 8 layers x 2 KV heads, but .* has 4 x 2: .* --resample-heads"):
            TrafficSource(trace, resample_heads=False).traffic(scene.plan(ahead))

    def test_a_plain_models_heads_for_one_with_windows(self) -> None:
        """Of as many layers and heads: those of the layers that keep the whole context stand for them one by one."""
        trace, spec = recorded(small_model()), Network(small_model()).spec
        windowed = spec.with_fields(window_tokens=12, windowed_layers=(1, 2))
        chosen = design("resolve", budget_pages=3, dense_layers=0, prefetch_depth=0)
        plans = [clo_sim.make_scene(model, "h200", workload=LOAD).plan(chosen) for model in (windowed, spec)]
        found, wanted = (TrafficSource(trace, resample_heads=False).traffic(plan).demand_pages for plan in plans)
        np.testing.assert_array_equal(found[:, [0, 3]], wanted[:, [0, 3]])
        assert not found[:, [1, 2]].any()

    def test_a_profile_of_another_model_is_refused(self) -> None:
        trace, spec = recorded(EVERY["Qwen3_5"]()), Network(small_model()).spec
        with pytest.raises(SpecError, match="has 8 layers, 4 of which keep the whole context, 2 KV and "):
            head_profile(trace, design("clo"), spec)
        shallow = spec.with_fields(window_tokens=12, windowed_layers=(1,))
        with pytest.raises(SpecError, match="4 layers, 3 of which keep the whole context"):
            head_profile(recorded(small_model()), design("clo"), shallow)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recorded_layers": (0, 2)}, "must name num_layers layers"),
        ({"recorded_layers": (2, 0, 3, 4), "model_layers": 6}, "and ascend"),
        ({"recorded_layers": (0, 2, 3, 6), "model_layers": 6}, "must be less than model_layers"),
        ({"lookaheads": (4,)}, "must be less than the model's layers"),
    ],
)
def test_headers_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    header = recorded(small_model()).header
    with pytest.raises(SpecError, match=message):
        header.with_fields(**fields)


def test_the_model_attends_as_before() -> None:
    """Whoever shows its attention: it is the model's own, with its sinks."""
    for kind in ONE_OF_EACH:
        model = EVERY[kind]()
        with torch.inference_mode():
            wanted = model(TOKENS, use_cache=False).logits
            recorded(model)
            torch.testing.assert_close(model(TOKENS, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)


class TestFromAFolder:
    """As `clo record` does it, tokens and all."""

    @pytest.mark.parametrize("kind", [*ONE_OF_EACH, "Gemma3 that sees", "Qwen3_5 that sees"])
    def test_every_kind(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(record_module, "load_model", lambda _: (ALL[kind](), Characters()))
        trace = record_module.record("small", "abcdefg" * 30, context_tokens=100, num_steps=3, page_size=PAGE)
        assert trace.header.context_tokens == 100
        assert trace.header.nll_per_token > 0
        with pytest.raises(SpecError, match="the model has 256"):
            record_module.record("small", "abcdefg" * 90, context_tokens=255, num_steps=9, page_size=PAGE)


class Characters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **_options: Any) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([[ord(letter) % (VOCABULARY - 5) for letter in text]]))


class TestLayersNearTheInput:
    def test_no_query_is_predicted_from_before_the_first_layer(self) -> None:
        """Two layers ahead of any there is none that is recorded: that distance is left out."""
        trace = recorded(windowed_model("Qwen3", layers=(FULL, FULL, SLIDES, SLIDES)))
        assert (trace.header.places, trace.header.lookaheads) == ((0, 1), (1,))
        assert list(describe(trace)["lookahead_cosine"]) == ["1"]
        alone = recorded(windowed_model("Qwen3", layers=(FULL, SLIDES, SLIDES)))
        assert (alone.header.places, alone.header.lookaheads) == ((0,), ())
        assert describe(alone)["lookahead_cosine"] == {}
        with pytest.raises(SpecError, match="lookaheads must predict a recorded layer"):
            trace.header.with_fields(lookaheads=(2,))

    def test_its_heads_stand_for_others_that_are_predicted(self) -> None:
        trace, spec = (
            recorded(windowed_model("Qwen3", layers=(FULL, FULL, SLIDES, SLIDES))),
            Network(small_model()).spec,
        )
        scene = clo_sim.make_scene(spec, "h200", workload=LOAD)
        for dense in (0, 1, 2):
            chosen = design("resolve", budget_pages=3, prefetch_depth=1, dense_layers=dense)
            traffic = TrafficSource(trace).traffic(scene.plan(chosen))
            assert set(np.flatnonzero(traffic.spec_heads.sum(0))) == set(range(max(1, dense), 4))
        with pytest.raises(TraceError, match=r"prefetch_depth = 2: the trace recorded lookaheads \[1\]"):
            TrafficSource(trace).traffic(scene.plan(design("resolve", budget_pages=3, prefetch_depth=2)))

    def test_a_recorder_that_is_refused_leaves_the_model_alone(self) -> None:
        model = small_model()
        before = model.config._attn_implementation
        with pytest.raises(SpecError, match="the model has only 4 layers"):
            AttentionRecorder(model, replace(KEEP, lookaheads=(4,)))
        assert model.config._attn_implementation == before

"""The recorder against an independent float64 computation from a tiny random model's own weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from clo.engine.models.anatomy import decoder_layers  # noqa: E402
from clo.engine.recording.attention_recorder import (  # noqa: E402
    ATTENTION_NAME,
    AttentionRecorder,
    register_attention,
)
from clo.engine.recording.record import record  # noqa: E402
from clo.engine.recording.settings import RecordSettings  # noqa: E402
from clo.engine.texts import default_text  # noqa: E402
from clo.errors import NotFoundError, SpecError  # noqa: E402
from clo.trace import NO_PAGE, AttentionTrace  # noqa: E402

CONTEXT, STEPS, PAGE, WINDOW, KEEP, LAYERS = 200, 12, 8, 64, 6, 3
KV_HEADS, GROUP, DIM, HIDDEN = 2, 3, 8, 48
HEADS = KV_HEADS * GROUP
# float32 against float64
TIGHT = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(kind: str) -> Any:
    register_attention()
    torch.manual_seed(0)
    shape = {
        "vocab_size": 97,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "max_position_embeddings": 256,
        # large weights make attention far from uniform
        "initializer_range": 0.3,
        "attn_implementation": ATTENTION_NAME,
    }
    if kind == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()


class Characters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **_options: Any) -> Any:
        ids = torch.tensor([[ord(letter) % 97 for letter in text]])
        return transformers.BatchEncoding({"input_ids": ids})


class Reference:
    """All layers computed at once in float64, from the weights, without a cache: what every step must have seen."""

    def __init__(self, model: Any, token_ids: Any) -> None:
        self.weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
        self.eps = model.config.rms_norm_eps
        positions = np.arange(token_ids.shape[1])
        frequencies = 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
        self.angles = np.concatenate([positions[:, None] * frequencies] * 2, -1)
        hidden = self.weights["model.embed_tokens.weight"][token_ids[0].numpy()]
        self.inputs, self.queries, self.keys, self.mass, self.contribution = [], [], [], [], []
        for layer in range(LAYERS):
            hidden = self._layer(layer, hidden)
        self.logits = self._norm(hidden, "model.norm.weight") @ self.weights["lm_head.weight"].T

    def _layer(self, layer: int, hidden: np.ndarray) -> np.ndarray:
        self.inputs.append(hidden)
        query, key = self.project(layer, hidden, "q"), self.project(layer, hidden, "k")
        name = f"model.layers.{layer}"
        normed = self._norm(hidden, f"{name}.input_layernorm.weight")
        value = (normed @ self.weights[f"{name}.self_attn.v_proj.weight"].T).reshape(-1, KV_HEADS, DIM)
        mass = np.stack([softmax(self._logits(query, key, head)) for head in range(HEADS)])
        out = np.stack([mass[head] @ value[:, head // GROUP] for head in range(HEADS)], 1)
        weight = self.weights[f"{name}.self_attn.o_proj.weight"]
        parts = np.stack([out[:, h] @ weight[:, h * DIM : (h + 1) * DIM].T for h in range(HEADS)], 1)
        self.queries.append(query)
        self.keys.append(key)
        self.mass.append(mass)
        self.contribution.append(np.linalg.norm(parts, axis=-1))
        hidden = hidden + parts.sum(1)
        normed = self._norm(hidden, f"{name}.post_attention_layernorm.weight")
        gate, up, down = (self.weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        gated = normed @ gate.T
        return hidden + (gated / (1 + np.exp(-gated)) * (normed @ up.T)) @ down.T

    def _logits(self, query: np.ndarray, key: np.ndarray, head: int) -> np.ndarray:
        logits = query[:, head] @ key[:, head // GROUP].T / np.sqrt(DIM)
        return np.where(np.tri(len(logits), dtype=bool), logits, -np.inf)

    def project(self, layer: int, hidden: np.ndarray, part: str) -> np.ndarray:
        """Rotated queries or keys [tokens, heads, head_dim] of a layer from any layer's input."""
        name = f"model.layers.{layer}"
        flat = self._norm(hidden, f"{name}.input_layernorm.weight")
        heads = (flat @ self.weights[f"{name}.self_attn.{part}_proj.weight"].T).reshape(len(hidden), -1, DIM)
        if f"{name}.self_attn.{part}_norm.weight" in self.weights:
            heads = self._norm(heads, f"{name}.self_attn.{part}_norm.weight")
        angles = self.angles[:, None]
        turned = np.concatenate([-heads[..., DIM // 2 :], heads[..., : DIM // 2]], -1)
        return heads * np.cos(angles) + turned * np.sin(angles)

    def _norm(self, values: np.ndarray, weight: str) -> np.ndarray:
        return values / np.sqrt((values**2).mean(-1, keepdims=True) + self.eps) * self.weights[weight]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


TEXT = "".join(chr(33 + (7 * i * i + i // 3) % 90) for i in range(CONTEXT + STEPS - 1))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def recorded(request: pytest.FixtureRequest) -> tuple[AttentionTrace, AttentionRecorder, Reference]:
    model = tiny_model(request.param)
    kept: list[AttentionRecorder] = []
    original = AttentionRecorder.__init__

    def keep(self: AttentionRecorder, *args: Any) -> None:
        original(self, *args)
        kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clo.engine.recording.record.load_model", lambda *_, **__: (model, Characters()))
        patch.setattr("clo.engine.recording.record.PREFILL_CHUNK_TOKENS", 48)
        patch.setattr(AttentionRecorder, "__init__", keep)
        trace = record(
            "tiny",
            TEXT,
            context_tokens=CONTEXT,
            num_steps=STEPS,
            page_size=PAGE,
            max_budget_pages=KEEP,
            text_source="t",
        )
    return trace, kept[0], Reference(model, Characters()(TEXT)["input_ids"])


def at(step: int) -> int:
    """Position of the token that a step feeds."""
    return CONTEXT - 1 + step


def page_masses(mass: np.ndarray, step: int) -> np.ndarray:
    """Mass [KV heads, candidates] of pages 1.. from mass [query heads, tokens]; by the definition, page by page."""
    tokens = CONTEXT + step
    pages = [page for page in range(1, tokens // PAGE) if (page + 1) * PAGE <= tokens - WINDOW]
    by_head = np.stack([mass[:, page * PAGE : (page + 1) * PAGE].sum(-1) for page in pages], -1)
    return by_head.reshape(KV_HEADS, GROUP, -1).mean(1)


def assert_best(pages: np.ndarray, scores: np.ndarray) -> None:
    """The listed pages (from 1) are the best by score, in order; ties may fall either way."""
    best = -np.sort(-scores, axis=-1)[:, : pages.shape[-1]]
    assert (pages != NO_PAGE).all()
    np.testing.assert_allclose(np.take_along_axis(scores, pages.astype(int) - 1, -1), best, **TIGHT)


def minmax_scores(reference: Reference, layer: int, query: np.ndarray, step: int) -> np.ndarray:
    keys = reference.keys[layer]
    count = page_masses(np.zeros((HEADS, CONTEXT + step)), step).shape[-1]
    scores = np.zeros((HEADS, count))
    for page in range(1, count + 1):
        inside = keys[page * PAGE : (page + 1) * PAGE]
        for head in range(HEADS):
            ends = query[head] * np.stack([inside[:, head // GROUP].min(0), inside[:, head // GROUP].max(0)])
            scores[head, page - 1] = ends.max(0).sum() / np.sqrt(DIM)
    return softmax(scores).reshape(KV_HEADS, GROUP, count).mean(1)


Recorded = tuple[AttentionTrace, AttentionRecorder, Reference]


def test_queries_are_those_of_the_text_itself(recorded: Recorded) -> None:
    trace, recorder, reference = recorded
    for step in range(STEPS):
        for layer in range(LAYERS):
            np.testing.assert_allclose(recorder._queries[step, layer], reference.queries[layer][at(step)], **TIGHT)
    # the coded trace is the same within its rounding
    expected = np.stack([[reference.queries[layer][at(step)] for layer in range(LAYERS)] for step in range(STEPS)])
    norm = np.linalg.norm(trace.queries, axis=-1) * np.linalg.norm(expected, axis=-1)
    assert ((trace.queries * expected).sum(-1) / norm).min() > 1 - 0.0018


def test_exact_pages_and_masses(recorded: Recorded) -> None:
    trace, recorder, reference = recorded
    for step in range(STEPS):
        for layer in range(LAYERS):
            mass = page_masses(reference.mass[layer][:, at(step), : CONTEXT + step], step)
            assert mass.shape[-1] == trace.num_candidate_pages(step)
            assert_best(trace.pages["exact"][step, layer], mass)
            best = -np.sort(-mass, axis=-1)[:, :KEEP]
            np.testing.assert_allclose(recorder._page_mass[step, layer], best, **TIGHT)
            np.testing.assert_allclose(trace.page_mass[step, layer], best, rtol=0.05, atol=1e-5)
            np.testing.assert_allclose(trace.resident_mass[step, layer], 1 - mass.sum(-1), atol=1e-3)


def test_minmax_pages(recorded: Recorded) -> None:
    trace, _, reference = recorded
    for step in range(STEPS):
        for layer in range(LAYERS):
            scores = minmax_scores(reference, layer, reference.queries[layer][at(step)], step)
            assert_best(trace.pages["page_minmax"][step, layer], scores)


@pytest.mark.parametrize("distance", [1, 2])
def test_lookahead(recorded: Recorded, distance: int) -> None:
    trace, recorder, reference = recorded
    assert trace.header.first_predicted(distance) == distance
    assert not trace.lookahead_queries[distance][:, :distance].any()
    for layer in range(distance, LAYERS):
        expected = reference.project(layer, reference.inputs[layer - distance], "q")
        for step in range(STEPS):
            query = expected[at(step)]
            np.testing.assert_allclose(recorder._lookahead_queries[distance][step, layer], query, **TIGHT)
            logits = np.stack(
                [reference.keys[layer][: CONTEXT + step, h // GROUP] @ query[h] / np.sqrt(DIM) for h in range(HEADS)]
            )
            exact = page_masses(softmax(logits), step)
            assert_best(trace.lookahead_pages["exact", distance][step, layer], exact)
            minmax = minmax_scores(reference, layer, query, step)
            assert_best(trace.lookahead_pages["page_minmax", distance][step, layer], minmax)
    for selector in trace.header.selectors:
        assert (trace.lookahead_pages[selector, distance][:, :distance] == NO_PAGE).all()


def test_pages_leave_out_sinks_and_window(recorded: Recorded) -> None:
    trace = recorded[0]
    for pages in (*trace.pages.values(), *trace.lookahead_pages.values()):
        for step in range(STEPS):
            named = pages[step][pages[step] != NO_PAGE].astype(int)
            assert named.min() >= 1
            assert ((named + 1) * PAGE).max() <= CONTEXT + step - WINDOW


def test_head_importance(recorded: Recorded) -> None:
    trace, _, reference = recorded
    norms = np.stack([layer[at(0) : at(STEPS)].mean(0) for layer in reference.contribution])
    np.testing.assert_allclose(trace.head_importance, norms / norms.mean(), rtol=1e-4)


def test_header(recorded: Recorded) -> None:
    trace, _, reference = recorded
    header = trace.header
    assert (header.context_tokens, header.num_steps, header.page_size) == (CONTEXT, STEPS, PAGE)
    assert (header.num_layers, header.num_query_heads, header.num_kv_heads, header.head_dim) == (LAYERS, 6, 2, DIM)
    assert (header.model, header.text_source) == ("tiny", "t")
    assert header.versions.keys() >= {"torch", "transformers", "python"}
    ids = [ord(letter) % 97 for letter in TEXT]
    losses = [-np.log(softmax(reference.logits[at(s)])[ids[at(s) + 1]]) for s in range(STEPS - 1)]
    assert header.nll_per_token == pytest.approx(np.mean(losses), rel=1e-4)


def test_hooks_are_gone_afterwards(recorded: Recorded) -> None:
    for layer in recorded[1]._layers:
        assert not layer._forward_pre_hooks
        assert not hasattr(layer.self_attn, "clo_observer")


class TestBadInput:
    @pytest.fixture(autouse=True)
    def _tiny(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "clo.engine.recording.record.load_model", lambda *_, **__: (tiny_model("llama"), Characters())
        )

    def test_text_too_short(self) -> None:
        with pytest.raises(SpecError, match=r"text: 50 tokens, but .* need 209"):
            record("tiny", "a" * 50, context_tokens=200, num_steps=10)

    def test_context_beyond_the_model(self) -> None:
        with pytest.raises(SpecError, match="need 309 positions: the model has 256"):
            record("tiny", "a" * 500, context_tokens=300, num_steps=10)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_steps": 0}, "num_steps = 0: must be at least 1"),
            ({"context_tokens": 70}, "no page of 16 tokens"),
            ({"page_size": 2}, "num_sink_tokens = 4: must fit"),
            ({"selectors": ("exact", "best")}, "best: known are exact, page_minmax"),
            ({"selectors": ()}, "at least one"),
            ({"lookaheads": (0,)}, "at least 1"),
            ({"lookaheads": (2, 1)}, "must ascend"),
            ({"lookaheads": (1, 3)}, "the model has only 3 layers"),
        ],
    )
    def test_settings(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            record("tiny", "a" * 250, **{"context_tokens": 200, "num_steps": 3} | changes)

    def test_model_of_another_kind(self) -> None:
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=97)
        with pytest.raises(SpecError, match=r"GPT2LMHeadModel: no decoder layers at model\.layers"):
            decoder_layers(transformers.GPT2LMHeadModel(config))

    def test_a_layer_that_attends_to_less_than_its_config_says(self) -> None:
        model = tiny_model("llama")
        recorder = AttentionRecorder(model, RecordSettings(context_tokens=200, num_steps=2, page_size=PAGE))
        with pytest.raises(SpecError, match="attends to 5 of 200 tokens"), recorder.attached(), torch.inference_mode():
            model(torch.ones((1, 5), dtype=torch.long))


def test_unknown_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotFoundError, match="absent: no such model folder"):
        record(tmp_path / "absent", "text", context_tokens=200, num_steps=2)
    with pytest.raises(NotFoundError, match=r"not a model folder: no config\.json in it"):
        record(str(tmp_path), "text", context_tokens=200, num_steps=2)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotFoundError, match="no model folder"):
        record(tmp_path, "text", context_tokens=200, num_steps=2)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError

    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    with pytest.raises(NotFoundError, match=r"not-there: .*the hub does not answer, and its cache here has no such"):
        record("not-there", "text", context_tokens=200, num_steps=2)
    assert len(asked) == 1


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_missing_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotFoundError, match=rf'needs {package}: pip install "clo-offload\[models\]"'):
        record("tiny", "text", context_tokens=200, num_steps=2)


def test_default_text_is_long_enough_for_a_long_context() -> None:
    assert len(default_text()) > 200_000

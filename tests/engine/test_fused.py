"""Norms and rotations in one launch: which models have them, and that they compute what the models' own do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kinds import EVERY, ONE_OF_EACH, WITH_INDEXER
from latent import indexer_design
from small import design, prompt, small_model

from clo.engine.decoder import Decoder
from clo.engine.models import network as networks
from clo.engine.models.fused import RmsNorm, Rotation, fused_norms, fused_rotation
from clo.engine.models.network import Network
from clo.specs import Design

SUMS = (torch.float32, torch.bfloat16)
MAKES: dict[str, Callable[..., Any]] = {"Llama": lambda dtype: small_model().to(dtype), **EVERY, **WITH_INDEXER}
AS_THEY_ARE = {("DeepseekV2", torch.float32), ("DeepseekV2", torch.bfloat16), ("Olmo3", torch.bfloat16)}
"""Rotations of complex numbers, and in single precision whatever the model's own is."""


@pytest.fixture
def in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "one_launch", lambda _: True)


@pytest.mark.usefixtures("in_one_launch")
@pytest.mark.parametrize("dtype", SUMS, ids=str)
@pytest.mark.parametrize("kind", MAKES)
class TestKinds:
    def test_every_norm_of_a_layer_and_its_rotation(self, kind: str, dtype: torch.dtype) -> None:
        network = Network(MAKES[kind](dtype=dtype))
        # gates of states and of indexers belong to modules that are run whole
        norms = {part for part in network.decoder.modules() if type(part).__name__.endswith("RMSNorm")}
        assert set(network._norms) == norms
        shifted = {one.less_one for one in network._norms.values()}
        assert shifted == {kind in ("Gemma3", "Qwen3Next", "Qwen3_5", "Qwen3_5Moe")}
        latent = network.spec.latent
        assert network._turn == (
            None
            if (kind, dtype) in AS_THEY_ARE
            else Rotation(first=latent.kv_rank if latent else 0, paired=latent is not None, halved=kind == "GptOss")
        )

    def test_each_gives_what_the_model_s_own_gives(self, kind: str, dtype: torch.dtype) -> None:
        network, rounding = Network(MAKES[kind](dtype=dtype)), torch.finfo(dtype).eps
        torch.manual_seed(0)
        with torch.inference_mode():
            for module, fused in network._norms.items():
                module.weight.add_(torch.randn_like(module.weight) / 4)
                hidden = torch.randn(3, 1, len(module.weight)).to(dtype)
                torch.testing.assert_close(fused(hidden), module(hidden), rtol=4 * rounding, atol=0)
            layer, positions = network.spec.whole_layers[-1], torch.tensor([3, 17, 90])
            hidden = torch.randn(3, 1, network.spec.hidden_size).to(dtype)
            rotation = network.rotations(hidden, positions)[layer]
            width, heads = network.spec.head_dim, network.spec.num_query_heads
            query, key = torch.randn(3, heads, 1, width).to(dtype), torch.randn(3, 2, 1, width).to(dtype)
            found = network.rotate(query, key, rotation)
            for one, wanted in zip(found, network._rotate_as_the_model(query, key, rotation), strict=True):
                assert one.shape == wanted.shape
                torch.testing.assert_close(one, wanted, rtol=2 * rounding, atol=2 * rounding)


@pytest.mark.parametrize("kind", ["Llama", *ONE_OF_EACH, "DeepseekV32"])
def test_decoding_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicted queries, too."""

    def decoded() -> torch.Tensor:
        network = Network(MAKES[kind](dtype=torch.float32))
        chosen = indexer_design("clo", network) if kind in WITH_INDEXER else ahead
        text = prompt(60)
        with Decoder(network, chosen, max_new_tokens=4) as decoder:
            rows = [decoder.prefill([text[:56], text[:33]])]
            rows += [decoder.step(torch.stack([token, 60 - token])).clone() for token in text[56:]]
        return torch.cat(rows)

    ahead: Design = design("clo", budget_pages=3, prefetch_depth=1)
    expected = decoded()
    monkeypatch.setattr(networks, "one_launch", lambda _: True)
    torch.testing.assert_close(decoded(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.usefixtures("in_one_launch")
class TestWhatIsTried:
    def test_a_weight_that_is_changed_or_moved_later(self) -> None:
        network = Network(small_model())
        module, hidden = network.layers[0].input_layernorm, torch.randn(1, 1, network.spec.hidden_size)
        before = network.input_norm(0, hidden)
        module.weight = torch.nn.Parameter(2 * module.weight)
        torch.testing.assert_close(network.input_norm(0, hidden), 2 * before)

    @pytest.mark.parametrize("name", ["variance_epsilon", "eps", None])
    @pytest.mark.parametrize(
        ("of", "less_one"),
        [
            (lambda normed, weight: weight * normed, False),
            (lambda normed, weight: (1 + weight) * normed, True),
            (lambda normed, weight: (2 + weight) * normed, None),
            (lambda normed, weight: weight * normed + 1e-3, None),
            (lambda normed, weight: weight * normed.abs(), None),
        ],
    )
    def test_a_norm_is_taken_for_what_it_computes(
        self, name: str | None, of: Callable[..., torch.Tensor], less_one: bool | None
    ) -> None:
        class Norm(torch.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.rand(16) + 0.5)

            def forward(self, hidden: torch.Tensor) -> torch.Tensor:
                return of(hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6), self.weight)

        norm = Norm()
        if name is not None:
            setattr(norm, name, 1e-6)
        known = None if name is None else less_one
        expected = {} if known is None else {norm: RmsNorm(norm, 1e-6, known)}
        assert fused_norms([], norm, torch.float32) == expected
        assert fused_norms([], norm, torch.float16) == {}

    def test_norms_without_a_weight_stay(self) -> None:
        assert (
            fused_norms([SimpleNamespace(input_layernorm=torch.nn.Identity())], torch.nn.Identity(), torch.half) == {}
        )

    @pytest.mark.parametrize("change", [0.0, 1e-3])
    def test_a_rotation_is_taken_for_what_it_computes(self, change: float) -> None:
        network = Network(small_model())
        like, width = torch.zeros(1), network.spec.head_dim
        rotation = network.rotations(torch.zeros(2, 1, 1), torch.tensor([1, 50]))[0]

        def turn(query: torch.Tensor, key: torch.Tensor, given: Any) -> tuple[torch.Tensor, torch.Tensor]:
            turned = network._rotate_as_the_model(query, key, given)
            return turned[0] + change, turned[1]

        found = fused_rotation(turn, rotation, like=like, head_dim=width)
        assert found == (Rotation() if change == 0 else None)
        assert fused_rotation(turn, torch.zeros(2, 1, width), like=like, head_dim=width) is None
        assert fused_rotation(turn, (rotation[0].double(),) * 2, like=like, head_dim=width) is None

    def test_a_model_that_rotates_otherwise_says_so_where_it_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = small_model()
        monkeypatch.delattr(model.model, "rotary_emb")
        network = Network(model)
        assert network._turn is None
        with pytest.raises(AttributeError, match="rotary_emb"):
            network.rotations(torch.zeros(1, 1, 48), torch.tensor([1]))

    def test_several_tokens_are_rotated_by_the_model(self) -> None:
        network = Network(small_model())
        rotation = network.decoder.rotary_emb(torch.zeros(1, 5, 1), torch.arange(5)[None])
        query, key = torch.randn(1, 4, 5, network.spec.head_dim), torch.randn(1, 2, 5, network.spec.head_dim)
        wanted = network._rotate_as_the_model(query, key, rotation)
        assert all(
            torch.equal(one, other) for one, other in zip(network.rotate(query, key, rotation), wanted, strict=True)
        )


@pytest.mark.parametrize("whole", [False, True])
def test_on_a_cpu_and_within_the_library_nothing_is_replaced(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Network(small_model())._norms
    monkeypatch.setattr(networks, "one_launch", lambda _: True)
    assert bool(Network(small_model(), whole=whole)._norms) is not whole

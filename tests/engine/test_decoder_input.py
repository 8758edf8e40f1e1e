"""What a decoder refuses, and how it ends."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch
from small import design, prompt, small_model

from clo.engine.decoder import Decoder
from clo.engine.heads import HeadProfile
from clo.errors import EngineError, SpecError


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

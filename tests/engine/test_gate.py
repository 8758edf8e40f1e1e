"""Who misses: by weighted cosines, and by drift from the step before."""

from __future__ import annotations

import pytest
import torch
from small import design, prompt, small_model

from clo.engine.decoder import Decoder
from clo.engine.layers import OffloadedLayer
from clo.engine.layers.gate import Gate
from clo.engine.layers.shape import HeadSettings, LayerShape
from clo.schedule.ops import Stage


class TestGate:
    @pytest.mark.parametrize("member", range(3))
    def test_an_important_query_head_decides_for_its_group(self, member: int) -> None:
        """Of three query heads one has turned away: its KV head misses where its weight is large."""
        shape = LayerShape(
            batch=1, num_query_heads=6, num_kv_heads=2, head_dim=16, max_tokens=8, scale=1.0,
            dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        weights = torch.tensor([8.0, 1.0, 1.0]).roll(member).repeat(2)
        gate = Gate(
            design("clo", gqa_fold="importance", tau=0.5),
            shape,
            HeadSettings(tau=torch.full((2,), 0.5), importance=weights),
        )
        query = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
        gate.test(Stage.DEMAND, query)
        assert gate.missed[Stage.DEMAND].all()
        query[0, member] *= -1
        query[0, 3 + (member + 1) % 3] *= -1
        gate.test(Stage.DEMAND, query)
        # (8 * -1 + 1 + 1) / 10 is less than 0.5, (8 - 1 + 1) / 10 is not
        assert gate.missed[Stage.DEMAND].tolist() == [[True, False]]

    def test_recall_measures_drift_from_the_step_before(self) -> None:
        model, tokens = small_model(), prompt(100)
        with Decoder(model, design("recall", budget_pages=2, tau=0.2), max_new_tokens=12) as decoder:
            decoder.prefill([tokens[:90]])
            corrected = set()
            for token in tokens[90:]:
                decoder.step(token[None])
                layer, operations = decoder.layers[2], decoder._operations
                assert isinstance(layer, OffloadedLayer)
                assert operations is not None
                assert torch.equal(layer.gate.anchor, operations._real[2])
                corrected |= set(layer.gate.missed[Stage.DEMAND].flatten().tolist())
        assert corrected == {True, False}

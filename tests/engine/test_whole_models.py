"""Models that `offload` leaves whole, whichever of their layers are not offloaded: schedule, plan, what is refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import hybrid
import pytest
import torch
import windowed
from hybrid import FULL, LINEAR, hybrid_model
from small import KV_HEADS, PAGE, design
from whole_models import assert_same, batch, everything, generated
from windowed import windowed_model

import clo_sim
from clo import presets
from clo.engine import inline, mount, offload
from clo.engine.layers import OffloadedLayer
from clo.engine.memory import local_machine
from clo.engine.models.network import Network
from clo.errors import EngineError, SpecError
from clo.plan import make_plan
from clo.schedule import record_step
from clo.schedule.ops import Stage
from clo.specs import Workload

WHOLE = {
    "windowed": partial(windowed_model, "Gemma3"),
    "hybrid": partial(hybrid_model, "Qwen3_5"),
    "linear-at-the-end": partial(hybrid_model, "Qwen3_5", layers=(FULL, LINEAR, FULL, LINEAR)),
}


def whole_model(kind: str) -> Any:
    return windowed_model(kind) if kind in windowed.KINDS else hybrid_model(kind)


@pytest.mark.parametrize("kind", ["Gemma3", "GptOss", "Qwen3Next", "Qwen3_5", "Qwen3_5Moe"])
@pytest.mark.parametrize("padding", [slice(30, 33), slice(66, 68)], ids=["before-the-window", "in-the-window"])
def test_gaps_wherever_they_are(kind: str, padding: slice) -> None:
    """A first layer with a window has a mask that says nothing of what came before it, a linear one has none."""
    model, ids = whole_model(kind), batch(70)
    mask = torch.ones_like(ids)
    mask[0, padding] = 0
    with offload(model, design("clo", budget_pages=2), max_new_tokens=40) as cache:
        with pytest.raises(SpecError, match="it hides tokens behind others"):
            generated(model, ids, cache, 20, attention_mask=mask)
        told = generated(model, ids, cache, 4).sequences
        asked = torch.cat([told, batch(5, 9)], dim=1)
        hidden = torch.ones_like(asked)
        hidden[1, padding] = 0
        with pytest.raises(SpecError, match="it hides tokens behind others"):
            generated(model, asked, cache, 4, attention_mask=hidden)
        assert generated(model, asked, cache, 4, attention_mask=torch.ones_like(asked)).sequences.shape == (2, 83)
    wanted = generated(model, ids, None, 20, attention_mask=mask)
    with offload(model, design("clo", budget_pages=2)):
        assert_same(generated(model, ids, None, 20, attention_mask=mask), wanted)


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("Gemma3", r"layer 0 has a sliding window: what it keeps is in layers\[0\]"),
        ("Qwen3Next", r"layer 0 has linear attention: its states are in layers\[0\]"),
    ],
)
def test_what_the_cache_cannot_take_back(kind: str, first: str) -> None:
    model, ids = whole_model(kind), batch(70)
    with offload(model, design("clo", budget_pages=2), max_new_tokens=40) as cache:
        told = generated(model, ids, cache, 4).sequences
        with pytest.raises(SpecError, match="cannot be copied"):
            copy.deepcopy(cache)
        for layer in cache.layers:
            with pytest.raises(SpecError, match="cannot be taken back"):
                layer.crop(-1)
            with pytest.raises(SpecError, match="beam search"):
                layer.reorder_cache(torch.zeros(2, dtype=torch.long))
            with pytest.raises(EngineError, match="it has decoded already"):
                layer.reset()
        with pytest.raises(EngineError, match=first):
            cache.layer(0)
        assert isinstance(cache.layer(cache.plan.model.whole_layers[-1]), OffloadedLayer)  # type: ignore[union-attr]
        with pytest.raises(SpecError, match="the cache holds one of 2"):
            generated(model, told[:1], cache, 4)
        with pytest.raises(SpecError, match="the whole conversation"):
            generated(model, ids, cache, 4)
    with pytest.raises(EngineError, match="cache: closed"):
        generated(model, told, cache, 4)
    assert model.config._attn_implementation != mount.ATTENTION_NAME


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_an_interrupt_between_layers(make: Any, at: int) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = make()
    with offload(model, design("clo", budget_pages=2), max_new_tokens=40) as cache:
        told = generated(model, batch(70), cache, 4).sequences
        hook = model.model.layers[at].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generated(model, told, cache, 4)
        hook.remove()
        with pytest.raises(EngineError, match="broken off half-way"):
            generated(model, told, cache, 4)


LAYERS = {"windowed": windowed.LAYERS, "hybrid": hybrid.LAYERS}
OFFLOADED = {family: [layer for layer, kind in enumerate(kinds) if kind == FULL] for family, kinds in LAYERS.items()}
"""The layers that follow the design; the others are the library's own."""
DESIGNS = presets.names("designs")


@pytest.mark.parametrize("family", LAYERS)
class TestOneSchedule:
    @pytest.mark.parametrize("depth", [0, 1, 2])
    @pytest.mark.parametrize("name", [name for name in DESIGNS if presets.load_design(name).selects])
    def test_predictions_are_those_of_the_schedule(self, name: str, depth: int, family: str) -> None:
        model = WHOLE[family]()
        with offload(model, everything(name, prefetch_depth=depth), max_new_tokens=9) as cache:
            generated(model, batch(40), cache, 2)
            plan = cache.plan
        made = {inline.predicts(plan, layer) for layer in range(len(LAYERS[family]))} - {None}
        ahead = Stage.PREFETCH.op_name("select_pages")
        recorded = {node.op.layer for node in record_step(plan).nodes if node.op.name == ahead}
        assert made == (set() if plan.design.speculates_last_step else recorded)
        assert recorded <= set(plan.sparse_layers) <= set(OFFLOADED[family])

    @pytest.mark.parametrize("name", DESIGNS)
    def test_the_plan_is_the_simulators(self, name: str, family: str) -> None:
        model, chosen = WHOLE[family](), everything(name)
        with offload(model, chosen, max_new_tokens=20) as cache:
            generated(model, batch(70), cache, 2)
            plan = cache.plan
            spec = Network(model, whole=True).spec
            here, load = local_machine(torch.device("cpu")), Workload(context_tokens=70, batch=2)
            assert plan == make_plan(spec, here, chosen, load)
        simulated = clo_sim.make_scene(spec, "h200", context_tokens=70, batch=2).plan(chosen)
        fields = "sparse_layers", "budget_pages", "slot_pages", "host_bytes", "attended_tokens", "offloaded_heads"
        assert [getattr(plan, field) for field in fields] == [getattr(simulated, field) for field in fields]
        assert plan.memory.kv == simulated.memory.kv
        assert set(plan.sparse_layers) <= set(OFFLOADED[family])

    @pytest.mark.parametrize("name", DESIGNS)
    def test_traffic_is_of_the_layers_that_are_offloaded(self, name: str, family: str) -> None:
        model = WHOLE[family]()
        with offload(model, everything(name), max_new_tokens=20) as cache:
            generated(model, batch(70), cache, 4)
            plan, traffic = cache.plan, cache.traffic
        assert traffic.offloaded_heads == plan.offloaded_heads * len(plan.sparse_layers)
        assert traffic.requested_pages <= len(plan.sparse_layers) * 2 * KV_HEADS * -(-73 // PAGE)
        if name == "streamed":
            assert traffic.fetched_pages == len(OFFLOADED[family]) * 2 * KV_HEADS * -(-72 // PAGE)

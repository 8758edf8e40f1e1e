"""What a batch needs is said before it is taken, and when it cannot be had."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deferred import DeferredMachine
from fake_device import FakeDevice
from small import DIM, KV_HEADS, SELECTORS, design, prompt, small_model

from clo import presets
from clo.engine import memory
from clo.engine.decoder import Decoder
from clo.engine.inline_decoder import InlineDecoder
from clo.engine.layers import DenseLayer, OffloadedLayer, StreamedLayer
from clo.engine.models.network import Network
from clo.errors import EngineError, SpecError, ran_out
from clo.specs import Selector

NAMES = presets.names("designs")


def held(decoder: Decoder) -> tuple[int, int]:
    """Bytes of the large tensors, device and host."""
    device = host = 0
    for layer in decoder.layers:
        if isinstance(layer, DenseLayer):
            device += layer.kv.nbytes
            host += layer.host.nbytes if isinstance(layer, StreamedLayer) else 0
        if isinstance(layer, OffloadedLayer):
            kv = (layer.kv.sinks, layer.kv.window, layer.kv.slots, layer.kv.pinned, layer.selection.index)
            device += sum(tensor.nbytes for tensor in kv)
            device += layer.selection.keys.nbytes if layer.design.selector is Selector.EXACT else 0
            host += layer.host_pages.nbytes if layer.design.offloads else 0
    return device, host


def assert_it_is_known(**changes: Any) -> None:
    name = changes.pop("name", "clo")
    with Decoder(small_model(), design(name, **changes), max_new_tokens=9) as decoder:
        decoder.prefill([prompt(50), prompt(78)])
        assert decoder.plan is not None
        needed = memory.cache_bytes(decoder.plan, 87)
        assert (needed.device, needed.host) == held(decoder)
        assert needed.prefill == (0 if name == "resident" else 2 * 78 * 2 * KV_HEADS * DIM * 4)


class TestNeed:
    @pytest.mark.parametrize("name", NAMES)
    def test_is_what_the_layers_take(self, name: str) -> None:
        assert_it_is_known(name=name)

    @pytest.mark.parametrize("selector", SELECTORS)
    def test_with_every_selector_and_pinned_heads(self, selector: Selector) -> None:
        assert_it_is_known(selector=selector, pinned_head_fraction=0.5)


class TestTooLittle:
    @pytest.mark.parametrize(
        ("name", "fields"),
        [("clo", r", design\.slot_budgets or slot_pages"), ("streamed", "")],
    )
    def test_host_memory(self, monkeypatch: pytest.MonkeyPatch, name: str, fields: str) -> None:
        with Decoder(small_model(), design(name), max_new_tokens=20) as decoder:
            decoder.prefill([prompt(40)])
            monkeypatch.setattr(memory, "available_host_bytes", lambda: 1e4)
            need = r"2 prompts of up to 200 tokens with max_new_tokens = 20 needs [\d.]+ [kM]i?B of host memory"
            with pytest.raises(
                SpecError, match=rf"{need} .*fewer or .*, or lower max_new_tokens{fields}\), .* available"
            ):
                decoder.prefill([prompt(40), prompt(200)])
            monkeypatch.undo()
            assert torch.isfinite(decoder.prefill([prompt(40)])).all()
            assert torch.isfinite(decoder.step(torch.tensor([1]))).all()

    def test_for_those_who_drive_the_model_themselves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from clo.engine.prompts import read_prompt

        network = Network(small_model())
        monkeypatch.setattr(memory, "available_host_bytes", lambda: 1e4)
        with pytest.raises(SpecError, match="of host memory"):
            InlineDecoder(network, design("clo"), max_new_tokens=20).prefill([read_prompt(network, prompt(200))])

    def test_a_gpu_is_asked_for_both_memories(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with Decoder(small_model(), design("clo"), max_new_tokens=20) as decoder:
            plan, gpu = decoder.make_plan([200]), torch.device("cuda")
        needed = memory.cache_bytes(plan, 220)
        for device, host, message in [
            (needed.device, 1e12, "of device memory"),
            (1e12, needed.pinned - 1, "of pinned host memory"),
        ]:
            monkeypatch.setattr(memory, "available_device_bytes", lambda _, free=device: free)
            monkeypatch.setattr(memory, "available_host_bytes", lambda free=host: free)
            with pytest.raises(SpecError, match=message):
                memory.check_memory(plan, gpu, 220)
        monkeypatch.setattr(memory, "available_device_bytes", lambda _: needed.device + needed.prefill)
        monkeypatch.setattr(memory, "available_host_bytes", lambda: needed.pinned)
        memory.check_memory(plan, gpu, 220)

    @pytest.mark.parametrize(
        ("host", "layers", "pinned"),
        [(0.0, 3, 0), (3.0, 3, 3), (24.0, 3, 24), (27.0, 3, 48), (3 * 2.0**29, 3, 3 << 29)],
    )
    def test_pinned_memory_comes_in_powers_of_two(self, host: float, layers: int, pinned: int) -> None:
        needed = memory.CacheBytes(device=0.0, host=host, prefill=0.0, host_layers=layers)
        assert needed.pinned == pinned

    def test_memory_that_is_gone_when_it_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A real failure of the allocator: more than any machine can address."""
        with Decoder(small_model(), design("clo"), max_new_tokens=20) as decoder:
            monkeypatch.setattr("clo.engine.decoder.make_layers", lambda *_: torch.empty(1 << 58))
            with pytest.raises(EngineError, match=r"needs [\d.]+ [kM]i?B of memory \(.*max_new.*allocate memory"):
                decoder.prefill([prompt(40)])
            monkeypatch.undo()
            assert torch.isfinite(decoder.prefill([prompt(40)])).all()

    @pytest.mark.parametrize(
        ("error", "is_it"),
        [
            (MemoryError(), True),
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
            (RuntimeError("CUDA error: out of memory"), True),
            (RuntimeError("shapes do not fit"), False),
            (EngineError("a lane died"), False),
            (ValueError("out of memory"), False),
        ],
    )
    def test_other_failures_stay_what_they_are(self, error: Exception, is_it: bool) -> None:
        assert ran_out(error) is is_it

    def test_a_system_that_does_not_tell(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        if memory.MEMINFO.exists():
            assert memory.available_host_bytes() > 0
        (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n", encoding="ascii")
        monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
        assert memory.available_host_bytes() == 50 * 1024
        monkeypatch.setattr(memory, "MEMINFO", tmp_path / "absent")
        assert memory.available_host_bytes() > 1e6

    def test_what_is_stated_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(memory.STATED, "12e9")
        assert memory.host_memory_bytes() == 12e9
        assert 0 < memory.available_host_bytes() <= 12e9
        monkeypatch.setenv(memory.STATED, "1000")  # less than this process has
        assert memory.available_host_bytes() == 0

    def test_a_cpu_that_does_not_hold_the_weights_is_told_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(memory.STATED, "1000")
        with (
            Decoder(small_model(), design("clo"), max_new_tokens=2) as decoder,
            pytest.raises(SpecError, match="this machine has 1 kB of memory") as said,
        ):
            decoder.prefill([prompt(40)])
        assert memory.STATED in str(said.value)
        assert "GPU" not in str(said.value)

    @pytest.mark.parametrize("stated", ["many", "-1", "inf"])
    def test_what_is_no_size_is_refused(self, monkeypatch: pytest.MonkeyPatch, stated: str) -> None:
        monkeypatch.setenv(memory.STATED, stated)
        with pytest.raises(SpecError, match=f"CLO_HOST_MEMORY_BYTES = {stated}: must be a number of bytes"):
            memory.available_host_bytes()


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What only a garbage collection frees stays: pinned pages do not make Python collect."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
class TestRelease:
    @pytest.mark.parametrize("on_cuda", [False, True], ids=["cpu", "cuda"])
    @pytest.mark.parametrize("name", ["clo", "clo-v2", "streamed", "lru-cpu"])
    def test_who_drops_a_closed_decoder_has_the_memory_back(
        self, name: str, on_cuda: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        device = FakeDevice()
        if on_cuda:
            made = lambda _, operations: DeferredMachine(operations, device, patience_s=10.0)  # noqa: E731
            monkeypatch.setattr(Decoder, "_new_machine", made)
        with Decoder(small_model(), design(name), max_new_tokens=9) as decoder:
            held = []
            for _ in range(2):
                logits = decoder.prefill([prompt(50)])
                held += [weakref.ref(layer) for layer in decoder.layers]
                for _ in range(3):
                    logits = decoder.step(logits.argmax(-1))
        device.close()
        assert decoder.timeline is not None
        assert [layer() for layer in held[: len(held) // 2]] == [None] * (len(held) // 2)
        del decoder
        assert [layer() for layer in held] == [None] * len(held)

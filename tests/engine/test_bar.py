"""CPU stores through a BAR, against a stand-in of GDRCopy's library that checks how it is called."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest
import torch
from small import design, prompt, small_model

from clo.engine.cuda import bar as module
from clo.engine.cuda.bar import Bar, is_installed, open_bar
from clo.engine.decoder import Decoder
from clo.errors import EngineError

CPU = torch.device("cpu")


@pytest.fixture
def gdr(cuda_stand_in: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(cuda_stand_in))
    library.stand_in_refuse(0, 0)
    library.stand_in_written.restype = ctypes.c_ulong
    assert library.stand_in_left_open() == 0
    return library


def test_rows_arrive_where_they_belong(gdr: ctypes.CDLL) -> None:
    host = torch.randint(-100, 100, (50, 3, 7), dtype=torch.int16)
    slots = torch.full((20, 3, 7), -999, dtype=torch.int16)
    sources, targets = torch.tensor([49, 0, 7, 7]), torch.tensor([0, 19, 3, 4])
    expected = slots.clone()
    expected[targets] = host[sources]
    bar = Bar(gdr, gdr, CPU)
    bar.prepare(slots)
    bar.prepare(slots)
    before = gdr.stand_in_written()
    bar.write(slots, targets, host, sources)
    bar.flush()
    assert torch.equal(slots, expected)
    assert gdr.stand_in_written() - before == 4 * 3 * 7 * 2
    bar.close()
    bar.close()
    assert gdr.stand_in_left_open() == 0


def test_one_that_is_dropped_leaves_nothing_mapped(gdr: ctypes.CDLL) -> None:
    bar = Bar(gdr, gdr, CPU)
    bar.prepare(torch.zeros(4, 100))
    assert gdr.stand_in_left_open() == 3
    gc.disable()
    try:
        del bar
        assert gdr.stand_in_left_open() == 0
    finally:
        gc.enable()


def test_what_fails_is_named_and_left_clean(gdr: ctypes.CDLL) -> None:
    bar = Bar(gdr, gdr, CPU)
    gdr.stand_in_refuse(0, 1)
    with pytest.raises(EngineError, match="gdr_map failed with code"):
        bar.prepare(torch.zeros(4, 100))
    assert gdr.stand_in_left_open() == 1
    bar.close()
    gdr.stand_in_refuse(1, 0)
    with pytest.raises(EngineError, match="gdrdrv"):
        Bar(gdr, gdr, CPU)


def test_it_is_found_where_it_is_installed(
    gdr: ctypes.CDLL, cuda_stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIBRARIES", ("libabsent.so", str(cuda_stand_in)))
    monkeypatch.setattr(module, "DRIVER", str(cuda_stand_in))
    assert is_installed(CPU)
    gdr.stand_in_refuse(1, 0)
    assert open_bar(CPU) is None
    monkeypatch.setattr(module, "LIBRARIES", ("libabsent.so",))
    assert not is_installed(CPU)


@pytest.mark.parametrize("name", ["clo-v1", "clo-v2", "lru-cpu"])
def test_designs_decode_through_it_as_without(name: str, gdr: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = design(name, budget_pages=3).with_fields(transfer="cpu_zero_copy", transfer_threads=2)
    model, texts = small_model(), [prompt(90, 1), prompt(60, 2)]

    def decoded() -> list[list[int]]:
        with Decoder(model, chosen, max_new_tokens=20) as decoder:
            return [tokens.tolist() for tokens in decoder.generate(texts)]

    expected, before = decoded(), gdr.stand_in_written()
    monkeypatch.setattr(Decoder, "_new_bar", lambda _self: Bar(gdr, gdr, CPU))
    assert decoded() == expected
    assert gdr.stand_in_written() > before
    assert gdr.stand_in_flushes() > 0
    assert gdr.stand_in_left_open() == 0

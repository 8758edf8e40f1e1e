"""What of the bench only a GPU can time, with the CPU in its place: it runs, and counts what it says it counts.

What stands in for `torch.cuda` takes the arguments that torch takes and no others. Times mean nothing.
"""

import inspect
import json
import threading
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from clo_kernels import hit_test, ring_doorbell, wait_ready
from clo_kernels_bench import figures, host_costs, peaks, problems, run, timing
from tests.kernels.helpers import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the bench itself runs there")
CPU = torch.device("cpu")


def taking_what_torch_takes(name, stand_in):
    """`stand_in`, whose arguments are bound to those of `torch.cuda`'s own first."""
    real = inspect.signature(getattr(torch.cuda, name))

    def call(*args, **kwargs):
        return stand_in(*real.bind(*args, **kwargs).args)

    return call


@pytest.fixture
def done(monkeypatch):
    """What was asked of the device, in order; it is over at once."""
    log = []

    class Event:
        def __init__(self, *_):
            self.time = 0.0

        def record(self, stream=None):
            log.append("record")
            self.time = time.perf_counter()

        def elapsed_time(self, other):
            return max(1e-6, (other.time - self.time) * 1e3)

    stream = SimpleNamespace(wait_event=lambda event: None, wait_stream=lambda stream: None, synchronize=lambda: None)

    @contextmanager
    def capture(graph):
        log.append("capture")
        yield

    stand_ins = {
        "Event": Event,
        "Stream": lambda: stream,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        "graph": capture,
        "stream": lambda _: nullcontext(),
        "set_stream": lambda _: log.append("stream"),
        "current_stream": lambda *_: stream,
        "synchronize": lambda *_: None,
        "_sleep": lambda cycles: log.append(cycles),
        "get_device_properties": lambda *_: SimpleNamespace(
            name="a device",
            major=9,
            minor=0,
            multi_processor_count=132,
            total_memory=2**37,
            L2_cache_size=100,
            memory_clock_rate=2_000_000,
            memory_bus_width=1024,
        ),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, taking_what_torch_takes(name, stand_in))
    for name in ("empty", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, pin_memory=False, make=make, **rest: make(*size, **rest))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(timing, "WARM_S", 0.0)
    for module in (hit_test, ring_doorbell, wait_ready):
        # the interpreter would take minutes
        monkeypatch.setattr(module, "runs_kernel", lambda tensor: False)
    return log


def test_a_graph_is_timed_behind_a_sleep_that_hides_its_launch(done):
    calls = [lambda: done.append("call")] * 300
    samples = timing.graph_samples(calls, repeats=4)
    assert len(samples) == 4
    # once to compile, once to be recorded, three replays to warm up
    assert done[:605] == ["call"] * 300 + ["capture"] + ["call"] * 300 + ["stream"] + ["replay"] * 3
    assert done[605:] == [3 * timing.SLEEP_CYCLES, "record", "replay", "record"] * 4


def test_a_device_is_busy_for_a_while_before_it_is_timed(done, monkeypatch):
    monkeypatch.setattr(timing, "WARM_S", 0.2)
    began, called = time.perf_counter(), []
    timing.event_samples(lambda: called.append(time.perf_counter()) or time.sleep(0.01), repeats=2)
    *warm, first, second = called
    assert first - began >= 0.2
    assert len(warm) >= 3
    assert second > first


def test_copies_read_four_times_what_the_cache_holds(done):
    device = torch.device("cuda", 0)
    assert [timing.copies_beyond_cache(size, device) for size in (1e9, 400.0, 100.0, 99.0, 1.0)] == [1, 1, 4, 5, 32]


def test_limits_are_what_was_measured(done, monkeypatch):
    monkeypatch.setattr(peaks, "COPY_BYTES", 2**16)
    monkeypatch.setattr(peaks, "MEMORY_BYTES", 2**18)
    limits, found = peaks.measure_peaks(CPU, quick=False)
    by_name = {figure.operation: figure for figure in found}
    assert limits.h2d == pytest.approx(2**16 / by_name["pinned_copy_h2d"].median_us * 1e6)
    assert limits.hbm == max(by_name[name].bytes_per_s for name in ("device_copy", "device_read"))
    # a copy reads and writes; 2 GHz, two words of 1,024 bits each
    assert by_name["device_copy"].num_bytes == 2 * by_name["device_read"].num_bytes == 2**19
    assert by_name["device_read"].limit_us == pytest.approx(2**18 / (2 * 2e9 * 128) * 1e6)
    assert by_name["pinned_copy_d2h"].limit_us is None


def test_costs_of_the_host(done, monkeypatch):
    monkeypatch.setattr(host_costs, "Sizes", lambda device: problems.Sizes(device=device, kv_heads=2, head_dim=16))
    found = list(host_costs.host_figures(CPU, quick=True))
    assert [figure.operation for figure in found] == [
        *("launch", "launch", "graph node", "graph replay", "event record", "stream waits for event"),
        *("stream synchronize", "launch and synchronize", "read back", "read back"),
    ]
    assert all(len(figure.samples_us) == 10 for figure in found)


def test_flags_are_answered_by_a_thread_that_ends(done):
    before = threading.active_count()
    *trips, poll = host_costs.flag_figures(CPU, quick=False)
    assert [(figure.case["message_words"], len(figure.samples_us)) for figure in trips] == [(0, 99), (8192, 99)]
    assert poll.median_us > 0
    assert threading.active_count() == before


def test_a_device_is_described(done, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = run.environment()
    assert (found["device"], found["compute_capability"], found["l2_bytes"]) == ("cuda", "9.0", 100)
    assert found["memory_bytes_per_s_by_clock"] == pytest.approx(512e9)


def test_every_section_of_a_device_is_asked_as_it_is_defined(done, monkeypatch):
    """With the arguments that it takes; limits and pinned memory are made once."""
    names = ("gather", "resolve", "attention", "interference", "flag", "host", "selection", "shared_vector")
    names += ("small_operation",)
    for name in (f"{name}_figures" for name in names):
        figure = figures.Figure(operation=name, case={}, samples_us=(1.0,))
        monkeypatch.setattr(run, name, create_autospec(getattr(run, name), return_value=iter([figure])))
    limits = peaks.Peaks(h2d=1.0, hbm=1.0)
    monkeypatch.setattr(run, "measure_peaks", create_autospec(run.measure_peaks, return_value=(limits, [])))
    storage = create_autospec(run.pinned_storage, return_value=torch.empty(1))
    monkeypatch.setattr(run, "pinned_storage", storage)
    monkeypatch.setattr(run, "compiled_kernels", create_autospec(run.compiled_kernels, return_value=[]))
    bulk = figures.Figure(operation="bulk_figures", case={}, samples_us=(1.0,), num_bytes=1.0)
    told = create_autospec(run._of_its_own, return_value=json.dumps([bulk.as_json()]))
    monkeypatch.setattr(run, "_of_its_own", told)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "verdicts", lambda device: [])
    report = figures.Report({}, True, "")
    run.run(report, lambda text: None, quick=True, seconds=60, save=lambda: None)
    assert (report.failed, report.left_out) == ([], [])
    assert {figure.operation for figure in report.figures} == {f"{name}_figures" for name in (*names, "bulk")}
    assert told.call_args.args == (run.BULK_READER,)
    assert storage.call_count == 1
    assert run.gather_figures.call_args.args == (storage.return_value, torch.device("cuda", 0), limits)
    assert run.compiled_kernels.call_args.args == (90,)

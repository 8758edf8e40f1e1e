"""The CUDA machine against a device that does everything in the worst order its streams and events allow."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from deferred import DeferredMachine
from fake_device import FakeDevice, FakeWork
from small import LAYERS, design, prompt, small_model

from clo import presets
from clo.engine.cuda.machine import CudaMachine
from clo.engine.decoder import Decoder
from clo.errors import EngineError
from clo.plan import DecodePlan
from clo.schedule import Lane, Part, StepGraph, decode_step, record_step
from clo.schedule.work import HostAction, Submit
from clo.specs import Design

SYNCS = ["host", "events", "flags", "graph"]
TRANSFERS = ["page_copies", "staged", "cpu_zero_copy", "gpu_zero_copy"]


def variant(preset: str, called: str, **changes: object) -> Design:
    return design(preset, **changes).with_fields(name=called)


DESIGNS = [
    *[design(name) for name in presets.names("designs")],
    *[
        variant("clo", f"{transfer} {sync} {on}", transfer=transfer, sync=sync, resolve_on=on)
        for transfer in TRANSFERS
        for sync in SYNCS
        for on in ("gpu", "cpu")
    ],
    *[
        variant("recall", f"recall {transfer} {sync}", transfer=transfer, sync=sync)
        for transfer in TRANSFERS
        for sync in SYNCS
    ],
    *[
        variant("clo-v2", f"clo-v2 {transfer} {depth} ahead", transfer=transfer, prefetch_depth=depth)
        for transfer in TRANSFERS
        for depth in (1, 2)
    ],
    variant("streamed", "streamed, graph", sync="graph"),
    variant("clo", "pinned", pinned_head_fraction=0.5),
]


def named(chosen: list[Design]) -> list[object]:
    return [pytest.param(one, id=one.name) for one in chosen]


@pytest.fixture(scope="module")
def model() -> object:
    return small_model()


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    made = FakeDevice()
    yield made
    made.close()


def plan_of(model: object, chosen: Design) -> DecodePlan:
    with Decoder(model, chosen, max_new_tokens=4) as decoder:
        return decoder.make_plan([80])


def ancestors(graph: StepGraph) -> list[set[int]]:
    """For each node everything that the schedule lets end before it starts."""
    found: list[set[int]] = []
    last: dict[Lane, int] = {}
    for number, node in enumerate(graph.nodes):
        before = [wait.node for wait in node.after] + ([last[node.lane]] if node.lane in last else [])
        found.append(set(before).union(*(found[other] for other in before)))
        last[node.lane] = number
    return found


def check_order(plan: DecodePlan, ran: list[tuple[str, str, int]]) -> None:
    graph = record_step(plan)
    works = {
        number: node
        for number, node in enumerate(graph.nodes)
        if node.lane is not Lane.LAUNCH and not isinstance(node.op.work, HostAction | Submit)
    }
    place = {name: at for at, name in enumerate(ran)}
    assert len(place) == len(ran) == len(works)
    where = {
        number: place[node.lane.value if node.lane is not Lane.POOL else "threads", node.op.name, node.op.layer]
        for number, node in works.items()
    }
    for number, before in enumerate(ancestors(graph)):
        for other in before & works.keys() if number in works else ():
            assert where[other] < where[number], f"{graph.nodes[other].op} must end before {graph.nodes[number].op}"


def machine_of(device: FakeDevice, patience_s: float = 5.0, **options: bool) -> tuple[CudaMachine, FakeWork]:
    work = FakeWork(device)
    return CudaMachine(work, device, patience_s=patience_s, **options), work


def step(machine: CudaMachine, plan: DecodePlan) -> list[tuple[str, str, int]]:
    """What one step ran, in order."""
    device = machine._device
    assert isinstance(device, FakeDevice)
    assert isinstance(machine._work, FakeWork)
    device.ran.clear()
    machine._work.begin()
    machine.execute(decode_step(plan, machine))
    return list(device.ran)


class TestOrder:
    @pytest.mark.parametrize("chosen", named(DESIGNS))
    def test_nothing_runs_before_what_the_schedule_puts_before_it(self, model: object, chosen: Design) -> None:
        """Any wait that was forgotten lets some seed run an operation too early."""
        plan = plan_of(model, chosen)
        for seed in range(3):
            device = FakeDevice(seed)
            with machine_of(device)[0] as machine:
                for _ in range(4):
                    check_order(plan, step(machine, plan))
            device.close()

    @pytest.mark.parametrize("chosen", named([one for one in DESIGNS if one.sync == "graph"]))
    def test_a_poll_that_keeps_its_queue_keeps_no_bell_from_ringing(self, model: object, chosen: Design) -> None:
        plan = plan_of(model, chosen)
        for seed in range(3):
            device = FakeDevice(seed, one_queue=True)
            machine, _ = machine_of(device)
            with machine:
                for _ in range(4):
                    check_order(plan, step(machine, plan))
            device.close()

    @pytest.mark.parametrize("chosen", named(DESIGNS))
    def test_its_timeline_has_the_operations_that_the_simulator_prices(
        self, model: object, device: FakeDevice, chosen: Design
    ) -> None:
        plan = plan_of(model, chosen)
        with machine_of(device)[0] as machine:
            for _ in range(3):
                step(machine, plan)
            found = machine.timeline
            assert found is not None
            for lane in Lane:
                recorded = [(node.op.name, node.op.layer) for node in record_step(plan).nodes if node.lane is lane]
                spans = [span for span in found.spans if span.lane == lane.value]
                assert [(span.name, span.layer) for span in spans] == recorded
                assert all(one.end_s <= other.start_s + 1e-9 for one, other in pairwise(spans))
                for one, other in pairwise(spans if lane is not Lane.LAUNCH else []):
                    assert other.waited_s <= other.start_s - one.end_s + 1e-9

    def test_the_caller_s_work_comes_first(self, model: object, device: FakeDevice) -> None:
        plan, order = plan_of(model, design("clo")), list[str]()
        machine, _ = machine_of(device, timed=False)
        with machine:
            for _ in range(3):
                with device.on(device.callers_stream()):
                    device.submit(lambda: order.append("caller"))
                machine.execute(decode_step(plan, machine), prepare=lambda: device.submit(lambda: order.append("step")))
        assert order == ["caller", "step"] * 3


GRAPHS = [chosen for chosen in DESIGNS if chosen.sync == "graph"]


class TestGraphs:
    @pytest.mark.parametrize("chosen", named(GRAPHS))
    def test_a_graph_is_recorded_once_and_the_host_waits_at_its_end_only(
        self, model: object, device: FakeDevice, chosen: Design
    ) -> None:
        plan = plan_of(model, chosen)
        machine, work = machine_of(device, timed=False)
        with machine:
            step(machine, plan)
            assert (device.captures, device.replays) == (0, 0)
            for count in range(1, 4):
                device.polled.clear()
                step(machine, plan)
                assert (device.captures, device.replays) == (1, count)
                assert len(device.polled) == 1
            work.version = 1
            check_order(plan, step(machine, plan))
            assert device.captures == 2

    def test_times_come_from_events_in_the_graph_or_not_at_all(self, model: object) -> None:
        plan = plan_of(model, design("clo"))
        for times_graphs in (True, False):
            device = FakeDevice(times_graphs=times_graphs)
            with machine_of(device)[0] as machine:
                for _ in range(3):
                    step(machine, plan)
                found = machine.timeline
            device.close()
            assert found is not None
            names = {span.name for span in found.spans if span.lane == Lane.MAIN.value}
            assert ("attention" in names) is times_graphs
            assert (names == {"whole step"}) is not times_graphs
            assert found.title.endswith("operations not timed") is not times_graphs
            # in a graph nothing waits for a launch but what comes first
            main = [span for span in found.spans if span.lane == Lane.MAIN.value]
            assert not any("launch" in dict(span.waits) or "sync" in dict(span.waits) for span in main[1:])

    def test_the_first_step_lets_nothing_overlap(self, model: object, device: FakeDevice) -> None:
        plan = plan_of(model, design("clo", transfer="page_copies"))
        with machine_of(device)[0] as machine:
            step(machine, plan)
            found = machine.timeline
        assert found is not None
        busy = sorted((s.start_s, s.end_s) for s in found.spans if s.part != Part.RUNTIME.value)
        assert all(one[1] <= other[0] + 1e-9 for one, other in pairwise(busy))


class TestDecoding:
    @pytest.mark.parametrize("chosen", named(DESIGNS))
    def test_answers_and_traffic_are_the_cpu_machine_s(
        self, monkeypatch: pytest.MonkeyPatch, device: FakeDevice, chosen: Design
    ) -> None:
        """Real tensors: whatever is read before it is written, or written too early, changes a number."""
        if chosen.selects:
            chosen = chosen.with_fields(budget_pages=3, slot_budgets=None, slot_pages=None)

        def decoded() -> list[torch.Tensor]:
            with Decoder(small_model(), chosen, max_new_tokens=12) as decoder:
                rows = [decoder.prefill([prompt(80), prompt(70, 1)])]
                for token in range(12):
                    rows.append(decoder.step(torch.tensor([token, 2 * token])).clone())
                    rows.append(torch.tensor([decoder.traffic.h2d_bytes, decoder.traffic.written_back_pages]))
                assert decoder.timeline is not None
            return rows

        expected = decoded()
        monkeypatch.setattr(
            Decoder,
            "_new_machine",
            lambda self, operations: DeferredMachine(operations, device, patience_s=10.0),
        )
        assert all(torch.equal(*pair) for pair in zip(decoded(), expected, strict=True))
        assert device.replays == (11 if chosen.sync == "graph" else 0)


def fail() -> None:
    raise SystemExit("killed")


class TestFaults:
    @pytest.mark.parametrize("sync", SYNCS)
    @pytest.mark.parametrize("name", ["host_gather", "attention", "copy_staged", "select_pages"])
    @pytest.mark.parametrize("healthy_steps", [0, 1, 2])
    def test_a_failed_operation_is_named_and_the_next_step_works(
        self, model: object, device: FakeDevice, name: str, sync: str, healthy_steps: int
    ) -> None:
        before = threading.active_count()
        plan = plan_of(model, design("staged", sync=sync))
        machine, work = machine_of(device)
        with machine:
            for _ in range(healthy_steps):
                step(machine, plan)
            replays = machine.replays and name in ("attention", "select_pages")
            names = [node.op.name for node in record_step(plan).nodes if node.op.layer == 2]
            name = name if name in names else f"prefetch.{name}"
            work.faults[name, 2] = fail
            if replays:  # what a graph holds is not submitted again
                step(machine, plan)
            else:
                with pytest.raises(EngineError, match=rf"operation {name} of layer 2: killed"):
                    step(machine, plan)
            work.faults.clear()
            for _ in range(3):
                check_order(plan, step(machine, plan))
        assert threading.active_count() == before

    @pytest.mark.parametrize("sync", ["flags", "graph"])
    def test_a_flag_that_never_comes_is_named_with_both_numbers(
        self, model: object, device: FakeDevice, sync: str
    ) -> None:
        plan = plan_of(model, design("clo", transfer="page_copies", sync=sync))
        with machine_of(device, 0.3)[0] as machine:
            step(machine, plan)
            step(machine, plan)
            device.deaf = {1}
            began = time.perf_counter()
            numbers = r"flag of request 1: waited for number 3, it stands at 2"
            with pytest.raises(EngineError, match=rf"operation ready_flag of layer \d: {numbers}"):
                step(machine, plan)
            assert time.perf_counter() - began < 5
            device.deaf = set()
            check_order(plan, step(machine, plan))

    def test_an_operation_that_hangs_is_not_waited_for_without_end(self, model: object, device: FakeDevice) -> None:
        plan = plan_of(model, design("staged"))
        machine, work = machine_of(device, 0.3)
        release = threading.Event()
        with machine:
            step(machine, plan)
            work.faults["prefetch.host_gather", 2] = lambda: release.wait(3) and None
            with pytest.raises(EngineError, match=r"operation prefetch.host_gather of layer 2: not done in 0\.3 s"):
                step(machine, plan)
            release.set()
            work.faults.clear()
            time.sleep(0.2)  # what hung is done now
            check_order(plan, step(machine, plan))

    def test_a_closed_machine_says_so_and_leaves_no_thread(self, model: object, device: FakeDevice) -> None:
        before, plan = threading.active_count(), plan_of(model, design("clo"))
        machine, _ = machine_of(device)
        assert threading.active_count() == before + 1
        machine.close()
        machine.close()
        assert threading.active_count() == before
        with pytest.raises(EngineError, match="the machine is closed"):
            machine.execute(decode_step(plan, machine))


def test_small_models_have_the_layers_that_the_faults_name() -> None:
    assert LAYERS > 2

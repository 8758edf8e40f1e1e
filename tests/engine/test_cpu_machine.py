"""Lanes that are threads: order, overlap, and every way in which a step can go wrong."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable

import pytest
import torch
from small import design, prompt, small_model

from clo.engine.cpu_machine import CpuMachine, Flag
from clo.engine.decoder import Decoder
from clo.errors import EngineError
from clo.schedule import Cause, HostWait, Lane, Op, Part, Step, decode_step, record_step
from clo.schedule.work import HostAction

SYNCS = ["host", "events", "flags", "graph"]


def op(name: str, layer: int = 0) -> Op:
    return Op(name, layer, Part.MODEL, HostAction("kernel_launch"))


class TestOrder:
    def test_a_lane_waits_for_a_token_of_another(self) -> None:
        done: list[str] = []

        def run(what: Op) -> float:
            if what.name == "slow":
                time.sleep(0.05)
            done.append(what.name)
            return 0.0

        with CpuMachine(run) as machine:

            def step() -> Step:
                slow = machine.launch(Lane.PREFETCH, op("slow"))
                machine.wait(Lane.MAIN, slow, Cause.PREFETCH)
                end = machine.launch(Lane.MAIN, op("after"))
                yield HostWait(end, op("read_back"), Cause.SYNC)

            timeline = machine.execute(step())
        assert done == ["slow", "after"]
        after = next(span for span in timeline.spans if span.name == "after")
        assert dict(after.waits)["late prefetch"] > 0.03

    def test_lanes_overlap(self) -> None:
        together = threading.Barrier(2, timeout=5)

        def run(_: Op) -> float:
            together.wait()  # passes only while both lanes are in it
            return 0.0

        with CpuMachine(run) as machine:

            def step() -> Step:
                machine.launch(Lane.PREFETCH, op("one"))
                end = machine.launch(Lane.MAIN, op("other"))
                yield HostWait(end, op("read_back"), Cause.SYNC)

            machine.execute(step())

    def test_a_lane_that_polls_a_flag_goes_on_after_the_move(self) -> None:
        done: list[str] = []

        def run(what: Op) -> float:
            if what.name == "move":
                time.sleep(0.05)
            done.append(what.name)
            return 0.0

        with CpuMachine(run) as machine:

            def step() -> Step:
                for layer in range(2):
                    seen = machine.ring(machine.launch(Lane.MAIN, op("choose", layer)), layer)
                    moved = machine.flagged_work(seen, op("move", layer))
                    machine.wait_flag(Lane.MAIN, seen, moved, layer, Cause.DEMAND)
                    end = machine.launch(Lane.MAIN, op("use", layer))
                yield HostWait(end, op("read_back"), Cause.SYNC)

            timeline = machine.execute(step())
        assert done == ["choose", "move", "use"] * 2
        polls = [span for span in timeline.spans if span.name == "ready_flag"]
        assert all(dict(span.waits)[Cause.DEMAND.value] > 0.03 for span in polls)
        assert len(polls) == 2

    def test_numbers_of_two_streams_do_not_answer_for_each_other(self) -> None:
        """The prefetch's doorbell rings first although it was numbered second."""
        order: list[str] = []

        def run(what: Op) -> float:
            if what.name == "demand":
                time.sleep(0.1)
            order.append(what.name)
            return 0.0

        with CpuMachine(run) as machine:

            def step() -> Step:
                demand = machine.launch(Lane.MAIN, op("demand"))
                seen = machine.ring(demand, 0)
                moved = machine.flagged_work(seen, op("move demand"))
                ready = machine.wait_flag(Lane.MAIN, seen, moved, 0, Cause.DEMAND)
                ahead = machine.launch(Lane.PREFETCH, op("ahead"))
                seen = machine.ring(ahead, 1)
                moved = machine.flagged_work(seen, op("move ahead"))
                machine.wait_flag(Lane.PREFETCH, seen, moved, 1, Cause.PREFETCH)
                yield HostWait(ready, op("read_back"), Cause.SYNC)

            machine.execute(step())
        assert order == ["ahead", "demand", "move demand", "move ahead"]

    @pytest.mark.parametrize("sync", SYNCS)
    @pytest.mark.parametrize("transfer", ["page_copies", "staged", "cpu_zero_copy", "gpu_zero_copy"])
    def test_its_timeline_has_the_operations_that_the_simulator_prices(self, transfer: str, sync: str) -> None:
        chosen = design("clo", budget_pages=3, transfer=transfer, sync=sync)
        with Decoder(small_model(), chosen, max_new_tokens=4) as decoder:
            decoder.prefill([prompt(80)])
            decoder.step(torch.tensor([1]))
            assert decoder.plan is not None
            assert decoder.timeline is not None
            for lane in Lane:
                recorded = [
                    (node.op.name, node.op.layer) for node in record_step(decoder.plan).nodes if node.lane is lane
                ]
                ran = [(span.name, span.layer) for span in decoder.timeline.spans if span.lane == lane.value]
                assert ran == recorded


def broken_decoder(monkeypatch: pytest.MonkeyPatch, chosen: str, name: str, fault: Callable[[], None]) -> Decoder:
    """A decoder with its prompt read, in which operation `name` of layer 2 does `fault` first."""
    decoder = Decoder(small_model(), design(chosen, budget_pages=3), max_new_tokens=8, patience_s=0.5)
    decoder.prefill([prompt(80)])
    operations = decoder._operations
    assert operations is not None
    healthy = operations.run

    def run(what: Op) -> None:
        if what.name.endswith(name) and what.layer == 2:
            fault()
        healthy(what)

    monkeypatch.setattr(operations, "run", run)
    return decoder


def die() -> None:
    raise SystemExit("killed")


class TestFaults:
    @pytest.mark.parametrize(
        ("name", "operation"),
        [("staged", "host_gather"), ("clo", "gather_pages"), ("lru-cpu", "lru_update"), ("clo", "attention")],
    )
    def test_a_lane_that_dies_ends_the_step_and_the_next_prompt_works(
        self, monkeypatch: pytest.MonkeyPatch, name: str, operation: str
    ) -> None:
        before = threading.active_count()
        with broken_decoder(monkeypatch, name, operation, die) as decoder:
            with pytest.raises(EngineError, match=rf"operation .*{operation} of layer 2: killed"):
                decoder.step(torch.tensor([1]))
            with pytest.raises(EngineError, match="the last step failed half-way: call prefill again"):
                decoder.step(torch.tensor([1]))
            again = decoder.prefill([prompt(80)])
            assert torch.isfinite(again).all()
            assert torch.isfinite(decoder.step(torch.tensor([1]))).all()
        assert threading.active_count() == before

    def test_a_flag_that_never_comes_is_named_with_both_numbers(self) -> None:
        flag = Flag("ready flag of the main stream")
        flag.publish(6)
        with pytest.raises(EngineError, match=r"flag ready flag of the main stream: waited 0.01 s for number 7, .* 6"):
            flag.wait(7, 0.01)

    def test_transfer_threads_that_hang_are_not_waited_for_without_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        release = threading.Event()
        decoder = broken_decoder(monkeypatch, "clo-v2", "bar_write", lambda: release.wait(20) and None)
        began = time.perf_counter()
        with pytest.raises(EngineError, match=r"0\.5 s"):
            decoder.step(torch.tensor([1]))
        release.set()
        decoder.close()
        assert time.perf_counter() - began < 15

    def test_numbers_that_are_none(self) -> None:
        model = small_model()
        with Decoder(model, design("clo", budget_pages=3), max_new_tokens=8) as decoder:
            decoder.prefill([prompt(80)])
            with torch.no_grad():
                model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
            with pytest.raises(EngineError, match=r"operation lm_head .* logits are not finite"):
                decoder.step(torch.tensor([1]))

    def test_a_cancelled_generation_leaves_no_thread_and_a_decoder_that_works(self) -> None:
        before = threading.active_count()
        with Decoder(small_model(), design("clo", budget_pages=3), max_new_tokens=20) as decoder:
            whole = [int(token) for token in decoder.generate([prompt(80)])]
            for cancel_after in (1, 4):
                generation = decoder.generate([prompt(80)])
                said = [int(next(generation)) for _ in range(cancel_after)]
                generation.close()
                assert said == whole[:cancel_after]
                # the last token was given out and not yet decoded
                assert int(decoder.step(torch.tensor(said[-1:])).argmax()) == whole[cancel_after]
            assert [int(token) for token in decoder.generate([prompt(80)])] == whole
        assert threading.active_count() == before

    @pytest.mark.parametrize("sync", SYNCS)
    def test_a_step_that_is_interrupted(self, monkeypatch: pytest.MonkeyPatch, sync: str) -> None:
        """Ctrl-C while the launching thread waits for its lanes."""
        before = threading.active_count()

        def interrupt() -> None:
            _thread.interrupt_main()
            time.sleep(0.2)

        with Decoder(small_model(), design("clo", budget_pages=3, sync=sync), max_new_tokens=20) as decoder:
            whole = [int(token) for token in decoder.generate([prompt(80)])]
            generation = decoder.generate([prompt(80)])
            assert int(next(generation)) == whole[0]
            operations = decoder._operations
            assert operations is not None
            healthy = operations.run

            def run(what: Op) -> None:
                if what.name == "attention" and what.layer == 2:
                    interrupt()
                healthy(what)

            monkeypatch.setattr(operations, "run", run)
            with pytest.raises(KeyboardInterrupt):
                next(generation)
            with pytest.raises(EngineError, match="call prefill again"):
                decoder.step(torch.tensor([1]))
            assert [int(token) for token in decoder.generate([prompt(80)])] == whole
        assert threading.active_count() == before

    def test_an_interrupt_before_anything_is_launched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ctrl-C in the launching thread itself: what it has launched ends, nothing more is begun."""
        with Decoder(small_model(), design("clo", budget_pages=3), max_new_tokens=8) as decoder:
            decoder.prefill([prompt(80)])
            assert decoder._machine is not None
            launched: list[str] = []
            healthy = decoder._machine.launch

            def launch(lane: Lane, what: Op) -> object:
                launched.append(what.name)
                if len(launched) == 7:
                    raise KeyboardInterrupt
                return healthy(lane, what)

            monkeypatch.setattr(decoder._machine, "launch", launch)
            with pytest.raises(KeyboardInterrupt):
                decoder.step(torch.tensor([1]))
            assert len(launched) == 7
            monkeypatch.undo()
            decoder.prefill([prompt(80)])
            assert torch.isfinite(decoder.step(torch.tensor([1]))).all()

    def test_a_closed_machine_says_so(self) -> None:
        with Decoder(small_model(), design("clo", budget_pages=3), max_new_tokens=8) as decoder:
            decoder.prefill([prompt(80)])
            assert decoder._machine is not None
            assert decoder.plan is not None
            decoder._machine.close()
            with pytest.raises(EngineError, match="the machine is closed"):
                decoder._machine.execute(decode_step(decoder.plan, decoder._machine))

"""Sharing of links, memory and SMs against closed forms; the fast two-lane service against the general one.

The general service of three and four lanes with late submissions is held to a slow one that counts work down.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clo.errors import CloError
from clo.pricing import Demand
from clo.profile import InterferenceCost
from clo_sim.contention import SHARED, Contention, fill
from clo_sim.device import Device, LaneProgram
from clo_sim.pair import LanePair

NO_INTERFERENCE = InterferenceCost(per_sm_share=0.0, dma=0.0, source="assumed")
IDLE = Demand()
DMA = Demand(h2d=1.0, is_dma=True)
ZERO_COPY = Demand(h2d=1.0, sms_taken=0.25)
BACK = Demand(d2h=1.0, is_dma=True)
KERNEL = Demand(hbm=0.5, is_kernel=True)


def serve(
    *lanes: list[tuple[Demand, float]], starts: list[float] | None = None, rules: Contention | None = None
) -> list[list[float]]:
    """Completion times by lane when each lane serves its (demand, seconds alone) list from its start on."""
    rules = rules or Contention(NO_INTERFERENCE)
    demands = [IDLE]
    for demand, _ in (item for lane in lanes for item in lane):
        if demand not in demands:
            demands.append(demand)
    programs, column = [], 0
    for number, lane in enumerate(lanes):
        programs.append(
            LaneProgram(
                classes=tuple(demands.index(demand) for demand, _ in lane),
                waits=((),) * len(lane),
                host_waits=((number + 1, 0), *[(0, 0)] * (len(lane) - 1)),
                wakes=((),) * len(lane),
                columns=tuple(range(column, column + len(lane))),
            )
        )
        column += len(lane)
    device = Device(
        programs, lambda classes: rules.rates(tuple(demands[c] for c in classes)), watched=0, num_causes=1, record=True
    )
    device.begin_step(0.0, [seconds for lane in lanes for _, seconds in lane])
    for time in sorted(starts or [0.0] * len(lanes)):
        device.submit(time)
    for number, lane in enumerate(lanes):
        device.run_until(number, len(lane))
    ends: list[list[float]] = [[] for _ in lanes]
    for span in device.spans or ():
        ends[span.lane].append(span.end)
    return ends


class TestProcessorSharing:
    """Times follow from the areas under the rates; worked out beside each case."""

    def test_alone_at_full_speed(self) -> None:
        assert serve([(DMA, 3.0)]) == [[3.0]]

    def test_two_equal_transfers_take_twice_as_long(self) -> None:
        assert serve([(DMA, 3.0)], [(ZERO_COPY, 3.0)]) == [[6.0], [6.0]]

    def test_the_longer_one_speeds_up_when_the_shorter_one_is_done(self) -> None:
        # both at half speed until the shorter one ends at 2; 2 of 3 seconds are left at full speed
        assert serve([(DMA, 1.0)], [(ZERO_COPY, 3.0)]) == [[2.0], [4.0]]

    def test_a_later_start(self) -> None:
        # alone for 2 of its 4 seconds; then both halve: 2 left each, done at 6
        assert serve([(DMA, 4.0)], [(ZERO_COPY, 2.0)], starts=[0.0, 2.0]) == [[6.0], [6.0]]

    def test_three_on_one_link(self) -> None:
        # thirds until 3 (the shortest), halves until the next has 1 left: 3 + 2, then alone 1
        assert serve([(DMA, 1.0)], [(ZERO_COPY, 2.0)], [(DMA, 3.0)]) == [[3.0], [5.0], [6.0]]

    def test_three_that_come_one_by_one(self) -> None:
        # the first alone 0-1, two halve 1-2, three from 2: left are 6 - 1 - 0.5 = 4.5, 1 - 0.5 = 0.5 and 1. Thirds
        # until 3.5 (the second is done; left 4, 0.5), halves until 4.5 (the third is done; left 3.5), alone until 8
        ends = serve([(DMA, 6.0)], [(ZERO_COPY, 1.0)], [(DMA, 1.0)], starts=[0.0, 1.0, 2.0])
        assert ends == [[pytest.approx(8.0)], [pytest.approx(3.5)], [pytest.approx(4.5)]]

    @pytest.mark.parametrize("offset", [0.0, 0.5, 1.0, 1.5, 2.5])
    def test_two_started_apart(self, offset: float) -> None:
        # 2 s and 1 s of work. If the second starts after 1 s it ends last; the first is done when what it had left at
        # the offset has been served at half speed
        first, second = serve([(DMA, 2.0)], [(ZERO_COPY, 1.0)], starts=[0.0, offset])
        left = 2.0 - offset
        if left <= 0:
            expected = (2.0, offset + 1.0)
        elif left <= 1.0:
            expected = (offset + 2 * left, offset + 2 * left + (1.0 - left))
        else:
            expected = (offset + 2.0 + (left - 1.0), offset + 2.0)
        assert (first, second) == ([pytest.approx(expected[0])], [pytest.approx(expected[1])])

    @given(
        st.lists(
            st.lists(st.tuples(st.sampled_from([DMA, ZERO_COPY]), st.floats(0.1, 5)), min_size=1, max_size=4),
            min_size=1,
            max_size=4,
        )
    )
    @settings(max_examples=100, deadline=None)
    def test_a_busy_link_never_idles(self, lanes: list[list[tuple[Demand, float]]]) -> None:
        # everybody can use the whole link, so that all is done when all the work is, whoever shares it with whom
        work = [[seconds for _, seconds in lane] for lane in lanes]
        last = max(end for ends in serve(*lanes) for end in ends)
        assert last == pytest.approx(sum(map(sum, work)))

    def test_directions_do_not_share(self) -> None:
        assert serve([(DMA, 3.0)], [(BACK, 3.0)]) == [[3.0], [3.0]]

    def test_half_a_link_each_is_enough_for_both(self) -> None:
        half = Demand(h2d=0.5)
        assert serve([(half, 3.0)], [(half, 3.0)]) == [[3.0], [3.0]]

    def test_a_lane_serves_in_order(self) -> None:
        assert serve([(DMA, 1.0), (DMA, 2.0)]) == [[1.0, 3.0]]

    def test_two_memory_bound_kernels_share_device_memory(self) -> None:
        heavy = Demand(hbm=1.0, is_kernel=True)
        assert serve([(heavy, 2.0)], [(heavy, 2.0)]) == [[4.0], [4.0]]


class TestInterference:
    rules = Contention(InterferenceCost(per_sm_share=0.4, dma=0.05, source="assumed"))

    def test_a_kernel_beside_zero_copy_takes_longer_by_the_share_of_sms(self) -> None:
        # a quarter of the SMs: 1 + 0.4 / 4 times as long, while the transfer outlasts it
        [kernel], [copy] = serve([(KERNEL, 10.0)], [(ZERO_COPY, 100.0)], rules=self.rules)
        assert kernel == pytest.approx(11.0)
        assert copy == 100.0

    def test_two_transfers_take_the_sms_of_both(self) -> None:
        [kernel], *_ = serve([(KERNEL, 10.0)], [(ZERO_COPY, 100.0)], [(ZERO_COPY, 100.0)], rules=self.rules)
        assert kernel == pytest.approx(12.0)

    def test_a_kernel_beside_dma(self) -> None:
        [kernel], _ = serve([(KERNEL, 10.0)], [(DMA, 100.0)], rules=self.rules)
        assert kernel == pytest.approx(10.5)

    def test_only_while_they_overlap(self) -> None:
        # 5.5 seconds beside the transfer do 5 seconds of work; 5 more are left
        [kernel], _ = serve([(KERNEL, 10.0)], [(ZERO_COPY, 5.5)], rules=self.rules)
        assert kernel == pytest.approx(10.5)

    def test_switched_off(self) -> None:
        rules = Contention(self.rules.interference, interfere=False)
        assert serve([(KERNEL, 10.0)], [(ZERO_COPY, 100.0)], rules=rules)[0] == [10.0]


SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
DEMANDS = st.builds(Demand, h2d=SHARES, d2h=SHARES, hbm=SHARES, host_memory=SHARES)


class TestFill:
    """Max-min fair rates (progressive filling; Bertsekas and Gallager, Data Networks, section 6.5)."""

    @given(st.lists(DEMANDS, min_size=1, max_size=5), st.data())
    @settings(max_examples=200, deadline=None)
    def test_feasible_and_nobody_can_rise_alone(self, demands: list[Demand], data: st.DataObject) -> None:
        caps = [data.draw(st.sampled_from([0.3, 0.8, 1.0])) for _ in demands]
        rates = fill(tuple(demands), caps)
        used = {name: sum(getattr(d, name) * rate for d, rate in zip(demands, rates, strict=True)) for name in SHARED}
        assert all(value <= 1 + 1e-9 for value in used.values())
        for demand, rate, cap in zip(demands, rates, caps, strict=True):
            assert 0 < rate <= cap + 1e-12
            # whoever is below its cap uses a full capacity on which nobody goes faster: nobody can rise unless somebody
            # who is not faster falls
            bottlenecks = [name for name in SHARED if getattr(demand, name) > 0 and used[name] >= 1 - 1e-9]
            fastest = [
                max(other for user, other in zip(demands, rates, strict=True) if getattr(user, name) > 0)
                for name in bottlenecks
            ]
            assert rate == pytest.approx(cap) or any(rate >= other - 1e-9 for other in fastest)

    @given(st.lists(DEMANDS, min_size=1, max_size=4), st.data())
    @settings(max_examples=60, deadline=None)
    def test_equals_get_equal_rates_in_any_company_and_any_order(
        self, demands: list[Demand], data: st.DataObject
    ) -> None:
        caps = [data.draw(st.sampled_from([0.3, 0.8, 1.0])) for _ in demands]
        twice = fill((*demands, demands[0]), [*caps, caps[0]])
        assert twice[0] == pytest.approx(twice[-1])
        order = data.draw(st.permutations(range(len(demands))))
        rates = fill(tuple(demands), caps)
        shuffled = fill(tuple(demands[number] for number in order), [caps[number] for number in order])
        assert shuffled == pytest.approx([rates[number] for number in order])

    @given(DEMANDS, st.integers(2, 5))
    @settings(max_examples=60, deadline=None)
    def test_equals_get_equal_rates_and_leave_nothing_unused(self, demand: Demand, count: int) -> None:
        rates = fill((demand,) * count, [1.0] * count)
        heaviest = max(getattr(demand, name) for name in SHARED)
        expected = min(1.0, 1 / (count * heaviest)) if heaviest else 1.0
        assert rates == pytest.approx((expected,) * count)


def programs_of(
    lengths: tuple[int, int], waits: list[tuple[int, int, int]], classes: list[list[int]]
) -> list[LaneProgram]:
    """Two lanes; `waits` are (lane, segment, completions of the other lane it needs)."""
    needed = {(lane, segment): count for lane, segment, count in waits}
    programs, column = [], 0
    for lane in (0, 1):
        own = tuple(
            ((1 - lane, needed[(lane, segment)], 1),) if (lane, segment) in needed else ()
            for segment in range(lengths[lane])
        )
        wakes = tuple(
            (1 - lane,) if (segment + 1) in [count for (who, _), count in needed.items() if who == 1 - lane] else ()
            for segment in range(lengths[lane])
        )
        host = ((1, 0), *[(0, 0)] * (lengths[lane] - 1))
        columns = tuple(range(column, column + lengths[lane]))
        programs.append(LaneProgram(tuple(classes[lane]), own, host, wakes, columns))
        column += lengths[lane]
    return programs


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_two_lane_service_is_the_general_one(data: st.DataObject) -> None:
    lengths = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    # waits are drawn along one interleaving of both lanes, so that they can always be met
    order = data.draw(st.permutations([0] * lengths[0] + [1] * lengths[1]))
    done, waits = [0, 0], []
    for lane in order:
        if done[1 - lane] and data.draw(st.booleans()):
            waits.append((lane, done[lane], data.draw(st.integers(1, done[1 - lane]))))
        done[lane] += 1
    classes = [[data.draw(st.integers(0, 3)) for _ in range(count)] for count in lengths]
    work = [data.draw(st.sampled_from([0.0, 0.25, 1.0, 1.5, 3.0])) for _ in range(sum(lengths))]
    demands = (IDLE, DMA, ZERO_COPY, KERNEL)
    rules = Contention(InterferenceCost(per_sm_share=0.4, dma=0.05, source="assumed"))

    def rates(numbers: tuple[int, ...]) -> tuple[float, ...]:
        return rules.rates(tuple(demands[number] for number in numbers))

    programs = programs_of(lengths, waits, classes)
    device = Device(programs, rates, watched=0, num_causes=2)
    device.begin_step(0.0, work)
    device.submit(0.5)
    device.run_until(1, lengths[1])
    device.run_until(0, lengths[0])
    pair = LanePair(programs[0], programs[1], rates, 2).run(0.5, work)
    assert pair.end == pytest.approx(device.last_end)
    assert pair.gaps == pytest.approx(device.gaps)
    assert list(pair.busy) == pytest.approx(device.busy)


def test_a_lane_waits_for_its_submission_before_its_inputs() -> None:
    # submitted at 2, its input is there at 3: two seconds of the first cause, one of the second
    lane = LaneProgram((0,), (((1, 1, 1),),), ((2, 0),), ((),), (0,))
    other = LaneProgram((0,), ((),), ((1, 0),), ((0,),), (1,))
    device = Device((lane, other), lambda classes: (1.0,) * len(classes), watched=0, num_causes=2)
    device.begin_step(0.0, [1.0, 3.0])
    device.submit(0.0)
    device.submit(2.0)
    assert device.run_until(0, 1) == 4.0
    assert device.gaps == [2.0, 1.0]


Item = tuple[int, float, list[tuple[int, int]], int]
"""Contention class, seconds alone, (lane, completions) it waits for, submission it belongs to."""


def slow_service(lanes: list[list[Item]], submitted: list[float], rates: Any) -> list[list[float]]:
    """Ends by lane: work left is counted down from one event to the next; nothing is predicted or looked up."""
    ends: list[list[float]] = [[] for _ in lanes]
    left: dict[int, float] = {}
    now = 0.0
    while any(len(end) < len(lane) for end, lane in zip(ends, lanes, strict=True)):
        future = []
        for number, lane in enumerate(lanes):
            if number in left or len(ends[number]) == len(lane):
                continue
            _, seconds, waits, submission = lane[len(ends[number])]
            if any(len(ends[other]) < count for other, count in waits):
                continue
            if submitted[submission] > now:
                future.append(submitted[submission])
            else:
                left[number] = seconds
        running = {number: lanes[number][len(ends[number])][0] for number in left}
        speed = rates(tuple(running.get(number, 0) for number in range(len(lanes))))
        until = min([now + work / speed[number] for number, work in left.items()] + future)
        for number in list(left):
            left[number] -= (until - now) * speed[number]
            if left[number] <= 1e-12:
                del left[number]
                ends[number].append(until)
        now = until
    return ends


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_general_service_is_the_slow_one(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 4))
    order = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=14))
    order = [*range(count), *order]
    submitted = sorted(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, 8.0]), min_size=4, max_size=4)))
    lanes: list[list[Item]] = [[] for _ in range(count)]
    reached = 0
    for lane in order:
        others = [other for other in range(count) if other != lane and lanes[other]]
        waits = [(other, data.draw(st.integers(1, len(lanes[other])))) for other in others if data.draw(st.booleans())]
        reached = data.draw(st.integers(reached, 3))
        work = data.draw(st.sampled_from([0.25, 1.0, 1.5, 3.0]))
        lanes[lane].append((data.draw(st.integers(0, 4)), work, waits, reached))
    demands = (IDLE, DMA, ZERO_COPY, KERNEL, Demand(h2d=0.5, hbm=0.75, is_kernel=True))
    rules = Contention(InterferenceCost(per_sm_share=0.4, dma=0.05, source="assumed"))

    def rates(numbers: tuple[int, ...]) -> tuple[float, ...]:
        return rules.rates(tuple(demands[number] for number in numbers))

    wakes: dict[tuple[int, int], set[int]] = {}
    for number, lane in enumerate(lanes):
        for _, _, waits, _ in lane:
            for other, completed in waits:
                wakes.setdefault((other, completed - 1), set()).add(number)
    programs, row = [], []
    for number, lane in enumerate(lanes):
        programs.append(
            LaneProgram(
                classes=tuple(item[0] for item in lane),
                waits=tuple(tuple((other, completed, 0) for other, completed in item[2]) for item in lane),
                host_waits=tuple((item[3] + 1, 0) for item in lane),
                wakes=tuple(tuple(sorted(wakes.get((number, place), ()))) for place in range(len(lane))),
                columns=tuple(range(len(row), len(row) + len(lane))),
            )
        )
        row += [item[1] for item in lane]
    expected = slow_service(lanes, submitted, rates)
    device = Device(programs, rates, watched=0, num_causes=1, record=True)
    device.begin_step(0.0, row)
    for time in submitted:
        device.submit(time)
    for number in data.draw(st.permutations(range(count))):
        device.run_until(number, len(lanes[number]))
    ends: list[list[float]] = [[] for _ in lanes]
    for span in device.spans or ():
        ends[span.lane].append(span.end)
    for found, slow in zip(ends, expected, strict=True):
        assert found == pytest.approx(slow)
    # every idle moment of the watched lane has a cause: gaps and busy time reach to its last end
    assert sum(device.gaps) + device.busy[0] == pytest.approx(device.last_end)


class TestDeadlock:
    programs = (
        LaneProgram((0,), (((1, 1, 0),),), ((1, 0),), ((1,),), (0,)),
        LaneProgram((0,), (((0, 1, 0),),), ((1, 0),), ((0,),), (1,)),
    )

    def test_the_general_device_says_so(self) -> None:
        device = Device(self.programs, lambda classes: (1.0,) * len(classes), watched=0, num_causes=1)
        device.begin_step(0.0, [1.0, 1.0])
        device.submit(0.0)
        with pytest.raises(CloError, match="simulated deadlock"):
            device.run_until(0, 1)

    def test_the_pair_says_so(self) -> None:
        pair = LanePair(*self.programs, lambda classes: (1.0,) * len(classes), 1)
        with pytest.raises(CloError, match="simulated deadlock"):
            pair.run(0.0, [1.0, 1.0])

"""What was measured on one GPU, on another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_laws import HARDWARE, SHIPPED, shipped, small_decode, small_gemm

from clo import presets
from clo.kernel_scaling import measured_on, scaled_seconds
from clo.kernel_tables import KernelTable
from clo.specs import GpuSpec
from clo_calibration.tables import measurements

CACHE: dict[tuple[str, str], KernelTable] = {}


def unlike_gpus() -> Iterator[tuple[str, str]]:
    """Pairs of measured GPUs; those with almost the same bandwidth differ by what no roofline knows."""
    for source, target in itertools.permutations(measurements.GPUS, 2):
        rates = [presets.load_machine(name).gpu.hbm_bytes_per_s for name in (source, target)]
        if max(rates) > 1.2 * min(rates):
            yield source, target


class TestAnotherGpu:
    """`scaled_seconds`: what was measured on one GPU, on another."""

    POINTS = (np.array([1.0, 16.0, 4096.0]), np.array([1024.0, 4096.0, 8192.0]), 4096.0)

    @staticmethod
    def gpu(bandwidth: float = 1.0, flops: float = 1.0) -> GpuSpec:
        """The GPU of the small tables, faster by these factors."""
        hbm, peak = HARDWARE["hbm_bytes_per_s"] * bandwidth, HARDWARE["flops_per_s"] * flops
        return GpuSpec(memory_bytes=1e9, num_sms=100, hbm_bytes_per_s=hbm, peak_flops_per_s=peak)

    def test_the_measured_gpu_keeps_its_times(self) -> None:
        table = small_gemm()
        assert np.array_equal(scaled_seconds(table, self.gpu(), *self.POINTS), table.seconds(*self.POINTS))

    @given(data=st.data(), of=st.sampled_from([of for of in SHIPPED if of[1] != "all_reduce"]))
    def test_nothing_is_faster_than_its_roofline(self, data: st.DataObject, of: tuple[str, str]) -> None:
        """A benchmark reads small inputs from the cache, which is large on L40S and RTX PRO 6000; a step does not."""
        gpu, kind = of
        table, spec = CACHE.setdefault(of, shipped(gpu, kind)), presets.load_machine(gpu).gpu
        if not measured_on(table, spec):
            return  # experts of A100 are H100's, carried over
        point = [data.draw(st.floats(getattr(table, name)[0], getattr(table, name)[-1])) for name in table.ARGUMENTS]
        bound = table.roofline_seconds(*point)
        found = scaled_seconds(table, spec, *point)
        assert found == pytest.approx(max(table.seconds(*point), bound), rel=2e-3)
        assert found >= bound * (1 - 2e-3)

    @given(factor=st.floats(0.1, 10.0))
    def test_a_gpu_faster_in_all_takes_a_share_of_what_is_above_the_floor(self, factor: float) -> None:
        table = small_gemm()
        above = table.seconds(*self.POINTS) - table.floor_s
        there = scaled_seconds(table, self.gpu(factor, factor), *self.POINTS)
        assert there == pytest.approx(table.floor_s + above / factor, rel=2e-3)

    @given(factor=st.floats(1.01, 10.0))
    def test_what_arithmetic_bounds_gains_nothing_from_bandwidth(self, factor: float) -> None:
        sizes = (4096.0, 8192.0, 4096.0)  # 2.7 ms of arithmetic, 0.2 ms of bytes
        table = small_gemm()
        assert scaled_seconds(table, self.gpu(bandwidth=factor), *sizes) == pytest.approx(table.seconds(*sizes))

    @given(data=st.data(), kind=st.sampled_from([small_gemm(), small_decode()]))
    def test_a_faster_gpu_never_takes_longer(self, data: st.DataObject, kind: KernelTable) -> None:
        factor = st.floats(0.05, 20.0)
        slow = data.draw(st.tuples(factor, factor))
        fast = tuple(rate * data.draw(st.floats(1.0, 20.0)) for rate in slow)
        point = [data.draw(st.sampled_from(getattr(kind, name))) for name in kind.ARGUMENTS]
        there = [scaled_seconds(kind, self.gpu(*rates), *point) for rates in (slow, fast)]
        assert there[1] <= there[0] * (1 + 1e-3)  # rates a thousandth apart count as equal

    @pytest.mark.parametrize(("source", "target"), list(unlike_gpus()))
    @pytest.mark.parametrize("kind", ["gemm", "decode_attention"])
    def test_carried_over_is_nearer_to_what_was_measured_there(self, kind: str, source: str, target: str) -> None:
        sizes = {
            "gemm": ([1.0, 4.0, 16.0, 64.0], [4096.0, 28672.0], [4096.0, 14336.0]),
            "decode_attention": ([1.0, 4.0, 16.0], [32.0], [8.0], [128.0], [4096.0, 16384.0, 65536.0]),
        }[kind]
        points = [axis.ravel() for axis in np.meshgrid(*sizes, indexing="ij")]
        borrowed, measured = shipped(source, kind), shipped(target, kind).seconds(*points)
        carried = scaled_seconds(borrowed, presets.load_machine(target).gpu, *points)
        errors = [np.median(np.abs(times / measured - 1)) for times in (carried, borrowed.seconds(*points))]
        assert errors[0] < errors[1] / 1.5

"""The roofline of a step by hand, and GPUs of slower memory against it."""

from __future__ import annotations

import pytest
from scenes import scene_of

import clo_sim
from clo import presets
from clo.specs import Workload


class TestRoofline:
    def test_the_roofline_by_hand(self) -> None:
        scene = scene_of("smollm2-135m", workload=Workload(context_tokens=4096, batch=2, steps=1))
        model, roof = scene.model, clo_sim.simulate(scene, "resident").roofline
        weights = 30 * (576 * 64 * (2 * 9 + 2 * 3) + 3 * 576 * 1536) + 49152 * 576
        assert model.weight_bytes == 2 * weights
        # keys and values of 3 heads of 64 in bf16, 30 layers, two sequences
        assert roof.hbm_bytes == 2 * weights + 2 * 30 * 4096 * 3 * 2 * 64 * 2
        # two operations a weight and token; in attention, four per query head, key and element
        flops = 2 * (2 * weights + 30 * 4096 * 4 * 9 * 64)
        assert roof.compute_s == pytest.approx(flops / scene.machine.gpu.peak_flops_per_s)
        assert roof.h2d_bytes == 0
        assert roof.seconds == roof.hbm_s == roof.hbm_bytes / scene.machine.gpu.hbm_bytes_per_s

    def test_the_roofline_reads_what_a_step_must_read(self) -> None:
        scene = scene_of(workload=Workload(context_tokens=4096, batch=1, steps=1))
        needed = 2 * 32 * scene.model.layer_weight_values(0) + 128256 * 4096 * 2 + 4096 * 131072
        # a row of the embedding beside it
        assert clo_sim.simulate(scene, "resident").roofline.hbm_bytes <= needed + 4096 * 2

    @pytest.mark.parametrize("share", [0.25, 0.5])
    def test_a_gpu_of_slower_memory_takes_longer_and_nothing_of_it_is_measured(self, share: float) -> None:
        machine = presets.load_machine("h200")
        gpu = machine.gpu.with_fields(hbm_bytes_per_s=machine.gpu.hbm_bytes_per_s * share)
        workload = Workload(context_tokens=32768, batch=1, steps=2)
        known, slow = (
            clo_sim.simulate(scene_of(machine=one, workload=workload), "resident")
            for one in (machine, machine.with_fields(gpu=gpu))
        )
        # weights and KV of a step come from memory, whatever its speed
        assert slow.tpot_s > slow.roofline.seconds > known.tpot_s
        assert slow.measured_share == 0 < known.measured_share
        assert [line for line in slow.assumptions if "measured on NVIDIA H200" in line]
        assert not [line for line in known.assumptions if "measured on" in line]

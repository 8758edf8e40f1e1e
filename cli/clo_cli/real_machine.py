"""Explored designs on the machine at hand: the last level of `clo explore --measure`.

Knows nothing about which designs are worth it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clo.errors import SpecError

if TYPE_CHECKING:
    from clo.engine.models.network import Network
    from clo.results import Result
    from clo.specs import Design
    from clo_sim.evaluation import Measure
    from clo_sim.scene import Scene

STEPS = 16
"""Measured steps of a run at most: it is real time that passes."""


def measure_here(scene: Scene) -> Measure:
    """Runs designs with random weights of the calibrated model over made-up contexts.

    Raises `SpecError` unless the scene's costs were timed on this machine.
    """
    from clo.operation_costs import OperationProfile
    from clo_cli.models import need_engine

    timed = scene.profile
    if not isinstance(timed, OperationProfile):
        raise SpecError("--measure: --machine must be the JSON file that `clo calibrate` wrote on this machine")
    need_engine("measuring", "calibrate", ("scipy",))
    from clo_calibration.calibrate import network_of
    from clo_calibration.fingerprint import differences, fingerprint
    from clo_calibration.machines import device_of, half_the_cores

    device = device_of(timed.fingerprint["device"])
    with half_the_cores():
        if found := differences(fingerprint(device), timed.fingerprint):
            raise SpecError(f"--measure: {timed.name} is of another machine: {'; '.join(found)}")
    network = network_of(timed.model, device)

    def run(question: Scene, design: Design) -> Result:
        if question.model != timed.model or question.machine.name != timed.machine.name:
            raise SpecError(f"only {timed.model.name} on {timed.machine.name} can be run here")
        with half_the_cores():
            return _decode(network, question, design)

    return run


def _decode(network: Network, scene: Scene, design: Design) -> Result:
    from clo.engine.decoder import Decoder
    from clo.engine.measure import run_steps
    from clo.engine.random_weights import random_prompt
    from clo.engine.run import result_of

    steps, warmup = min(scene.workload.steps, STEPS), 2
    context = scene.workload.context_tokens - warmup - steps // 2
    plan = scene.plan(design)
    # the size that the plan gave it, where the design leaves that to the memory
    sized = design.with_fields(slot_budgets=None, slot_pages=plan.slot_pages) if design.offloads else design
    with Decoder(network, sized, max_new_tokens=steps + warmup + 2) as decoder:
        prompts = [random_prompt(network, context, seed=seed) for seed in range(scene.workload.batch)]
        return result_of(run_steps(decoder, prompts, steps=steps, warmup_steps=warmup))

"""A simulated GPU is a SimPy process: put it beside your own. Here two of them decode side by side."""

from collections.abc import Generator

import simpy

import clo_sim
from clo import presets
from clo_sim.simulator import SimulatedGpu

scene = clo_sim.make_scene(model="llama-3-8b", machine="h200", context_tokens=131072, batch=16)
env = simpy.Environment()
tokens = {"clo": 0, "resolve": 0}


def decode(name: str, steps: int) -> Generator[simpy.Event, None, None]:
    """Decode `steps` steps with a named design."""
    gpu = SimulatedGpu(env, scene.priced(scene.plan(presets.load_design(name))))
    for step in range(steps):
        yield from gpu.decode_step(step)
        tokens[name] += scene.workload.batch


for design in tokens:
    env.process(decode(design, 32))
env.run(until=0.5)
print(f"after {env.now} s: {tokens}")

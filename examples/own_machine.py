"""A machine and a model of your own: what fits, what does offloading cost, what would PCIe 5 bring?

The machine has PCIe 4 and half an H100's memory bandwidth; kernel times of its profile are carried over to it.
"""

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.specs import GpuSpec, LinkSpec, MachineSpec

h100 = presets.load_machine("h100")
mine = h100.with_fields(
    name="mine",
    source="made up for this example",
    gpu=GpuSpec(memory_bytes=48e9, num_sms=100, hbm_bytes_per_s=1.6e12, peak_flops_per_s=400e12),
    link=LinkSpec(h2d_bytes_per_s=25e9, d2h_bytes_per_s=25e9),
)
faster = mine.with_fields(name="mine with PCIe 5", link=LinkSpec(h2d_bytes_per_s=50e9, d2h_bytes_per_s=50e9))
model = presets.load_model("llama-3-8b").with_fields(name="two KV heads", num_kv_heads=2)


def tpot(design: str, machine: MachineSpec, context_tokens: int) -> str:
    """Milliseconds per token of four sequences, or that they do not fit."""
    scene = clo_sim.make_scene(model, machine, context_tokens=context_tokens, batch=4)
    try:
        return f"{clo_sim.simulate(scene, design).tpot_s * 1e3:.1f} ms"
    except SpecError:
        return "no room"


CASES = {"resident-sparse": ("resident-sparse", mine), "clo": ("clo", mine), "clo, PCIe 5": ("clo", faster)}
print(f"{'context':>8}" + "".join(f"{title:>18}" for title in CASES))
for context in (32768, 131072, 524288):
    print(f"{context:>8}" + "".join(f"{tpot(*case, context):>18}" for case in CASES.values()))

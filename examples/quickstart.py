"""The README's five lines: the fastest design for a workload, and where its time goes."""

import clo_sim

scene = clo_sim.make_scene(model="llama-3-8b", machine="h200", context_tokens=131072, batch=16)
result = clo_sim.simulate(scene, "clo")
print(f"{result.tpot_s * 1e3:.1f} ms per token, {result.hit_rate:.1%} hits, stalls {result.stall_s}")
smaller = clo_sim.simulate(scene, result.design.with_fields(slot_budgets=2))
print(f"{smaller.tpot_s * 1e3:.1f} ms with a cache of two budgets")

"""What others report beside what the simulator says of the same comparison: `python -m clo_calibration.published`.

No cost is fitted to these figures. Where the two differ the table says why. Knows nothing about how steps are run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import clo_sim
from clo.errors import SpecError
from clo.presets import load_design, load_machine, load_named_profile
from clo.results import Result
from clo.specs import Cache, Design
from clo_calibration.served_steps import PROMPTS, SERVED, Steps
from clo_sim.scene import Scene


@dataclass(frozen=True, slots=True)
class Claim:
    """A published figure, ours, and why they differ."""

    what: str
    theirs: str
    ours: str
    why: str


CONTEXTS = (32768, 65536, 131072)
BATCH = 4
TARGETS = (0.8, 0.9, 0.95)
"""How often each head's own threshold lets a query keep its set. Predicted queries miss too: fewer sets stay."""
SLOT_BUDGETS = (1.0, 2.0, 4.0)
MISS_CONTEXTS = (32768, 131072)
HISPARSE_CONTEXT, HISPARSE_SLOTS = 36864, 4096
"""In the mean of an answer of 8K tokens to a prompt of 32K; tokens that HiSparse keeps on the GPU by default."""
GPUS, FEW, MANY = 8, 8, 256
"""GPUs that share the model, sequences."""
PIECES = (4096, 8192, 16384, 24576, 28672, 65536)


def claims() -> list[Claim]:
    """All comparisons; some seconds of simulation."""
    a40, h100 = Rivals.on("a40"), Rivals.on("h100")
    return [
        _speed_up("v1 over RetroInfer and InfiniGen, A40 (PCIe 4)", a40, "clo-v1", "+9.3% to +66.6%", _A40),
        _speed_up("v2 over RetroInfer and InfiniGen, A40 (PCIe 4)", a40, "clo-v2", "+10.7% to +60.5%", _A40),
        _speed_up("v2 over RetroInfer and InfiniGen, H100 (PCIe 5)", h100, "clo-v2", "+67.0% to +224.2%", _H100),
        _miss_rates(),
        _beyond_memory(),
        *map(_served_steps, SERVED),
        _long_prompts(),
        _copy_cliff(),
    ]


_SETS = (
    "heads of the recorded small model keep half of their sets by default, and for the others a whole new set is "
    "fetched; how many theirs keep is not known. The rivals here share CLO's selector, pages and budget, with slots "
    "for one budget"
)
_A40 = _SETS + "; kernel times of the A40 are carried over from the A100 along the roofline"
_H100 = _SETS + "; their rivals run from Python without graphs, which costs per launch that ours do not pay"


@dataclass(frozen=True, slots=True)
class Rivals:
    """What a design is compared with on a machine, at all contexts, by name."""

    machine: str
    results: dict[str, list[Result]]

    @classmethod
    def on(cls, machine: str) -> Rivals:
        """Simulated."""
        return cls(machine, {name: _tpots(machine, load_design(name)) for name in ("lru-cpu", "staged")})


def _speed_up(what: str, rivals: Rivals, name: str, theirs: str, why: str) -> Claim:
    """Decode throughput of a design over its two rivals, over all contexts, by the share of sets kept."""
    spans = [_over(rivals, load_design(name))]
    spans += [_over(rivals, load_design(name).with_fields(target_hit_rate=rate)) for rate in TARGETS]
    return Claim(what, theirs, "; ".join(spans), why)


def _over(rivals: Rivals, design: Design) -> str:
    ours = _tpots(rivals.machine, design)
    # not `reuse_rate`: a head whose set was replaced ahead of its query counts as reused there
    kept = sum(result.hit_rate for result in ours) / len(ours)
    gains = {
        rival: [other.tpot_s / mine.tpot_s - 1.0 for other, mine in zip(theirs, ours, strict=True)]
        for rival, theirs in rivals.results.items()
    }
    spans = ", ".join(f"over {rival} {min(found):+.0%} to {max(found):+.0%}" for rival, found in gains.items())
    return f"{kept:.0%} of sets kept: {spans}"


def _tpots(machine: str, design: Design) -> list[Result]:
    if design.cache is Cache.LRU:
        design = design.with_fields(slot_budgets=1.0)
    return [clo_sim.simulate(_scene(machine, context), design) for context in CONTEXTS]


def _scene(machine: str, context: int) -> Scene:
    return clo_sim.make_scene("llama-3-8b", machine, context_tokens=context, batch=BATCH)


def _miss_rates() -> Claim:
    found = []
    for context in MISS_CONTEXTS:
        scene = _indexed_scene(16, context)
        resolve = load_design("resolve", scene.model)
        hits = [clo_sim.simulate(scene, resolve.with_fields(slot_budgets=slots)).hit_rate for slots in SLOT_BUDGETS]
        found.append(f"at {context // 1024}K " + ", ".join(f"{1 - rate:.1%}" for rate in hits))
    return Claim(
        "miss rate of a buffer of 1, 2 and 4 times top-k 2048 (HiSparse)",
        "30%, 13.4%, 6.7%",
        "; ".join(found),
        "theirs: what an indexer chose, at contexts not told; ours: heads of a small model, which choose as large a "
        "share",
    )


def _beyond_memory() -> Claim:
    few, many = (_offloaded_tokens_per_s(batch) for batch in (FEW, MANY))
    fitting = _most_that_fit()
    return Claim(
        "tokens/s of an offloading GLM-5.1-FP8 over one that keeps everything, 8 H200, 32K in, 8K out (HiSparse)",
        "somewhat less with few sequences, over 3 times with 256",
        f"{few / _resident_tokens_per_s(FEW):.2f} times with {FEW} sequences, "
        f"{many / _resident_tokens_per_s(fitting):.1f} times with {MANY}, where {fitting} fit without",
        "theirs keeps more memory free for prefill, in the same GPUs, so that fewer sequences fit without; how theirs "
        "deals out attention is not told (here: by sequences)",
    )


def _served_steps(run: Steps) -> Claim:
    """TPOT of each step, with the range of theirs over ours."""
    ours = [step.simulated_s() for step in run.steps]
    ratios = [step.tpot_s / simulated for step, simulated in zip(run.steps, ours, strict=True)]
    return Claim(
        f"TPOT of {run.what} ({run.source})",
        _milliseconds([step.tpot_s for step in run.steps]),
        f"{_milliseconds(ours)} (theirs are {min(ratios):.2f} to {max(ratios):.2f} times as long)",
        run.why,
    )


def _milliseconds(seconds: Sequence[float]) -> str:
    return ", ".join(f"{each * 1e3:.2f}" for each in seconds) + " ms"


def _long_prompts() -> Claim:
    sizes = " and ".join(f"{prompt.tokens}" for prompt in PROMPTS)
    return Claim(
        f"TTFT of MiniMax-M3 alone on 8 B200 under vLLM: prompts of {sizes} tokens (vLLM issue 51494, August 2026)",
        ", ".join(f"{prompt.ttft_s:g} s" for prompt in PROMPTS),
        ", ".join(f"{prompt.simulated_s():.1f} s" for prompt in PROMPTS),
        "experts in 4 bits, others in 8; what scores every pair of tokens was timed with SGLang's kernel, vLLM's is "
        "another",
    )


def _offloaded_tokens_per_s(batch: int) -> float:
    scene = _indexed_scene(batch, HISPARSE_CONTEXT)
    design = load_design("resolve", scene.model).with_fields(slot_pages=HISPARSE_SLOTS)
    return clo_sim.simulate(scene, design).tokens_per_s


def _resident_tokens_per_s(batch: int) -> float:
    return _resident(_indexed_scene(batch, HISPARSE_CONTEXT)).tokens_per_s


def _resident(scene: Scene) -> Result:
    return clo_sim.simulate(scene, load_design("resident-sparse", scene.model))


def _most_that_fit() -> int:
    """Sequences whose vectors and index the GPUs hold, as many on each."""
    most = 0
    for batch in range(GPUS, MANY, GPUS):
        scene = _indexed_scene(batch, HISPARSE_CONTEXT)
        try:
            scene.plan(load_design("resident-sparse", scene.model))
        except SpecError:
            break
        most = batch
    return most


def _indexed_scene(batch: int, context: int, machine: str = "h200", attention_by: str = "sequences") -> Scene:
    shared = load_machine(machine).with_fields(tensor_parallel=GPUS, attention_by=attention_by)
    return clo_sim.make_scene("glm-5.1", shared, context_tokens=context, batch=batch)


def _copy_cliff() -> Claim:
    rate: Callable[[float], float] = load_named_profile("h100").copy_h2d.rate
    ours = ", ".join(f"{size // 1024} KiB {rate(size) / 1e9:.1f}" for size in PIECES)
    return Claim(
        "rate of batched copies by piece, GB/s (vLLM on H100)",
        "4 to 7 for 4 to 24 KiB, six times as much from 28 KiB",
        ours,
        "not a finding: the profile was read from this source",
    )


def table(found: Sequence[Claim]) -> str:
    """Markdown."""
    rows = [f"| {claim.what} | {claim.theirs} | {claim.ours} | {claim.why} |" for claim in found]
    return "\n".join(["| What | Theirs | Ours | Why they differ |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(table(claims()))

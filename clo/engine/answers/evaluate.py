"""How good the answers stay under a design: perplexity, passkeys, agreement and attention, against full attention.

Every token after the prompt goes through the design, fed or generated; what it did to earlier tokens stays in the
cache. Knows nothing about time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from clo.engine.answers.controls import Contender
from clo.engine.answers.fidelity import Fidelity
from clo.engine.answers.quality import Quality, paired
from clo.engine.answers.tasks import EvaluationSettings, Passkey, Tasks, check_text, read_tasks
from clo.engine.inline_decoder import InlineDecoder
from clo.engine.models.network import Network
from clo.errors import SpecError
from clo.plan import DecodePlan
from clo.progress import PhaseProgress, nobody
from clo.schedule.ops import Stage
from clo.specs import Design

WARMUP_STEPS = 8
"""Steps whose traffic is not counted: the first fills the cache."""

BASELINE = Contender(name="resident", design=Design(name="resident", attend="full", cache="resident"))


def evaluate(
    network: Network,
    tokenizer: Callable[..., object],
    text: str,
    contenders: Iterable[Contender],
    settings: EvaluationSettings,
    progress: PhaseProgress = nobody,
) -> list[Quality]:
    """One `Quality` per contender, in order. The baseline is full attention, decoded here too.

    Prompts are read once, `settings.batch_texts` at a time, and decoded by all contenders in turn. Raises `SpecError`
    for a text that is too short, for names that are not unique, where a design does not fit, and for a model with an
    indexer of its own.
    """
    chosen = list(contenders)
    if network.spec.indexer is not None:
        raise SpecError(
            f"evaluate: answers are compared with full attention, which is not what {network.spec.name} does: its own "
            "indexer chooses what it attends to"
        )
    _check_names(chosen)
    check_text(tokenizer, text, settings)
    baseline = _Outcome()
    outcomes = {contender.name: _Outcome() for contender in chosen}
    groups = math.ceil(settings.num_texts / settings.batch_texts)
    for group, tasks in enumerate(read_tasks(network, tokenizer, text, settings, progress)):
        rates: dict[str, float] = {}
        _decode(network, BASELINE, tasks, settings, baseline)
        for contender in chosen:
            rate = rates.get(contender.paced_by or "")
            paced = contender if rate is None else contender.paced(rate)
            rates[contender.name] = _decode(network, paced, tasks, settings, outcomes[contender.name])
            progress(contender.name, group + 1, groups)
    return [_quality(contender, outcomes[contender.name], baseline, settings) for contender in chosen]


def _check_names(contenders: Sequence[Contender]) -> None:
    seen: set[str] = set()
    for contender in contenders:
        if contender.name in seen:
            raise SpecError(f"evaluate: two designs are called {contender.name!r}: give them different names")
        if contender.paced_by is not None and contender.paced_by not in seen:
            raise SpecError(f"evaluate: {contender.name!r} is paced by {contender.paced_by!r}, which must come before")
        seen.add(contender.name)


@dataclass(slots=True)
class _Moved:
    """Sums over decode steps and sequences."""

    sequence_steps: int = 0
    h2d_bytes: float = 0.0
    requested_pages: int = 0
    fetched_pages: int = 0
    corrected_heads: int = 0
    selections: int = 0
    heads: int = 0

    def add(self, decoder: InlineDecoder) -> None:
        traffic = decoder.traffic
        self.sequence_steps += decoder.plan.workload.batch
        self.h2d_bytes += traffic.h2d_bytes
        self.fetched_pages += traffic.fetched_pages + traffic.prefetched_pages
        self.requested_pages += traffic.requested_pages
        self.corrected_heads += traffic.demand_misses
        self.selections += sum(layer.counts.missed[stage] for layer in decoder.layers for stage in Stage)
        self.heads += traffic.offloaded_heads


@dataclass(slots=True)
class _Outcome:
    """What one contender did. Lists by text: `[decoded_tokens - 1]`, the first token depends on the prompt alone."""

    losses: list[np.ndarray] = field(default_factory=list)
    best: list[np.ndarray] = field(default_factory=list)
    generated: list[np.ndarray] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    moved: _Moved = field(default_factory=_Moved)
    fidelity: Fidelity = field(default_factory=Fidelity)
    plan: DecodePlan | None = None


def _decode(
    network: Network, contender: Contender, tasks: Tasks, settings: EvaluationSettings, into: _Outcome
) -> float:
    """All tasks at once; the share of steps in which a head selected anew."""
    before, heads = into.moved.selections, into.moved.heads
    _decode_texts(network, contender, tasks, settings, into)
    into.correct += _answers(network, contender, tasks.passkeys)
    return (into.moved.selections - before) / max(1, into.moved.heads - heads)


def _decode_texts(
    network: Network, contender: Contender, tasks: Tasks, settings: EvaluationSettings, into: _Outcome
) -> None:
    """Each text twice in one batch: fed its own continuation, and generating greedily."""
    count, steps = len(tasks.texts), settings.decoded_tokens
    fed = torch.stack([continuation for _, continuation in tasks.texts])
    losses, best, generated = np.zeros((count, steps)), np.zeros((count, steps), int), np.zeros((count, steps), int)
    decoder = InlineDecoder(
        network, contender.design, max_new_tokens=steps, heads=contender.heads, observer=into.fidelity
    )
    logits = decoder.prefill([prompt for prompt, _ in tasks.texts] * 2)
    into.plan = decoder.plan
    for step in range(steps):
        chances = logits[:count].double().log_softmax(-1)
        losses[:, step] = -chances.gather(1, fed[:, step : step + 1])[:, 0].numpy(force=True)
        chosen = logits.argmax(-1).cpu()
        best[:, step], generated[:, step] = chosen[:count].numpy(), chosen[count:].numpy()
        if step < steps - 1:
            logits = decoder.step(torch.cat([fed[:, step], chosen[count:]]))
            if step >= min(WARMUP_STEPS, steps // 2, steps - 2):
                into.moved.add(decoder)
    into.losses += list(losses[:, 1:])
    into.best += list(best[:, 1:])
    into.generated += list(generated[:, 1:])


def _answers(network: Network, contender: Contender, passkeys: Sequence[Passkey]) -> list[bool]:
    """Whether each key is found when the question itself is decoded under the design.

    The answer is fed while every token of it is the most likely one: greedy decoding says it then, and only then.
    """
    if not passkeys:
        return []
    feeds = [torch.cat([passkey.question, passkey.answer]) for passkey in passkeys]
    longest = max(len(feed) for feed in feeds)
    padded = torch.stack([torch.nn.functional.pad(feed, (0, longest - len(feed))) for feed in feeds])
    decoder = InlineDecoder(network, contender.design, max_new_tokens=longest, heads=contender.heads)
    decoder.prefill([passkey.prompt for passkey in passkeys])
    said = [decoder.step(padded[:, step]).argmax(-1).cpu() for step in range(longest - 1)]
    correct = torch.stack(said, 1) == padded[:, 1:]
    return [
        bool(row[len(passkey.question) - 1 : len(feed) - 1].all())
        for row, passkey, feed in zip(correct, passkeys, feeds, strict=True)
    ]


def _quality(contender: Contender, found: _Outcome, baseline: _Outcome, settings: EvaluationSettings) -> Quality:
    plan, moved, design = found.plan, found.moved, contender.design
    assert plan is not None
    by_text = [float((mine - full).mean()) for mine, full in zip(found.losses, baseline.losses, strict=True)]
    delta, error = paired(by_text)
    one_tau = design.gated and (contender.heads is None or contender.heads.tau is None) and not contender.paced_by
    return Quality(
        design=contender.name,
        tau=design.tau if one_tau else None,
        nll=float(np.mean(found.losses)),
        delta_nll=delta,
        delta_nll_se=error,
        delta_nll_by_text=by_text,
        passkey_rate=float(np.mean(found.correct)) if found.correct else None,
        passkeys_found=found.correct,
        agreement=_agreement(found.generated, baseline.generated),
        top1_agreement=float(np.mean(np.equal(found.best, baseline.best))),
        output_error=found.fidelity.output_error,
        mass_recalled=found.fidelity.mass_recalled,
        hit_rate=1.0 - min(1.0, moved.fetched_pages / moved.requested_pages) if moved.requested_pages else 1.0,
        selections_per_head=moved.selections / max(1, moved.heads),
        demand_miss_rate=moved.corrected_heads / max(1, moved.heads),
        h2d_bytes_per_step=moved.h2d_bytes / moved.sequence_steps,
        refetch_bytes_per_step=moved.requested_pages * plan.page_bytes / moved.sequence_steps,
        index_bytes_per_step=moved.selections * plan.index_bytes_per_head / moved.sequence_steps,
        context_tokens=settings.context_tokens,
        budget_pages=plan.budget_pages,
        slot_pages=plan.slot_pages,
        steps=moved.sequence_steps,
    )


def _agreement(mine: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Share of tokens before the first that differs: after it the two have different contexts."""
    firsts = [np.append(np.flatnonzero(one != other), len(one))[0] for one, other in zip(mine, theirs, strict=True)]
    return float(np.mean([first / len(one) for first, one in zip(firsts, mine, strict=True)]))

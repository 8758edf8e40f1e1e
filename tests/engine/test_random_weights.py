"""Decodes with random weights: pages turn over about as fast as with a real model."""

from itertools import islice

import numpy as np
import pytest
import torch

from clo import presets
from clo.engine.decoder import Decoder
from clo.engine.measure import MachineRun, run_steps
from clo.engine.models.network import Network
from clo.engine.random_weights import TOKEN_LIKENESS, TOKEN_SCALE, random_model, random_prompt, random_text
from clo.specs import ModelSpec
from clo.specs.cut import first_layers

SHAPE = first_layers(presets.load_model("llama-3-8b"), 5).with_fields(
    hidden_size=512, intermediate_size=1024, num_query_heads=8, num_kv_heads=2, vocab_size=2000
)
CONTEXT, STEPS = 2048, 24


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(random_model(SHAPE), SHAPE.name)


def run(network: Network, name: str) -> MachineRun:
    design = presets.load_design(name, network.spec).as_without_head_profile().with_fields(slot_budgets=1.0)
    with Decoder(network, design, max_new_tokens=40) as decoder:
        return run_steps(decoder, [random_prompt(network, CONTEXT)], steps=STEPS, warmup_steps=4)


def budgets_fetched(run: MachineRun) -> float:
    """A step, of layers that choose pages."""
    choosing = SHAPE.num_layers - run.plan.design.dense_layers
    return float(run.traffic.demand_pages.sum()) / (run.plan.budget_pages * SHAPE.num_kv_heads * choosing * STEPS)


def test_pages_turn_over_about_as_fast_as_recorded(network: Network) -> None:
    """The recorded trace of SmolLM2-135M at 4,096 tokens: reuse 0.57; budgets fetched a step 0.115 and 0.234."""
    clo, resolve = run(network, "clo"), run(network, "resolve")
    reused = float(np.sum(clo.traffic.reused_heads)) / float(
        np.sum(clo.traffic.reused_heads + clo.traffic.demand_heads)
    )
    assert reused == pytest.approx(0.57, abs=0.15)
    assert budgets_fetched(resolve) == pytest.approx(0.234, rel=0.4)
    assert budgets_fetched(clo) == pytest.approx(0.115, rel=0.5)


def queries(network: Network, num: int) -> torch.Tensor:
    """Of the third layer, one after another, without rotation: `[num, heads, head_dim]`."""
    seen: list[torch.Tensor] = []
    hook = network.model.model.layers[2].self_attn.q_proj.register_forward_hook(lambda *call: seen.append(call[2]))
    tokens = torch.cat(list(islice(random_text(network, 1), num)))
    with torch.inference_mode():
        network.model(tokens[None], use_cache=False)
    hook.remove()
    return seen[0][0].view(num, SHAPE.num_query_heads, SHAPE.head_dim)


def test_queries_resemble_each_other_as_embeddings_do(network: Network) -> None:
    """Every layer of a random network maps them without a preferred direction; attention mixes what came before."""
    made = queries(network, 60)
    cosines = torch.nn.functional.cosine_similarity(made[1:], made[:-1], dim=-1)
    assert cosines.mean() == pytest.approx(TOKEN_LIKENESS, abs=0.06)


def test_embeddings(network: Network) -> None:
    rows = network.model.get_input_embeddings().weight.detach().double()
    assert float(rows.square().mean().sqrt()) == pytest.approx(TOKEN_SCALE, rel=0.1)
    common = rows.mean(0)
    assert float(common.square().sum() / rows.square().sum(1).mean()) == pytest.approx(TOKEN_LIKENESS, abs=0.02)


def test_without_likeness_they_are_the_library_s() -> None:
    small = first_layers(presets.load_model("smollm2-135m"), 1).with_fields(vocab_size=300)
    rows = random_model(small, likeness=0).get_input_embeddings().weight.detach()
    assert float(rows.square().mean().sqrt()) == pytest.approx(0.02, rel=0.05)


def test_a_text_is_the_same_for_every_design_and_differs_by_seed(network: Network) -> None:
    first, again, other = (list(islice(random_text(network, 3, seed=seed), 5)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(torch.stack(first), torch.stack(other))
    assert all(tokens.shape == (3,) and tokens.min() >= 0 and tokens.max() < SHAPE.vocab_size for tokens in first)


@pytest.mark.parametrize("model", ["smollm2-135m", "llama-3-8b"])
def test_a_passage_s_keys_are_as_long(model: str) -> None:
    shape: ModelSpec = first_layers(presets.load_model(model), 1).with_fields(
        hidden_size=128, intermediate_size=64, vocab_size=50, num_query_heads=8, num_kv_heads=8
    )
    keys, values = random_prompt(Network(random_model(shape), "small"), 1605).kv[0]
    assert keys.shape == values.shape == (8, 1605, shape.head_dim)
    squares = keys.square().mean(-1)
    assert float(squares.mean()) == pytest.approx(1.0, abs=0.08)
    passages = squares[:, :1600].view(8, 100, 16).mean(-1).log() / 2
    assert float(passages.std()) == pytest.approx(0.25, abs=0.03)

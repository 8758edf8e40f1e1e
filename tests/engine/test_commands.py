"""`clo generate`, `clo evaluate` and `clo heads` as a user meets them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from commands import run
from small import design, prompt, small_model

from clo.engine import sampling
from clo.engine.decoder import Decoder
from clo.engine.measure import run_steps
from clo.engine.models.loading import load_model
from clo.errors import CloError
from clo.timeline import load_chrome_trace
from clo_cli.main import clo

on_each_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    ],
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], "PROMPT: empty"),
        (["generate", "@nosuch.txt"], "PROMPT @nosuch.txt: No such file"),
        (["generate", f"@{os.devnull}"], f"PROMPT @{os.devnull}: empty"),
        (["generate", "a", "--tokens", "0"], "0 is not in the range x>=1"),
        (["generate", "a", "--temperature", "-1"], "--temperature = -1.0"),
        (["generate", "a", "--seed", "-1"], "--seed = -1: must be from 0"),
        (["generate", "a", "--seed", "99999999999999999999"], "--seed = 99999999999999999999: must be from 0"),
        (["generate", "a", "--design", "nosuch"], "design 'nosuch' is unknown"),
        (["generate", "a", "--tokens", "1", "--timeline", "a.json"], "--timeline: the first token comes with"),
        (["evaluate", "--seed", "-1"], "--seed = -1: must be from 0"),
        (["evaluate", "--designs", " ,"], "--designs = ' ,': expected names"),
        (["evaluate", "--taus", "0.5,x"], "--taus = '0.5,x': numbers separated by commas"),
        (["evaluate", "--pools", "1,,2"], "--pools = '1,,2': numbers separated by commas"),
        (["evaluate", "--vary", "tau"], "--vary = 'tau': FIELD=A,B is expected"),
        (["evaluate", "--vary", "nosuch=1"], "design.nosuch: unknown field"),
        (["evaluate", "--vary", "design.nosuch=1"], "design.nosuch: unknown field"),
        (["evaluate", "--designs", "resident", "--vary", "tau=1"], "--vary: none of the designs (resident) selects"),
        (["evaluate", "--designs", "resolve", "--taus", "0.5"], "--taus: none of the designs (resolve) reuses heads"),
        (["evaluate", "--designs", "staged", "--pools", "1"], "--pools: none of the designs (staged) keeps pages"),
        (["evaluate", "--controls", "resolve"], "--controls = 'resolve': it reuses no heads"),
        (["evaluate", "--against", "lru"], "--against = 'lru': none of the designs (resident, resolve, clo)"),
        (["evaluate", "--figure", "a.txt"], "a.txt: a figure's suffix must be one of"),
        (["evaluate", "--tokens", "1"], "evaluate.decoded_tokens = 1: must be at least 2"),
        (["evaluate", "--context", "0"], "evaluate.context_tokens = 0: must be at least 1"),
        (["evaluate", "--context", "1024,x"], "--context = '1024,x': whole numbers separated by commas"),
        (["evaluate", "--context", "512,0"], "evaluate.context_tokens = 0: must be at least 1"),
        (["evaluate", "--context", "1,2", "--figure", "a.png"], "--figure: shows one context, --context = 1,2 names 2"),
        (["evaluate", "--passkeys", "-1"], "evaluate.num_passkeys = -1"),
        (["evaluate", "--text", "nosuch.txt"], "--text nosuch.txt: No such file"),
        (["heads", "nosuch"], "trace 'nosuch' is unknown"),
        (["heads", "--budget", "0"], "--budget = 0.0: must be a share"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(arguments: list[str], message: str) -> None:
    with pytest.raises((CloError, click.BadParameter)) as refused:
        CliRunner().invoke(clo, arguments, catch_exceptions=False, standalone_mode=False)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_head_of_the_trace_is_listed() -> None:
    heads = json.loads(run("heads", "--json"))["heads"]
    assert len(heads) == 90
    assert {len(head["importance"]) for head in heads} == {3}
    assert run("heads").count("\n") > 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [["generate", "a"], ["evaluate"], ["run"]])
def test_a_device_that_is_not_there_is_refused(command: list[str]) -> None:
    done = CliRunner().invoke(clo, [*command, "--device", "cuda"])
    assert str(done.exception) == "--device cuda: torch sees no CUDA device on this machine"


@pytest.mark.model
@on_each_device
def test_a_real_model_generates_under_a_design(tmp_path: Path, device: str) -> None:
    timeline = tmp_path / "step.json"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Water boils at one hundred degrees. " * 20 + "Water boils at one hundred", encoding="utf-8")
    options = ["--device", device, "--tokens", "4", "--json", "--timeline", str(timeline)]
    said = json.loads(run("generate", f"@{prompt}", *options))
    assert said["text"].startswith(" degrees")
    assert said["design"] == "clo"
    assert said["model"] == "smollm2-135m"
    assert 0 < said["h2d_bytes_per_step"] < said["host_bytes"]
    (traced,) = load_chrome_trace(timeline)
    assert {span.name for span in traced.spans} >= {"attention", "gather_pages", "hit_test"}


@pytest.mark.model
@pytest.mark.parametrize("left_out", [0, 1])
def test_characters_of_several_tokens_are_shown_once_they_are_whole(
    monkeypatch: pytest.MonkeyPatch, left_out: int
) -> None:
    _, tokenizer = load_model("smollm2-135m")
    tokens = tokenizer("Hi \N{GRINNING FACE} \N{CJK UNIFIED IDEOGRAPH-4E16}").input_ids
    said = tokens[: len(tokens) - left_out]
    coming = iter(said)
    monkeypatch.setattr(sampling, "sampler_of", lambda *_: lambda _: torch.tensor([next(coming)]))
    assert len(tokens) > 5
    assert run("generate", "Say", "--tokens", len(said)) == tokenizer.decode(said)


@pytest.mark.model
def test_who_waits_for_a_prompt_sees_that_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int | None]] = []

    @contextmanager
    def phases() -> Iterator[Callable[[str, int, int | None], None]]:
        yield lambda *now: told.append(now)

    monkeypatch.setattr("clo_cli.bars.phases", phases)
    run("generate", "Water boils at", "--tokens", "2")
    assert told == [("reading the prompt", 0, None)]


@pytest.mark.model
def test_a_token_that_comes_with_the_prompt_has_no_time() -> None:
    done = CliRunner().invoke(clo, ["generate", "Water boils at", "--tokens", "1"], catch_exceptions=False)
    assert "3 + 1 tokens, the first of which comes with the prompt: no decode step was run" in done.stderr
    assert "TPOT" not in done.stderr
    said = json.loads(run("generate", "Water boils at", "--tokens", "1", "--json"))
    assert said["tpot_s"] is said["hit_rate"] is said["h2d_bytes_per_step"] is None


@pytest.mark.model
@on_each_device
def test_answers_of_a_real_model_are_recorded_for_each_design(device: str) -> None:
    records = json.loads(
        run(
            *("evaluate", "--designs", "resident,clo", "--taus", "0.5,0.9", "--context", "256", "--texts", "1"),
            *("--tokens", "8", "--passkeys", "1", "--json", "--device", device),
        )
    )
    assert [record["design"] for record in records] == ["resident", "clo tau=0.5", "clo tau=0.9"]
    assert records[0]["delta_nll"] == 0.0
    assert records[1]["h2d_bytes_per_step"] <= records[2]["h2d_bytes_per_step"]
    needed = {"design", "delta_nll", "delta_nll_se", "passkey_rate", "hit_rate", "h2d_bytes_per_step"}
    assert all(needed <= record.keys() for record in records)


@pytest.mark.model
def test_answers_at_several_lengths_are_those_at_each(tmp_path: Path) -> None:
    few = ("--designs", "resolve,clo", "--texts", "1", "--tokens", "4", "--passkeys", "1", "--against", "resolve")
    out = tmp_path / "answers.json"
    both = json.loads(run("evaluate", *few, "--context", "256,128", "--json", "--out", str(out)))
    alone = json.loads(run("evaluate", *few, "--context", "128", "--json"))
    assert [(record["context_tokens"], record["design"]) for record in both] == [
        (tokens, name) for tokens in (128, 256) for name in ("resolve", "clo")
    ]
    assert both[:2] == alone
    assert json.loads(out.read_text(encoding="utf-8"))["evaluation"]["context_tokens"] == [256, 128]


def test_a_real_run_tells_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []
    with Decoder(small_model(), design("clo"), max_new_tokens=8) as decoder:
        run_steps(decoder, [prompt(40)], steps=3, warmup_steps=1, progress=lambda *now: told.append(now))
    assert told == [(done, 4) for done in range(1, 5)]

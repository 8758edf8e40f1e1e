"""Compiles every kernel for GPUs that need not be there; run as a script, without the interpreter.

    python compiled.py 80 90

prints {"kernel:architecture": {"ptx", "registers", "shared_bytes", "spill_bytes"}} as JSON; registers and spills are
null where Triton's copies of ptxas are not found or too old for its PTX.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clo_kernels.append_kv import append_kv_kernel
from clo_kernels.bulk_gather import ROW_WORDS, STAGES, bulk_gather_kernel
from clo_kernels.dispatch import FUSED, ROUNDED
from clo_kernels.gather_pages import gather_pages_kernel
from clo_kernels.hit_test import hit_test_kernel
from clo_kernels.resolve_pages import MAX_BUDGET, variant
from clo_kernels.ring_doorbell import ring_doorbell_kernel
from clo_kernels.rotate import rotate_kernel
from clo_kernels.score_pages import fold_scores_kernel, page_logits_kernel
from clo_kernels.select_pages import select_pages_kernel
from clo_kernels.sparse_decode_attention import attend_split_kernel, merge_splits_kernel
from clo_kernels.token_logits import hash_query_kernel, token_logits_kernel
from clo_kernels.wait_ready import wait_ready_kernel

RESOLVE = "*i32/16 *u8/16" + 7 * " *i32/16"
SELECT = "*fp32/16 *i32/16 *u8/16 *i32/16 i32 i32 i32"
APPEND = "*bf16/16 *bf16/16 *i32/16 *bf16/16 *bf16/16 *bf16/16 *i32/16 *{1}/16 *{2}/16 *{0}/16 *fp32/16" + 9 * " i32"
APPENDED: dict[str, Any] = {
    "DIM": 128, "DIM_PAD": 128, "ROWS": 2, "PAGE": 16, "BLOCK": 16, "HASHED": 64, "CODED": False,
}  # fmt: skip
APPENDED_FOR_ALL: dict[str, Any] = APPENDED | {"DIM": 576, "DIM_PAD": 1024, "ROWS": 1, "BLOCK": 8}
PLAIN, CODED = ("bf16", "bf16"), ("i8", "bf16")
ATTEND = "*bf16/16 *bf16/16 *bf16/16 *{}/16 *{}/16 *bf16/16 *i32/16 *i32/16 *i32/16 *fp32/16 *fp32/16 fp32" + 8 * " i32"
ATTENDED: dict[str, Any] = {
    "GROUP": 8, "MEMBERS": 16, "DIM": 128, "DIM_PAD": 128, "REST": -1, "REST_PAD": 16, "PAGE": 16, "BLOCK": 64,
    "CODED": False, "DOT": tl.bfloat16,
}  # fmt: skip
ATTENDED_BY_ALL: dict[str, Any] = ATTENDED | {
    "GROUP": 128, "MEMBERS": 32, "DIM": 512, "DIM_PAD": 512, "REST": 64, "REST_PAD": 64, "BLOCK": 32,
}  # fmt: skip
TOKEN_LOGITS: dict[str, Any] = {
    "GROUP": 8, "MEMBERS": 16, "DIM": 128, "PART": 128, "PAGE": 16, "PAGE_PAD": 16, "BLOCK": 4, "DOT": tl.bfloat16,
}  # fmt: skip
OF_ALL: dict[str, Any] = {"GROUP": 128, "MEMBERS": 32, "DIM": 576, "PART": 64}
"""128 query heads that share one vector a token (latent attention)."""
ROTATE = "*bf16/16 *bf16/16 *bf16/16 *bf16/16 *bf16/16 *bf16/16 i32 i32"
LOGITS = "*bf16/16 *bf16/16 *i32/16 *u8/16 *fp32/16 *fp32/16 *fp32/16 fp32 i32 i32 i32"
LOGITS_OF_TOKENS = "*bf16/16 *i32/16 *fp32/16 *i32/16 *i32/16 *u8/16 *fp32/16 *fp32/16 *fp32/16 fp32 i32 i32 i32"
PAGE_LOGITS: dict[str, Any] = {
    "GROUP": 8, "MEMBERS": 16, "DIM": 128, "PART": 128, "VECTORS": 2, "BLOCK": 32, "DOT": tl.bfloat16,
}  # fmt: skip


def resolve(budget: int, slots: int, *, replace: bool = False) -> tuple[Any, str, dict[str, Any], int]:
    """As the kernel is launched for so many pages and slots: Triton asks whether numbers are multiples of 16."""
    kernel, constants = variant(budget, slots, replace=replace)
    numbers = (" i32" + ("/16" if number % 16 == 0 else "") for number in (budget, slots, 1))
    return kernel, RESOLVE + "".join(numbers), constants, constants.pop("num_warps")


# kernel, dtypes of pointers ("/16": aligned, as torch allocates) and numbers, constants, warps
KERNELS: dict[str, tuple[Any, str, dict[str, Any], int]] = {
    "hit_test": (
        hit_test_kernel,
        "*bf16/16 *bf16/16 *fp32/16 *fp32/16 *u8/16 i32",
        {"GROUP": 7, "GROUP_PAD": 8, "DIM": 128, "PART": 128, "FOLD": "importance"},
        1,
    ),
    "hit_test_shared": (
        hit_test_kernel,
        "*bf16/16 *bf16/16 *fp32/16 *fp32/16 *u8/16 i32",
        {"GROUP": 128, "GROUP_PAD": 128, "DIM": 576, "PART": 64, "FOLD": "importance"},
        8,
    ),
    "resolve_pages": resolve(819, 1638),
    "resolve_pages_few": resolve(5, 9),
    "resolve_pages_aligned": resolve(1024, 2048),
    "resolve_pages_replace": resolve(819, 1638, replace=True),
    "resolve_pages_replace_aligned": resolve(1024, 2048, replace=True),
    "resolve_pages_4k": resolve(4096, 4096),
    "resolve_pages_8k": resolve(8192, 8192),
    "resolve_pages_more": resolve(2047, 16383),
    "resolve_pages_most": resolve(MAX_BUDGET, 65536),
    "resolve_pages_replace_most": resolve(MAX_BUDGET, 65536, replace=True),
    "gather_pages": (
        gather_pages_kernel,
        "*i32/16 *i32/16 *i32/16 *i32/16 *i32/16 i32 i32 i32 i32 i32",
        {"PAGE_WORDS": 2048, "CHUNK": 2048, "ITEMS": 4, "ROWS_PAD": 128},
        8,
    ),
    "gather_pages_chunked": (
        gather_pages_kernel,
        "*i32/16 *i32/16 *i32/16 *i32/16 *i32/16 i32 i32 i32 i32 i32",
        {"PAGE_WORDS": 8192, "CHUNK": 4096, "ITEMS": 2, "ROWS_PAD": 128},
        8,
    ),
    "bulk_gather": (
        bulk_gather_kernel,
        f"tensordesc<i32[8,{ROW_WORDS}]> *i32/16 *i32/16 *i32/16 *i32/16 i32 i32 i32 i32 i32",
        {"PAGE_WORDS": 2048, "ROWS": 8, "WORDS": ROW_WORDS, "ROWS_PAD": 8, "UNDER_WAY": STAGES},
        8,
    ),
    "attend_split": (attend_split_kernel, ATTEND.format(*PLAIN), ATTENDED, 4),
    "attend_split_coded": (attend_split_kernel, ATTEND.format(*CODED), ATTENDED | {"CODED": True}, 4),
    "attend_split_shared": (attend_split_kernel, ATTEND.format(*PLAIN), ATTENDED_BY_ALL, 8),
    "attend_split_shared_coded": (
        attend_split_kernel,
        ATTEND.format(*CODED),
        ATTENDED_BY_ALL | {"CODED": True, "MEMBERS": 16},
        8,
    ),
    "merge_splits": (
        merge_splits_kernel,
        "*fp32/16 *fp32/16 *fp32/16 *bf16/16 i32 i32",
        {"WITH_SINKS": False, "DIM": 128, "PART": 128, "SPLITS_PAD": 64},
        4,
    ),
    "merge_splits_sinks": (
        merge_splits_kernel,
        "*fp32/16 *fp32/16 *fp32/16 *bf16/16 i32 i32",
        {"WITH_SINKS": True, "DIM": 128, "PART": 128, "SPLITS_PAD": 64},
        4,
    ),
    "select_pages": (select_pages_kernel, SELECT, {"BLOCK": 8192, "HELD": True, "PLACE": 4096}, 32),
    "select_pages_32k": (select_pages_kernel, SELECT, {"BLOCK": 32768, "HELD": True, "PLACE": 4096}, 32),
    "select_pages_more": (select_pages_kernel, SELECT, {"BLOCK": 32768, "HELD": False, "PLACE": 4096}, 32),
    "page_logits": (page_logits_kernel, LOGITS, PAGE_LOGITS, 4),
    "page_logits_256": (page_logits_kernel, LOGITS, PAGE_LOGITS | {"DIM": 256, "PART": 64}, 4),
    "page_logits_shared": (page_logits_kernel, LOGITS, PAGE_LOGITS | OF_ALL, 4),
    "fold_scores": (
        fold_scores_kernel,
        "*u8/16 *fp32/16 *fp32/16 *fp32/16 *fp32/16 i32 i32",
        {"GROUP": 8, "MEMBERS": 8, "BLOCKS_PAD": 256, "BLOCKS_PART": 256, "BLOCK": 1024},
        4,
    ),
    "fold_scores_many": (
        fold_scores_kernel,
        "*u8/16 *fp32/16 *fp32/16 *fp32/16 *fp32/16 i32 i32",
        {"GROUP": 128, "MEMBERS": 1, "BLOCKS_PAD": 16384, "BLOCKS_PART": 8192, "BLOCK": 1024},
        4,
    ),
    "rotate": (rotate_kernel, ROTATE, {"FIRST": 0, "ROTATED": 128, "DIM": 128, "DIM_PAD": 128, "PAIRED": False}, 1),
    "rotate_fp32": (
        rotate_kernel,
        ROTATE.replace("bf16", "fp32"),
        {"FIRST": 0, "ROTATED": 128, "DIM": 128, "DIM_PAD": 128, "PAIRED": False},
        1,
    ),
    "rotate_shared": (
        rotate_kernel,
        ROTATE,
        {"FIRST": 512, "ROTATED": 64, "DIM": 576, "DIM_PAD": 1024, "PAIRED": True},
        4,
    ),
    "token_logits_4bit": (token_logits_kernel, LOGITS_OF_TOKENS, TOKEN_LOGITS | {"HASHED": False}, 4),
    "token_logits_hash": (token_logits_kernel, LOGITS_OF_TOKENS, TOKEN_LOGITS | {"HASHED": True}, 4),
    "token_logits_4bit_shared": (token_logits_kernel, LOGITS_OF_TOKENS, TOKEN_LOGITS | OF_ALL | {"HASHED": False}, 4),
    "token_logits_hash_shared": (
        token_logits_kernel,
        LOGITS_OF_TOKENS,
        TOKEN_LOGITS | OF_ALL | {"HASHED": True, "MEMBERS": 16},
        4,
    ),
    "hash_query": (
        hash_query_kernel,
        "*bf16/16 *fp32/16 *i32/16 *fp32/16 i32",
        {"DIM": 128, "PART": 64, "ROWS": 16},
        4,
    ),
    "append_kv": (append_kv_kernel, APPEND.format("bf16", *PLAIN), APPENDED | {"KIND": "page_minmax"}, 4),
    "append_kv_4bit": (append_kv_kernel, APPEND.format("i32", *PLAIN), APPENDED | {"KIND": "key_4bit"}, 4),
    "append_kv_hash": (append_kv_kernel, APPEND.format("i32", *PLAIN), APPENDED | {"KIND": "sign_hash"}, 4),
    "append_kv_coded": (
        append_kv_kernel,
        APPEND.format("i32", *CODED),
        APPENDED | {"KIND": "key_4bit", "CODED": True},
        4,
    ),
    "append_kv_shared": (
        append_kv_kernel,
        APPEND.format("bf16", *PLAIN),
        APPENDED_FOR_ALL | {"KIND": "page_minmax"},
        4,
    ),
    "append_kv_shared_hash": (
        append_kv_kernel,
        APPEND.format("i32", *PLAIN),
        APPENDED_FOR_ALL | {"KIND": "sign_hash", "BLOCK": 16},
        8,
    ),
    "append_kv_shared_coded": (
        append_kv_kernel,
        APPEND.format("i32", *CODED),
        APPENDED_FOR_ALL | {"KIND": "key_4bit", "CODED": True},
        4,
    ),
    "ring_doorbell": (ring_doorbell_kernel, "*i64/16 *i32/16 *i32/16 *i64/16 i32", {"BLOCK": 1024}, 4),
    "wait_ready": (wait_ready_kernel, "*i64/16 *i64/16 *i64/16 i32", {}, 1),
}


def compiled(
    kernel: Any, types: str, constants: dict[str, Any], num_warps: int, architecture: int, *, ones: bool = False
) -> Any:
    """With `ones`, every number is 1: Triton then makes it a constant, which is no tensor."""
    names = [name for name in kernel.arg_names if name not in constants]
    kinds = dict(zip(names, types.split(), strict=True))
    if ones:
        constants = {**constants, **{name: 1 for name, kind in kinds.items() if kind == "i32"}}
    signature = {
        name: "constexpr" if name in constants else kinds[name].removesuffix("/16") for name in kernel.arg_names
    }
    aligned = [i for i, name in enumerate(kernel.arg_names) if kinds.get(name, "").endswith("/16")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": num_warps, "num_stages": 3} | (ROUNDED if kernel is rotate_kernel else FUSED)
    return triton.compile(source, target=target, options=options)


def assembled(ptx: str) -> dict[str, int | None]:
    """Registers of a thread and bytes spilled, as ptxas reports them."""
    target = re.findall(r"\.target (\w+)", ptx)[0]
    for ptxas in sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*")):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(ptx)
            command = [str(ptxas), "-v", f"--gpu-name={target}", str(source), "-o", f"{source}.cubin"]
            run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode == 0:
            said = run.stdout + run.stderr
            spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
            return {"registers": int(re.findall(r"Used (\d+) registers", said)[0]), "spill_bytes": spilled}
    return {"registers": None, "spill_bytes": None}


def main(architectures: list[int]) -> None:
    """Compile for all of them and print."""
    result: dict[str, dict[str, Any]] = {}
    for name, (kernel, types, constants, num_warps) in KERNELS.items():
        compiled(kernel, types, constants, num_warps, architectures[-1], ones=True)
        for architecture in architectures:
            done = compiled(kernel, types, constants, num_warps, architecture)
            ptx = done.asm["ptx"]
            result[f"{name}:{architecture}"] = {
                "ptx": ptx,
                "shared_bytes": done.metadata.shared,
                **assembled(ptx),
            }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])

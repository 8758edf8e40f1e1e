"""torch's CUDA operations, done by the CPU in the same memory: `install` once, in a process that runtime.c serves.

Every operation that has a CUDA implementation gets another: it sees its tensors as the CPU's, at the same addresses,
and is done by its stream when its turn comes; what comes out has its memory at once. Operations that need a number of
the device on the host wait for the stream, and are refused while it is captured.
"""

from __future__ import annotations

import ctypes
import itertools
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
THEIR_OWN = (
    *("empty.memory_format", "empty_strided", "as_strided", "view", "_reshape_alias", "alias", "detach", "unfold"),
    *("view_as_real", "view_as_complex", "resize_", "set_", "set_.source_Storage", "set_.source_Tensor"),
    *("set_.source_Storage_storage_offset", "set_.source_Tensor_storage_offset", "is_set_to"),
    *("record_stream", "_pin_memory", "is_pinned"),
)
"""They compute nothing."""
WAITING = (
    *("_local_scalar_dense", "nonzero", "masked_select", "equal"),
    *("_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave"),
)
"""They need a number on the host."""
INDEXED = ("index.Tensor", "index_put_", "_index_put_impl_")
"""They do where an index is a mask."""

_calls: dict[int, Callable[[], Any]] = {}
"""What streams are to do, by number; what graphs have done stays."""
_once: set[int] = set()
_numbers = itertools.count()


class RehearsalError(RuntimeError):
    """What a GPU would refuse."""


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long)
def _do(number: int) -> int:
    try:
        with torch.inference_mode():
            (_calls.pop if number in _once else _calls.__getitem__)(number)()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        _once.discard(number)
    return 0


_runtime = ctypes.CDLL("libcudart.so.13")
for _function in (_runtime.rehearsal_captures, _runtime.cudaStreamSynchronize):
    _function.argtypes = (ctypes.c_void_p,)
_runtime.rehearsal_submit.argtypes = (ctypes.c_void_p, ctypes.c_long)


def current_stream() -> int:
    """Its handle."""
    return int(torch.cuda.current_stream().cuda_stream)


def captures() -> bool:
    """Whether the current stream is captured."""
    return bool(_runtime.rehearsal_captures(current_stream()))


def submit(do: Callable[[], Any], stream: int | None = None) -> None:
    """Have it done by the stream (the current one), or with each launch of the graph that it is captured into.

    What it needs of tensors it has to have taken before (`on_cpu`): tensors may be gone when its turn comes, and their
    memory is others' then, as on a GPU.
    """
    stream, number = current_stream() if stream is None else stream, next(_numbers)
    _calls[number] = do
    if not _runtime.rehearsal_captures(stream):
        _once.add(number)
    _runtime.rehearsal_submit(stream, number)


def wait() -> None:
    """Until the current stream has done everything; not while it is captured."""
    if captures():
        raise RehearsalError("a capture waits for the device")
    if _runtime.cudaStreamSynchronize(current_stream()):
        raise RehearsalError("the device has failed")


def on_cpu(value: Any) -> Any:
    """A CUDA tensor as one of the CPU in the same memory; CUDA generators as none; anything else as it is."""
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    if isinstance(value, torch.Generator):
        return None
    if not (isinstance(value, torch.Tensor) and value.is_cuda):
        return value
    storage, item = value.untyped_storage(), value.element_size()
    if not value.numel():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    room = (ctypes.c_uint8 * (storage.nbytes() // item * item)).from_address(storage.data_ptr())
    flat = torch.frombuffer(room, dtype=value.dtype)
    seen = flat.as_strided(value.size(), value.stride(), value.storage_offset())
    seen = seen.conj() if value.is_conj() else seen
    return torch._neg_view(seen) if value.is_neg() else seen


def room_for(value: Any) -> Any:
    """A new tensor of the device like one of another; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=CUDA)


def put(there: Any, found: Any) -> None:
    """Values into the CPU's views of tensors, one or several."""
    targets, values = (each if isinstance(each, tuple | list) else (each,) for each in (there, found))
    for to, value in zip(targets, values, strict=True):
        if isinstance(to, torch.Tensor):
            to.copy_(value)


def outcome(compute: Callable[..., Any], given: Any, named: Any) -> Any:
    """Tensors as `compute` would make them, without values; of the CPU's where torch can say no more without them."""
    try:
        return compute(*tree_map(_shape, given), **tree_map(_shape, named))
    except (RuntimeError, NotImplementedError):
        # zeros are valid as indices, too
        return compute(*tree_map(_zeros, given), **tree_map(_zeros, named))


def _shape(value: Any) -> Any:
    if isinstance(value, torch.device):
        return META
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=META)


def _zeros(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else value


def functional(compute: Callable[..., Any]) -> Callable[..., Any]:
    """An operation that makes new tensors, done by `compute` on the CPU's."""

    def run(*given: Any, **named: Any) -> Any:
        given, named = tree_map(on_cpu, given), tree_map(on_cpu, named)
        there = tree_map(room_for, outcome(compute, given, named))
        views = tree_map(on_cpu, there)
        submit(lambda: put(views, compute(*given, **named)))
        return there

    return run


def changing(compute: Callable[..., Any], arguments: list[Any], results: int, *, sizes: bool) -> Callable[..., Any]:
    """An operation that writes into some of its arguments; `sizes`: it gives empty ones a size."""
    written = [(place, one.name) for place, one in enumerate(arguments) if one.alias_info and one.alias_info.is_write]

    def run(*given: Any, **named: Any) -> Any:
        targets = [
            named[name] if name in named else given[place]
            for place, name in written
            if name in named or place < len(given)
        ]
        if sizes and any(isinstance(one, torch.Tensor) and not one.numel() for one in targets):
            found = outcome(compute, tree_map(on_cpu, given), tree_map(on_cpu, named))
            for to, value in zip(targets, found if isinstance(found, tuple) else (found,), strict=False):
                to.resize_(value.size())
        seen, named_seen = tree_map(on_cpu, given), tree_map(on_cpu, named)
        submit(lambda: compute(*seen, **named_seen))
        return None if not results else targets[0] if results == 1 else tuple(targets[:results])

    return run


def waiting(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """An operation that the host waits for, as it needs a number of the device."""

    def run(*given: Any, **named: Any) -> Any:
        if captures():
            raise RehearsalError(f"{name} in a capture")
        wait()
        found = compute(*tree_map(on_cpu, given), **tree_map(on_cpu, named))
        there = tree_map(room_for, found)
        put(tree_map(on_cpu, there), found)
        return there

    return run


def unless_masked(name: str, run: Callable[..., Any], wait_and_run: Callable[..., Any]) -> Callable[..., Any]:
    """An operation with indices: a mask among them has to be counted first."""

    def either(to: torch.Tensor, indices: Any, *given: Any, **named: Any) -> Any:
        masked = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)
        if masked and name != "index.Tensor":
            wait()  # what is written is there already
        return (wait_and_run if masked and name == "index.Tensor" else run)(to, indices, *given, **named)

    return either


def copy_(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """As torch copies between memories: the host goes on if it says so and its memory is pinned."""
    pageable = any(not one.is_cuda and not one.is_pinned() for one in (to, source))
    waits = not (to.is_cuda and source.is_cuda) and (pageable or not non_blocking)
    if captures() and waits:
        raise RehearsalError(f"a capture {'copies pageable memory' if pageable else 'waits for a copy'}")
    target, values = on_cpu(to), on_cpu(source)  # which keep what is the host's, as torch does
    submit(lambda: target.copy_(values))
    if waits:
        wait()
    return to


def attention(results: int, numbers: tuple[int, ...], *, masked: bool) -> Callable[..., Any]:
    """One of torch's fused attentions; of what they return beside, nothing is computed. `numbers`: not tensors."""

    def compute(query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scale: float | None) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            found = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
            )
        return found.transpose(1, 2).contiguous().transpose(1, 2)  # as theirs lie in memory

    def run(query: Any, key: Any, value: Any, *others: Any, scale: float | None = None, **named: Any) -> Any:
        mask = others[0] if masked and others else named.get("attn_bias")
        causal = 3 if masked else 1
        is_causal = others[causal] if len(others) > causal else named.get("is_causal", False)
        out = functional(compute)(query, key, value, mask, is_causal, scale)
        beside = [0 if number in numbers else torch.empty(0, device=CUDA) for number in range(1, results)]
        return (out, *beside)

    return run


def depthwise(source: Any, weight: Any, size: Any, bias: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """A convolution of each channel by itself."""
    groups = source.shape[-len(size) - 1]
    return torch.nn.functional.conv2d(source, weight, bias, stride, padding, dilation, groups=groups)


SPECIAL: dict[str, Callable[..., Any]] = {
    "copy_": copy_,
    "_fused_sdp_choice": lambda *_, **__: 0,
    "_scaled_dot_product_efficient_attention": attention(4, (), masked=True),
    "_scaled_dot_product_cudnn_attention": attention(9, (4, 5), masked=True),
    "_scaled_dot_product_flash_attention": attention(9, (4, 5), masked=False),
    # what the CPU has by another name, or not for all types
    "_conv_depthwise2d": functional(depthwise),
    "histc": functional(lambda values, *others: torch.histc(values.double(), *others).to(values.dtype)),
}


def _stand_in(name: str, operation: Any) -> Callable[..., Any]:
    if name in SPECIAL:
        return SPECIAL[name]
    schema = operation._schema
    tensors = [place for place, one in enumerate(schema.arguments) if str(one.type) == "Tensor"]

    def compute(*given: Any, **named: Any) -> Any:
        # the dispatcher took a plain number for a tensor: another overload takes it
        numbers = any(place < len(given) and isinstance(given[place], int | float | complex) for place in tensors)
        return (operation.overloadpacket if numbers else operation)(*given, **named)

    if any(one.alias_info and one.alias_info.is_write for one in schema.arguments):
        run = changing(compute, schema.arguments, len(schema.returns), sizes="out" in schema.overload_name)
    else:
        run = functional(compute)
    if name in INDEXED:
        return unless_masked(name, run, waiting(name, compute))
    return waiting(name, compute) if name.partition(".")[0] in WAITING else run


_library = torch.library.Library("aten", "IMPL")


def install() -> None:
    """Put them in the place of torch's."""
    _runtime.rehearsal_calls(_do)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    every = [full for full in torch._C._dispatch_get_all_op_names() if full.startswith("aten::") and has(full, "CUDA")]
    names = {full.removeprefix("aten::") for full in every} - set(THEIR_OWN) | SPECIAL.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one already
        for full in names:
            name, _, overload = full.partition(".")
            operation = getattr(getattr(torch.ops.aten, name), overload or "default")
            _library.impl(full, _stand_in(full, operation), "CUDA", allow_override=True)

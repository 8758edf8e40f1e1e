"""A model's norms and rotations in one launch each, where that computes what the model's own modules compute.

On a CUDA device a norm of the library is eight launches, and a rotation ten: of one token they take longer than the
layer's attention. Whether a norm, or the rotation, computes the same is tried out with numbers. Knows nothing of the
rest. **Not yet run on a GPU.**
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from clo_kernels.rotate import rotate

Vectors = tuple[torch.Tensor, torch.Tensor]
Turn = Callable[[torch.Tensor, torch.Tensor, Any], Vectors]
"""Query and key `[batch, heads, 1, head_dim]`, and what the model's rotary embedding gives: both rotated."""

EPSILONS = ("variance_epsilon", "eps")
OF_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
)
OF_ATTENTION = ("q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm")
ROUNDINGS = 4
"""By how many units of its last place a norm may differ: the library rounds in between, torch's kernel does not."""


def one_launch(device: torch.device) -> bool:
    """Whether many small operations cost more there than they compute."""
    return bool(device.type == "cuda")


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """torch's own RMS norm with the weight of `module`, wherever that is by now.

    Some models keep weights less one (Gemma, Qwen3-Next), and add that in single precision.
    """

    module: Any
    epsilon: float
    less_one: bool = False

    @property
    def weight(self) -> torch.Tensor:
        """The module's."""
        given: torch.Tensor = self.module.weight
        return given

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of vectors along the last dimension."""
        weight = self.weight
        if not self.less_one:
            return torch.nn.functional.rms_norm(hidden, weight.shape, weight, self.epsilon)
        normed = torch.nn.functional.rms_norm(hidden.float(), weight.shape, weight.float() + 1, self.epsilon)
        return normed.to(hidden.dtype)


def fused_norms(layers: Iterable[Any], last: Any, dtype: torch.dtype) -> Mapping[Any, RmsNorm]:
    """By module, of the norms in `layers` and the `last` one those that an `RmsNorm` can stand for, of this dtype."""
    found = {}
    for module in [*_norms(layers), last]:
        epsilon = next((value for name in EPSILONS if (value := getattr(module, name, None)) is not None), None)
        tried = [] if epsilon is None else [RmsNorm(module, float(epsilon), less_one) for less_one in (False, True)]
        same = next((one for one in tried if _is_same_norm(one, dtype)), None)
        if same is not None:
            found[module] = same
    return found


def _norms(layers: Iterable[Any]) -> Iterable[Any]:
    for layer in layers:
        for owner, names in ((layer, OF_LAYER), (getattr(layer, "self_attn", None), OF_ATTENTION)):
            yield from (module for name in names if (module := getattr(owner, name, None)) is not None)


def _is_same_norm(fused: RmsNorm, dtype: torch.dtype) -> bool:
    weight = getattr(fused.module, "weight", None)
    if weight is None or weight.dim() != 1 or weight.dtype != dtype:
        return False
    hidden = _numbers((2, len(weight)), weight)
    with torch.inference_mode():
        wanted, found = fused.module(hidden), fused(hidden)
    # an infinite or missing number in a weight is reported where it is used
    near = {"rtol": ROUNDINGS * torch.finfo(dtype).eps, "atol": 0.0, "equal_nan": True}
    return bool(wanted.dtype == found.dtype and torch.allclose(found, wanted, **near))


@dataclass(frozen=True, slots=True)
class Rotation:
    """`clo_kernels.rotate`, with what differs between models."""

    first: int = 0
    paired: bool = False
    halved: bool = False
    """Whether the library gives cosines and sines of one half only."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, rotation: Any) -> Vectors:
        """See `Turn`."""
        tables = (torch.cat([part, part], -1) if self.halved else part for part in rotation)
        cosines, sines = (table[:, 0].contiguous() for table in tables)
        vectors = query[:, :, 0].contiguous(), key[:, :, 0].contiguous()
        turned = rotate(*vectors, cosines, sines, first=self.first, paired=self.paired)
        return turned[0][:, :, None], turned[1][:, :, None]


def fused_rotation(turn: Turn, rotation: Any, *, like: torch.Tensor, head_dim: int, first: int = 0) -> Rotation | None:
    """The rotation that gives what the model's own `turn` gives, if there is one, of dtype and device of `like`.

    `rotation` is what its rotary embedding gives for two tokens, and the first value that it turns is `first`.
    """
    given = rotation if isinstance(rotation, tuple) and len(rotation) == 2 else ()
    if not given or any(part.dim() != 3 or part.dtype != like.dtype or part.shape[:2] != (2, 1) for part in given):
        return None
    query, key = (_numbers((2, heads, 1, head_dim), like) for heads in (3, 1))
    with torch.inference_mode():
        wanted = turn(query, key, rotation)
        for paired in (False, True):
            for halved in (False, True):
                tried = Rotation(first, paired, halved)
                width = given[0].shape[-1] * (2 if halved else 1)
                fits = width <= head_dim - first and width % 2 == 0
                if fits and _same(tried(query, key, rotation), wanted):
                    return tried
    return None


def _same(found: Vectors, wanted: Vectors) -> bool:
    eps = torch.finfo(wanted[0].dtype).eps
    return all(torch.allclose(one, other, rtol=2 * eps, atol=2 * eps) for one, other in zip(found, wanted, strict=True))


def _numbers(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """From -1 to 1, no two alike, without a generator whose state others rely on."""
    count = torch.Size(shape).numel()
    places = torch.arange(count, device=like.device, dtype=torch.float64)
    return torch.sin(1 + places * 12.9898).to(like.dtype).view(shape)

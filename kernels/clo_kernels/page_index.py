"""What the device keeps of a page's keys so that pages can be scored without them. In plain torch.

Entries of a page, by kind:

- `page_minmax`, [2, head_dim] of the keys' dtype: elementwise minimum and maximum, bounds of a key
- `page_mean`, [1, head_dim] of the keys' dtype
- `key_4bit`, int32 [page_size, head_dim / 8 + 1]: eight codes of 4 bits a word, the first lowest; then a word of the
  float16 step (low half) and the float16 value of code 0 (high half). Each element is known to half a step
- `sign_hash`, int32 [page_size, 4]: 128 bits, the first lowest, say on which side of 128 planes a key lies. Its angle
  to a query is about pi times the share of bits that differ (SimHash; Charikar, STOC 2002)

`score_pages` reads an index, `append_kv` writes it page by page, prefill with `page_index`. Planes are random; learnt
ones of the same shape can take their place.
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch

from clo_kernels.checks import FLOATS, LARGEST_VECTOR_DIM, check_head_dim, check_tensor, require
from clo_kernels.layout import INT32

HASH_BITS = 128
HASH_WORDS = HASH_BITS // 32
VALUES_PER_WORD = 8
LARGEST_CODE = 15


class IndexKind(StrEnum):
    """What an index holds."""

    PAGE_MINMAX = "page_minmax"
    PAGE_MEAN = "page_mean"
    KEY_4BIT = "key_4bit"
    SIGN_HASH = "sign_hash"

    @property
    def of_tokens(self) -> bool:
        """Whether every token of a page has an entry of its own."""
        return self in (IndexKind.KEY_4BIT, IndexKind.SIGN_HASH)


def entry_shape(kind: IndexKind, page_size: int, head_dim: int) -> tuple[int, int]:
    """Shape of one page's entry."""
    return {
        IndexKind.PAGE_MINMAX: (2, head_dim),
        IndexKind.PAGE_MEAN: (1, head_dim),
        IndexKind.KEY_4BIT: (page_size, head_dim // VALUES_PER_WORD + 1),
        IndexKind.SIGN_HASH: (page_size, HASH_WORDS),
    }[kind]


def hash_planes(head_dim: int, seed: int = 0) -> torch.Tensor:
    """Normals of the planes of a sign hash, float32 [128, head_dim], on the CPU."""
    return torch.randn((HASH_BITS, head_dim), generator=torch.Generator().manual_seed(seed))


def check_index(
    index: torch.Tensor, rows: tuple[int, int], head_dim: int, planes: torch.Tensor | None, device: torch.device
) -> IndexKind:
    """The kind of `index` [batch, num_kv_heads, num_pages, *entry]; of int32 a sign hash where there are `planes`."""
    check_head_dim("index", head_dim, LARGEST_VECTOR_DIM)
    check_tensor("index", index, (*rows, -1, -1, -1), (*FLOATS, INT32), device)
    entries, width = index.shape[3:]
    if index.dtype != INT32:
        require(planes is None, f"planes go with an int32 index, not one of {index.dtype}")
        require(entries in (1, 2), f"index: {entries} vectors a page, expected 2 (minimum, maximum) or 1 (mean)")
        kind = IndexKind.PAGE_MINMAX if entries == 2 else IndexKind.PAGE_MEAN
    elif planes is None:
        kind = IndexKind.KEY_4BIT
    else:
        kind = IndexKind.SIGN_HASH
        check_tensor("planes", planes, (HASH_BITS, head_dim), torch.float32, device)
    expected = entry_shape(kind, entries, head_dim)[1]
    require(width == expected, f"index: {width} a row, expected {expected} of {kind} with head_dim = {head_dim}")
    return kind


def page_index(keys: torch.Tensor, kind: IndexKind, planes: torch.Tensor | None = None) -> torch.Tensor:
    """Entries [..., *entry] of pages of keys [..., page_size, head_dim]."""
    if kind is IndexKind.PAGE_MINMAX:
        return torch.stack([keys.amin(-2), keys.amax(-2)], -2)
    if kind is IndexKind.PAGE_MEAN:
        return keys.float().mean(-2, keepdim=True).to(keys.dtype)
    if kind is IndexKind.KEY_4BIT:
        return quantized(keys)
    require(planes is not None, "planes: sign_hash needs them")
    assert planes is not None
    return sign_codes(keys, planes)


def quantized(keys: torch.Tensor) -> torch.Tensor:
    """Keys [..., head_dim] in 4 bits an element: int32 [..., head_dim / 8 + 1]."""
    exact = keys.float()
    low = exact.amin(-1, keepdim=True).half()
    step = ((exact.amax(-1, keepdim=True) - low.float()) / LARGEST_CODE).half()
    codes = ((exact - low.float()) / torch.where(step > 0, step, 1).float() + 0.5).floor().clamp(0, LARGEST_CODE)
    codes = torch.where(step > 0, codes, 0).to(INT32).unflatten(-1, (-1, VALUES_PER_WORD))
    shifts = 4 * torch.arange(VALUES_PER_WORD, dtype=INT32, device=keys.device)
    words = (codes << shifts).sum(-1, dtype=INT32)
    scales = (low.view(torch.int16).to(INT32) << 16) | (step.view(torch.int16).to(INT32) & 0xFFFF)
    return torch.cat([words, scales], -1)


def dequantized(words: torch.Tensor) -> torch.Tensor:
    """What `quantized` stands for, float32 [..., head_dim]."""
    shifts = 4 * torch.arange(VALUES_PER_WORD, dtype=INT32, device=words.device)
    codes = ((words[..., :-1, None] >> shifts) & LARGEST_CODE).flatten(-2).float()
    scales = words[..., -1:]
    step, low = ((scales << 16) >> 16).to(torch.int16), (scales >> 16).to(torch.int16)
    return codes * step.view(torch.float16).float() + low.view(torch.float16).float()


def sign_codes(vectors: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """On which side of each plane vectors [..., head_dim] lie: int32 [..., 4]."""
    sides = (vectors.float() @ planes.T > 0).to(INT32).unflatten(-1, (HASH_WORDS, 32))
    return (sides << torch.arange(32, dtype=INT32, device=vectors.device)).sum(-1, dtype=INT32)


def differing_bits(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Hamming distance of codes [..., 4], broadcast against each other."""
    bits = (first ^ second)[..., None] >> torch.arange(32, dtype=INT32, device=first.device)
    return (bits & 1).sum((-2, -1))


def token_products(query: torch.Tensor, entries: torch.Tensor, planes: torch.Tensor | None) -> torch.Tensor:
    """Estimated products of queries [group, head_dim] with the keys of entries [pages, page_size, words].

    Float32 [group, pages, page_size]. A hash knows angles only: keys are taken to be sqrt(head_dim) long.
    """
    now = query.float()
    if planes is None:
        return _code_products(now, entries)
    distance = differing_bits(sign_codes(now, planes)[:, None, None], entries)
    lengths = now.norm(dim=-1) * math.sqrt(query.shape[-1])
    return lengths[:, None, None] * torch.cos(distance * (math.pi / HASH_BITS))


def _code_products(query: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Products with `dequantized(words)`, without it: code by code in bytes, step and lowest value once a token."""
    # two codes a byte, the first in its lower half: words are stored lowest byte first wherever torch runs
    pairs = words[..., :-1].view(torch.uint8).flatten(0, -2).float()
    odd = (pairs / (LARGEST_CODE + 1)).floor_()  # in floats, exactly: torch shifts bytes one by one
    even = pairs.sub_(odd, alpha=LARGEST_CODE + 1)
    coded = (query[:, 0::2] @ even.T + query[:, 1::2] @ odd.T).unflatten(1, words.shape[:-1])
    step, low = words[..., -1:].view(torch.float16).float().unbind(-1)
    return coded * step + low * query.sum(-1)[:, None, None]

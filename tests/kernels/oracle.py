"""The index of single tokens read bit by bit with numpy, in float64: knows nothing of the code under test."""

import math

import numpy as np


def keys_of(entries):
    """4-bit entries [..., head_dim / 8 + 1] -> keys [..., head_dim] and the step of each [..., 1]."""
    octets = np.ascontiguousarray(entries).view(np.uint8).reshape(*entries.shape[:-1], -1)
    codes = np.stack([octets[..., :-4] % 16, octets[..., :-4] // 16], -1).reshape(*entries.shape[:-1], -1)
    halves = np.ascontiguousarray(octets[..., -4:]).view(np.float16).astype(np.float64)
    return codes * halves[..., :1] + halves[..., 1:], halves[..., :1]


def bits_of(entries):
    """Hash entries [..., 4] -> booleans [..., 128]."""
    octets = np.ascontiguousarray(entries).view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little").astype(bool)


def page_scores(query, entries, scale, planes=None):
    """Queries [group, head_dim] and the candidates' entries [pages, page_size, words] -> shares [pages]."""
    shares = np.zeros(len(entries))
    for q in query:
        if planes is None:
            keys, _ = keys_of(entries)
            logits = keys @ q
        else:
            differ = (bits_of(entries) != (planes @ q > 0)).mean(-1)
            logits = np.linalg.norm(q) * math.sqrt(len(q)) * np.cos(np.pi * differ)
        mass = np.exp(logits * scale - (logits * scale).max()).sum(-1)
        shares += mass / mass.sum() / len(query)
    return shares

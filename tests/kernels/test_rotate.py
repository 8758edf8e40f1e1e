"""`rotate` against rotations of complex numbers, against `transformers`, and against the reference."""

import numpy as np
import pytest
import torch

from clo_kernels import reference
from clo_kernels.rotate import rotate
from tests.kernels.helpers import DEVICE, TOLERANCE, by_dtype, cases

POISON = float("nan")


def problem(batch, query_heads, kv_heads, dim, rotated, dtype, paired=False):
    """Queries, keys, and the angles of each value of a half."""
    angles = torch.rand(batch, rotated // 2, dtype=torch.float64) * 2 * torch.pi
    both = torch.cat([angles, angles], -1)
    vectors = (torch.randn(batch, heads, dim).to(DEVICE, dtype) for heads in (query_heads, kv_heads))
    return (*vectors, both.cos().to(DEVICE, dtype), both.sin().to(DEVICE, dtype)), angles


def turned(vectors, cosines, sines, first, paired):
    """In float64: value i and its partner are a complex number, and its factor has them as parts."""
    whole, factor = vectors.cpu().double().numpy().copy(), (cosines.cpu().double() + 1j * sines.cpu().double()).numpy()
    half = factor.shape[1] // 2
    part = whole[..., first : first + 2 * half]
    real, imaginary = (part[..., ::2], part[..., 1::2]) if paired else (part[..., :half], part[..., half:])
    product = (real + 1j * imaginary) * factor[:, None, :half]
    whole[..., first : first + 2 * half] = np.concatenate([product.real, product.imag], -1)
    return torch.from_numpy(whole)


@by_dtype
@pytest.mark.parametrize("paired", [False, True], ids=["halves", "pairs"])
@cases(
    "batch query_heads kv_heads dim first rotated",
    (1, 8, 2, 128, 0, 128),
    (3, 7, 1, 64, 0, 64),
    (2, 3, 3, 80, 0, 80),
    (2, 5, 1, 96, 0, 24),  # only a part is rotated
    (1, 6, 1, 576, 512, 64),
    (3, 20, 1, 40, 30, 10),
    (2, 4, 0, 64, 2, 62),  # nothing but queries
    (1, 1, 1, 2, 0, 2),
)
def test_agrees_with_float64(batch, query_heads, kv_heads, dim, first, rotated, paired, dtype):
    (query, key, cosines, sines), _ = problem(batch, query_heads, kv_heads, dim, rotated, dtype)
    for operation in (rotate, reference.rotate):
        outs = {"out_query": torch.full_like(query, POISON), "out_key": torch.full_like(key, POISON)}
        found = operation(query, key, cosines, sines, first=first, paired=paired, **outs)
        for out, vectors in zip(found, (query, key), strict=True):
            expected = turned(vectors, cosines, sines, first, paired)
            torch.testing.assert_close(out.cpu().double(), expected, **TOLERANCE[dtype])
            stays = torch.ones(dim, dtype=torch.bool)
            stays[first : first + rotated] = False
            assert torch.equal(out[..., stays], vectors[..., stays])


@by_dtype
def test_kernel_and_reference_round_alike(dtype):
    (query, key, cosines, sines), _ = problem(2, 9, 3, 96, 64, dtype)
    outs = {"out_query": torch.empty_like(query), "out_key": torch.empty_like(key)}
    found, wanted = rotate(query, key, cosines, sines), reference.rotate(query, key, cosines, sines, **outs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("paired", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_specification_is_what_transformers_computes(paired, dtype):
    """Bit for bit."""
    kind = "deepseek_v3" if paired else "llama"
    library = pytest.importorskip(f"transformers.models.{kind}.modeling_{kind}")
    given = getattr(library, "apply_rotary_pos_emb" + ("_interleave" if paired else ""))
    (query, key, cosines, sines), _ = problem(2, 6, 2, 64, 64, dtype)
    query, key, cosines, sines = (each.cpu() for each in (query, key, cosines, sines))
    wanted = given(query[:, :, None], key[:, :, None], cosines[:, None], sines[:, None])
    outs = {"out_query": torch.empty_like(query), "out_key": torch.empty_like(key)}
    found = reference.rotate(query, key, cosines, sines, paired=paired, **outs)
    assert all(torch.equal(one, other[:, :, 0]) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": torch.zeros(2, 1, 48)}, r"key: shape \[2, 1, 48\]"),
        ({"cosines": torch.zeros(2, 7), "sines": torch.zeros(2, 7)}, "cosines: 7 values, expected an even number"),
        ({"cosines": torch.zeros(2, 0), "sines": torch.zeros(2, 0)}, "cosines: 0 values, expected an even number"),
        ({"sines": torch.zeros(2, 16)}, r"sines: shape \[2, 16\]"),
        ({"sines": torch.zeros(2, 8, dtype=torch.float16)}, r"sines: dtype torch\.float16"),
        ({"first": 25}, "first = 25, expected 0 to head_dim - rotated = 32 - 8"),
        ({"first": -1}, "first = -1"),
        ({"query": torch.zeros(2, 32, 4).transpose(1, 2)}, "query: strides"),
        ({"out_key": torch.zeros(2, 2, 32)}, "out_key: shape"),
    ],
)
def test_says_what_is_wrong(changed, message):
    given = {"query": torch.zeros(2, 4, 32), "key": torch.zeros(2, 1, 32)}
    given |= {"cosines": torch.zeros(2, 8), "sines": torch.zeros(2, 8), "first": 0} | changed
    with pytest.raises(ValueError, match=message):
        rotate(**given)

"""Instructions of `ptx/` against whole numbers of Python, and roundings against torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.ptx.block import Block
from tests.kernels.ptx.instructions import meaning
from tests.kernels.ptx.numbers import from_bf16, to_bf16, to_integer
from tests.kernels.ptx.program import parse

WORDS = st.integers(0, 2**32 - 1)
KERNEL = """
.visible .entry some(
	.param .u32 some_param_0
)
.reqntid 32
{
	.reg .b32 	%r<6>;
	.reg .b64 	%rd<3>;
	.reg .pred 	%p<3>;
	.loc	1 7 3                          // some.py:7:3
	WRITTEN
$L__BB0_1:
	ret;
}
"""


def computed(written: str, result: str = "%r0", **registers: int) -> int:
    """What a register of the fifth thread holds after an instruction."""
    program = parse(KERNEL.replace("WRITTEN", written))
    block = Block(program, 32, {}, (1, 1, 1), {}, np.random.default_rng(0), {})
    for name, value in registers.items():
        register = block.registers[f"%{name}"]
        register[:] = np.array(value % 2 ** (8 * register.itemsize), np.uint64).astype(register.dtype)
    meaning(block, program.instructions[0])(slice(0, 32))
    return int(block.registers[result][5])


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


@given(WORDS, WORDS)
def test_whole_numbers(a, b):
    given_ = {"r1": a, "r2": b}
    x, y = signed(a), signed(b)
    assert computed("add.s32 %r0, %r1, %r2;", **given_) == (a + b) % 2**32
    assert computed("mul.hi.u32 %r0, %r1, %r2;", **given_) == a * b >> 32
    assert computed("mul.wide.s32 %rd0, %r1, %r2;", "%rd0", **given_) == x * y % 2**64
    assert computed("mad.wide.u32 %rd0, %r1, %r2, %rd1;", "%rd0", rd1=5, **given_) == (a * b + 5) % 2**64
    assert computed("min.relu.s32 %r0, %r1, %r2;", **given_) == max(0, min(x, y))
    assert computed("selp.b32 %r0, %r1, %r2, %p1;", p1=1, **given_) == a
    if b:
        towards_zero = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        assert computed("div.u32 %r0, %r1, %r2;", **given_) == a // b
        assert computed("div.s32 %r0, %r1, %r2;", **given_) == towards_zero % 2**32
        assert computed("rem.s32 %r0, %r1, %r2;", **given_) == (x - towards_zero * y) % 2**32


@given(WORDS, WORDS, st.integers(0, 40), st.integers(0, 31), st.integers(0, 32))
def test_bits(a, b, count, first, size):
    given_ = {"r1": a, "r2": b, "r3": count}
    assert computed("shl.b32 %r0, %r1, %r3;", **given_) == (a << count) % 2**32
    assert computed("shr.u32 %r0, %r1, %r3;", **given_) == a >> count
    assert computed("shr.s32 %r0, %r1, %r3;", **given_) == (signed(a) >> count) % 2**32
    both = ((b << 32 | a) << (count % 32)) >> 32
    assert computed("shf.l.wrap.b32 %r0, %r1, %r2, %r3;", **given_) == both % 2**32
    assert computed("popc.b32 %r0, %r1;", **given_) == a.bit_count()
    assert computed(f"bfe.u32 %r0, %r1, {first}, {size};", **given_) == (a >> first) % 2**size
    found = computed("mov.b64 {%r0, %r4}, %rd1;", "%r4", rd1=b << 32 | a)
    assert found == b


@given(WORDS, st.integers(0, 31), st.integers(1, 32))
def test_signed_fields(a, first, size):
    taken = (signed(a) >> first) % 2**size
    wanted = taken - 2**size if taken >> (size - 1) else taken
    assert computed(f"bfe.s32 %r0, %r1, {first}, {size};", r1=a) == wanted % 2**32


@given(WORDS, WORDS, st.lists(st.integers(0, 15), min_size=4, max_size=4))
def test_permuted_bytes(a, b, choices):
    pool = (b << 32 | a).to_bytes(8, "little")
    wanted = [(255 if pool[each % 8] & 128 else 0) if each & 8 else pool[each % 8] for each in choices]
    selector = sum(each << 4 * place for place, each in enumerate(choices))
    found = computed(f"prmt.b32 %r0, %r1, %r2, {selector:#x}U;", r1=a, r2=b)
    assert list(found.to_bytes(4, "little")) == wanted


@given(WORDS, WORDS, st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), st.sampled_from(["s32", "u32"]))
def test_comparisons(a, b, relation, kind):
    x, y = (signed(a), signed(b)) if kind == "s32" else (a, b)
    wanted = {"lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y, "eq": x == y, "ne": x != y}[relation]
    assert computed(f"setp.{relation}.{kind} %p0, %r1, %r2;", "%p0", r1=a, r2=b) == wanted


@given(st.floats(width=32), st.floats(width=32))
def test_comparisons_with_what_is_no_number(a, b):
    bits = {name: int(np.float32(value).view(np.uint32)) for name, value in (("r1", a), ("r2", b))}
    for relation, ordered in (("lt", a < b), ("eq", a == b), ("ge", a >= b)):
        assert computed(f"setp.{relation}.f32 %p0, %r1, %r2;", "%p0", **bits) == ordered
        assert computed(f"setp.{relation}u.f32 %p0, %r1, %r2;", "%p0", **bits) == (ordered or a != a or b != b)


@given(st.floats(width=32))
def test_bfloat16_is_rounded_as_torch_does(value):
    wanted = torch.tensor([value]).bfloat16()
    found = torch.from_numpy(from_bf16(to_bf16(np.array([value], np.float32))))
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [(3.7, "s32", 3), (-3.7, "s32", -3), (1e20, "s32", 2**31 - 1), (-5.0, "u32", 0), (np.nan, "s16", 0)],
)
def test_floats_become_whole_numbers_within_the_range(value, kind, wanted):
    assert to_integer(np.array([value]), kind)[0] == wanted


def test_instructions_know_where_they_come_from():
    program = parse(KERNEL.replace("WRITTEN", "@!%p2 bra $L__BB0_1;"))
    first = program.instructions[0]
    assert (first.opcode, first.guard, first.guard_is, first.operands) == ("bra", "%p2", False, ("$L__BB0_1",))
    assert "some.py:7:3" in first.text
    assert program.labels == {"$L__BB0_1": 1}

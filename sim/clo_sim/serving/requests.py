"""Requests and the files they come in: Mooncake JSONL and Azure CSV. Knows nothing about machines or designs.

Time is a whole number of nanoseconds from the first arrival: sums of it are exact in any order.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from clo.errors import RequestError

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000
BLOCK_TOKENS = 512
"""Tokens of a prefix block in Mooncake's traces."""


class Request(NamedTuple):
    """One request. `prefix_blocks` names its prompt's blocks: equal names, equal tokens from the start up to there."""

    arrival_ns: int
    input_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...] = ()

    @property
    def total_tokens(self) -> int:
        """Tokens the KV cache holds at the end."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True)
class RequestTrace:
    """Requests in order of arrival, and what to call them."""

    name: str
    requests: tuple[Request, ...]
    block_tokens: int = BLOCK_TOKENS

    def __len__(self) -> int:
        return len(self.requests)

    @cached_property
    def duration_s(self) -> float:
        """First to last arrival."""
        return (self.requests[-1].arrival_ns - self.requests[0].arrival_ns) / NS_PER_S

    @property
    def rate_per_s(self) -> float:
        """Mean arrival rate; infinite where all come at once."""
        return (len(self) - 1) / self.duration_s if self.duration_s else math.inf

    @cached_property
    def mean_output_tokens(self) -> float:
        """Mean answer length."""
        return sum(request.output_tokens for request in self.requests) / len(self)

    @cached_property
    def max_total_tokens(self) -> int:
        """Longest sequence at its end."""
        return max(request.total_tokens for request in self.requests)

    @cached_property
    def has_prefixes(self) -> bool:
        """Whether any prompt names its blocks."""
        return any(request.prefix_blocks for request in self.requests)

    def at_rate(self, multiplier: float) -> RequestTrace:
        """The same requests, arriving `multiplier` times as fast. Raises `RequestError` unless it is positive."""
        if not (multiplier > 0 and math.isfinite(multiplier)):
            raise RequestError(f"rate multiplier = {multiplier:g}: must be positive and finite")
        if multiplier == 1.0:
            return self
        if self.requests and not math.isfinite(self.requests[-1].arrival_ns / multiplier):
            raise RequestError(f"rate multiplier = {multiplier:g}: the last request would never come")
        faster = tuple(one._replace(arrival_ns=round(one.arrival_ns / multiplier)) for one in self.requests)
        return replace(self, requests=faster)

    def first(self, count: int) -> RequestTrace:
        """The first `count` requests."""
        return replace(self, requests=self.requests[:count])


def read_requests(path: Path) -> RequestTrace:
    """Read a Mooncake JSONL or Azure CSV trace, told apart by the first line.

    Raises `RequestError` naming file, line, field and rule: a missing column, a number that is none, a negative length,
    time going backwards. Lengths of zero are read: the service rejects and counts them.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = next(filter(str.strip, file), "")
            file.seek(0)
            rows = _mooncake(file) if first.lstrip().startswith("{") else _azure(file)
            requests = _in_order(rows)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path}: not text: neither a Mooncake JSONL nor an Azure CSV trace") from None
    except _BadLineError as bad:
        raise RequestError(f"{path}:{bad.line}: {bad.problem}") from None
    if not requests:
        raise RequestError(f"{path}: no requests in it")
    return RequestTrace(path.stem, requests)


class _BadLineError(Exception):
    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line, self.problem = line, problem


def _in_order(rows: Iterator[tuple[int, Request]]) -> tuple[Request, ...]:
    """Check that time does not go backwards, and count it from the first arrival."""
    requests: list[Request] = []
    for line, request in rows:
        if requests and request.arrival_ns < requests[-1].arrival_ns:
            back = (requests[-1].arrival_ns - request.arrival_ns) / NS_PER_S
            raise _BadLineError(line, f"arrives {back:g} s before the line above it: requests must be in order of time")
        requests.append(request)
    start = requests[0].arrival_ns if requests else 0
    return tuple(one._replace(arrival_ns=one.arrival_ns - start) for one in requests)


_MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length")


def _mooncake(lines: Iterator[str]) -> Iterator[tuple[int, Request]]:
    for number, text in enumerate(lines, start=1):
        if text.strip():
            yield number, _mooncake_request(number, text)


def _mooncake_request(line: int, text: str) -> Request:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadLineError(line, f"not JSON, or truncated: {error}") from None
    if not isinstance(row, dict):
        raise _BadLineError(line, f"a JSON object is expected, this is a {type(row).__name__}")
    for name in _MOONCAKE_FIELDS:
        if name not in row:
            raise _BadLineError(line, f"no field {name!r}: a Mooncake trace needs {', '.join(_MOONCAKE_FIELDS)}")
    arrival = _number(line, "timestamp", row["timestamp"])
    inputs, outputs = (_count(line, name, row[name]) for name in _MOONCAKE_FIELDS[1:])
    return Request(round(arrival * NS_PER_MS), inputs, outputs, _blocks(line, row.get("hash_ids", []), inputs))


def _blocks(line: int, ids: Any, input_tokens: int) -> tuple[int, ...]:
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise _BadLineError(line, "hash_ids: a list of whole numbers is expected")
    full, covering = input_tokens // BLOCK_TOKENS, -(-input_tokens // BLOCK_TOKENS)
    if ids and not full <= len(ids) <= covering:
        blocks = f"{len(ids)} blocks of {BLOCK_TOKENS} tokens"
        raise _BadLineError(line, f"hash_ids: {blocks} do not make a prompt of input_length = {input_tokens}")
    return tuple(ids)


def _number(line: int, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _BadLineError(line, f"{name} = {value!r}: must be a number, zero or more")
    return value


MAX_TOKENS = 1 << 40
"""Far beyond any model: a length above it is a broken file."""


def _count(line: int, name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        raise _BadLineError(line, f"{name} = {value!r}: must be a whole number of tokens, from 0 to {MAX_TOKENS}")
    return value


_TIMESTAMP = re.compile(r"(?P<whole>[-\d]+[ T][:\d]+)(\.(?P<fraction>\d+))?(?P<zone>Z|[-+]\d\d:\d\d)?")
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def _azure(lines: Iterator[str]) -> Iterator[tuple[int, Request]]:
    reader = csv.reader(lines)
    header = [name.strip() for name in next(filter(None, reader), [])]
    if not header:
        return  # an empty file, of either kind
    for name in _AZURE_COLUMNS:
        if name not in header:
            needs = f"an Azure trace needs {', '.join(_AZURE_COLUMNS)}; a Mooncake trace has a JSON object a line"
            raise _BadLineError(1, f"no column {name!r}: {needs}")
    places = [header.index(name) for name in _AZURE_COLUMNS]
    for row in reader:
        if row:
            yield reader.line_num, _azure_request(reader.line_num, row, places, len(header))


def _azure_request(line: int, row: Sequence[str], places: Sequence[int], columns: int) -> Request:
    if len(row) != columns:
        raise _BadLineError(line, f"{len(row)} fields, but the header has {columns}")
    when, inputs, outputs = (row[place].strip() for place in places)
    lengths = [
        _count(line, name, _parsed(int, text)) for name, text in zip(_AZURE_COLUMNS[1:], (inputs, outputs), strict=True)
    ]
    return Request(_timestamp_ns(line, when), lengths[0], lengths[1])


def _parsed(kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


def _timestamp_ns(line: int, text: str) -> int:
    """`2023-11-16 18:15:46.6805900` in nanoseconds: that file has seven digits, `datetime` keeps six.

    Those of 2024 have six or none, and a zone: `2024-05-10 00:00:00.009930+00:00`.
    """
    found = _TIMESTAMP.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        moment = datetime.fromisoformat(f"{found['whole']}{found['zone'] or '+00:00'}")
    except ValueError:
        raise _BadLineError(line, f"TIMESTAMP = {text!r}: must look like 2023-11-16 18:15:46.6805900") from None
    nanoseconds = int((found["fraction"] or "0")[:9].ljust(9, "0"))
    return round((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * NS_PER_S + nanoseconds

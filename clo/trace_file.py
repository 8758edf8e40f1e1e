"""How the arrays of an attention trace become small byte streams, and how those are written and read.

Queries are int8 codes with one scale per vector. A code is predicted from the vector's code one step earlier and its
mean over steps; approximate queries are coded as differences to the nearest more exact query. A page list is coded as
where its pages stand in a reference list (the previous step's, or that of the real query), counting only pages not
named yet. Every stream is then Huffman coded. Nothing is lost but the rounding to int8 and the rounding of page
masses. Knows nothing about what the arrays mean, or about statistics.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clo.errors import TraceError
from clo.files import write_whole

# padding of page lists
NO_PAGE = 0xFFFF
# rounding to steps of 0.12 of the vector's root mean square changes its direction by a cosine of 0.0005 on average
STEP_PER_RMS = 0.12
QUERY_ENCODING = (
    "int8, one float16 scale per vector: 0.12 of the root mean square of the smallest of the real and the approximate "
    "queries, more where codes would pass 127"
)
_MASS_CODES_PER_OCTAVE = 8
_ZERO_MASS = 255

Codes = NDArray[np.int8]
Lists = NDArray[Any]
AnyArray = NDArray[Any]


def query_scale(queries: AnyArray, approximate: Sequence[tuple[int, AnyArray]]) -> NDArray[np.float16]:
    """One scale per vector, float16 [steps, layers, heads], shared by the real and the approximate queries.

    Of these with the first layer that has any.
    """
    rms = _rms(queries)
    peak = np.abs(queries).max(-1)
    for first, lookahead in approximate:
        rms[:, first:] = np.minimum(rms[:, first:], _rms(lookahead[:, first:]))
        peak = np.maximum(peak, np.abs(lookahead).max(-1))
    # half a step of slack, so that rounding the scale to float16 cannot push a code to 128
    scale = np.maximum(rms * STEP_PER_RMS, peak / 126.5)
    smallest, largest = np.finfo(np.float16).smallest_normal, np.finfo(np.float16).max
    clipped: NDArray[np.float16] = np.clip(scale, smallest, largest).astype(np.float16)
    return clipped


def _rms(vectors: AnyArray) -> NDArray[np.float32]:
    rms: NDArray[np.float32] = np.sqrt(np.square(vectors.astype(np.float32)).mean(-1))
    return rms


def to_codes(queries: AnyArray, scale: AnyArray) -> Codes:
    """Round `queries` to int8 steps of `scale`."""
    steps = np.rint(queries.astype(np.float32) / scale.astype(np.float32)[..., None])
    codes: Codes = np.clip(steps, -127, 127).astype(np.int8)
    return codes


def from_codes(codes: Codes, scale: AnyArray) -> NDArray[np.float32]:
    """Queries, float32, from `to_codes`."""
    return np.multiply(codes, scale.astype(np.float32)[..., None], dtype=np.float32)


def mean_code(codes: Codes) -> Codes:
    """Mean over steps, rounded: int8 [layers, heads, head_dim]."""
    mean: Codes = np.rint(codes.mean(0, dtype=np.float32)).astype(np.int8)
    return mean


def _predict(previous: Codes, mean: Codes, quarters: int) -> Codes:
    mixed = previous.astype(np.int16) * quarters + mean.astype(np.int16) * (4 - quarters) + 2
    return (mixed >> 2).astype(np.int8)


def encode_codes(codes: Codes, mean: Codes, quarters: int) -> Codes:
    """Differences to the prediction, modulo 256, in the order [layers, heads, steps, head_dim].

    `quarters` is the weight, in quarters, of the previous step against the mean.
    """
    predicted = np.concatenate([mean[None], _predict(codes[:-1], mean, quarters)])
    return np.ascontiguousarray((codes - predicted).transpose(1, 2, 0, 3))


def decode_codes(differences: Codes, mean: Codes, quarters: int) -> Codes:
    """Inverse of `encode_codes`: int8 [steps, layers, heads, head_dim]."""
    codes = differences.transpose(2, 0, 1, 3).copy()
    codes[0] += mean
    for step in range(1, len(codes)):
        codes[step] += _predict(codes[step - 1], mean, quarters)
    return codes


def _ranking(reference: Lists, universe: int) -> Lists:
    """Rows [n, universe] that name every page: those of `reference` [n, k] in its order, then the rest ascending."""
    unnamed = np.ones((len(reference), universe), bool)
    np.put_along_axis(unnamed, reference.astype(np.intp), False, axis=1)
    rest = np.nonzero(unnamed)[1].reshape(len(reference), -1)
    return np.concatenate([reference, rest.astype(reference.dtype)], axis=1)


def complete_lists(lists: Lists, universe: int) -> Lists:
    """Replace padding at the end of rows [n, k] by pages not named yet, ascending; k must not pass `universe`."""
    padded = lists == NO_PAGE
    full = np.where(padded, 0, lists)
    for row in np.flatnonzero(padded.any(1)):
        known = lists[row][~padded[row]]
        full[row, len(known) :] = np.setdiff1d(np.arange(universe), known)[: lists.shape[1] - len(known)]
    return full


def encode_lists(lists: Lists, reference: Lists, universe: int) -> Lists:
    """Code complete lists [n, k] against reference lists [n, k]: [k, n], entry j below `universe - j`."""
    ranking = _ranking(reference, universe).astype(np.intp)
    place = np.empty_like(ranking)
    np.put_along_axis(place, ranking, np.broadcast_to(np.arange(universe), ranking.shape), axis=1)
    places = np.take_along_axis(place, lists.astype(np.intp), axis=1).T
    earlier = [(places[:entry] < places[entry]).sum(0) for entry in range(len(places))]
    code: Lists = (places - np.stack(earlier)).astype(code_dtype(universe))
    return code


def decode_lists(code: Lists, reference: Lists, universe: int) -> Lists:
    """Inverse of `encode_lists`."""
    return np.take_along_axis(_ranking(reference, universe), list_places(code).T.astype(np.intp), axis=1)


def list_places(code: Lists) -> Lists:
    """Places in the reference ranking [k, n] from codes [k, n] that skip the places taken by earlier entries."""
    places = code.copy()
    for entry in range(len(places) - 2, -1, -1):
        later = places[entry + 1 :]
        later += later >= places[entry]
    return places


def encode_series(lists: Lists, universe: int) -> Lists:
    """Code complete lists [steps, n, k], each step against the one before and the first against page order."""
    first = np.broadcast_to(np.arange(lists.shape[2], dtype=lists.dtype), lists.shape[1:])
    references = np.concatenate([first[None], lists[:-1]])
    return encode_lists(lists.reshape(-1, lists.shape[2]), references.reshape(-1, lists.shape[2]), universe)


def decode_series(code: Lists, steps: int, universe: int) -> Lists:
    """Inverse of `encode_series`: uint16 [steps, n, k]."""
    places = list_places(code).T.astype(np.intp).reshape(steps, -1, len(code))
    lists = np.empty(places.shape, np.uint16)
    reference = np.broadcast_to(np.arange(len(code), dtype=np.uint16), places.shape[1:])
    for step in range(steps):
        lists[step] = reference = np.take_along_axis(_ranking(reference, universe), places[step], axis=1)
    return lists


def code_dtype(universe: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds places below `universe`."""
    return np.dtype(np.uint8) if universe <= 256 else np.dtype("<u2")


def encode_mass(mass: AnyArray) -> NDArray[np.uint8]:
    """Logarithmic codes, eight an octave (4.4 % at most); 255 is zero."""
    positive = mass > 0
    octaves = -np.log2(np.where(positive, mass, 1.0).astype(np.float64))
    codes = np.clip(np.rint(octaves * _MASS_CODES_PER_OCTAVE), 0, _ZERO_MASS - 1)
    return np.where(positive, codes, _ZERO_MASS).astype(np.uint8)


def decode_mass(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Inverse of `encode_mass`, float32."""
    table = np.exp2(-np.arange(256) / _MASS_CODES_PER_OCTAVE).astype(np.float32)
    table[_ZERO_MASS] = 0.0
    return table[codes]


def pack(array: AnyArray, *, repeats: bool = False) -> NDArray[np.uint8]:
    """A zlib stream of the array's bytes; without `repeats` Huffman codes and runs only, which is smaller for noise."""
    strategy = zlib.Z_DEFAULT_STRATEGY if repeats else zlib.Z_RLE
    stream = zlib.compressobj(9, zlib.DEFLATED, 15, 8, strategy)
    # all first bytes, then all second bytes: the second bytes of small numbers become one run
    planes = np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8).T
    return np.frombuffer(stream.compress(planes.tobytes()) + stream.flush(), np.uint8)


def unpack(stream: NDArray[np.uint8], dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> AnyArray:
    """The array behind `pack`. Raises `TraceError` naming the member when bytes do not make that shape."""
    expected = int(np.prod(shape)) * dtype.itemsize
    inflater = zlib.decompressobj()
    try:
        # one byte more than expected is enough to see that there are too many
        data = inflater.decompress(stream.tobytes(), expected + 1)
    except zlib.error as error:
        raise TraceError(f"{name}: {error}") from None
    if len(data) != expected or not inflater.eof:
        raise TraceError(f"{name}: its shape disagrees with the header ({shape} of {dtype} expected)")
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(shape)


def write_members(path: Path, members: Mapping[str, AnyArray]) -> None:
    """Write an `.npz` file whole or not at all. Raises `TraceError` if it cannot be written."""
    arrays: dict[str, Any] = dict(members)
    write_whole(path, lambda file: np.savez_compressed(file, **arrays), TraceError)


def read_members(path: Path) -> dict[str, AnyArray]:
    """All arrays of an `.npz` file, checksums verified. Raises `TraceError` naming the file and the problem."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy"): _read_array(archive, name) for name in archive.namelist()}
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from None
    # zipfile and numpy raise many kinds of errors on damaged bytes, among them NotImplementedError and KeyError
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TraceError(f"{path}: not a trace file, truncated or corrupt: {reason}") from None


def _read_array(archive: zipfile.ZipFile, name: str) -> AnyArray:
    # read whole: a stream that is read only as far as numpy needs skips the checksum
    array: AnyArray = np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
    return array

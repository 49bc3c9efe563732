"""A GGUF file without its vocabulary, from which transformers reads a config in milliseconds instead of seconds."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_UINT32, _STRING, _ARRAY = 4, 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type of a value
_VERSIONS = (2, 3)  # little-endian; a version that is read as another number is a file of the other order
_ALIGNMENT = 32  # bytes, unless the file says otherwise
_TOKENS = b"tokenizer.ggml.tokens"
_VOCABULARY = {_TOKENS, b"tokenizer.ggml.scores", b"tokenizer.ggml.token_type", b"tokenizer.ggml.merges"}


def without_vocabulary(file: Path, copy: Path) -> int | None:
    """Writes the header of a GGUF file to `copy`, without the vocabulary; returns the number of its tokens, if any.

    The copy says that number itself, as ARCHITECTURE.vocab_size, since transformers counts the tokens otherwise.
    The copy is as long as if the weights were there, but they are a hole that takes no space. The layout is that of the
    GGUF specification (ggml, docs/gguf.md), versions 2 and 3. Raises `ValueError` or `struct.error` for any other file.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version, tensors, pairs = struct.unpack_from("<4sIQQ", data)
        if magic != b"GGUF" or version not in _VERSIONS:
            raise ValueError(f"not a GGUF file of version {' or '.join(map(str, _VERSIONS))}")
        at, kept, count, alignment, architecture = 24, {}, None, _ALIGNMENT, b""
        for _ in range(pairs):
            start, value = at, _after_string(data, at)
            key = data[start + 8 : value]
            (kind,) = struct.unpack_from("<I", data, value)
            at = _after(data, value + 4, kind)
            if key == b"general.alignment":
                (alignment,) = struct.unpack_from("<I", data, value + 4)
            if key == _TOKENS and kind == _ARRAY:
                (count,) = struct.unpack_from("<Q", data, value + 8)
            if key == b"general.architecture" and kind == _STRING:
                architecture = data[value + 12 : at]
            if key not in _VOCABULARY:
                kept[key] = data[start:at]
        infos = at
        for _ in range(tensors):
            dimensions = _after_string(data, at)
            (rank,) = struct.unpack_from("<I", data, dimensions)
            at = dimensions + 4 + 8 * rank + 4 + 8
        size = architecture + b".vocab_size"
        if count is not None and size not in kept:
            kept[size] = struct.pack("<Q", len(size)) + size + struct.pack("<II", _UINT32, count)
        header = struct.pack("<4sIQQ", magic, version, tensors, len(kept)) + b"".join(kept.values()) + data[infos:at]
        weights = len(data) - _aligned(at, alignment)
        if weights < 0:
            raise ValueError("the file ends before its weights")
    with copy.open("wb") as written:
        written.write(header)
        written.truncate(_aligned(len(header), alignment) + weights)
    return count


def _after_string(data: mmap.mmap, at: int) -> int:
    (length,) = struct.unpack_from("<Q", data, at)
    return int(at + 8 + length)


def _after(data: mmap.mmap, at: int, kind: int) -> int:
    """Where a value of this type ends that begins at `at`."""
    if kind == _STRING:
        return _after_string(data, at)
    if kind != _ARRAY:
        return at + _size(kind)
    items, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if items in _SIZES:
        return at + int(count) * _SIZES[items]
    for _ in range(count):
        at = _after(data, at, items)
    return at


def _size(kind: int) -> int:
    if kind not in _SIZES:
        raise ValueError(f"no value has type {kind}")
    return _SIZES[kind]


def _aligned(at: int, alignment: int) -> int:
    if alignment < 1:
        raise ValueError(f"no alignment is {alignment}")
    return -(-at // alignment) * alignment

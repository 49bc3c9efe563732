"""Tuned tables: where they lie, what is in them, and what they say for a shape.

A table is one JSON file per device. It is read once per process and ignored as a whole, with one warning, where
anything about it is not as this process needs it.
"""

import hashlib
import json
import math
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from atp_kernels._version import __version__
from atp_kernels.call import NAMES
from atp_kernels.linear.tiles import SMALLEST_DOT

ENVIRONMENT = "ATP_KERNELS_TABLES"
"""Names the folder of the user's tables, in place of that in the cache."""
SHIPPED = Path(__file__).parent / "tables"
FORMAT = 1
KEPT = ("kept_out", "kept_in")
"""Regimes of a `KeptSlice` made beforehand, with one bool mask in the model's order: on its outputs, on its inputs."""
FIRST = ("first_out", "first_in")
"""Regimes of a `KeptSlice` with one side kept first, as a `KeptFirst` brings it: its outputs, its inputs."""
HARD = ("search", *KEPT, *FIRST)
"""Those with bool masks on the base path."""
REGIMES = ("decision", "search", "cut", *KEPT, *FIRST)
SLICED, FOLDED, ZEROED = "sliced", "folded", "zeroed"
BACKENDS = tuple(name for name in NAMES if name != "auto")
_WAYS = dict.fromkeys(KEPT, (SLICED, ZEROED)) | dict.fromkeys(FIRST, BACKENDS)
_WAYS_OF_LINEARS = (SLICED, FOLDED, *BACKENDS)

_LARGEST_FILE = 2**24
_ROWS = 2.0  # an entry speaks for half to twice its rows, and where its side lies kept first, its share
_SHARE = 1.05  # and shares of the weight within a twentieth count as one
_LARGEST_BLOCK, _MOST_WARPS, _MOST_STAGES = 256, 16, 8  # of a tile: twice what any candidate has, or the same
_PACKAGE = Path(__file__).parents[1]
_TIMED_ROOMS = ("linear", "kept", "compaction")


@dataclass(frozen=True)
class Key:
    """What an entry is about. kept: the share of the weight that the masks of `HARD` keep, 1.0 elsewhere."""

    regime: str
    dtype: str
    m: int
    n: int
    k: int
    r: int
    kept: float = 1.0


Tile = tuple[int, ...] | str
"""BLOCK_M, BLOCK_N, BLOCK_K, warps and stages of Triton's kernel, or a name in `linear.tiles.descriptor_tiles`."""


def shown_tile(tile: Tile) -> str:
    """A tile as tables of results print it."""
    return tile if isinstance(tile, str) else "x".join(map(str, tile))


@dataclass(frozen=True)
class Entry:
    """The fastest way for a key, and the tile of Triton, None for its own table.

    milliseconds: medians of all candidates that were right. refused: why the others were not timed.
    """

    key: Key
    way: str
    tile: Tile | None
    milliseconds: Mapping[str, float]
    refused: Mapping[str, str] = field(default_factory=dict)


class TableError(ValueError):
    """A file that is no table, or none for this process."""


class Table:
    """The entries of one file."""

    def __init__(self, path: Path, entries: Iterable[Entry]) -> None:
        self.path, self.entries = path, tuple(entries)
        self._by_shape: dict[tuple[object, ...], list[Entry]] = {}
        for entry in self.entries:
            key = entry.key
            self._by_shape.setdefault((key.regime, key.dtype, key.n, key.k, key.r), []).append(entry)

    def near(self, key: Key) -> list[Entry]:
        """The entries of this regime, dtype, N, K and r for half to twice as many rows."""
        found = self._by_shape.get((key.regime, key.dtype, key.n, key.k, key.r), ())
        return [entry for entry in found if key.m <= _ROWS * entry.key.m and entry.key.m <= _ROWS * key.m]

    def find(self, key: Key) -> Entry | None:
        """That of `near` with the nearest M that speaks for a call.

        With hard masks the share that is kept must not leave the side on which the entry's way won: less than it was
        timed with makes slices better still, more makes them worse. Where a side lies kept first every way multiplies
        the slice, and the share only has to be near.
        """
        distance = lambda entry: (abs(math.log(entry.key.m / key.m)), abs(entry.key.kept - key.kept))  # noqa: E731
        return min((entry for entry in self.near(key) if _speaks_for(entry, key.kept)), key=distance, default=None)


def ways_in(regime: str) -> tuple[str, ...]:
    """The names of the ways that an entry of a regime may take."""
    return _WAYS.get(regime, _WAYS_OF_LINEARS)


def _speaks_for(entry: Entry, kept: float) -> bool:
    if entry.key.regime not in HARD:
        return True
    if entry.key.regime in FIRST:
        return kept <= _ROWS * entry.key.kept and entry.key.kept <= _ROWS * kept
    return kept <= _SHARE * entry.key.kept if entry.way == SLICED else _SHARE * kept >= entry.key.kept


def folder() -> Path | None:
    """Where the user's tables lie: ATP_KERNELS_TABLES, else atp_kernels in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named)
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache_home):  # others are to be ignored, says the standard
        return Path(cache_home) / "atp_kernels"
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "atp_kernels" if os.path.isabs(home) else None


def header(device: torch.device) -> dict[str, object]:
    """What the timings in a table depend on beside the shape; a table with another header is not this process's."""
    return {
        "format": FORMAT,
        "device": device_name(device),
        "torch": torch.__version__,
        "kernels": _kernels(device.type),
    }


def file_name(device: torch.device) -> str:
    """The name of a device's table."""
    return re.sub(r"[^a-z0-9]+", "-", f"{device.type} {device_name(device)}".lower()).strip("-") + ".json"


@cache
def tables_of(device: torch.device) -> tuple[Table, ...]:
    """The tables for a device, the user's before that of the package.

    Read once; whoever writes one calls `tables_of.cache_clear()`.
    """
    if device.type not in ("cpu", "cuda"):
        return ()
    name = file_name(device)
    places = [place / name for place in (folder(), SHIPPED) if place is not None]
    found = (read(path, device) for path in places if os.path.isfile(path))
    return tuple(table for table in found if table is not None)


def read(path: Path, device: torch.device) -> Table | None:
    """The table in a file; None, with one warning, where it is damaged, partial or of another device or version."""
    try:
        return Table(path, _entries_of(content_of(path), header(device)))
    except TableError as error:
        advice = "`python -m atp_kernels.tune` writes a new one"
        warnings.warn(f"The tuned table {path} is ignored, since {error}; {advice}.", RuntimeWarning, stacklevel=2)
        return None


def write(path: Path, device: torch.device, entries: Iterable[Entry]) -> None:
    """Put entries into the table of a device, beside those for other keys that are there and still hold.

    The file is replaced in one step, and processes that write at once wait for each other.
    """
    import fcntl  # not there on every system on which tables can be read

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            kept = {entry.key: entry for entry in _entries_of(content_of(path), header(device))}
        except TableError:
            kept = {}
        kept |= {entry.key: entry for entry in entries}
        rows = [asdict(entry) for entry in kept.values()]
        text = json.dumps({**header(device), "entries": rows}, indent=1) + "\n"
        replace_file(path, text)
    tables_of.cache_clear()


def replace_file(path: Path, text: str) -> None:
    """Write a file in one step: whoever reads it meets the old one or the new one, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def content_of(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `TableError` where there is none."""
    try:
        small = path.stat().st_size <= _LARGEST_FILE
        content = json.loads(path.read_text(encoding="utf-8")) if small else None
    except OSError as error:
        raise TableError(f"it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise TableError("it is not whole JSON") from None
    if not small:
        raise TableError(f"it is larger than {_LARGEST_FILE:,} bytes")
    if not isinstance(content, dict):
        raise TableError("it is not a JSON object")
    return content


def _entries_of(content: Mapping[str, Any], expected: Mapping[str, object]) -> list[Entry]:
    for name, value in expected.items():
        if content.get(name) != value:
            raise TableError(f"its {name} is {content.get(name)!r} and here it is {value!r}")
    rows = content.get("entries")
    if not isinstance(rows, list):
        raise TableError("it has no list of entries")
    return [_entry_of(row, place) for place, row in enumerate(rows)]


def _entry_of(row: Any, place: int) -> Entry:
    try:
        key, tile = row["key"], row["tile"]
        if set(key) != {each.name for each in fields(Key)} or set(row) != {each.name for each in fields(Entry)}:
            raise ValueError
        tile = tuple(tile) if isinstance(tile, list) else tile
        found = Entry(Key(**key), row["way"], tile, row["milliseconds"], row["refused"])
        if not _is_sound(found):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise TableError(f"entry {place} of it is not what a tuned entry looks like") from None
    return found


def _is_sound(entry: Entry) -> bool:
    key, tile = entry.key, entry.tile
    return (
        key.regime in REGIMES
        and isinstance(key.dtype, str)
        and all(type(count) is int and count > 0 for count in (key.m, key.n, key.k, key.r))
        and type(key.kept) is float
        and 0 <= key.kept <= 1
        and entry.way in ways_in(key.regime)
        and (tile is None or entry.way == "triton")
        and (tile is None or isinstance(tile, str) or (_is_tile(tile) and key.regime not in FIRST))
        and isinstance(entry.refused, dict)
        and all(type(time) is float and 0 <= time < math.inf for time in entry.milliseconds.values())
    )


def _is_tile(tile: Any) -> bool:
    """Whether Triton could compile it: blocks and warps are powers of two, and blocks of a product 16 at least."""
    if not (isinstance(tile, tuple) and len(tile) == 5 and all(type(size) is int for size in tile)):
        return False
    *blocks, warps, stages = tile
    return (
        all(size.bit_count() == 1 for size in (*blocks, warps))
        and SMALLEST_DOT <= min(blocks)
        and max(blocks) <= _LARGEST_BLOCK
        and 1 <= warps <= _MOST_WARPS
        and 1 <= stages <= _MOST_STAGES
    )


@cache
def device_name(device: torch.device) -> str:
    """What the maker calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


@cache
def _kernels(device_type: str) -> str:
    """The version of the package, a digest of what is timed, and whether the C++ extension is there.

    On a CPU, where most of what is timed is compiled, the digest is of the extension's binary too. On a GPU it is not:
    a table that comes with the package must fit every build of it.
    """
    from atp_kernels import extension

    digest = hashlib.sha256()
    for room in _TIMED_ROOMS:
        for path in sorted((_PACKAGE / room).glob("*.py")):
            digest.update(path.read_bytes())
    if device_type == "cpu" and (binary := extension.binary()) is not None:
        with suppress(OSError):  # replaced while this process runs, as by an upgrade: no table is of what runs here
            digest.update(binary.read_bytes())
    return f"{__version__} {digest.hexdigest()[:12]} {'with' if extension.AVAILABLE else 'without'} C++"

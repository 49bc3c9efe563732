"""A folder of tuned tables that this process goes by."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from atp_kernels import call, extension
from atp_kernels.tuning import table, tiled


@contextmanager
def tables_in(folder: Path) -> Iterator[Path]:
    """Where the table of the CPU is looked for, alone; nothing is there yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(table.ENVIRONMENT, str(folder))
        patch.setattr(table, "SHIPPED", folder / "shipped")
        _forget()
        yield folder / table.file_name(torch.device("cpu"))
    _forget()


@contextmanager
def without_extension() -> Iterator[None]:
    """The vendor's products are the backend, as on CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "REASON", "not wanted here")
        call._select.cache_clear()
        yield
    call._select.cache_clear()


def _forget() -> None:
    table.tables_of.cache_clear()
    tiled._followed.cache_clear()

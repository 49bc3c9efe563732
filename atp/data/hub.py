"""Names of data sets on the Hub, and the commits that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from atp.ground.reading import existing

_SECONDS = 10.0  # to wait for the Hub's answer; without one, data that are in the cache can still be used


@dataclass(frozen=True)
class HubName:
    """A data set of the Hub, as `owner/name[@revision][#config][:split]` writes it; parts left out are empty."""

    name: str
    revision: str = ""
    config: str = ""
    split: str = ""

    @classmethod
    def parse(cls, text: str) -> HubName:
        """The parts of a name; none of them is checked."""
        rest, _, split = text.partition(":")
        rest, _, config = rest.partition("#")
        name, _, revision = rest.partition("@")
        return cls(name, revision, config, split)

    @property
    def commit(self) -> str | None:
        """The 40 digits of the commit; None where the Hub does not answer, and for a folder. Asked once per process."""
        return None if existing(self.name) is not None else _commit(self.name, self.revision)


@cache
def _commit(name: str, revision: str) -> str | None:
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(name, revision=revision or None, timeout=_SECONDS).sha
    except Exception:  # no network, no such name, no package: whoever reads the data says what is wrong
        return None

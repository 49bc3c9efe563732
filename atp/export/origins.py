"""Which commits of the Hub a run was made from, for its summary."""

from __future__ import annotations

from typing import Any

from atp.config import ATPConfig
from atp.data.hub import HubName
from atp.export.card import hub_data
from atp.ground.reading import existing
from atp.models.load import commit


def origins(config: ATPConfig) -> dict[str, Any]:
    """The Hub's names in a config with their commits, None where the Hub did not say; empty if it names none.

    Folders and packages have no commit: their content is fingerprinted in inputs.json.
    """
    found: dict[str, Any] = {}
    model = config.model
    if existing(model.path) is None and not model.path.startswith("package:"):
        known = commit(model.path, model.gguf_file, model.revision)
        found["model"] = {"name": model.path, "revision": model.revision, "commit": known}
    data = [HubName.parse(text) for text in hub_data(config)]
    if data:
        found["data"] = [{"name": one.name, "revision": one.revision or None, "commit": one.commit} for one in data]
    return {"hub": found} if found else {}

"""Records what the tuned dense model of a finished demo scored, for `atp demo --no-dense` to quote.

    python experiments/record_demo_dense.py RUN_FOLDER

Writes atp/cli/demo_dense.json from the summary.json and config.yaml of RUN_FOLDER, which `atp demo` has filled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from atp.cli.demo import RECORDED_DENSE, dense_settings
from atp.config import ATPConfig

MODEL = "tuned_dense"


def main() -> None:
    folder = Path(sys.argv[1])
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    record = record_of(summary, ATPConfig.load(folder / "config.yaml"))
    RECORDED_DENSE.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def record_of(summary: dict[str, Any], config: ATPConfig) -> dict[str, Any]:
    """The content of the file: settings, command, and scores with their intervals."""
    tasks = {task: summary[task][MODEL] for task in summary["tasks"]}
    return {
        "command": summary["command"],
        "settings": dense_settings(config),
        "perplexity": summary["perplexity"][MODEL],
        "perplexity_interval": summary["perplexity_interval"][MODEL],
        "tasks": {task: {key: found[key] for key in found if key != "confusion"} for task, found in tasks.items()},
    }


if __name__ == "__main__":
    main()

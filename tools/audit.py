"""Asks pip-audit for known weaknesses of the installed packages; needs the network, and says so where there is none.

    python tools/audit.py

Exit status 1 for a weakness, 0 without one, and 0 with one line where pip-audit is missing or nobody answers it.
"""

from __future__ import annotations

import json
import subprocess
import sys


def verdict(output: str, errors: str) -> tuple[list[str], int]:
    """(lines to print, exit status) for what `pip-audit --format json` wrote to stdout and stderr."""
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (errors.strip().splitlines() or ["no answer"])[-1]
        return [f"audit skipped: {last[:200]}"], 0
    weak = [
        f"{package['name']} {package['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'none'}"
        for package in packages
        for found in package.get("vulns", [])
    ]
    return [*weak, f"{len(weak)} known weaknesses in {len(packages)} packages"], int(bool(weak))


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines, status = verdict(done.stdout, done.stderr)
    print(*lines, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())

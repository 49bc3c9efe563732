"""What pip-audit says becomes a line per weakness, and its silence never fails anything."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import audit  # noqa: E402

WEAK = {"name": "old", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1", "2.0"]}]}
SOUND = {"name": "new", "version": "2.0", "vulns": []}
SKIPPED = {"name": "atp-kernels", "skip_reason": "editable"}


def test_a_weakness_is_named_and_fails_and_none_passes():
    lines, status = audit.verdict(json.dumps({"dependencies": [SOUND, WEAK, SKIPPED], "fixes": []}), "")
    assert lines == ["old 1.0: CVE-1, fixed in 1.1, 2.0", "1 known weaknesses in 3 packages"] and status == 1
    assert audit.verdict(json.dumps({"dependencies": [SOUND]}), "") == (["0 known weaknesses in 1 packages"], 0)


@pytest.mark.parametrize("errors", ["", "Traceback\nConnectionError: no network", "No module named pip_audit"])
def test_no_answer_is_one_line(errors):
    ((line,), status) = audit.verdict("", errors)
    assert line.startswith("audit skipped: ") and line.endswith((errors.splitlines() or ["no answer"])[-1])
    assert status == 0

"""Every figure on a run's page is one of its records, or follows from them in a way that is written down."""

from test_report import CERTIFICATE, CONFIG, SUMMARY, write_run
from traced import untraced

from atp.removal.certify import LIMITS
from atp.report.files import RunFiles, read_run
from atp.report.page import page_of

SAMPLES = [{"prompt": "1234 and 56?", "reference": "7", "models": {"original": "89.25", "final": "12"}}]
RECORDED = {"command": "atp demo 3", "perplexity": 16.0625, "perplexity_interval": [15.375, 17.25],
            "tasks": {"pubmedqa": {"accuracy": 0.615, "macro_f1": 0.401}}}  # fmt: skip


WRONG = {"30.17": "30.18", "91.3%": "91.4%", "1.30 ×": "1.31 ×", "92.02 M": "92.03 M", ">536<": ">535<",
         ">3.45<": ">3.46<", ">48<": ">47<", "2.4e-06": "2.5e-06"}  # fmt: skip


def test_every_figure_comes_from_a_record(tmp_path):
    majority = {"pubmedqa": {"label": "3", "of": "train", "macro_f1": 0.125}}
    summary = SUMMARY | {"samples": SAMPLES, "recorded_dense": RECORDED, "majority": majority}
    run = write_run(tmp_path / "run 77", summary=summary, certificate=CERTIFICATE | {"limits": LIMITS})
    (run / "config.yaml").write_text(CONFIG)
    page, records = page_of(run), read_run(run)
    assert untraced(page, records) == []
    for right, wrong in WRONG.items():
        assert right in page, right
        assert untraced(page.replace(right, wrong), records), wrong
    assert len(untraced(page, RunFiles(name=records.name))) > 100, "nothing is found where there are no records"

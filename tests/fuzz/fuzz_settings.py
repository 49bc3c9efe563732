"""Cases of settings and records: config files, overrides, experiments, what a run leaves for its report."""

import contextlib
import json

import yaml
from fuzz_draws import GOOD_VALUES, ODD_JSON, ODD_KEYS, ODD_VALUES, ODD_YAML, as_json, as_yaml, rebuilt, scrambled
from test_report import CERTIFICATE, DECISIONS, SUMMARY, metrics
from transformers import LlamaConfig

from atp.config import ATPConfig
from atp.ground.errors import InputError
from atp.inputs.checks import check_reachable
from atp.report import write_report
from atp.studies.experiments.spec import ExperimentSpec

CONFIG = {
    "model": {"path": "some-model", "gguf_file": None, "dtype": "float32"},
    "output_dir": "runs/x",
    "preset": "quick",
    "seed": 3,
    "data": {"recipe": "custom", "train": "data.jsonl", "labels": ["yes", "no"], "length": 64, "limit": 20,
             "sources": {"mednli": "a.jsonl"}, "general_share": 0.0},
    "decisions": {"space": "head_dim", "target_keep": 0.6, "multiples": {"mlp": 8}, "init": "saliency"},
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "training": {"search": 5, "settle": 2, "tune": 3, "lr": 1e-3, "report_to": [], "schedule": "cosine"},
    "evaluation": {"windows": 5, "generate": False},
}  # fmt: skip
EXPERIMENT = {
    "question": "Which?", "base": "base.yaml", "domains": ["custom", "health-mini"], "seeds": [0, 1],
    "arms": [{"method": "dense_lora"}, {"method": ["atp", "static"], "set": {"lora.r": 4},
                                        "vary": {"decisions.target_keep": [0.6, 0.8]}}],
    "picture": "curve", "x": "decisions.target_keep",
}  # fmt: skip
SCORES = {
    name: {"perplexity": 20.5, "perplexity_interval": [19.0, 22.0], "size": {"params": 1000, "megabytes": 4.0},
           "speed": SUMMARY["speed"]["final"],
           "tasks": {"qa": {"accuracy": 0.5, "macro_f1": 0.4, "macro_f1_interval": [0.3, 0.5]}}}
    for name in ("original", "tuned_dense", "final")
}  # fmt: skip
RECORDED = {"recorded_dense": {"command": "atp demo", "perplexity": 16.5, "tasks": {"pubmedqa": {"accuracy": 0.5}}}}
RUN = {
    "summary.json": SUMMARY | RECORDED | {"not_measurable": {"pubmedqa accuracy": "it is low"}},
    "evaluation.json": SCORES | {"majority": SUMMARY["majority"]},
    "certificate.json": CERTIFICATE,
    "decisions.json": DECISIONS,
}
SHAPES = LlamaConfig(
    hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512,
)  # fmt: skip


def use_config(config):
    """What a run does with a config before it loads a model; the dump must read back as the same config."""
    if ATPConfig.parse(yaml.safe_load(config.dump())) != config:
        raise AssertionError("the dumped config differs")
    check_reachable(config, SHAPES)
    with contextlib.suppress(InputError):
        config.refuse_change_of(ATPConfig.parse(CONFIG).model_dump(mode="json"))


def config_case(draw, folder):
    path = folder / "config.yaml"
    path.write_bytes(as_yaml(draw, CONFIG, 3))
    use_config(ATPConfig.load(path))


def override_case(draw, folder):
    keys = [f"{section}.{key}" for section, values in CONFIG.items() if isinstance(values, dict) for key in values]
    overrides = []
    for _ in range(draw.choice((1, 1, 2, 4))):
        key = draw.choice(keys) if draw.random() < 0.9 else draw.choice([*ODD_KEYS, "a." * 3000, "seed.x", "data..x"])
        value = draw.choice(GOOD_VALUES if draw.random() < 0.6 else ODD_VALUES)
        text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
        text = draw.choice(ODD_YAML) if draw.random() < 0.2 else text
        overrides.append(scrambled(draw, f"{key}={text}", ODD_YAML, draw.random() < 0.2))
    use_config(ATPConfig.parse(CONFIG, overrides))


def experiment_case(draw, folder):
    path = folder / "which.yaml"
    path.write_bytes(as_yaml(draw, EXPERIMENT, 3))
    base = {key: value for key, value in CONFIG.items() if key != "output_dir"}
    (folder / "base.yaml").write_bytes(as_yaml(draw, base, 2 if draw.random() < 0.3 else 1))
    spec, found = ExperimentSpec.load(str(path))
    arms = spec.labelled_arms()
    for domain in spec.domains[:3]:
        config = spec.config(found, domain, [])
        for arm in list(arms.values())[:3]:
            ATPConfig.parse(config.model_dump(mode="json"), list(arm.overrides))


def report_case(draw, folder):
    for name, content in RUN.items():
        if draw.random() < 0.9:
            damaged = as_json(draw, content, 4) if draw.random() < 0.5 else json.dumps(content).encode()
            (folder / name).write_bytes(damaged)
    lines = [json.dumps(rebuilt(draw, record, draw.random() < 0.2)) for record in list(metrics())[::5]]
    text = "\n".join(lines)
    text = scrambled(draw, text, ODD_JSON, draw.randrange(3)) if draw.random() < 0.5 else text
    (folder / "metrics.jsonl").write_bytes(text.encode("utf-8", "replace"))
    (folder / "config.yaml").write_bytes(as_yaml(draw, CONFIG, 2))
    page = write_report(folder).read_text(encoding="utf-8")
    if "<script" in page or page.split()[-3:] != ["</main>", "</body>", "</html>"]:
        raise AssertionError("not the page that was meant")

"""Tasks of lm-eval 0.4, one YAML file each, over JSONL files that `atp.evaluation.harness.write_tasks` writes."""

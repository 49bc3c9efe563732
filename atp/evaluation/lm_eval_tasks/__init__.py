"""Tasks for lm-eval 0.4, one YAML file each, over JSONL files written by `atp.evaluation.harness.write_tasks`."""

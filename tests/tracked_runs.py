"""Trackers of a run in a folder, and what they wrote to metrics.jsonl."""

import json

from lora_dpo_jax.tracking import start_trackers


def start(tmp_path, *configs):
    return start_trackers(configs, run_dir=tmp_path / "run", run_id="some-id", resolved_config={"beta": 0.1})


def read_metrics(tmp_path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]

"""The metrics of a running server, judged by Prometheus' own tool, and what the dashboard asks."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import CONFIG
from tests.e2e.serving import Served
from tests.ops.test_deployment_files import DASHBOARD

pytestmark = pytest.mark.slow

NUM_REQUESTS, NUM_GENERATED = 3, 8


@pytest.fixture(scope="module")
def scrape(served: Served) -> str:
    for endpoint, prompt in (
        ("completions", {"prompt": "abc"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "abc"}]}),
        ("completions", {"prompt": "abc", "stream": True}),
    ):
        body = {**prompt, "max_tokens": NUM_GENERATED, "ignore_eos": True, "temperature": 0}
        reply = httpx.post(f"{served.url}/v1/{endpoint}", json=body, timeout=30)
        assert reply.status_code == 200, reply.text
    assert httpx.post(f"{served.url}/v1/completions", json={}).status_code == 400
    return httpx.get(f"{served.url}/metrics").text


def dashboard_queries() -> list[tuple[str, str]]:
    """(panel, expression) of every target."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [
        (panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])
    ]


def test_promtool_has_nothing_to_say_about_the_metrics(scrape: str, promtool: str) -> None:
    run = subprocess.run(
        [promtool, "check", "metrics"], input=scrape, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""


def test_the_counts_are_exact(scrape: str) -> None:
    def total(name: str) -> float:
        values = re.findall(rf"^skipllm_{name}(?:\{{.*\}})? (\S+)$", scrape, re.MULTILINE)
        assert values, name
        return sum(map(float, values))

    assert total("time_to_first_token_seconds_count") == NUM_REQUESTS
    assert total("inter_token_latency_seconds_count") == NUM_REQUESTS * (NUM_GENERATED - 1)
    assert total("generated_tokens_total") == NUM_REQUESTS * NUM_GENERATED
    assert total("prompt_tokens_total") == NUM_REQUESTS * 3
    assert total("request_skip_ratio_count") == NUM_REQUESTS
    assert total("requests_total") == NUM_REQUESTS + 1
    assert total("requests_running") == total("requests_waiting") == 0
    num_blocks = NUM_REQUESTS * (NUM_GENERATED - 1) * CONFIG["num_hidden_layers"]
    assert total("ffn_blocks_total") == num_blocks
    assert total("ffn_neurons_total") == num_blocks * CONFIG["intermediate_size"]
    assert total("engine_up") == 1


@pytest.mark.parametrize(("panel", "expression"), dashboard_queries())
def test_every_metric_of_a_panel_exists(panel: str, expression: str, scrape: str) -> None:
    names = re.findall(r"\bskipllm_\w+", expression)
    assert names, panel
    for name in names:
        assert re.search(rf"^{name}[ {{]", scrape, re.MULTILINE), f"{panel}: no {name}"
    for name, label, value in re.findall(r'(skipllm_\w+)\{(\w+)="(\w+)"\}', expression):
        assert re.search(rf'^{name}\{{.*{label}="{value}"', scrape, re.MULTILINE), panel


def test_prometheus_understands_every_panel(promtool: str, tmp_path: Path) -> None:
    rules: list[dict[str, Any]] = [
        {"record": f"panel:{number}", "expr": re.sub(r"\$__\w+", "1m", expression)}
        for number, (_, expression) in enumerate(dashboard_queries())
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_request_is_one_line_of_json_without_its_text(served: Served, scrape: str) -> None:
    lines = [json.loads(line) for line in served.log.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["event"] == "request"]
    assert len(requests) == NUM_REQUESTS + 1
    first = requests[0]
    assert first["endpoint"] == "completions"
    assert first["status"] == 200
    assert first["finish_reason"] == "length"
    assert (first["prompt_tokens"], first["generated_tokens"]) == (3, NUM_GENERATED)
    assert first["ttft_s"] > 0
    assert "abc" not in json.dumps(requests)

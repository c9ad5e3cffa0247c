"""The files that others' tools read: Dockerfile, compose, Prometheus', Grafana's."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[2]
DASHBOARD = REPO / "docker/grafana/dashboards/skipllm.json"


def load(path: str) -> Any:
    return yaml.safe_load((REPO / path).read_text())


def test_the_dockerfile_passes_its_linter() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    run = subprocess.run([hadolint, REPO / "Dockerfile"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_the_image_runs_the_server_as_a_user_and_receives_its_signals() -> None:
    text = (REPO / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["skipllm", "serve"]' in text
    assert "\nUSER 1000:0\n" in text
    assert "\nHEALTHCHECK " in text
    assert "\nEXPOSE 8000\n" in text


def test_the_image_contains_what_the_package_needs() -> None:
    allowed = {
        line.removeprefix("!")
        for line in (REPO / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for line in (REPO / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert copied == allowed
    assert all((REPO / source).exists() for source in copied)


def test_compose_mounts_files_that_exist_and_pins_versions() -> None:
    services = load("docker/compose.yaml")["services"]
    for name, service in services.items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (REPO / "docker" / source).exists(), volume
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
    (scrape,) = load("docker/prometheus/prometheus.yml")["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == ["skipllm:8000"]
    assert "skipllm" in services
    assert load("docker/compose.gpu.yaml")["services"].keys() <= services.keys()


def test_streams_may_end_before_docker_kills_the_container() -> None:
    from server.settings import Settings

    service = load("docker/compose.yaml")["services"]["skipllm"]
    assert int(service["stop_grace_period"].removesuffix("s")) > Settings().shutdown_timeout


def test_grafana_is_given_the_dashboard_and_its_data_source() -> None:
    folder = "docker/grafana/provisioning"
    (provider,) = load(f"{folder}/dashboards/skipllm.yaml")["providers"]
    grafana = load("docker/compose.yaml")["services"]["grafana"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"
    (source,) = load(f"{folder}/datasources/prometheus.yaml")["datasources"]
    (variable,) = json.loads(DASHBOARD.read_text())["templating"]["list"]
    assert variable["current"]["value"] == source["uid"]
    assert source["url"] == "http://prometheus:9090"


def test_prometheus_takes_its_configuration(promtool: str) -> None:
    config = REPO / "docker/prometheus/prometheus.yml"
    run = subprocess.run([promtool, "check", "config", config], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_dependency_has_an_exact_version() -> None:
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
        wanted = Requirement(text)
        if wanted.name != "skipllm":
            assert pins[canonicalize_name(wanted.name)] in wanted.specifier, text


def test_ci_runs_the_one_test_command_of_the_readme() -> None:
    readme = (REPO / "README.md").read_text()
    commands = re.findall(r"^ *python3 -m venv .* -m pytest$", readme, re.MULTILINE)
    assert len(commands) == 1
    assert os.access(REPO / ".ci/run", os.X_OK)
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", REPO / ".ci/run"], check=True)


@pytest.mark.parametrize("kind", ["heatmap", "timeseries", "barchart"])
def test_the_first_row_of_the_dashboard_is_the_skip_ratio(kind: str) -> None:
    row, *panels = json.loads(DASHBOARD.read_text())["panels"]
    assert (row["type"], row["title"]) == ("row", "Skip ratio")
    assert kind in [panel["type"] for panel in panels[:3]]


def test_the_heat_map_counts_each_request_in_one_column() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    (heat_map,) = [panel for panel in panels if panel["type"] == "heatmap"]
    (target,) = heat_map["targets"]
    assert "[$__interval]" in target["expr"]  # $__rate_interval spans several columns
    scrape_interval = load("docker/prometheus/prometheus.yml")["global"]["scrape_interval"]
    seconds = [int(text.removesuffix("s")) for text in (target["interval"], scrape_interval)]
    assert seconds[0] >= 4 * seconds[1]


def test_the_share_of_weights_left_out_counts_the_rows_of_each_neuron(
    promtool: str, tmp_path: Path
) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    (panel,) = [panel for panel in panels if panel["title"] == "FFN weights left out"]
    share = panel["targets"][0]["expr"].replace("$__rate_interval", "1m")
    # Of two layers with 3600 rows of weights, left out are 2 x 210 + 30 and 3 x 450.
    counts = {
        ("0", "computed"): 960, ("0", "skipped_before_up"): 210, ("0", "skipped_before_down"): 30,
        ("0", "skipped_with_block"): 0,
        ("1", "computed"): 750, ("1", "skipped_before_up"): 0, ("1", "skipped_before_down"): 0,
        ("1", "skipped_with_block"): 450,
    }  # fmt: skip
    name = "skipllm_ffn_neurons_total"
    series = [
        {"series": f'{name}{{layer="{layer}", outcome="{outcome}"}}', "values": f"0+{count}x5"}
        for (layer, outcome), count in counts.items()
    ]
    # Rounded, as series are added up in any order.
    query = {"expr": f"round({share}, 1e-6)", "eval_time": "2m", "exp_samples": [{"value": 0.25}]}
    case = {
        "interval": "30s",
        "input_series": series,
        "promql_expr_test": [query],
    }
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "30s", "tests": [case]}))
    run = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_panel_tells_the_neurons_left_out_by_layer() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    (panel,) = [panel for panel in panels if panel["title"] == "Neurons left out per layer"]
    assert [re.findall(r'outcome="(\w+)"', target["expr"]) for target in panel["targets"]] == [
        ["skipped_before_up"],
        ["skipped_before_down"],
    ]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places), "two panels at one place"
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_kubernetes_example_probes_what_the_server_answers() -> None:
    text = (REPO / "docs/deploy.md").read_text()
    match = re.search(r"^ {4}apiVersion:.*?(?=^\S)", text, re.MULTILINE | re.DOTALL)
    assert match is not None
    (container,) = yaml.safe_load(match[0])["spec"]["template"]["spec"]["containers"]
    paths = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness")}
    assert paths == {"/ready"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/live"

"""Alert rules through promtool; all other expressions through a Prometheus that scrapes the server."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.ports import free_port
from tests.support.served import wait_until

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "triton.json"
POD = {"namespace": "gigapath", "pod": "triton-0"}
Ask = Callable[..., Any]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> dict[str, str]:
    """Everything that asks Prometheus, with what Grafana and prometheus-adapter put into their templates."""
    found = {
        f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", "10s")
        for panel in panels()
        for target in panel["targets"]
    }
    (rule,) = yaml.safe_load((PROMETHEUS / "adapter.yaml").read_text())["rules"]["custom"]
    labels = ",".join(f'{name}="{value}"' for name, value in POD.items())
    query = rule["metricsQuery"].replace("<<.LabelMatchers>>", labels).replace("<<.GroupBy>>", "pod")
    return {
        **found,
        "autoscaling, its series": rule["seriesQuery"],
        "autoscaling": query.replace("[2m]", "[10s]"),
    }


def result(ask: Ask, expression: str) -> Any:
    """The series that an expression gives now."""
    return ask("query", query=expression)["result"]


@pytest.fixture(scope="module")
def ask(
    program: Callable[[str], str], deployment: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ask]:
    """Call the API of a Prometheus that has scraped the running server under load."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port("127.0.0.1")
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [deployment.metrics_address], "labels": POD}]
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(PROMETHEUS / "alerts.yml")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )

    moment = 0.0

    def call(path: str, **query: str) -> Any:
        query |= {"time": str(moment)} if path == "query" else {}
        url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url) as answer:
            return json.load(answer)["data"]

    def scraped(at_least: int) -> bool:
        """Whether there are so many samples, the last one among them: a scrape may have taken too long."""
        samples = f"count_over_time(nv_inference_count{{model='tile_encoder'}}[10s]) >= {at_least}"
        try:
            return bool(result(call, f"{samples} and on() up == 1"))
        except OSError:
            return False

    try:
        deadline = time.monotonic() + 200
        while not scraped(at_least=8):
            assert time.monotonic() < deadline, (folder / "prometheus.log").read_text()[-4000:]
            assert deployment.probe("infer").returncode == 0
            moment = time.time()  # all is asked for as it was then, however long the tests take
        yield call
    finally:
        process.terminate()
        process.wait()


def test_the_configuration_is_valid(program: Callable[[str], str]) -> None:
    done = subprocess.run(
        [program("promtool"), "check", "config", "prometheus.yml"],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_alerts_fire_when_they_should_and_only_then(program: Callable[[str], str]) -> None:
    done = subprocess.run(
        [program("promtool"), "test", "rules", "alerts_test.yml"],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test() -> None:
    alerts = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    firing = {case["alertname"] for test in tests for case in test["alert_rule_test"] if "exp_alerts" in case}
    assert {alert["alert"] for alert in alerts} == firing


@pytest.mark.parametrize("name", expressions())
def test_an_expression_is_answered(ask: Ask, name: str) -> None:
    assert result(ask, expressions()[name]), "Prometheus knows nothing that fits this expression"


def test_the_dashboard_counts_tiles(ask: Ask) -> None:
    """The panel's figure is the load: each probe sends one tile, several of them a second."""
    (answer,) = result(ask, expressions()["Tiles per second A"])
    assert 0 < float(answer["value"][1]) < 100
    (batch,) = result(ask, expressions()["Tiles in one execution A"])
    assert float(batch["value"][1]) == pytest.approx(1)


def test_rules_are_evaluated_without_errors_and_none_fires(ask: Ask) -> None:
    def found() -> set[tuple[str, str]]:
        (group,) = ask("rules")["groups"]
        return {(rule["health"], rule["state"]) for rule in group["rules"]}

    wait_until(lambda: found() == {("ok", "inactive")})  # pending for a moment where a scrape took too long


def test_grafana_finds_its_files() -> None:
    """Paths and names by which compose, provisioning and dashboard refer to each other."""
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in panels()} == {source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "files.yml").read_text())["providers"]
    grafana = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["grafana"]
    mounted = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    assert mounted["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].startswith(
        provider["options"]["path"]
    )
    assert source["url"] == "http://prometheus:9090"

"""compose.yaml as docker-compose resolves it, against the Compose Specification's schema; needs no engine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("triton", "triton-cpu", "front", "client", "prometheus", "grafana")


def resolve(compose: str, file: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [compose, "-f", str(file), "--project-directory", str(ROOT), "config"],
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", **settings},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def compose(program: Callable[[str], str]) -> str:
    return program("docker-compose")


@pytest.fixture(scope="module")
def services(compose: str) -> dict[str, Any]:
    done = resolve(compose, ROOT / "compose.yaml")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = yaml.safe_load(done.stdout)["services"]
    return found


def test_every_service_is_there(services: dict[str, Any]) -> None:
    assert set(services) == set(SERVICES)
    # `docker compose up` alone starts the GPU server; everything else is asked for by name or profile.
    assert [name for name in SERVICES if "profiles" not in services[name]] == ["triton"]


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_has_privileges(services: dict[str, Any], name: str) -> None:
    service = services[name]
    assert re.match(r"[1-9]\d*:", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback(services: dict[str, Any], name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in services[name].get("ports", []))
    assert not any(":8000" in port for port in services[name].get("ports", [])), "HTTP stays inside"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_limits(services: dict[str, Any], name: str) -> None:
    service = services[name]
    assert service["mem_limit"]
    assert service["pids_limit"] == 1024
    assert float(service["cpus"]) > 0
    assert all("size=" in mount for mount in service["tmpfs"])


def test_every_door_has_a_setting_of_its_own(compose: str) -> None:
    doors = {
        "BIND": ("triton", "8001"),
        "BIND_FRONT": ("front", "8003"),
        "BIND_METRICS": ("triton", "8002"),
        "BIND_PROMETHEUS": ("prometheus", "9090"),
        "BIND_GRAFANA": ("grafana", "3000"),
    }
    for setting in doors:
        done = resolve(compose, ROOT / "compose.yaml", **{setting: "10.1.2.3"})
        found = yaml.safe_load(done.stdout)["services"]
        opened = {
            (name, port.split(":")[1])
            for name, service in found.items()
            for port in service.get("ports", [])
            if not port.startswith("127.0.0.1:")
        }
        name, port = doors[setting]
        wanted = {(name, port)} | ({("triton-cpu", port)} if name == "triton" else set())
        assert opened == wanted


@pytest.mark.parametrize("name", ["triton", "triton-cpu"])
def test_a_server_reads_its_models_and_is_asked_for_an_inference(services: dict[str, Any], name: str) -> None:
    service = services[name]
    assert f"{ROOT}/model_repository:/models:ro" in service["volumes"]
    assert service["command"] == ["/bin/sh", "/deploy/start.sh"]
    assert service["healthcheck"]["test"] == ["CMD", "python3", "/deploy/probe.py", "infer"]
    assert f"{ROOT}/deploy/base:/deploy:ro" in service["volumes"]
    assert service["networks"]["default"]["aliases"] == ["triton"]
    assert service["environment"]["NVIDIA_TF32_OVERRIDE"] == "0"


def test_the_gpu_server_is_nvidias_and_has_a_gpu(services: dict[str, Any]) -> None:
    version = re.search(r"^TRITON_VERSION=(\S+)$", (ROOT / ".env").read_text(), re.MULTILINE)
    assert version
    assert services["triton"]["image"] == f"nvcr.io/nvidia/tritonserver:{version[1]}-py3"
    (device,) = services["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    environments = {name: services[name]["environment"] for name in ("triton", "triton-cpu")}
    assert environments["triton"] == {**environments["triton-cpu"], "GPU": "required"}


def test_settings_reach_the_server(compose: str) -> None:
    settings = {"TLS": "mutual", "CERTS": "/etc/certs", "BIND": "10.1.2.3", "TRITON_VERSION": "99.01"}
    settings |= {"MODEL_CONFIG": "tensorrt"}
    triton = yaml.safe_load(resolve(compose, ROOT / "compose.yaml", **settings).stdout)["services"]["triton"]
    assert triton["environment"]["MODEL_CONFIG"] == "tensorrt"
    assert triton["environment"]["TLS"] == "mutual"
    assert "/etc/certs:/certs:ro" in triton["volumes"]
    assert "10.1.2.3:8001:8001/tcp" in triton["ports"]
    assert triton["image"].endswith(":99.01-py3")


def test_a_front_stands_before_the_server_with_tls_of_its_own(compose: str) -> None:
    settings = {"FRONT_TLS": "mutual", "CERTS": "/etc/certs"}
    found = yaml.safe_load(resolve(compose, ROOT / "compose.yaml", **settings).stdout)["services"]
    assert found["front"]["command"] == ["--upstream=triton:8001", "--tls=mutual"]
    assert "/etc/certs:/certs:ro" in found["front"]["volumes"]
    assert found["triton"]["environment"]["TLS"] == "off"


def test_the_client_which_decodes_slides_sees_no_key_of_the_server(services: dict[str, Any]) -> None:
    certs = {
        name: next(volume for volume in services[name]["volumes"] if volume.endswith(":/certs:ro"))
        for name in ("triton", "triton-cpu", "client")
    }
    assert certs["triton"] == certs["triton-cpu"] == f"{ROOT}/deploy/certs/server:/certs:ro"
    assert certs["client"] == f"{ROOT}/deploy/certs/client:/certs:ro"


def test_a_typing_error_is_refused(compose: str, tmp_path: Path) -> None:
    """The validation above can fail."""
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((ROOT / "compose.yaml").read_text().replace("shm_size", "shm_sise"))
    assert "shm_sise" in resolve(compose, wrong).stderr

"""The manifests as `kubectl kustomize` builds them, against Kubernetes' published schemas."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.front.proxy import Settings

ROOT = Path(__file__).resolve().parents[2]
KUBECTL = Path(sysconfig.get_path("scripts")) / "kubectl"
Manifests = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=["gpu", "cpu", "cpu with a front"])
def overlay(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def manifests(overlay: str, tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    """Every object of one overlay by its kind; its commented line asks for a front."""
    name, _, front = overlay.partition(" ")
    deploy = shutil.copytree(ROOT / "deploy", tmp_path_factory.mktemp("deploy") / "deploy")
    path = deploy / "overlays" / name / "kustomization.yaml"
    if front:
        path.write_text(path.read_text().replace("# components:", "components:"))
    build = [str(KUBECTL), "kustomize", str(path.parent)]
    documents = list(
        yaml.safe_load_all(subprocess.run(build, check=True, capture_output=True, text=True).stdout)
    )
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


@pytest.fixture(scope="module")
def pod(manifests: Manifests) -> dict[str, Any]:
    spec: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(overlay: str, pod: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any]
    found, *fronts = pod["containers"]
    assert [one["name"] for one in fronts] == ["front"] * ("front" in overlay)
    return found


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_manifests_fit_the_published_schemas(manifests: Manifests, version: str) -> None:
    for document in manifests.values():
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_refuse_a_typing_error(manifests: Manifests) -> None:
    """The validation above can fail."""
    wrong = {**manifests["Service"], "spec": {"clusterIp": "None"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_pods_have_no_privileges(manifests: Manifests, pod: dict[str, Any]) -> None:
    """What the Pod Security Standard `restricted` asks for, which the namespace enforces."""
    assert manifests["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    for one in pod["containers"]:
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert {next(iter(set(volume) - {"name"})) for volume in pod["volumes"]} <= {
        *("persistentVolumeClaim", "configMap", "secret", "emptyDir")
    }


def test_a_pod_has_limits(pod: dict[str, Any]) -> None:
    """The number of processes is the kubelet's to limit (podPidsLimit)."""
    for one in pod["containers"]:
        assert {"cpu", "memory", "ephemeral-storage"} <= set(one["resources"]["limits"])
    assert all(volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume)


def test_a_server_with_stubs_can_be_killed_from_within_its_container(
    overlay: str, pod: dict[str, Any]
) -> None:
    """Process 1 of a namespace can't be."""
    assert pod.get("shareProcessNamespace", False) is overlay.startswith("cpu")


def test_the_probes_infer(container: dict[str, Any]) -> None:
    commands = {kind: container[f"{kind}Probe"]["exec"]["command"] for kind in ("startup", "readiness")}
    assert set(map(tuple, commands.values())) == {("python3", "/deploy/probe.py", "infer")}
    # A busy server must not be restarted for being slow: its liveness asks the process alone.
    assert container["livenessProbe"]["exec"]["command"] == ["python3", "/deploy/probe.py", "live"]


def test_a_pod_drains_before_it_is_killed(pod: dict[str, Any]) -> None:
    start = (ROOT / "deploy" / "base" / "start.sh").read_text()
    exit_timeout = re.search(r"--exit-timeout-secs=(\d+)", start)
    assert exit_timeout
    assert Settings.grace == int(exit_timeout[1])
    for one in pod["containers"]:
        _, pause = one["lifecycle"]["preStop"]["exec"]["command"]
        assert pod["terminationGracePeriodSeconds"] > int(pause) + int(exit_timeout[1])


def test_names_meet(manifests: Manifests, pod: dict[str, Any], container: dict[str, Any]) -> None:
    """What refers to something by its name finds it: Kubernetes itself would say nothing."""
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        manifests["Service"]["spec"]["selector"],
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels.items()
    deployment = manifests["Deployment"]["metadata"]["name"]
    assert manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == deployment
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claim = volumes["models"]["persistentVolumeClaim"]
    assert claim == {"claimName": manifests["PersistentVolumeClaim"]["metadata"]["name"], "readOnly": True}
    assert volumes["deploy"]["configMap"]["name"] == manifests["ConfigMap"]["metadata"]["name"]
    ports = [port["name"] for one in pod["containers"] for port in one["ports"]]
    assert len(ports) == len(set(ports))
    assert {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]} == set(ports)
    rules = manifests["NetworkPolicy"]["spec"]["ingress"]
    assert {port["port"] for rule in rules for port in rule["ports"]} == set(ports)
    assert manifests["Service"]["spec"]["clusterIP"] == "None"


def test_clients_reach_the_front_alone(overlay: str, pod: dict[str, Any], container: dict[str, Any]) -> None:
    (door,) = (
        (one["name"], port["containerPort"])
        for one in pod["containers"]
        for port in one["ports"]
        if port["name"] == "grpc"
    )
    behind = "front" in overlay
    assert door == (("front", 8003) if behind else ("triton", 8001))
    assert ("--grpc-address=127.0.0.1" in container["args"]) is behind


def test_a_pod_that_is_labelled_as_a_client_reaches_grpc_and_no_other_does(manifests: Manifests) -> None:
    (peer,) = next(
        rule["from"]
        for rule in manifests["NetworkPolicy"]["spec"]["ingress"]
        if rule["ports"] == [{"port": "grpc"}]
    )
    # Nothing but the one label is asked for, neither of the pod nor of its namespace.
    assert peer == {
        "podSelector": {
            "matchExpressions": [{"key": "gigapath/client", "operator": "In", "values": ["true"]}]
        }
    }
    docs = (ROOT / "docs" / "deployment.md").read_text()
    assert '`gigapath/client: "true"`' in docs


def test_the_autoscaler_asks_for_the_metric_that_the_adapter_gives(manifests: Manifests) -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "adapter.yaml").read_text())["rules"]["custom"]
    (metric,) = manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in {rule["name"]["as"] for rule in rules}


def test_the_files_are_the_ones_that_compose_mounts(manifests: Manifests) -> None:
    data = manifests["ConfigMap"]["data"]
    assert data == {name: (ROOT / "deploy" / "base" / name).read_text() for name in ("start.sh", "probe.py")}


def test_float32_is_not_tf32(container: dict[str, Any]) -> None:
    assert {"name": "NVIDIA_TF32_OVERRIDE", "value": "0"} in container["env"]


def test_gpu(overlay: str, container: dict[str, Any]) -> None:
    version = re.search(r"^TRITON_VERSION=(\S+)$", (ROOT / ".env").read_text(), re.MULTILINE)
    assert version
    image = f"nvcr.io/nvidia/tritonserver:{version[1]}-py3"
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert ({"name": "GPU", "value": "required"} in container["env"]) is (overlay == "gpu")
    assert (container["image"] == image, gpus) == ((True, "1") if overlay == "gpu" else (False, None))


def test_the_overlay_of_the_docs_turns_tls_on(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    (overlay,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    deploy = shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    mine = deploy / "overlays" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(overlay)
    built = subprocess.run([str(KUBECTL), "kustomize", str(mine)], check=True, capture_output=True, text=True)
    (found,) = [one for one in yaml.safe_load_all(built.stdout) if one["kind"] == "Deployment"]
    assert {"name": "TLS", "value": "mutual"} in found["spec"]["template"]["spec"]["containers"][0]["env"]

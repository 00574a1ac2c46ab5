"""docker/Dockerfile: linted, every step of the images run by buildah, and the images used together.

Where the tests run, no registry of images can be reached. So this machine stands in for python:3.11-slim: the
base image is nearly empty, and the machine's programs and Python are mounted read-only where they would be.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import client
from server.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
CA_FILE = "/etc/ssl/certs/ca-certificates.crt"
BASE = f"""
FROM scratch
COPY root/ /
ENV PATH=/usr/local/bin:/usr/bin:/bin LD_LIBRARY_PATH=/usr/local/lib
ENV SSL_CERT_FILE={CA_FILE} PIP_CERT={CA_FILE}
"""
# What python:3.11-slim-bookworm brings of its own: everything else has to be in the image.
SYSTEM_LIBRARIES = {
    *("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libresolv.so.2"),
    *("libgcc_s.so.1", "libstdc++.so.6", "libz.so.1", "/lib64/ld-linux-x86-64.so.2", "linux-vdso.so.1"),
}


pytestmark = pytest.mark.timeout(900)  # the first build fetches and unpacks some hundred MB
NO_NETWORK = (
    *("Failed to fetch", "Failed to download", "name resolution", "Failed to establish a new connection"),
    *("Max retries exceeded", "Read timed out"),
)


def test_the_dockerfile_passes_the_linter() -> None:
    linter = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([str(linter), str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_nothing_secret_or_heavy_reaches_a_build() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    copied = {source.rstrip("/") for sources in copies for source in sources.split()}
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


class Builder:
    """buildah with a storage of its own, which keeps the layers for the next run."""

    def __init__(self, buildah: str, storage: Path) -> None:
        self.command = [buildah, f"--root={storage}/storage", f"--runroot={storage}/run"]
        mounts = [f"{path}:{path}:ro" for path in ("/etc/ssl", "/usr/share")]
        # Where a distribution hasn't merged /usr, these would be links; Debian's are folders of /usr.
        mounts += [
            f"{path}:{path}:ro" for path in ("/usr/bin", "/usr/lib", "/usr/lib64") if Path(path).exists()
        ]
        mounts.append(f"{sys.base_prefix}:/usr/local:ro")
        self.machine = [f"--volume={mount}" for mount in mounts]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True, cwd=ROOT)
        if any(sign in done.stderr for sign in NO_NETWORK):
            pytest.skip("the package index can't be reached")
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout.strip()

    def build(self, target: str) -> dict[str, Any]:
        """Build one target of the Dockerfile; returns the image's settings."""
        arguments = ["--isolation=chroot", "--layers", "--build-arg=BASE_IMAGE=localhost/machine"]
        self(
            "build",
            *arguments,
            *self.machine,
            f"--target={target}",
            f"--tag={target}",
            f"-f={DOCKERFILE}",
            ".",
        )
        settings: dict[str, Any] = json.loads(self("inspect", "--type=image", f"localhost/{target}"))
        return settings


@pytest.fixture(scope="module")
def builder(program: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Builder:
    buildah = program("buildah")
    if os.geteuid() != 0:
        pytest.skip("building without an engine needs root here (chroot isolation)")
    build = Builder(buildah, ROOT / "build" / "buildah")
    context = tmp_path_factory.mktemp("machine")
    root = context / "root"
    for folder in ("etc", "proc", "dev", "sys", "run", "root", "usr/local", "tmp", "var/tmp"):
        (root / folder).mkdir(parents=True)
    for folder in ("tmp", "var/tmp"):
        (root / folder).chmod(0o1777)
    for folder in ("bin", "lib", "lib64"):
        (root / folder).symlink_to(f"usr/{folder}")
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (context / "Dockerfile").write_text(BASE)
    build("build", "--layers", "--tag=machine", str(context))
    return build


@pytest.fixture(scope="module")
def images(builder: Builder) -> dict[str, dict[str, Any]]:
    return {target: builder.build(target) for target in ("triton-cpu", "client", "front")}


@pytest.fixture(scope="module")
def containers(builder: Builder, images: dict[str, dict[str, Any]]) -> Iterator[dict[str, str]]:
    made = {target: builder("from", f"localhost/{target}") for target in images}
    yield made
    builder("rm", *made.values())


@pytest.mark.parametrize("target", ["triton-cpu", "client", "front"])
def test_an_image_names_itself_and_runs_without_privileges(
    images: dict[str, dict[str, Any]], target: str
) -> None:
    settings = images[target]["OCIv1"]["config"]
    assert settings["User"] == "1000:1000"
    assert settings["Labels"]["org.opencontainers.image.title"].endswith(target)
    assert {"org.opencontainers.image.description", "org.opencontainers.image.revision"} < set(
        settings["Labels"]
    )


@pytest.mark.parametrize("target", ["triton-cpu", "client", "front"])
def test_an_image_needs_nothing_of_the_machine_but_what_its_base_has(
    builder: Builder, containers: dict[str, str], target: str
) -> None:
    root = builder("mount", containers[target])
    libraries = [str(path) for path in Path(root, "opt").rglob("*.so*") if path.is_file()]
    assert libraries
    listed = subprocess.run(
        ["ldd", *libraries],
        env={"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": f"{root}/opt/tritonserver/lib"},
        capture_output=True,
        text=True,
    ).stdout
    builder("umount", containers[target])
    dependencies = [line for line in listed.splitlines() if line.startswith("\t") and root not in line]
    # What is "not found" has been loaded by Python by then: it lies in the image next to those that need it.
    outside = {
        line.split()[0] for line in dependencies if "not found" not in line and "statically" not in line
    }
    assert outside <= SYSTEM_LIBRARIES
    missing = {line.split()[0] for line in dependencies if "not found" in line}
    assert missing <= {Path(library).name for library in libraries}


@pytest.mark.parametrize(
    ("target", "absent", "limit"),
    [
        ("client", "torch onnxruntime onnx", 700e6),
        ("triton-cpu", "torch", 350e6),
        ("front", "torch onnxruntime", 100e6),
    ],
)
def test_an_image_leaves_out_what_it_does_not_need(
    builder: Builder, containers: dict[str, str], target: str, absent: str, limit: float
) -> None:
    root = Path(builder("mount", containers[target]))
    (packages,) = (root / "opt/venv/lib").glob("python3.*/site-packages")
    assert (packages / "numpy").is_dir()
    assert not any((packages / name).exists() for name in absent.split())
    assert sum(path.lstat().st_size for path in root.rglob("*") if path.is_file()) < limit
    builder("umount", containers[target])


def test_the_client_image_runs_the_installed_wheel(
    builder: Builder, images: dict[str, dict[str, Any]], containers: dict[str, str]
) -> None:
    assert images["client"]["OCIv1"]["config"]["Entrypoint"] == ["gigapath-client"]
    run = ("run", "--isolation=chroot", *builder.machine, containers["client"], "--")
    version = "import importlib.metadata; print(importlib.metadata.version('gigapath-triton'))"
    assert builder(*run, "gigapath-client", "--version") == f"gigapath-client {client.__version__}"
    assert builder(*run, "python", "-c", version) == client.__version__
    kept = "import gigapath_client.commands.batch as one; print(one.__cached__)"
    compiled = builder(*run, "python", "-c", kept).removeprefix("/")
    assert (Path(builder("mount", containers["client"])) / compiled).exists(), "compiled at each start"
    builder("umount", containers["client"])


def test_a_slide_is_scored_from_image_to_image(
    builder: Builder,
    images: dict[str, dict[str, Any]],
    containers: dict[str, str],
    demo_repository: Path,
    real_slide: Path,
    tmp_path: Path,
) -> None:
    """All run as user 1000, as their images say: start.sh, its probe, the front, the client."""
    models, results = tmp_path / "models", tmp_path / "out"
    shutil.copytree(demo_repository, models)
    results.mkdir()
    os.chown(results, 1000, 1000)
    for path in (models, *models.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    ports = {name: free_port("127.0.0.1") for name in ("grpc", "http", "metrics")}
    start = ["/bin/sh", "/deploy/start.sh", "--exit-timeout-secs=0"]
    start += [f"--{name}-port={port}" for name, port in ports.items()]
    start += [f"--{name}-address=127.0.0.1" for name in ("grpc", "metrics")]
    run = [*builder.command, "run", "--isolation=chroot", *builder.machine]
    with (tmp_path / "triton.log").open("w+") as log:
        server = subprocess.Popen(
            [*run, f"--volume={models}:/models:ro", containers["triton-cpu"], "--", *start],
            stdout=log,
            stderr=log,
        )
        try:
            probe = ["python3", "/deploy/probe.py", "infer", f"--url=http://127.0.0.1:{ports['http']}"]
            probe += [f"--metrics-url=http://127.0.0.1:{ports['metrics']}/metrics"]
            for _ in range(240):
                assert server.poll() is None, log.seek(0) or log.read()[-4000:]
                if not subprocess.run(
                    [*run, containers["triton-cpu"], "--", *probe], capture_output=True
                ).returncode:
                    break
            mounts = [f"--volume={real_slide}:/slides/slide.svs:ro", f"--volume={results}:/out"]
            score = ["gigapath-client", "score", "/slides/slide.svs", "--out", "/out"]
            listen = f"127.0.0.1:{free_port('127.0.0.1')}"
            front = [*images["front"]["OCIv1"]["config"]["Entrypoint"]]
            front += [f"--listen={listen}", f"--upstream=127.0.0.1:{ports['grpc']}"]
            before = subprocess.Popen(
                [*run, containers["front"], "--", *front], stderr=subprocess.PIPE, text=True
            )
            try:
                assert before.stderr is not None
                assert listen in before.stderr.readline()
                command = [*run, *mounts, containers["client"], "--", *score, "--url", listen]
                done = subprocess.run(command, capture_output=True, text=True)
            finally:
                before.terminate()
                said = before.communicate()[1]
            assert done.returncode == 0, done.stderr
            assert "slide_encoder EMBEDDINGS[" in said
        finally:
            server.terminate()
            server.wait()
    (result,) = results.glob("*.h5")
    assert result.stat().st_uid == 1000

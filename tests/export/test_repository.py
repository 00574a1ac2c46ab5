"""Versions: installed in one step whatever is killed when, listed, switched, removed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from export import repository as repo
from export.configs import read_config
from export.errors import ExportError
from gigapath_contract.schema import (
    MODELS,
    Contract,
    HeadContract,
    OcclusionContract,
    SlideEncoderContract,
    TileEncoderContract,
    VariantContract,
)

Files = Callable[[Path], dict[str, bytes]]


def contract_of(version: int, head: HeadContract | None = None) -> Contract:
    return Contract(
        export_id=f"{version:016x}",
        version=version,
        preset="demo",
        trained=False,
        tile_encoder=TileEncoderContract("t", "0" * 64, 7),
        slide_encoder=SlideEncoderContract("s", "1" * 64, 5, 3, (1024,), (1,)),
        head=head,
        variant=VariantContract("cls", 3, "norm", "level0/256", "row-major"),
        precision="fp32",
        occlusion=OcclusionContract("fp32", 1000),
        versions={},
    )


def install(repository: Path, head: HeadContract | None = None) -> int:
    """Install and serve a version whose graphs are a few bytes."""
    with repo.exclusive(repository):
        version = repo.next_version(repository)
        staging = repo.new_staging(repository)
        for model in MODELS[:3]:
            (staging / model / "model.onnx").write_bytes(b"graph %d" % version)
            (staging / model / "model.onnx").chmod(0o600)
        repo.install(repository, staging, contract_of(version, head), key=f"key {version}")
        repo.serve(repository, version)
    return version


def test_a_version_is_installed_listed_and_served(empty_repository: Path) -> None:
    assert repo.served_version(empty_repository) is None
    assert install(empty_repository) == 1
    assert install(empty_repository) == 2
    versions = repo.list_versions(empty_repository)
    assert [(v.number, v.served, v.contract.preset, v.contract.trained) for v in versions] == [
        (1, False, "demo", False),
        (2, True, "demo", False),
    ]
    for model in MODELS:
        served = read_config(empty_repository / model / "configs" / "onnxruntime.pbtxt")
        assert list(served.version_policy.specific.versions) == [2]
        contract = json.loads(served.parameters["contract"].string_value)
        assert contract == json.loads(contract_of(2).to_json())
    assert repo.find_version(empty_repository, key="key 1") == 1
    assert repo.find_version(empty_repository, export_id=f"{2:016x}") == 2
    assert repo.find_version(empty_repository, key="key 3") is None


def test_only_what_is_committed_is_copied(empty_repository: Path, tmp_path: Path) -> None:
    install(empty_repository)
    configs = empty_repository / "tile_encoder" / "configs"
    (configs / "mine.pbtxt").write_text("a variant of the user's")
    (configs / "gone.pbtxt").symlink_to("../nowhere")
    repo.copy_configs(empty_repository, tmp_path / "copy")
    copied = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*.*")}
    assert copied == {f"{model}/config.pbtxt" for model in MODELS} | {"tile_encoder/configs/mine.pbtxt"}


def test_served_dims_are_exact_and_logits_need_a_head(empty_repository: Path) -> None:
    install(empty_repository)
    tensors = {
        (model, t.name): list(t.dims)
        for model in MODELS
        for config in [read_config(empty_repository / model / "configs" / "onnxruntime.pbtxt")]
        for t in (*config.input, *config.output)
    }
    assert tensors["tile_encoder", "EMBEDDINGS"] == [7]
    assert tensors["slide_encoder", "EMBEDDINGS"] == [-1, 7]
    assert tensors["slide_encoder", "LAYERS"] == tensors["slide_pipeline", "LAYERS"] == [4, 2, 5]
    assert tensors["slide_occlusion", "SLIDE"] == [-1, 5]
    assert tensors["slide_occlusion", "KEEP"] == [-1, -1]
    assert not [name for _, name in tensors if name == "LOGITS"]
    pipeline = read_config(empty_repository / "slide_pipeline" / "configs" / "onnxruntime.pbtxt")
    assert "LOGITS" not in pipeline.ensemble_scheduling.step[1].output_map

    install(empty_repository, HeadContract("2" * 64, ("a", "b", "c"), "multiclass"))
    served = read_config(empty_repository / "slide_occlusion" / "configs" / "onnxruntime.pbtxt")
    assert {t.name: list(t.dims) for t in served.output}["LOGITS"] == [-1, 3]


def test_another_user_can_read_every_file(empty_repository: Path) -> None:
    install(empty_repository)
    for model in MODELS:
        for path in (empty_repository / model / "1").rglob("*"):
            assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_the_served_version_stays_and_others_can_go(empty_repository: Path) -> None:
    install(empty_repository)
    install(empty_repository)
    with pytest.raises(ExportError, match="version 2 is the one being served"):
        repo.remove_version(empty_repository, 2)
    repo.remove_version(empty_repository, 1)
    assert not list(empty_repository.glob("*/1"))
    with pytest.raises(ExportError, match=r"no version 1 .*installed: 2"):
        repo.remove_version(empty_repository, 1)


def test_an_older_version_can_be_served_again(empty_repository: Path) -> None:
    install(empty_repository)
    install(empty_repository)
    repo.serve(empty_repository, 1)
    assert repo.served_version(empty_repository) == 1
    assert install(empty_repository) == 3, "a number is never given twice"


def test_a_contract_that_cannot_be_read_is_named_and_can_be_deleted(empty_repository: Path) -> None:
    install(empty_repository)
    install(empty_repository)
    folder = empty_repository / "slide_pipeline" / "2"
    for content in (b"", b"{", b'{"schema": 0}', b"\xff"):
        (folder / "contract.json").write_bytes(content)
        for ask in (repo.list_versions, repo.served_version):
            with pytest.raises(
                ExportError, match=rf"contract\.json: .*; delete {folder.resolve()} and export again"
            ):
                ask(empty_repository)
    shutil.rmtree(folder)
    assert repo.served_version(empty_repository) is None
    assert install(empty_repository) == 3


def test_two_exports_at_a_time_are_refused(empty_repository: Path) -> None:
    with (
        repo.exclusive(empty_repository),
        pytest.raises(ExportError, match="another export"),
        repo.exclusive(empty_repository),
    ):
        pass


def test_a_damaged_version_is_not_taken_for_the_export(empty_repository: Path) -> None:
    install(empty_repository)
    (empty_repository / "tile_encoder" / "1" / "model.onnx").write_bytes(b"cut")
    assert repo.find_version(empty_repository, key="key 1") is None


@pytest.mark.parametrize("moment", range(20))
def test_killed_at_any_moment_the_old_version_is_served(
    empty_repository: Path, files_of: Files, moment: int
) -> None:
    """A child installs version 2 and is killed at its `moment`-th rename."""
    install(empty_repository)
    before = served_files(empty_repository, files_of)
    child = os.fork()
    if child == 0:
        _die_at_rename(moment)
        install(empty_repository)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == signal.SIGKILL or os.waitstatus_to_exitcode(status) == 0

    now = repo.served_version(empty_repository)
    assert now in (1, 2)
    for model in MODELS:
        served = read_config(empty_repository / model / "configs" / "onnxruntime.pbtxt")
        assert list(served.version_policy.specific.versions) == [now], "all four or none"
        assert (empty_repository / model / str(now)).is_dir()
    if now == 1:
        assert served_files(empty_repository, files_of) == before

    assert install(empty_repository) in (2, 3)
    assert not (empty_repository / "slide_pipeline" / ".staging").exists(), "what was left is swept"
    for version in repo.list_versions(empty_repository):
        assert all((empty_repository / model / str(version.number)).is_dir() for model in MODELS)


def served_files(repository: Path, files_of: Files) -> dict[str, bytes]:
    """The files of version 1 and the configs that serve it."""
    return {
        name: content
        for name, content in files_of(repository).items()
        if "/1/" in name or "/configs/" in name
    }


def _die_at_rename(moment: int) -> None:
    count = 0

    def counted(original: Callable[..., Path]) -> Callable[..., Path]:
        def rename(self: Path, target: Path) -> Path:
            nonlocal count
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return original(self, target)

        return rename

    Path.rename = counted(Path.rename)  # type: ignore[method-assign,assignment]
    Path.replace = counted(Path.replace)  # type: ignore[method-assign,assignment]

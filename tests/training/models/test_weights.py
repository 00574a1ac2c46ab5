"""Weights from files and from a hub: strict, explained, and told apart by their digest."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from training.errors import TrainingError
from training.models.build import Models, WeightSources, build_models, build_slide_model, choose_weights
from training.models.head import ClassificationHead, HeadConfig
from training.models.hub import fetch
from training.models.packaged import Packaged
from training.models.presets import get_preset
from training.models.weights import load_strict, read_state_dict, split_finetuned, weights_digest


@pytest.fixture(scope="module")
def demo() -> Models:
    return build_models("demo", seed=5)


@pytest.fixture(scope="module")
def encoder_state(demo: Models) -> dict[str, Tensor]:
    return dict(demo.slide_model.encoder.state_dict())


def test_every_kind_of_file_gives_the_same_weights(encoder_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(encoder_state, tmp_path / "bare.bin")
    torch.save({"model": encoder_state}, tmp_path / "published.pth")
    safetensors.torch.save_file(encoder_state, tmp_path / "w.safetensors")
    finetuned = {f"slide_encoder.{name}": tensor for name, tensor in encoder_state.items()}
    head = {"classifier.0.weight": torch.zeros(2, 96), "classifier.0.bias": torch.ones(2)}
    torch.save(finetuned | head, tmp_path / "finetuned.pt")
    for file in tmp_path.iterdir():
        state, found = split_finetuned(read_state_dict(file))
        assert weights_digest(state) == weights_digest(encoder_state), file
        assert found.keys() == (head.keys() if file.stem == "finetuned" else set())


def test_built_from_files_is_trained_and_the_same(
    demo: Models, encoder_state: dict[str, Tensor], tmp_path: Path
) -> None:
    tile, slide = tmp_path / "tile.bin", tmp_path / "slide.pth"
    assert demo.slide_model.head is not None
    torch.save(demo.tile.vit.state_dict(), tile)
    torch.save(
        {f"slide_encoder.{n}": t for n, t in encoder_state.items()} | demo.slide_model.head.state_dict(),
        slide,
    )
    models = build_models("demo", tile, slide)
    assert (demo.trained, models.trained) == (False, True)
    assert weights_digest(models.tile.state_dict()) == weights_digest(demo.tile.state_dict())
    assert weights_digest(models.slide_model.state_dict()) == weights_digest(demo.slide_model.state_dict())
    assert not models.slide_model.training
    assert all(p.requires_grad and not p.is_meta for p in models.slide_model.parameters())
    torch.save({"model": encoder_state}, slide)
    assert not build_models("demo", tile, slide).trained  # its head is from the seed
    torch.save(encoder_state | demo.slide_model.head.state_dict(), slide)
    with pytest.raises(TrainingError, match=r"classifier\.0\.weight \[2, 96\] instead of \[3, 96\]"):
        build_models("demo", tile, slide, HeadConfig(("a", "b", "c")))


def test_other_seeds_give_other_weights_and_the_same_seed_the_same(demo: Models) -> None:
    digest = weights_digest(demo.slide_model.state_dict())
    assert weights_digest(build_models("demo", seed=5).slide_model.state_dict()) == digest
    assert weights_digest(build_models("demo", seed=6).slide_model.state_dict()) != digest


def test_a_new_head_begins_like_a_linear_layer_of_pytorch() -> None:
    """Uniform in +-1 / sqrt(width), weights and bias, like the released classifier."""
    classes = HeadConfig(tuple(f"class {i}" for i in range(400)))
    bound = 96**-0.5
    drawn = build_slide_model("demo", head=classes, seed=0).head
    assert drawn is not None
    torch.manual_seed(0)
    for ours, pytorch in zip(drawn.parameters(), ClassificationHead(96, classes).parameters(), strict=True):
        for values in (ours.detach(), pytorch.detach()):
            assert 0.98 * bound < values.abs().max() <= bound
            assert float(values.var()) == pytest.approx(bound**2 / 3, rel=0.15)
            assert abs(float(values.mean())) < 0.1 * bound
    normal = build_slide_model("demo", head=classes, seed=0, head_init="normal").head
    assert normal is not None
    assert float(next(normal.parameters()).detach().std()) == pytest.approx(bound, rel=0.05)


PACKAGED = Packaged(Path("tile"), Path("slide"), Path("facts"))
TWO, THREE = HeadConfig(("benign", "lesion")), HeadConfig(("a", "b", "c"))


@pytest.mark.parametrize(
    ("given", "packaged", "expected"),
    [
        ({}, PACKAGED, WeightSources(Path("tile"), Path("slide"), True, 0)),
        ({"head": TWO}, PACKAGED, WeightSources(Path("tile"), Path("slide"), True, 0)),
        ({"head": THREE}, PACKAGED, WeightSources(Path("tile"), Path("slide"), False, 0)),
        ({"slide_weights": "mine", "head": THREE}, PACKAGED, WeightSources(Path("tile"), "mine", True, 0)),
        ({"tile_weights": "mine"}, PACKAGED, WeightSources("mine", Path("slide"), True, 0)),
        ({"seed": 3}, PACKAGED, WeightSources(None, None, True, 3)),
        ({"seed": 0, "tile_weights": "mine"}, PACKAGED, WeightSources("mine", None, True, 0)),
        ({}, None, WeightSources(None, None, True, 0)),
        ({"slide_weights": "mine"}, None, WeightSources(None, "mine", True, 0)),
    ],
)
def test_given_weights_come_before_packaged_ones_and_those_before_the_seed(
    given: dict[str, Any], packaged: Packaged | None, expected: WeightSources
) -> None:
    assert choose_weights(get_preset("demo"), packaged, **given) == expected


def test_a_finetuned_checkpoint_brings_a_head_where_the_preset_has_none(tmp_path: Path) -> None:
    bare = build_models(get_preset("gigapath-flash"), seed=0)
    assert bare.slide_model.head is None
    state = {f"slide_encoder.{n}": t for n, t in bare.slide_model.encoder.state_dict().items()}
    head = {"classifier.0.weight": torch.ones(3, 384), "classifier.0.bias": torch.zeros(3)}
    torch.save(state | head, tmp_path / "f.pt")
    found = build_models(get_preset("gigapath-flash"), None, tmp_path / "f.pt", seed=0).slide_model.head
    assert found is not None
    assert found.config == HeadConfig(("class 0", "class 1", "class 2"))
    assert weights_digest(found.state_dict()) == weights_digest(head)


def test_the_digest_sees_names_values_types_and_shapes_but_not_the_order() -> None:
    state = {"a": torch.arange(6.0), "b": torch.ones(2)}
    digest = weights_digest(state)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert weights_digest({"b": state["b"], "a": state["a"].clone()}) == digest
    for other in (
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"].reshape(2, 3), "b": state["b"]},
        {"a": state["a"].double(), "b": state["b"]},
        {"a": state["a"] + 1e-6, "b": state["b"]},
    ):
        assert weights_digest(other) != digest


def test_lists_missing_extra_and_misshapen_keys_and_changes_nothing(encoder_state: dict[str, Tensor]) -> None:
    model = build_models("demo", seed=6).slide_model.encoder
    before = weights_digest(model.state_dict())
    state = dict(encoder_state)
    del state["encoder.layer_norm.bias"]
    state["pos_embed"] = torch.zeros(1)
    state["cls_token"] = torch.zeros(1, 1, 7)
    message = (
        "file doesn't fit LongNetSlideEncoder: 1 missing (encoder.layer_norm.bias); "
        "1 not in this model (pos_embed); 1 of another shape (cls_token [1, 1, 7] instead of [1, 1, 96])"
    )
    with pytest.raises(TrainingError, match=re.escape(message)):
        load_strict(model, state, "file")
    with pytest.raises(TrainingError, match=r"87 missing \(cls_token, .* and 75 more\)"):
        load_strict(model, {}, "file")
    assert weights_digest(model.state_dict()) == before


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_a_damaged_file_is_one_line(
    suffix: str, content: bytes | None, encoder_state: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / f"w{suffix}"
    if content is None:  # cut short
        save: Callable[..., None] = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
        save(encoder_state, file)
        content = file.read_bytes()[:100_000]
    file.write_bytes(content)
    with pytest.raises(TrainingError, match="can't be read as weights") as error:
        read_state_dict(file)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_file_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no weights file at .*gone\.pth; check the path"):
        read_state_dict(tmp_path / "gone.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(TrainingError, match="holds no state dict"):
        read_state_dict(tmp_path / "other.pth")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
            return Path.touch, (tmp_path / "was here",)

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(TrainingError, match="can't be read as weights"):
        read_state_dict(tmp_path / "evil.pth")
    assert not (tmp_path / "was here").exists()


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a gated, an unknown and a file-less repository."""

    def do_HEAD(self) -> None:
        code, reason = {
            "gated": (403, "GatedRepo"),
            "unknown": (401, "RepoNotFound"),
            "empty": (404, "EntryNotFound"),
        }[self.path.split("/")[2]]
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not on the terminal."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        (
            "gated",
            None,
            r"from huggingface.co/org/gated: HF_TOKEN is not set; accept the licence on that page",
        ),
        (
            "gated",
            "hf_x",
            r"from huggingface.co/org/gated: the token in HF_TOKEN has no access; accept the lice",
        ),
        ("unknown", "hf_x", r"from huggingface.co/org/unknown: the token in HF_TOKEN has no access"),
        ("empty", "hf_x", r"org/empty has no file slide_encoder.pth; name one as hf-hub:org/empty/FILE"),
    ],
)
def test_says_what_the_hub_refused(
    hub: str, repository: str, token: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(TrainingError, match=message):
        fetch(f"hf-hub:org/{repository}", "slide_encoder.pth", endpoint=hub)


def test_a_path_is_not_looked_up_on_the_hub() -> None:
    assert fetch("some/file.pth", "x") == Path("some/file.pth")
    with pytest.raises(TrainingError, match="names no repository; write hf-hub:OWNER/REPOSITORY"):
        fetch("hf-hub:gigapath", "x")

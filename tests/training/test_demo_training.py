"""The demo's packaged weights score as their facts say, and their configuration makes them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

from training.cohort.files import make_cohort, plan_digest
from training.cohort.plan import plan_cohort
from training.data.tiles import read_list
from training.demo_training import CONFIGS, TOLERANCE, compare, embed_slides, score_slides, train_demo
from training.errors import TrainingError
from training.models.build import build_models
from training.models.packaged import packaged_weights

pytestmark = pytest.mark.usefixtures("one_thread")
NEVER_SEEN = ("test-24A", "test-24B", "test-25B")  # no lesion, a contiguous and a scattered one


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    files = packaged_weights("demo")
    assert files is not None, "the demo has no packaged weights: run `make demo-weights`"
    facts: dict[str, Any] = json.loads(files.facts.read_text())
    return facts


def test_packaged_weights_tell_held_out_slides_apart_and_are_small(facts: dict[str, Any]) -> None:
    held_out = {plan.slide_id: bool(plan.lesion) for plan in plan_cohort() if plan.split == "test"}
    assert facts["cohort"] == plan_digest(plan_cohort())
    assert set(facts["held_out"]) == set(held_out)
    auroc = roc_auc_score(list(held_out.values()), [facts["held_out"][name] for name in held_out])
    assert auroc == pytest.approx(facts["slides"]["auroc_lesion"], abs=1e-3)
    assert auroc >= 0.95
    files = packaged_weights("demo")
    assert files is not None
    assert sum(path.stat().st_size for path in files) <= 2 * 1024**2
    assert build_models("demo").trained


def test_slides_drawn_again_score_as_the_facts_tell(
    facts: dict[str, Any], real_slide: Path, tmp_path: Path
) -> None:
    make_cohort(real_slide, tmp_path / "cohort", only=NEVER_SEEN)
    models = build_models("demo")
    embed_slides(read_list(tmp_path / "cohort" / "tiles.csv"), models.tile, tmp_path)
    scores = score_slides(models.slide_model, [tmp_path / f"{name}.h5" for name in NEVER_SEEN])
    assert scores == pytest.approx({name: facts["held_out"][name] for name in NEVER_SEEN}, abs=TOLERANCE)
    assert compare(scores) < TOLERANCE
    with pytest.raises(TrainingError, match=r"slide test-24A scores 0\.5 apart"):
        compare(scores | {"test-24A": facts["held_out"]["test-24A"] + 0.5})
    with pytest.raises(TrainingError, match="another cohort: run `make demo-weights`"):
        compare({"test-99A": 0.5})


def test_a_remade_model_scores_the_same(real_slide: Path, tmp_path: Path) -> None:
    """The configurations cut short, on a third of the tiles; `make check-demo-weights` runs them whole."""
    make_cohort(real_slide, tmp_path / "cohort", patients=(1, 1, 1))
    header, *rows = (tmp_path / "cohort" / "tiles.csv").read_text().splitlines(keepends=True)
    (tmp_path / "cohort" / "tiles.csv").write_text("".join([header, *rows[::3]]))
    tiles, slides = (
        yaml.safe_load((CONFIGS / f"demo-{name}.yaml").read_text()) for name in ("tiles", "slides")
    )
    tiles |= {"epochs": 1, "tiles_per_epoch": 64}
    slides["optim"] |= {"epochs": 2, "warmup_epochs": 0, "accumulate": 2}
    (tmp_path / "demo-tiles.yaml").write_text(yaml.safe_dump(tiles))
    (tmp_path / "demo-slides.yaml").write_text(yaml.safe_dump(slides))
    made = []
    for seed in (1, 2):  # what else is drawn in the process makes no difference
        torch.manual_seed(seed)
        out = tmp_path / f"work{seed}"
        made.append(train_demo(tmp_path / "cohort", out, bar=False, say=lambda _: None, configs=tmp_path))
    start = score_slides(
        build_models("demo", seed=0).slide_model, sorted(tmp_path.glob("work1/features/test*"))
    )
    assert len(made[0]["held_out"]) == 2
    assert made[0]["held_out"] == pytest.approx(made[1]["held_out"], abs=TOLERANCE)
    assert made[0]["held_out"] != pytest.approx(start, abs=TOLERANCE)  # it did learn something

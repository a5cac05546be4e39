"""The controls that a recipe names reach every network that is asked, those of each clip its own latent frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_wiring import SMALL
from torch import Tensor

from anyflow.backbone.controls import MODULE, by_latent_frame, controls_of
from anyflow.errors import UserError
from anyflow.recipe import load_recipe
from anyflow.training.assemble import Parts, assemble

CONTROL = ("model.control.names=[actions]", "model.control.width=8", "data.card=driving-uncaptioned")


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def parts_of(name: str, model: Path, *more: str) -> Parts:
    weights = (f"model.weights={model}", f"stage.onpolicy.teacher={model}")
    return assemble(load_recipe(name, overrides=[*SMALL, *weights, *CONTROL, *more]))


def told(stage: Any, batch: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """What each embedder is told in a training step, by the first name of the network that it is in."""
    seen: list[tuple[str, Tensor]] = []

    def listen(name: str) -> Any:
        return lambda _, inputs: seen.append((name, inputs[0].detach().clone()))

    modules = {"student": stage.roles.student if stage.roles else stage.backbone, **dict(stage.others.named_children())}
    if stage.roles is not None and stage.roles.frozen is not None:
        modules["teacher"] = stage.roles.frozen
    hooks = [
        module.transformer.condition_embedder.get_submodule(MODULE).register_forward_pre_hook(listen(name))
        for name, module in modules.items()
        if hasattr(module.transformer.condition_embedder, MODULE)
    ]
    stage.report = lambda **metrics: None
    if not stage.automatic_optimization:
        optimizers, schedules = stage.configure_optimizers()
        stage.optimizers, stage.lr_schedulers = lambda: optimizers, lambda: schedules
        stage.manual_backward = lambda loss, **options: loss.backward(**options)
    stage.on_train_batch_start(batch, 0)
    stage.training_step(batch, 0)
    for hook in hooks:
        hook.remove()
    return seen


def is_one_of(rows: Tensor, known: Tensor) -> list[bool]:
    """Of each row of controls, whether it is that of a clip of the batch."""
    return [any(torch.equal(row.nan_to_num(-9.0), own.nan_to_num(-9.0)) for own in known) for row in rows]


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_a_forward_step_asks_with_each_clips_own_controls(small_model: Path, dropout: float) -> None:
    """With text and without, at every time of the finite difference; dropped ones are unknown."""
    parts = parts_of("forward/tiny", small_model, f"model.control.dropout={dropout}", "stage.text_drop=0.5")
    batch = next(iter(parts.data.train_dataloader()))
    assert batch["controls"].shape == (4, 5, 2) and not batch["controls"].isnan().any()
    own = by_latent_frame(batch["controls"], 4)
    asked = told(parts.stage, batch)
    assert sum(len(rows) for _, rows in asked) > 4
    for _, rows in asked:
        assert all(is_one_of(rows, own)) if not dropout else bool(rows.isnan().all())
    first = asked[-1][1]  # the pass with gradient, all clips in order
    assert dropout or torch.equal(first, own)


def test_an_on_policy_step_tells_the_student_the_controls(small_model: Path) -> None:
    """A critic starts as its teacher: neither has learnt any here, so the student alone listens."""
    parts = parts_of("onpolicy/tiny", small_model, "model.control.dropout=0", "stage.onpolicy.budgets=[2]")
    assert parts.stage.roles is not None
    assert controls_of(parts.stage.roles.network("teacher").transformer) is None
    batch = next(iter(parts.data.train_dataloader()))
    own = by_latent_frame(batch["controls"], 4)
    asked = told(parts.stage, batch)
    assert asked and all(all(is_one_of(rows, own)) for _, rows in asked)


def test_cached_latents_come_with_the_controls_of_their_frames(small_model: Path, tmp_path: Path) -> None:
    import shutil

    footage = shutil.copytree("data/starter/driving", tmp_path / "driving")
    card = Path("data/driving-uncaptioned.yaml").read_text().replace("starter/driving/", "")
    (footage / "card.yaml").write_text(card)
    options = [f"data.card={footage}", "data.split=heldout", "data.heldout=train", "data.frames=17"]
    plain = parts_of("forward/tiny", small_model, *options)
    cached = parts_of("forward/tiny", small_model, *options, "data.precompute=true")
    one, other = (next(iter(parts.data.train_dataloader())) for parts in (plain, cached))
    assert one["key"] == other["key"] and "latents" in other
    assert torch.equal(one["controls"], other["controls"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("model.control.names=[wheel]", "model.control.names: 'wheel' is no control of the card 'driving-uncaptioned'"),
        ("data.card=driving-open", "model.control.names: "),
    ],
)
def test_controls_that_are_not_there_are_refused(small_model: Path, change: str, sentence: str) -> None:
    names = [] if "names" in change else ["model.control.names=[cars]"]
    with pytest.raises(UserError, match=sentence):
        parts_of("forward/tiny", small_model, *names, change)

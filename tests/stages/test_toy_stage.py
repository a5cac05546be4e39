"""A stage is its LightningModule and its declaration: one that this file declares alone is listed, checked, planned,
trained and resumed as the others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from anyflow.cli.main import app
from anyflow.errors import UserError
from anyflow.memory.need import plan
from anyflow.recipe import Recipe, load_recipe
from anyflow.stages.base import Stage
from anyflow.stages.batch import Batches
from anyflow.stages.declaration import Declaration
from anyflow.stages.declarations import STAGES
from anyflow.stages.parts import StageParts
from anyflow.tracking.checkpoints import latest_checkpoint
from anyflow.tracking.fingerprints import changed_facts, facts_of
from anyflow.training.launch import train


class ToyStage(Stage):
    """The network's answer at the data shall be nothing."""

    def __init__(self, parts: StageParts) -> None:
        super().__init__(parts.backbone, parts.training, codec=parts.codec)
        self.backbone = parts.backbone
        self.batches = Batches(parts.codec, parts.conditioning, self.update)

    @classmethod
    def build(cls, parts: StageParts) -> ToyStage:
        return cls(parts)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        data = self.batches.prepare(batch, self.device)
        times = torch.zeros(len(data.clean), device=self.device)
        answer = data.velocity(self.backbone)(data.clean, times, times, data.rows)
        loss = self.update.mean(answer.square().flatten(1))
        self.report(loss=loss)
        return loss


def no_muon(recipe: Any) -> None:
    if recipe.optimizer.name == "muon":
        raise UserError("stage toy knows nothing of muon: set optimizer.name=adamw")


def ask_once(step: Any) -> None:
    step.learn("student", step.ask("student", step.batch))


TOY = Declaration(
    name="toy",
    help="a network that falls silent",
    module=ToyStage,
    turns={"student": ask_once},
    starts_from="a loud model",
    folders=("stage.onpolicy.teacher",),
    checks=(no_muon,),
)
SMALL = (
    *("stage.name=toy", "stage.steps=2", "hardware.accelerator=cpu", "optimizer.name=adamw", "ema.start_step=0"),
    *("data.frames=5", "data.height=32", "data.width=32", "data.precompute=false", "data.num_workers=0"),
    *(
        "data.card=driving",
        "data.global_batch=2",
        "sampling.prompts=0",
        "run.tracking_uri=",
        "checkpoint.every_steps=1",
    ),
)


@pytest.fixture(autouse=True)
def declared(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setitem(STAGES, TOY.name, TOY)


def recipe_of(model: Path, *more: str, name: str = "forward/tiny") -> Recipe:
    return load_recipe(name, overrides=[*SMALL, f"model.weights={model}", *more])


def test_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = CliRunner().invoke(app, ["recipes", "show", "forward/tiny"]).output
    assert "toy: a network that falls silent" in " ".join(shown.split())
    with pytest.raises(UserError, match="did you mean toy"):
        load_recipe("forward/tiny", overrides=["stage.name=toi"])
    (tmp_path / "recipes/toy").mkdir(parents=True)
    (tmp_path / "recipes/toy/first.yaml").write_text("stage: {name: toy}\n")
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(app, ["recipes", "list"]).output.split()
    assert listed[listed.index("toy/") + 1] == "first", "beside the project's"


def test_its_own_rules_are_checked(small_model: Path) -> None:
    with pytest.raises(UserError, match="knows nothing of muon"):
        recipe_of(small_model, "optimizer.name=muon")
    with pytest.raises(UserError, match="stage toy starts from a loud model"):
        recipe_of(small_model, "model.init=new", f"model.codec={small_model}")


def test_its_memory_is_planned(small_model: Path) -> None:
    need = plan(recipe_of(small_model), gpu_memory=80.0)
    assert need.fits and 0 < need.totals["training step"] < plan(recipe_of(small_model, "stage.name=forward")).needed


def test_it_trains_and_resumes(small_model: Path, tmp_path: Path) -> None:
    recipe, states = recipe_of(small_model), []
    for out in (tmp_path / "whole", tmp_path / "cut"):
        assert train(recipe, out=out) == 0
        path = latest_checkpoint(out / "checkpoints")
        assert path is not None and (out / "model/transformer/config.json").is_file()
        states.append(path)
    for spoilt in ("checkpoints/step_00000002", "model"):  # as if it had been killed in the second step
        (tmp_path / "cut" / spoilt).rename(tmp_path / spoilt.replace("/", "-"))
    (tmp_path / "cut/status.json").unlink()
    assert train(recipe, out=tmp_path / "cut", resume=str(tmp_path / "cut")) == 0
    whole, cut = (torch.load(path, weights_only=True)["state_dict"] for path in states)
    assert all(torch.equal(whole[name], cut[name]) for name in whole) and whole.keys() == cut.keys()


@pytest.mark.parametrize("name", ["toy", "dmd", "consistency", "onpolicy"])
def test_another_teacher_is_another_run(name: str, small_model: Path, tmp_path: Path) -> None:
    teachers = [tmp_path / "one", tmp_path / "another"]
    facts = []
    for number, teacher in enumerate(teachers):
        teacher.mkdir()
        (teacher / "config.json").write_text(str(number))
        facts.append(facts_of(recipe_of(small_model, f"stage.name={name}", f"stage.onpolicy.teacher={teacher}")))
    one, another = facts
    assert changed_facts(one, another) == ["teacher"] and not changed_facts(one, one)
    start = {"data": one["data"], "start": one["start"]}
    assert not changed_facts(start, one), "a run of before, which did not note its teacher, goes on"
    joined = {**start, "start": f"{one['start']} {one['teacher']}"}
    assert not changed_facts(joined, one) and "start" in changed_facts(joined, another)

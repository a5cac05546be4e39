"""The controls that a recipe names reach every network that is asked, those of each clip its own latent frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_wiring import SMALL
from torch import Tensor

from anyflow.backbone.controls import MODULE, by_latent_frame, controls_of
from anyflow.backbone.export import export_pipeline
from anyflow.backbone.model_card import ModelCard
from anyflow.backbone.roles import ROLES
from anyflow.errors import UserError
from anyflow.recipe import load_recipe
from anyflow.training.assemble import Parts, assemble
from anyflow.training.finish import describe_parts

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


@pytest.fixture(scope="module")
def told_model(small_model: Path, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt the controls."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(project)
        parts = parts_of("forward/tiny", small_model)
    card = ModelCard("told", size=(5, 32, 32), fps=8.0)
    folder = tmp_path_factory.mktemp("told") / "model"
    return export_pipeline(folder, parts.backbone.transformer, parts.codec, 3.0, card, dtype=torch.float32)


ON_POLICY = ("model.control.dropout=0", "stage.onpolicy.budgets=[2]")


def test_an_on_policy_step_tells_all_three_the_same_controls(small_model: Path, told_model: Path) -> None:
    """Each clip's own, whoever is asked, with text and without."""
    parts = parts_of("onpolicy/tiny", small_model, *ON_POLICY, f"stage.onpolicy.teacher={told_model}")
    assert parts.notes == ()
    batch = next(iter(parts.data.train_dataloader()))
    own = by_latent_frame(batch["controls"], 4)
    asked = told(parts.stage, batch)
    assert {name for name, _ in asked} == {"student", "critic", "teacher"}
    assert all(all(is_one_of(rows, own)) for _, rows in asked)


def test_cards_without_the_controls_are_named(small_model: Path) -> None:
    """Mixing is allowed, and a misspelt column looks the same. Another domain's controls are not missed."""
    both = "data.card=[driving-uncaptioned,games-uncaptioned]"
    for names, lacks in (
        ("[driving.actions,games.actions]", []),
        ("[driving.actions]", ["games-uncaptioned has no driving.actions (its card has actions, trajectory)"]),
        (
            "[driving.actions,driving.trajectory]",
            ["has no driving.actions and no driving.trajectory"],
        ),
    ):
        notes = parts_of("finetune/driving", small_model, both, f"model.control.names={names}").notes
        assert len(notes) == len(lacks) and all(lack in note for lack, note in zip(lacks, notes, strict=True))


def test_a_teacher_that_is_told_none_is_warned_of(small_model: Path) -> None:
    """The student alone listens; the critic starts as the teacher, and knows as little. The dry run says so."""
    parts = parts_of("onpolicy/tiny", small_model, *ON_POLICY)
    assert parts.stage.roles is not None
    for role in ("teacher", "critic"):
        assert controls_of(parts.stage.roles.network(role).transformer) is None  # type: ignore[arg-type]
    batch = next(iter(parts.data.train_dataloader()))
    own = by_latent_frame(batch["controls"], 4)
    asked = told(parts.stage, batch)
    assert asked and {name for name, _ in asked} == {"student"}
    assert all(all(is_one_of(rows, own)) for _, rows in asked)
    [note] = parts.notes
    assert f"warning: the teacher {small_model} is told no controls, and so is the critic" in note
    recipe = load_recipe("onpolicy/tiny", overrides=[*SMALL, f"model.weights={small_model}", *CONTROL])
    assert note in list(describe_parts(recipe, parts))


@pytest.mark.parametrize("is_told", [False, True])
def test_adapters_critic_knows_what_its_teacher_knows(small_model: Path, told_model: Path, is_told: bool) -> None:
    """The teacher is the frozen base: one that has never learnt the controls must not face a critic that does."""
    lora = ("model.lora.enabled=true", "model.lora.rank=2", "stage.onpolicy.teacher=")
    parts = parts_of("onpolicy/tiny", told_model if is_told else small_model, *ON_POLICY, *lora)
    assert parts.stage.roles is not None
    trained = {role: [name for name, _ in parts.stage.roles.parameters(role) if MODULE in name] for role in ROLES}
    assert (len(trained["student"]), len(trained["critic"]), trained["teacher"]) == (7, 7 * is_told, [])
    assert bool(parts.notes) is not is_told


@pytest.mark.parametrize(
    ("stage", "more"), [("dmd/tiny", ()), ("consistency/tiny", ()), ("onpolicy/tiny", ("forward_weight=0",))]
)
def test_where_nothing_would_teach_the_controls_it_is_refused(
    small_model: Path, told_model: Path, stage: str, more: tuple[str, ...]
) -> None:
    budgets = ("stage.onpolicy.budgets=[2]", *(f"stage.onpolicy.{one}" for one in more))
    with pytest.raises(UserError, match=r"is told no controls, and in stage .* nothing else teaches the student"):
        parts_of(stage, small_model, *budgets)
    assert parts_of(stage, small_model, *budgets, f"stage.onpolicy.teacher={told_model}").notes == ()


def test_a_teacher_of_other_controls_is_refused(small_model: Path, told_model: Path) -> None:
    other = ("model.control.names=[trajectory]", f"stage.onpolicy.teacher={told_model}")
    with pytest.raises(UserError, match=r"was trained with the controls actions .* asks for trajectory"):
        parts_of("onpolicy/tiny", small_model, *ON_POLICY, *other)


def test_a_network_that_is_told_several_domains_learns_on_with_one(tmp_path: Path) -> None:
    """A recipe names `actions`; the network has those of roads and of halls, and the clips' own are told."""
    world = Path("data/models/tiny-world")
    network = ("model.architecture=causal", "model.network={chunk_partition: [1, 2, 2], full_chunk_limit: 2}")
    parts = parts_of("finetune/driving-control", world, *network, "data.frames=17")
    found = controls_of(parts.stage.backbone.transformer)
    assert found is not None and list(found.controls) == ["driving.actions", "games.actions"]
    rows = next(iter(parts.data.train_dataloader()))["controls"]
    assert not rows[..., :2].isnan().all() and rows[..., 2:].isnan().all()
    [note] = parts.notes
    assert "driving-uncaptioned has no games.actions" in note and "its clips train without" in note
    absent = ("model.control.names=[driving.actions]", "data.card=games-uncaptioned")
    with pytest.raises(UserError, match=r"'driving.actions' is no control of the card 'games-uncaptioned'"):
        parts_of("finetune/driving-control", world, *network, *absent)


def test_a_network_that_is_told_other_controls_is_refused(told_model: Path) -> None:
    with pytest.raises(UserError, match=r"was trained with the controls actions .*: name the same, or none \(model"):
        parts_of("forward/tiny", told_model, "model.control.names=[trajectory]")


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

"""Recipes: layering, overrides, sources, round trips, and a sentence for every mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflow.errors import UserError
from anyflow.recipe import (
    ModelRecipe,
    Recipe,
    check_files,
    check_recipe,
    describe,
    list_recipes,
    load_recipe,
    save_recipe,
    to_dict,
)
from anyflow.recipe.check import fit_batch, is_hub_id, lagging_average
from anyflow.recipe.fields import all_fields, flatten
from anyflow.stages.declarations import STAGES


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def load(*overrides: str, name: str = "finetune/driving", **options: str) -> Recipe:
    return load_recipe(name, overrides=overrides, **options)


def test_layers_win_in_order_and_say_so() -> None:
    recipe = load("optimizer.lr=3e-4", "data.width=128")
    rows = {row.key: row for row in describe(recipe)}
    assert recipe.optimizer.lr == 3e-4 and rows["optimizer.lr"].source == "command line"
    assert (
        recipe.model.weights == "data/models/tiny-open"
        and rows["model.weights"].source == "recipes/models/tiny-open.yaml"
    )
    assert rows["stage.steps"].source == "recipes/finetune/driving.yaml"
    assert recipe.hardware.accelerator == "auto"
    assert rows["hardware.accelerator"].source == "recipes/hardware/local.yaml"
    assert rows["stage.delta"].source == "default" and rows["stage.delta"].value == 5.0
    assert rows["run.name"].value == "finetune-driving-tiny-open" and rows["run.name"].source == "derived"


def test_every_field_is_described_once_with_a_meaning() -> None:
    rows = describe(Recipe())
    assert [row.key for row in rows] == list(all_fields())
    assert all(len(row.meaning) >= 5 for row in rows)
    assert {key for key, _ in flatten(to_dict(Recipe()))} == set(all_fields())


def test_stage_names_its_model_and_hardware() -> None:
    recipe = load(name="forward/wan2.1-t2v-14b")
    assert (recipe.model.name, recipe.hardware.name) == ("wan2.1-t2v-14b", "8gpu")
    assert load(name="forward/wan2.1-t2v-14b", hardware="1gpu").world_size == 1
    assert load().hardware.name == "local" and load(hardware="cpu").hardware.accelerator == "cpu"
    assert load(model="anyflow-wan2.1-t2v-1.3b").hardware.name == "1gpu", "a large model asks for a GPU itself"
    assert load(model="anyflow-wan2.1-t2v-14b").hardware.name == "8gpu"


def test_a_model_file_names_no_other_model(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("defaults: {model: tiny}\nmodel: {name: own, weights: data/models/tiny}\n")
    with pytest.raises(UserError, match="'defaults' names a hardware file and nothing else"):
        load(model=str(path))


def test_samples_are_guided_where_the_weights_have_no_guidance() -> None:
    """As much as is fused elsewhere, or as the recipe says; what has guidance fused is never guided on top."""
    assert load(name="teacher/tiny").sampled_guidance == 1.5
    for name in ("teacher/wan2.1-t2v-1.3b", "teacher/wan2.1-t2v-14b"):
        assert load("data.card=driving", name=name).sampled_guidance == 3.0, "the released teacher's"
    assert load("stage.guidance_scale=1", name="teacher/tiny").sampled_guidance == 1.0
    assert load("sampling.guidance_scale=4", name="teacher/tiny").sampled_guidance == 4.0
    for name in ("finetune/driving", "forward/tiny", "onpolicy/tiny", "consistency/tiny", "dmd/tiny"):
        more = ["stage.onpolicy.teacher=data/models/tiny"] if name == "onpolicy/tiny" else []
        assert load(*more, name=name).sampled_guidance == 1.0
        with pytest.raises(UserError, match=r"leave it out, and set stage\.guidance_scale"):
            load(*more, "sampling.guidance_scale=4", name=name)
    with pytest.raises(UserError, match="is below 1"):
        load("sampling.guidance_scale=0.5", name="teacher/tiny")


@pytest.mark.parametrize(("is_there", "found"), [(True, "gpu"), (False, "cpu")])
def test_auto_is_a_gpu_if_there_is_one(is_there: bool, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never what Lightning would take besides: the rest of the code knows these two."""
    from anyflow.backbone.parallelize import accelerator_here

    monkeypatch.setattr("torch.cuda.is_available", lambda: is_there)
    assert accelerator_here("auto") == found and accelerator_here("cpu") == "cpu"


def test_a_saved_recipe_is_complete_and_the_same(tmp_path: Path) -> None:
    recipe = load("stage.steps=7", "data.card=[driving,games]", "model.network.num_layers=2", hardware="8gpu")
    path = tmp_path / "recipe.yaml"
    save_recipe(recipe, path)
    assert load_recipe(str(path)) == recipe
    assert load_recipe(str(tmp_path)) == recipe  # a run's folder stands for its recipe
    assert load_recipe(str(path), overrides=["stage.steps=9"]).stage.steps == 9
    with pytest.raises(UserError, match="complete recipe"):
        load_recipe(str(path), model="tiny")


def test_the_work_needs_no_project_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load().stage.name == "finetune"


def test_a_text_stands_as_it_was_typed(tmp_path: Path) -> None:
    """YAML would make a number of 010, a yes of on, and a mapping of a colon: a field of text takes none of them."""
    typed = {
        "run.name": "010",
        "model.negative_prompt": "blur: low, [still]",
        "data.heldout": "on",
        "data.split": '"a b"',
    }
    recipe = load(*(f"{key}={text}" for key, text in typed.items()), "optimizer.lr=1e-4", "data.card=2024")
    assert (recipe.run.name, recipe.model.negative_prompt) == ("010", "blur: low, [still]")
    assert (recipe.data.heldout, recipe.data.split, recipe.data.card) == ("on", "a b", ["2024"])
    assert recipe.optimizer.lr == 1e-4
    recipe = load("run.name=1e5", "data.split=2024-01-02", "data.heldout=null")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path)) == recipe


def test_fields_may_refer_to_fields_and_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OmegaConf's interpolations, in files and overrides; they reach defaults too, and a saved recipe has values."""
    monkeypatch.setenv("FOOTAGE", "driving")
    path = tmp_path / "mine.yaml"
    path.write_text("stage: {name: forward, steps: 120}\nrun: {name: 'of-${stage.steps}'}\n")
    recipe = load_recipe(str(path), overrides=["data.card=${oc.env:FOOTAGE}", "optimizer.warmup_steps=${stage.steps}"])
    assert recipe.run.name == "of-120" and recipe.data.card == ["driving"] and recipe.optimizer.warmup_steps == 120
    recipe = load("data.height=${data.width}")
    assert recipe.data.height == recipe.data.width
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert "${" not in (tmp_path / "recipe.yaml").read_text()


def test_one_card_or_several() -> None:
    assert load("data.card=games").data.card == ["games"]
    assert load("data.card=[games,driving]").data.card == ["games", "driving"]
    assert load("data.card=").data.card == []


@given(total=st.integers(1, 64), ranks=st.integers(1, 16), limit=st.integers(1, 16))
@settings(max_examples=100, deadline=None)
def test_the_global_batch_is_met_exactly_or_refused(total: int, ranks: int, limit: int) -> None:
    words = [f"data.global_batch={total}", f"data.batch_size={limit}", f"hardware.devices={ranks}"]
    if total % ranks:
        with pytest.raises(UserError, match="does not divide"):
            load(*words)
        return
    recipe = load(*words)
    assert recipe.global_batch == total
    assert recipe.data.batch_size <= limit
    assert fit_batch(recipe) == recipe  # fitting twice changes nothing


def test_ranks_that_share_clips_count_as_one() -> None:
    """In the global batch and its passes; a group is of one node, and of a network that has tokens."""
    shared = {"name": "forward/wan2.1-t2v-14b", "hardware": "64gpu"}
    recipe = load("hardware.context=4", "data.global_batch=16", **shared)
    assert (recipe.world_size, recipe.data_ranks, recipe.hardware.accumulate) == (64, 16, 1)
    assert recipe.global_batch == 16
    assert load("hardware.context=4", **shared).hardware.accumulate == 4, "the file's batch is of 64"
    words = "data.global_batch=24 does not divide over 16 groups of ranks: give data.global_batch=3?"
    with pytest.raises(UserError, match=words + ".*hardware.context"):
        load("hardware.context=4", "data.global_batch=24", **shared)
    with pytest.raises(UserError, match=r"hardware.context=8 does not divide hardware.devices=4.*context=4, or"):
        load("hardware.context=8", "hardware.devices=4", **shared)
    with pytest.raises(UserError, match=r"hardware.context=2 .* stage codec .* set hardware.context=1"):
        load("hardware.context=2", "hardware.devices=2", name="codec/tiny")
    with pytest.raises(UserError, match=r"stage.name=codec needs them whole: set hardware.strategy=ddp$"):
        load("hardware.strategy=fsdp", "hardware.devices=2", name="codec/tiny")


@pytest.mark.parametrize("field", ["optimizer.name", "stage.onpolicy.critic.name"])
def test_muon_keeps_weights_whole_whichever_optimiser_it_is(field: str) -> None:
    """A hardware file's fsdp gives way; asked for on the command line, it is refused."""
    on_eight = {"name": "onpolicy/wan2.1-t2v-1.3b", "hardware": "8gpu"}
    assert load(**on_eight).hardware.strategy == "fsdp"
    assert load(f"{field}=muon", **on_eight).hardware.strategy == "ddp"
    with pytest.raises(UserError, match=f"{field}=muon needs them whole"):
        load(f"{field}=muon", "hardware.strategy=fsdp", **on_eight)


MISTAKES = [
    ("optimizer.lrr=1", "unknown key 'optimizer.lrr' (command line): did you mean 'optimizer.lr'?"),
    ("lr=1", "did you mean 'optimizer.lr'?"),
    ("sede=1", "did you mean 'sampling.seed'?"),
    ("foo.bar=1", "unknown key 'foo.bar'"),
    ("optimizer=3", "optimizer (command line) is a group"),
    ("model.lora=true", "model.lora (command line) is a group"),
    ("optimizer.lr=fast", "optimizer.lr='fast' (command line) is not of the right type: give a number"),
    ("stage.steps=1.5", "give a whole number"),
    ("stage.steps=", "give a whole number"),
    ("stage.rebalance=perhaps", "give true or false"),
    ("sampling.steps=[a]", "give a list such as [1, 2, 4"),
    ("model.network=3", "give a mapping"),
    ("stage.steps", "has no value: write it as dotted.key=value"),
    ("stage.steps=0", "stage.steps=0 (command line) is too small: give at least 1"),
    ("optimizer.lr=0", "give more than 0"),
    ("optimizer.lr=nan", "is not finite"),
    ("ema.decay=1", "is too large"),
    ("stage.name=fintune", "did you mean finetune?"),
    ("optimizer.name=sgd", "give one of adamw, muon"),
    ("data.frames=16", "data.frames=16 is not 4n+1, as the VAE needs: give 13 or 17"),
    ("data.height=100", "data.height=100 is no multiple of 16 (VAE x patch): give 96 or 112"),
    ("data.width=90", "give 80 or 96"),
    ("data.buckets=[64x96]", "data.buckets: '64x96' is no shape: write frames x height x width"),
    ("data.buckets=[16x64x96]", "data.buckets=16x64x96: frames=16 is not 4n+1, as the VAE needs: give 13 or 17"),
    ("data.buckets=[9x64x90]", "data.width=90 is no multiple of 16"),
    ("data.buckets=[17x64x96]", "or the run's own shape: give it once"),
    ("data.buckets=[81x480x832]", "a clip has 32760 tokens, more than a pass of data.batch_size=8 clips"),
    ("model.lora.start=runs/forward", "name that run in model.weights, and set model.lora.start= (empty)"),
    ("model.lora.dropout=0.1", "model.lora.dropout=0.1 would corrupt the finite difference"),
    ("stage.diffusion_share=0.9", "sum to 1.025, above 1"),
    ("stage.diffusion_share=-0.1", "is too small"),
    ("data.heldout=train", "is the training split"),
    ("sampling.steps=[4,4]", "repeats itself"),
    ("sampling.steps=[]", "is empty"),
    ("optimizer.betas=[0.9]", "give two numbers"),
    ("run.name=a/b", "cannot be a folder's name"),
    ("model.weights=", "model.weights is empty"),
    ("model.init=new", "name their folder in model.codec"),
    ("stage.tail.optimizer.betas=[1]", "stage.tail.optimizer.betas=[1.0] (command line) is too large"),
    ("stage.onpolicy.critic.betas=[0]", "stage.onpolicy.critic.betas=[0.0] is no pair"),
    ("hardware.context=3", "hardware.context=3 (command line) is not known: give one of 1, 2, 4, 8"),
    (
        "hardware.context=2",
        "hardware.context=2 does not divide hardware.devices=1, and ranks that share a clip are of one node: "
        "set hardware.context=1, or hardware.devices=2",
    ),
    ("hardware.devices=3", "data.global_batch=8 does not divide over 3 ranks: give data.global_batch=9"),
    ("hardware.devices=16", "does not divide over 16 ranks: give data.global_batch=16"),
    ("stage.name=codec", "trains a small VAE from nothing"),
    ("data.fps=[1,", "is not understood"),
    ("optimizer.lr=${nowhere}", "optimizer.lr='${nowhere}' (command line) refers to nothing"),
    ("model.weights=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
    (
        "stage.steps=${model.name}",
        "stage.steps='tiny-open' (command line) is not of the right type: give a whole number",
    ),
    ("stage.rebalance=1", "stage.rebalance=1 (command line) is not of the right type: give true or false"),
]


@pytest.mark.parametrize(("override", "sentence"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_mistake_gets_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


TAIL_MISTAKES = [
    ("stage.tail.teacher_steps=0", "knows nothing of this domain and would pull the model back"),
    ("stage.onpolicy.budgets=[]", "stage.onpolicy.budgets is empty"),
    ("model.lora.enabled=true model.lora.start=runs/forward/lora", "name the merged model"),
]


@pytest.mark.parametrize(("override", "sentence"), TAIL_MISTAKES, ids=[override for override, _ in TAIL_MISTAKES])
def test_a_mistake_with_a_tail_gets_one_sentence(override: str, sentence: str) -> None:
    overrides = override.split()
    load(*overrides)  # without the tail it does not matter
    with pytest.raises(UserError) as caught:
        load(*overrides, "stage.tail.steps=10")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tail_adds_its_teacher_and_itself() -> None:
    recipe = load("stage.steps=7", "stage.tail.steps=3", "stage.tail.teacher_steps=5")
    assert recipe.has_tail and recipe.total_steps == 15
    assert load("stage.steps=7").total_steps == 7
    rows = {row.key: row for row in describe(recipe)}
    assert rows["stage.tail.optimizer.lr"].value < rows["optimizer.lr"].value


NAMES = [
    ({"name": "driving"}, "did you mean finetune/driving?"),
    ({"name": "finetune/drivin"}, "finetune/driving"),
    ({"name": "no/such.yaml"}, "does not exist"),
    ({"model": "tinny"}, "there is no --model 'tinny': did you mean tiny?"),
    ({"model": "data"}, "pass model.weights=data instead"),
    ({"hardware": "tpu"}, "there is no --hardware 'tpu'"),
]


@pytest.mark.parametrize(("options", "sentence"), NAMES)
def test_a_wrong_name_is_told_what_exists(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load(**options)
    assert sentence in str(caught.value)


FILES = [
    ("stage: [1", "is no valid YAML"),
    ("- a\n- b", "holds list"),
    ("stage: {stepz: 3}", "mine.yaml): did you mean 'stage.steps'?"),
    ("defaults: {modell: tiny}", "'defaults' names a model and a hardware file"),
    (
        "stage: 3",
        "stage (",
    ),
    ("stage: {steps: 3}\nstage: {steps: 4}", "is no valid YAML"),
    ("stage: {steps: !!int x}", "is no valid YAML"),
    ("run: {name: 010}", "mine.yaml) is not of the right type: give a text in quotes"),
    ("sampling: {encoders: [1]}", "give a list such as [...]"),
]


@pytest.mark.parametrize(("text", "sentence"), FILES)
def test_a_broken_file_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert "mine.yaml" in str(caught.value) and sentence in str(caught.value)


def test_missing_files_are_named_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("name: mine\n")
    monkeypatch.chdir(tmp_path)
    check_files(load("data.card=mine", "model.weights=owner/name"))
    for overrides, sentence in (
        (["data.card="], "data.card is empty"),
        (["data.card=mien"], "did you mean mine?"),
        (["data.card=mine", "model.weights=data/models/nothing"], "model.weights='data/models/nothing' does not exist"),
        (["data.card=mine", "model.weights=data/nothing"], "does not exist"),
        (["data.card=mine", "model.weights=a/b", "model.codec=./c"], "model.codec='./c' does not exist"),
    ):
        with pytest.raises(UserError) as caught:
            check_files(load(*overrides))
        assert sentence in str(caught.value)


def test_hub_ids() -> None:
    assert is_hub_id("nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers") and is_hub_id("owner/model@v1.0")
    assert not any(is_hub_id(text) for text in ("plain", "./a/b", "/a/b", "a/b/c", "recipes/nothing", "../x"))


def test_limits_hold_for_the_defaults() -> None:
    """No default lies outside its own range."""
    check_recipe(Recipe(model=ModelRecipe(weights="a/b")))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stage.onpolicy.teacher=", "without LoRA there is no frozen base to teach"),
        ("stage.onpolicy.budgets=[]", "stage.onpolicy.budgets is empty"),
        ("stage.onpolicy.budgets=[0,4]", "give at least 1"),
        ("stage.onpolicy.critic.betas=[0.9]", "stage.onpolicy.critic.betas=[0.9] is no pair"),
        ("model.init=new", "model.codec"),
    ],
)
def test_an_impossible_onpolicy_recipe_gets_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("onpolicy/tiny", overrides=[override])
    assert sentence in str(caught.value)


def test_with_lora_the_base_may_teach() -> None:
    alone = ["data.card=driving", "stage.onpolicy.teacher=", "model.lora.start="]
    recipe = load_recipe("onpolicy/wan2.1-t2v-1.3b", overrides=alone)
    assert recipe.model.lora.enabled and recipe.stage.onpolicy.teacher == ""
    check_files(recipe)


@pytest.mark.parametrize("place", ["runs/x-forward", "runs/x-forward/lora"])
def test_a_run_that_was_numbered_by_itself_is_offered(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipes of a chain name each other's folders; a run without --out has a number behind its name."""
    recipe = load("model.lora.enabled=true", f"model.lora.start={place}", "model.weights=a/b")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="or run the recipe that makes it first"):
        check_files(recipe)
    for number in ("001", "002"):
        (tmp_path / "runs" / f"x-forward-{number}" / "lora").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"did you mean {place.replace('forward', 'forward-002')}\?"):
        check_files(recipe)


def test_one_stage_file_serves_several_models() -> None:
    """The places that a model's runs name each other by."""
    causal, plain = (load_recipe("onpolicy/tiny", model=model) for model in ("tiny-causal", "tiny"))
    assert causal.model.architecture == "causal" and causal.run.name == "tiny-causal-onpolicy"
    assert causal.model.weights == "runs/tiny-causal-forward/model"
    assert causal.stage.onpolicy.teacher == "runs/tiny-causal-teacher/model"
    assert plain.model.weights == "runs/tiny-forward/model" and plain.run.name == "tiny-onpolicy"
    assert load_recipe("teacher/tiny", model="tiny-causal").model.network["chunk_partition"] == [1, 2, 2]


def test_the_architecture_is_all_that_a_recipe_shows_of_a_causal_model() -> None:
    causal, plain = (to_dict(load_recipe("finetune/driving", model=model)) for model in ("tiny-causal", "tiny"))
    for tree in (causal, plain):
        for key in ("name", "weights", "architecture", "network"):
            del tree["model"][key]
        del tree["run"]["name"]
    assert causal == plain


def test_given_frames_must_leave_something_to_sample() -> None:
    with pytest.raises(UserError, match=r"sampling.given_frames=5 .* 5 latent frames .* give at most 4"):
        load_recipe("finetune/driving", overrides=["sampling.given_frames=5"])


def test_a_causal_network_has_room_for_its_compressed_patches() -> None:
    with pytest.raises(UserError, match=r"data.height=16 .* at least 32 pixels"):
        load_recipe("finetune/driving", model="tiny-causal", overrides=["data.height=16"])
    load_recipe("finetune/driving", overrides=["data.height=16"])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], ""),
        (["ema.decay=0"], ""),
        (["ema.decay=0.999"], "averages about 1,000 updates, and stage.steps=300 with ema.start_step=20 makes 280"),
        (["ema.decay=0.999", "stage.steps=20"], ""),  # all steps are before the average starts: it is the weights
        (["stage.tail.steps=25", "stage.tail.teacher_steps=50"], "stage.tail.steps=25 with ema.start_step=20 makes 25"),
        (["stage.tail.steps=25", "stage.tail.teacher_steps=50", "ema.decay=0.8"], ""),
    ],
)
def test_an_average_that_cannot_follow_is_told(overrides: list[str], told: str) -> None:
    warning = lagging_average(load_recipe("finetune/driving", overrides=overrides))
    assert told in warning and bool(warning) == bool(told)


SHIPPED = [f"{folder}/{name}" for folder in STAGES for name in list_recipes().get(folder, ())]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_averages_of_shipped_recipes_follow(name: str) -> None:
    assert not lagging_average(load_recipe(name))


def test_recipes_are_read_without_heavy_libraries() -> None:
    """They are shown and checked in a moment."""
    code = "import sys, anyflow.recipe; sys.exit(', '.join({'torch', 'diffusers', 'lightning'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.stderr.strip()

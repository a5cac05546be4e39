"""Where a run computes, in what precision, and in what portions: seen without a GPU, on devices that are only named."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from anyflow.backbone import codec as codec_module
from anyflow.backbone import parallelize, protocol, roles
from anyflow.backbone.codec import Codec
from anyflow.backbone.context import ALONE
from anyflow.backbone.load import load_backbone
from anyflow.backbone.roles import SeparateRoles
from anyflow.cli.main import app
from anyflow.cli.sample import sample_prompts
from anyflow.data.decode import ClipShape
from anyflow.errors import UserError
from anyflow.evaluation import heldout as curves
from anyflow.evaluation import models
from anyflow.evaluation.curve import Curve
from anyflow.evaluation.kept_samples import KeptSamples
from anyflow.evaluation.loaded import LoadedModel
from anyflow.evaluation.measurement import Judges
from anyflow.evaluation.options import WayOptions
from anyflow.recipe import Recipe, load_recipe, save_recipe
from anyflow.system import ranks
from anyflow.tracking.runs import RunFolder
from anyflow.training import finish
from anyflow.training.assemble import assemble, spread
from anyflow.training.callbacks.sharded import ShardedStrategy
from anyflow.training.finish import measure, place
from anyflow.training.launch import fit

GPU = torch.device("cuda", 0)
"""A name on this machine: nothing is ever put there."""


def small_recipe(model: Path, **changes: Any) -> Recipe:
    options = {
        "model.weights": model,
        "data.frames": 5,
        "data.height": 32,
        "data.width": 32,
        "data.num_workers": 0,
        "data.precompute": "false",
        "data.global_batch": 2,
        "optimizer.name": "adamw",
        "stage.steps": 2,
        "sampling.prompts": 3,
        "sampling.steps": "[2]",
        **changes,
    }
    return load_recipe("finetune/driving", overrides=[f"{key}={value}" for key, value in options.items()])


class Named(nn.Module):
    """A network of one weight, which lies on the CPU and notes where it is put."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.places: list[Any] = []
        self.is_parked = False
        self.transformer = SimpleNamespace(config={})

    def to(self, device: Any) -> Any:
        self.places.append(device)
        return self

    @contextmanager
    def lent(self, device: Any) -> Any:
        self.places.append(device)
        yield


def test_what_samples_is_put_on_the_runs_device_and_asked_there(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning has moved the network to the CPU when training ended: asking a weight where it lies samples there."""
    told: list[Any] = []
    monkeypatch.setattr(finish, "join_ranks", lambda accelerator: GPU)
    monkeypatch.setattr(finish, "judges_of", lambda *a, device, **k: (told.append(device), Judges())[1])
    monkeypatch.setattr(finish, "curve_of", lambda *a, device, **k: told.append(device))
    parts: Any = SimpleNamespace(backbone=Named(), codec=Named(), stage=SimpleNamespace(ema=None))
    finish._sampled(small_recipe(small_model), parts, "after", KeptSamples(tmp_path, "after"), None)
    assert told == [GPU, GPU]
    assert parts.backbone.places == [GPU] and set(parts.codec.places) == {GPU}


def test_sharded_weights_stay_where_they_are(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloaded ones lie in host memory, and compute on the GPU all the same; a parked codec comes when it works."""
    monkeypatch.setattr(finish, "join_ranks", lambda accelerator: GPU)
    monkeypatch.setattr(finish, "is_sharded_module", lambda module: True)
    parts: Any = SimpleNamespace(backbone=Named(), codec=Named())
    parts.codec.is_parked = True
    assert place(small_recipe(small_model), parts) == GPU
    assert parts.backbone.places == [] and parts.codec.places == []


def test_training_leaves_the_network_elsewhere_and_it_is_placed_again(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real order of things: fit, Lightning's teardown (to the CPU), the curve. ``meta`` stands for the GPU."""
    recipe = small_recipe(small_model)
    parts = assemble(recipe)
    fit(recipe, RunFolder(tmp_path), parts, None)
    assert next(parts.backbone.parameters()).device.type == "cpu"
    monkeypatch.setattr(finish, "join_ranks", lambda accelerator: torch.device("meta"))
    assert place(recipe, parts).type == "meta"
    assert {weight.device.type for weight in (*parts.backbone.parameters(), *parts.codec.parameters())} == {"meta"}


def test_no_weight_is_asked_where_to_compute(project: Path) -> None:
    """Weights are moved by Lightning and kept in host memory by offloading."""
    asking = re.compile(r"next\((\w+\.)*parameters\(\)\)\.device")
    found = [path.name for path in (project / "anyflow").rglob("*.py") if asking.search(path.read_text())]
    assert not found


def test_a_sharded_stage_is_told_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is moved, and Lightning notes a module's device when it moves it: it would stay the CPU."""
    monkeypatch.setattr(ShardedStrategy, "root_device", GPU)
    strategy = ShardedStrategy(1)
    import lightning

    stage = lightning.LightningModule()
    stage.layer = nn.Linear(2, 2)
    strategy._lightning_module = strategy._model = stage  # type: ignore[assignment]
    strategy.model_to_device()
    assert stage.device == GPU and stage.layer.weight.device.type == "cpu"


def test_an_offloaded_teacher_stays_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher: Any = Named()
    three = SeparateRoles(Named(), teacher, has_critic=False)  # type: ignore[arg-type]
    three.place(GPU)
    monkeypatch.setattr(roles, "is_sharded_module", lambda module: True)
    three.place(torch.device("meta"))
    assert teacher.places == [GPU]


def test_gradients_are_freed_with_their_step(small_model: Path, tmp_path: Path) -> None:
    """Kept until the next pass is over, they would lie there through its activations, and through every curve."""
    import lightning

    recipe, left = small_recipe(small_model, **{"sampling.prompts": 0}), []

    class Look(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, stage: Any, *_: Any) -> None:
            left.append([name for name, weight in stage.named_parameters() if weight.grad is not None])

    fit(recipe, RunFolder(tmp_path), assemble(recipe), None, [Look()])
    assert left == [[], []]


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, expected", [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_a_curve_is_sampled_in_the_precision_of_training(
    small_model: Path, tmp_path: Path, precision: str, expected: torch.dtype
) -> None:
    """Lightning's autocast surrounds training steps alone; times, state and result stay float32, and the codec too."""
    recipe = small_recipe(small_model, **{"hardware.precision": precision})
    parts, seen, outer, codecs = assemble(recipe), set(), set(), set()
    block = parts.backbone.transformer.blocks[0]
    block.ffn.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    parts.codec.vae.decoder.conv_in.register_forward_hook(lambda module, inputs, output: codecs.add(output.dtype))
    parts.backbone.register_forward_hook(
        lambda module, inputs, output: outer.update({output.dtype, *(one.dtype for one in inputs[:3])})
    )
    measure(recipe, RunFolder(tmp_path), parts, None, label="before")
    assert seen == {expected} and outer == {torch.float32} and codecs == {torch.float32}


def test_every_role_computes_in_the_recipes_precision(small_model: Path) -> None:
    networks = [load_backbone(small_model) for _ in range(2)]
    spread(small_recipe(small_model, **{"hardware.precision": "bf16-mixed"}), ALONE, *networks)
    assert [network.compute for network in networks] == [torch.bfloat16] * 2
    plain = load_backbone(small_model)
    spread(small_recipe(small_model), ALONE, plain)
    assert plain.compute is None


def test_clips_are_encoded_as_beforehand_whatever_surrounds_it(small_model: Path) -> None:
    """A training step's autocast would make bfloat16 latents and texts of a float32 codec."""
    codec = Codec.from_folder(small_model)
    video = torch.randint(0, 256, (1, 5, 32, 32, 3), dtype=torch.uint8)
    latents = codec.encode_video(video)
    pixels, text = codec.decode(latents), codec.embed("a car")
    again = Codec.from_folder(small_model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(again.encode_video(video), latents) and torch.equal(again.decode(latents), pixels)
        assert torch.equal(next(again.decode_parts([latents])), next(codec.decode_parts([latents])))
        assert torch.equal(again.embed("a car"), text)


def test_a_model_is_sampled_as_its_recipe_says(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 on the CPU; on a GPU the tiny models in float32, large ones and those that nobody knows in bfloat16."""
    run = tmp_path / "run"
    run.mkdir()
    save_recipe(small_recipe(small_model, **{"hardware.precision": "bf16-mixed"}), run / "recipe.yaml")
    names = ("data/models/tiny", "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", str(run), str(small_model))
    assert {models.usual_precision(name) for name in names} == {"float32"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [models.usual_precision(name) for name in names] == ["float32", "bfloat16", "bfloat16", "bfloat16"]


def test_the_autoencoder_of_a_sampled_model_is_float32(small_model: Path) -> None:
    codec, backbone, _ = models.load_model(str(small_model), "bfloat16")
    assert codec.dtype == torch.float32 and backbone.dtype == torch.bfloat16
    assert next(codec.text_encoder.parameters()).dtype == torch.bfloat16


def test_an_unknown_precision_is_refused() -> None:
    done = CliRunner().invoke(app, ["sample", "A car.", "--precision", "fp8"])
    assert isinstance(done.exception, UserError)
    assert "--precision 'fp8' is not known: give float32 or bfloat16" in str(done.exception)


# Portions -------------------------------------------------------------------------------------------------------------


def counted(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clips each pass through the autoencoder has, from now on."""
    passes: list[int] = []

    def count(name: str) -> Callable[..., Any]:
        original = getattr(codec_module, name)

        def counting(vae: Any, clips: Tensor) -> Any:
            passes.append(len(clips))
            return original(vae, clips)

        return counting

    for name in ("encode_moments", "decode_latents"):
        monkeypatch.setattr(codec_module, name, count(name))
    return passes


def test_clips_pass_the_autoencoder_in_portions_that_fit(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones all at once, as ever; large ones one by one, at least one, and nothing else comes of it."""
    codec = Codec.from_folder(small_model)
    video = torch.randint(0, 256, (5, 5, 32, 32, 3), dtype=torch.uint8)
    passes = counted(codec, monkeypatch)
    latents = codec.encode_video(video)
    pixels = codec.decode(latents)
    assert passes == [5, 5]
    for budget, expected in ((2 * 5 * 32 * 32, [2, 2, 1] * 2), (1, [1] * 10)):
        passes.clear()
        monkeypatch.setattr(codec_module, "PIXELS_AT_ONCE", budget)
        torch.testing.assert_close(codec.encode_video(video), latents, atol=1e-5, rtol=1e-5)
        assert (codec.decode(latents).int() - pixels.int()).abs().max() <= 1
        assert passes == expected


def test_one_clip_of_wan_fills_a_pass_and_tiny_ones_go_as_before() -> None:
    codec = Codec(codec_module.AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1))
    assert codec.clips_at_once(81, 480, 832) == 1 and codec.clips_at_once(17, 64, 96) >= 64
    wan = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 2))))
    at_once = protocol.FlowMapBackbone.clips_at_once
    assert at_once(wan, (21, 16, 60, 104)) == 1 and at_once(wan, (21, 16, 90, 160)) == 1  # type: ignore[arg-type]
    assert at_once(wan, (5, 16, 8, 12)) >= 64  # type: ignore[arg-type]


def test_ranks_that_share_weights_agree_on_their_portions() -> None:
    """As many calls on each rank: all of them gather the same weights."""
    assert curves.clips_a_pass(273, 1) == 8 and curves.clips_a_pass(273, 2) == 8 and curves.clips_a_pass(273, 16) == 16
    assert curves.clips_a_pass(1, 1) == 1 and curves.clips_a_pass(1, 8) == 8 and curves.clips_a_pass(2, 2, 32) == 4


def test_a_curve_of_large_clips_is_sampled_clip_by_clip(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its figures are those of the whole batch."""

    def curve(name: str) -> tuple[Curve, list[int]]:
        parts, rows = assemble(small_recipe(small_model)), []
        parts.backbone.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
        result = measure(small_recipe(small_model), RunFolder(tmp_path / name), parts, None, label="before")
        assert result is not None
        return result.curve, rows

    together, rows = curve("together")
    assert rows == [3, 3]
    monkeypatch.setattr(protocol, "TOKENS_AT_ONCE", 1)
    alone, rows = curve("alone")
    assert rows == [1] * 6
    assert alone.rows[0].sliced_w1 == pytest.approx(together.rows[0].sliced_w1, rel=1e-3)


def test_prompts_of_a_command_are_sampled_in_portions(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel.of(str(small_model), WayOptions(sampler="renoise"), ClipShape(5, 32, 32))
    rows: list[int] = []
    loaded.backbone.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    prompts = ["one", "two", "three"]
    _, together = sample_prompts(loaded, prompts, [1], 0)
    assert rows == [3]
    monkeypatch.setattr(protocol, "TOKENS_AT_ONCE", 1)
    _, alone = sample_prompts(loaded, prompts, [1], 0)
    assert rows == [3, 1, 1, 1] and alone[1].shape == together[1].shape
    assert (alone[1].int() - together[1].int()).abs().max() <= 1


# Memory ---------------------------------------------------------------------------------------------------------------


def test_segments_expand_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ranks.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    ranks.expand_segments()
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    ranks.expand_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_a_command_says_it_before_torch_is_there(project: Path) -> None:
    """Torch reads it once; the ranks that a command starts have its environment."""
    import subprocess
    import sys

    code = (
        "import sys, anyflow.cli.main as cli; cli.app = lambda: None; cli.main(); assert 'torch' not in sys.modules;"
        "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ranks.ALLOCATOR}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(project)},
    )
    assert done.stdout.strip() == "expandable_segments:True", done.stderr
    script = (project / "recipes" / "hardware" / "slurm.sh").read_text(encoding="utf-8")
    assert "expandable_segments:True" in script and script.index("PYTORCH_ALLOC_CONF") < script.index("srun ")


def test_the_devices_name_is_that_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What :func:`place` asks: rank 3's third GPU, whatever lies where."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert parallelize.join_ranks("auto") == torch.device("cuda", 3) and parallelize.join_ranks("cpu").type == "cpu"

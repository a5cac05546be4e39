"""What is refused, or told, before a run loads anything."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow.backbone.parallelize import check_devices
from anyflow.backbone.quantized import check_quantizer
from anyflow.cli.evaluate import EvaluateOptions, _check_shapes
from anyflow.data.decode import ClipShape
from anyflow.errors import UserError, explain
from anyflow.evaluation.models import trained_shape
from anyflow.recipe import load_recipe
from anyflow.training import launch
from anyflow.training.finish import model_card
from anyflow.training.idle import idle_options


@pytest.mark.parametrize(
    ("here", "devices", "remedy"),
    [(0, 1, r"no GPU .* hardware.accelerator=cpu"), (4, 8, "4 GPUs .*: set hardware.devices=4$")],
)
def test_gpus_that_are_not_there(here: int, devices: int, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    with pytest.raises(UserError, match=remedy):
        check_devices("gpu", devices)
    check_devices("cpu", devices)
    check_devices("gpu", here)
    hardware = "1gpu" if devices == 1 else "8gpu"
    for start in (launch.train, launch.encode_ahead):  # one process, and what starts several
        with pytest.raises(UserError, match=remedy):
            start(load_recipe("finetune/driving", hardware=hardware))


def test_what_several_ranks_need_is_waited_for(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may be encoding the same clips: training starts when it is done."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "encode", lambda job, engine, **how: asked.append(how))
    monkeypatch.setattr(launch, "assemble", lambda recipe, **how: None)
    words = [f"model.weights={small_model}", "data.card=driving-uncaptioned", "data.precompute=true"]
    launch.encode_ahead(load_recipe("finetune/driving", overrides=[*words, "data.frames=5", "hardware.devices=2"]))
    assert asked == [{"waits": True}]


def test_a_broken_quantiser_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    own = builtins.__import__

    def broken(name: str, *rest: Any, **more: Any) -> Any:
        if name == "bitsandbytes":
            raise RuntimeError("no such library: libbits.so\nmore")
        return own(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(UserError, match=r"base=nf4: .* cannot be imported \(no such library: libbits.so\): install it"):
        check_quantizer("nf4")
    check_quantizer("full")


def test_a_package_that_breaks_diffusers_is_named() -> None:
    try:
        try:
            raise ImportError("libbits.so")
        except ImportError as error:
            raise RuntimeError("Failed to import diffusers.loaders.peft because of the following error") from error
    except RuntimeError as error:
        assert "(ImportError: libbits.so): install that one again, or uninstall it" in str(explain(error))
    assert explain(RuntimeError("Failed to import")) is None


def test_options_that_change_nothing_are_told() -> None:
    typed = ["hardware.keep_attention=true", "hardware.recompute_jumps=true", "hardware.residual=compute"]
    typed += ["hardware.attention=flash3", "hardware.accelerator=cpu"]
    notes = list(idle_options(load_recipe("finetune/driving", overrides=typed)))
    assert [note.split("=")[0] for note in notes] == [f"note: {key.split('=')[0]}" for key in typed[:4]]
    assert notes[0].endswith("changes nothing here: hardware.gradient_checkpointing is false")
    used = ["hardware.keep_attention=true", "hardware.gradient_checkpointing=true", "hardware.recompute_jumps=true"]
    assert not list(idle_options(load_recipe("onpolicy/wan2.1-t2v-1.3b", overrides=used)))
    assert not list(idle_options(load_recipe("finetune/driving", hardware="8gpu")))


def test_a_run_compares_with_its_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may take each clip at its own rate, and an export's card names one."""
    shapes = {"run": ClipShape(17, 64, 96), "export": ClipShape(17, 64, 96, 8.0), "other": ClipShape(17, 64, 96, 4.0)}
    monkeypatch.setattr("anyflow.evaluation.models.native_shape", lambda model: shapes[model])
    for one, other in (("run", "export"), ("export", "run"), ("run", "run")):
        _check_shapes(one, EvaluateOptions(data="driving", against=other))
    with pytest.raises(UserError, match="4 a second, --model 17 frames of 96x64, 8 a second: they do not compare"):
        _check_shapes("export", EvaluateOptions(data="driving", against="other"))


def test_an_exports_card_has_its_clips_rate() -> None:
    assert model_card(load_recipe("finetune/games"), {}).fps == 8.75
    both = load_recipe("finetune/games", overrides=["data.card=[games,driving]"])
    assert model_card(both, {}).fps == 8.0
    assert model_card(load_recipe("finetune/games", overrides=["data.fps=4"]), {}).fps == 4.0


@pytest.mark.parametrize("name", ["finetune/games", "consistency/tiny"])
def test_what_kept_its_clips_rates_is_exported_as_such(tmp_path: Path, name: str) -> None:
    """Else clips of another rate than the example's would be resampled, or be too short."""
    for fps, rate in (("0", 0.0), ("4", 4.0)):
        recipe = load_recipe(name, overrides=["data.card=[games,driving]", f"data.fps={fps}"])
        (tmp_path / "README.md").write_text(model_card(recipe, {}).render())
        assert trained_shape(str(tmp_path)) == (17, 64, 96, rate)

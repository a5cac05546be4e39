"""What every shipped recipe really draws, on every model and hardware: its shares of intervals, and no idle rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anyflow.errors import UserError
from anyflow.flowmap.intervals import IntervalShares
from anyflow.recipe import Recipe, load_recipe
from anyflow.stages import update as module
from anyflow.stages.forward import draw_times
from anyflow.stages.update import Update

ROOT = Path(__file__).parents[2] / "recipes"
STAGES = sorted(
    f"{folder}/{path.stem}" for folder in ("forward", "finetune", "onpolicy") for path in (ROOT / folder).glob("*.yaml")
)
MODELS = sorted(path.stem for path in (ROOT / "models").glob("*.yaml"))
HARDWARE = sorted(path.stem for path in (ROOT / "hardware").glob("*.yaml"))
ONE_CLIP = ("data.global_batch=0", "data.batch_size=1")
SMALL = (ONE_CLIP, (*ONE_CLIP, "hardware.accumulate=4"))


def recipes_of(stage: str) -> list[Recipe]:
    """The stage on all models and hardware that it can be had with; and as people with small GPUs run it."""
    found = []
    for model in MODELS:
        for hardware in HARDWARE:
            for more in ((), *(SMALL if model == "tiny" else ())):
                try:
                    found.append(load_recipe(stage, model=model, hardware=hardware, overrides=more))
                except UserError:
                    continue  # a batch that does not divide, and the like: refused in a sentence
    return found


def drawn(recipe: Recipe, steps: int, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """How many clips had r = t, r = 0 and any r, all ranks and passes of some steps together."""
    shares = IntervalShares(recipe.stage.diffusion_share, recipe.stage.consistency_share)
    update, latents = Update(0, recipe.hardware.accumulate), torch.empty(recipe.data.batch_size, 1, 1, 1, 1)
    data: Any = SimpleNamespace(clean=latents)
    kinds, ranks = torch.zeros(3, dtype=torch.long), recipe.world_size
    for _ in range(steps):
        waiting = [False] * ranks  # for a jump: then no velocity may come, or its loss would weigh none before it
        for _ in range(update.passes):
            update.begin_pass()
            moving = []
            for rank in range(ranks):
                monkeypatch.setattr(module, "world", lambda rank=rank: (rank, ranks))
                times = draw_times(update, data, shares, 5.0)
                is_diffusion, to_data = times.timestep == times.r_timestep, times.r_timestep == 0
                assert int(is_diffusion.sum()) == times.num_diffusion
                assert not (waiting[rank] and is_diffusion.any())
                moving.append(int((~is_diffusion).sum()))
                waiting[rank] = moving[-1] > 0
                kinds += torch.stack([is_diffusion, to_data, ~is_diffusion & ~to_data]).sum(dim=1)
            assert max(moving) - min(moving) <= 1, "a rank waits for another's finite differences"
        assert update.is_complete
    return kinds


@pytest.mark.parametrize("stage", STAGES)
def test_shares_are_the_recipes(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded by pass, one GPU's fine-tuning of 1.3B drew no jump at all, and one clip a pass no velocity."""
    seen = set()
    for recipe in recipes_of(stage):
        shares = IntervalShares(recipe.stage.diffusion_share, recipe.stage.consistency_share)
        case = (recipe.data.batch_size, recipe.world_size, recipe.hardware.accumulate, shares)
        if case in seen:
            continue
        seen.add(case)
        is_whole = shares.are_whole(recipe.global_batch)
        steps = 1 if is_whole else max(4, 256 // recipe.global_batch)
        wanted = torch.tensor(
            [shares.diffusion_share, shares.consistency_share, 1 - shares.diffusion_share - shares.consistency_share]
        )
        found = drawn(recipe, steps, monkeypatch) / (steps * recipe.global_batch)
        assert (found - wanted).abs().max() < (1e-6 if is_whole else 0.02), (case, found)
    assert seen

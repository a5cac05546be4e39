"""A few real steps of a stage, through the trainer that ``anyflow train`` makes, on invented latents and prompts.

Weights are random and nothing is downloaded, so a network of any published size can be stepped, with as few layers as a
GPU holds: seconds and bytes of a step grow linearly in the layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from anyflow.backbone.codec import Codec
from anyflow.backbone.embedded import build_vae
from anyflow.backbone.load import new_backbone
from anyflow.backbone.lora import add_lora
from anyflow.backbone.parallelize import checkpoint_activations
from anyflow.doctor.here import Here
from anyflow.memory.need import latent_shape
from anyflow.recipe import Recipe
from anyflow.system.console import quiet_libraries
from anyflow.tracking.runs import RunFolder
from anyflow.training.assemble import Parts, batches_of, build_stage, lora_settings
from anyflow.training.launch import fit

LENGTHS = (511, 24, 90, 7, 300, 41, 160, 12)
"""Tokens of the prompts, in turn, where they are to differ: each batch's longest is another's."""


def run_steps(
    recipe: Recipe, config: dict[str, Any], here: Here, folder: Path, *callbacks: Any, long_prompts: bool = False
) -> None:
    """Run a recipe's stage to its last step with a random network of a configuration.

    Args:
        recipe: says stage, adapters, batch, hardware; its data and weights are not touched.
        config: the transformer's.
        here: where the network is built.
        folder: to work in.
        callbacks: of Lightning.
        long_prompts: every prompt has full length, so that every step is as heavy as can be.
    """
    quiet_libraries()
    with torch.device(here.device):
        backbone = new_backbone(config, 0, recipe.model.architecture)
    latents = latent_shape(recipe)
    backbone.fit_clip(latents[0])
    if recipe.hardware.gradient_checkpointing:
        checkpoint_activations(backbone, recipe.hardware.keep_attention)
    if recipe.model.lora.enabled:
        add_lora(backbone, lora_settings(recipe, backbone))
    backbone.to(here.device)
    codec = Codec(build_vae(0))
    codec.is_parked = True  # latents and prompts are ready: it has nothing to do
    codec.known_texts = InventedTexts(config["text_dim"], LENGTHS[:1] if long_prompts else LENGTHS)
    data: Any = InventedData(recipe, latents)
    fit(recipe, RunFolder(folder), Parts(codec, backbone, build_stage(recipe, codec, backbone), data), None, callbacks)


class InventedTexts:
    """Every prompt has an embedding: random, of a length that follows from the number it ends in."""

    def __init__(self, width: int, lengths: tuple[int, ...]) -> None:
        self._width, self._lengths = width, lengths

    def __contains__(self, prompt: str) -> bool:
        return True

    def get(self, prompt: str) -> Tensor | None:
        """``[length, D]``."""
        number = int(prompt.rpartition(" ")[2]) if prompt.rpartition(" ")[2].isdigit() else 0
        length = self._lengths[number % len(self._lengths)]
        return torch.randn(length, self._width, generator=torch.Generator().manual_seed(number))


class InventedData(lightning.LightningDataModule):
    """Batches of random latents, as encoded clips come."""

    stream = None
    """Nothing to report about unreadable clips."""

    def __init__(self, recipe: Recipe, latents: tuple[int, int, int, int]) -> None:
        super().__init__()
        self._batches, self._clips, self._latents = batches_of(recipe), recipe.data.batch_size, latents

    def train_dataloader(self) -> Any:
        """As many batches as the recipe asks for."""
        generator = torch.Generator().manual_seed(0)
        batches = []
        for number in range(self._batches):
            latents = torch.randn(self._clips, *self._latents, generator=generator)
            captions = [f"prompt {number * self._clips + row}" for row in range(self._clips)]
            batches.append({"latents": latents, "caption": captions})
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

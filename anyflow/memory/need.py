"""Memory known before hardware is rented: what a recipe needs of a GPU, and what to change where that is too much.

The figures come from :mod:`anyflow.memory.simulate` (the step, and sampling) and :mod:`anyflow.memory.codec` (clips in
the autoencoder); what lies on the GPU meanwhile, phase by phase, from :mod:`anyflow.memory.phases`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from anyflow.backbone.layout import PUBLISHED, published
from anyflow.errors import UserError
from anyflow.memory.changes import changes, with_gpus
from anyflow.memory.phases import GIB, phases_of
from anyflow.memory.speed import TERAFLOPS, UTILISATION, step_operations, step_seconds
from anyflow.recipe import Recipe, load_recipe, save_recipe
from anyflow.recipe.check import layout_of_recipe

WORTH_IT = 0.95
"""What a change among several must leave of the memory, at most."""

GB = 10**9
"""GPUs are sold in this, and hold GiB."""

LINK = 300 * GB
"""Bytes a second from one GPU to others of its node, over NVLink."""

UMT5_XXL_WEIGHTS, WAN_VAE_WEIGHTS, WAN22_VAE_WEIGHTS = 5_680_910_336, 126_892_531, 704_688_668

Simulate = Callable[[Recipe, dict[str, Any], tuple[int, int, int, int]], Any]


@dataclass(frozen=True)
class Remedy:
    """A change to a recipe, and the peak that comes of it."""

    change: str
    needed: float
    cost: str


@dataclass(frozen=True)
class Need:
    """What a recipe needs.

    Attributes:
        recipe: its name.
        gpus: ranks.
        memory: of one GPU, bytes.
        phases: bytes of one GPU by the phase of the run, and within it by what they are for.
        tokens: of one clip.
        checkpoint: bytes of one checkpoint on disk.
        disk: of all that are kept, one being written beside them.
        host: bytes of one machine's memory while weights load and checkpoints are written.
        remedies: single changes that make it fit, the cheapest first.
        together: where no single one does, changes that do so together, or the least memory that was found.
        context: ranks that share each clip.
        exchanged: bytes that a step sends from each rank to those.
        operations: floating-point operations of a step, all its clips; None: not known.
        clips: of a step.
        steps: of the run.
        whole: the field that keeps weights whole on every GPU, with its value; empty: none does.
    """

    recipe: str
    gpus: int
    memory: float
    phases: dict[str, dict[str, float]]
    tokens: int
    checkpoint: float
    disk: float
    host: float
    remedies: list[Remedy] = field(default_factory=list)
    together: Remedy | None = None
    context: int = 1
    exchanged: float = 0.0
    operations: float | None = None
    clips: int = 1
    steps: int = 1
    whole: str = ""

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step by the kind of GPU, by arithmetic; empty: not known."""
        if self.operations is None:
            return {}
        return {gpu: step_seconds(self.operations, self.gpus, gpu) for gpu in TERAFLOPS}

    @property
    def totals(self) -> dict[str, float]:
        """Bytes of one GPU by phase, all parts."""
        return {name: sum(parts.values()) for name, parts in self.phases.items()}

    @property
    def peak(self) -> str:
        """The phase that needs most."""
        return max(self.totals, key=lambda name: self.totals[name])

    @property
    def parts(self) -> dict[str, float]:
        """What that phase needs it for."""
        return self.phases[self.peak]

    @property
    def needed(self) -> float:
        """Bytes of one GPU, in that phase."""
        return self.totals[self.peak]

    @property
    def fits(self) -> bool:
        """Whether a GPU holds it."""
        return self.needed <= self.memory

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = {"peak": self.peak, "parts": self.parts, "needed": self.needed, "fits": self.fits}
        found["seconds_a_step"] = self.seconds
        return {**dataclasses.asdict(self), **found}

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.recipe} on {self.gpus} x {self.memory / GB:.0f} GB, {self.tokens:,} tokens a clip"
        yield f"most is needed in: {self.peak}"
        for name, size in self.parts.items():
            yield f"  {name:<34}{size / GIB:8.1f} GiB"
        verdict = "fits" if self.fits else "does not fit"
        yield f"  {'together':<34}{self.needed / GIB:8.1f} GiB of {self.memory / GIB:.1f}: it {verdict}"
        yield "phases"
        for name, size in self.totals.items():
            yield f"  {name:<34}{size / GIB:8.1f} GiB"
        if self.whole and self.gpus > 1:
            yield f"weights     whole on every GPU, for {self.whole}: more GPUs do not divide them"
        if self.context > 1:
            yield (
                f"context     {self.context} ranks share a clip, {-(-self.tokens // self.context):,} tokens each; a "
                f"step sends about {self.exchanged / GIB:.0f} GiB from each to the others by all-to-all, "
                f"{self.exchanged / LINK:.1f} s at {LINK / GB:.0f} GB/s (NVLink)"
            )
        if self.operations is not None:
            each = ", ".join(f"{gpu} {seconds:.2g} s" for gpu, seconds in self.seconds.items())
            mantissa, _, exponent = f"{self.operations:.1e}".partition("e")
            yield (
                f"time        {mantissa} x 10^{int(exponent)} operations a step of {self.clips} clips; by arithmetic, "
                f"at {UTILISATION:.0%} of a GPU's bfloat16 rate: {each}"
            )
        yield f"disk        {self.checkpoint / GIB:.1f} GiB a checkpoint, {self.disk / GIB:.1f} for those that are kept"
        yield f"host        {self.host / GIB:.1f} GiB of memory on each machine"
        if not self.fits:
            yield "what makes it fit:" if self.remedies else "no single change makes it fit"
        for remedy in self.remedies:
            yield f"  {remedy.change:<48}{remedy.needed / GIB:8.1f} GiB   {remedy.cost}"
        if self.together is not None:
            fits = self.together.needed <= self.memory
            yield "what makes it fit together:" if fits else "nor do several together; the least that was found:"
            yield f"  {self.together.change}"
            yield f"  {'':<48}{self.together.needed / GIB:8.1f} GiB   {self.together.cost}"


def plan(
    recipe: Recipe,
    *,
    gpus: int | None = None,
    gpu_memory: float = 80.0,
    remedies: bool = True,
    on_try: Callable[[str], Any] = str,
) -> Need:
    """What a recipe needs of each GPU, and the changes that make it fit.

    Args:
        recipe: as it would be trained.
        gpus: ranks, instead of the recipe's own; more than 8 are taken as nodes of 8.
        gpu_memory: of one GPU, in GB as it is sold.
        remedies: whether to try changes where it does not fit.
        on_try: told of each before it is simulated, which takes some seconds.

    Raises:
        UserError: the network's dimensions are not known, or there is nothing to simulate.
    """
    from anyflow.memory.simulate import simulate

    recipe = with_gpus(recipe, gpus) if gpus is not None else recipe
    need = _need(recipe, gpu_memory, simulate)
    if need.fits or not remedies:
        return need

    def trials(recipe: Recipe, need: Need) -> Iterator[Trial]:
        heads = transformer_config_of(recipe)["num_attention_heads"]
        for change, changed, cost in changes(recipe, need.peak, heads):
            on_try(change)
            yield Trial(change, changed, cost, _need(changed, gpu_memory, simulate))

    singly = list(trials(recipe, need))
    fitting = [Remedy(trial.change, trial.need.needed, trial.cost) for trial in singly if trial.need.fits]
    together = None if fitting else _together(need, singly, trials)
    return dataclasses.replace(need, remedies=fitting, together=together)


class Trial(NamedTuple):
    """A change that was simulated: what to write, the changed recipe, its cost, and what it needs."""

    change: str
    recipe: Recipe
    cost: str
    need: Need


def _together(
    need: Need, trials: Iterable[Trial], more_trials: Callable[[Recipe, Need], Iterator[Trial]]
) -> Remedy | None:
    """Changes one after the other, the cheapest that is worth it each time, until it fits or nothing lowers it."""
    taken: dict[str, tuple[str, str]] = {}
    while not need.fits:
        trial = next((trial for trial in trials if trial.need.needed < WORTH_IT * need.needed), None)
        if trial is None:
            break
        kind = re.sub(r"=.*|[0-9]+ ", "", trial.change)
        taken[kind] = trial.change, trial.cost  # GPUs and frames may be taken again: the last stands
        need, trials = trial.need, more_trials(trial.recipe, trial.need)
    written, costs = zip(*taken.values(), strict=True) if taken else ((), ())
    return Remedy(", ".join(written), need.needed, "; ".join(costs)) if taken else None


def _need(recipe: Recipe, gpu_memory: float, simulate: Simulate) -> Need:
    from anyflow.memory.codec import codec_work

    config, latents, own = transformer_config_of(recipe), latent_shape(recipe), recipe.data.shapes[0]
    memory = simulate(recipe, config, latents)
    hardware = recipe.hardware
    on_host = memory.states if hardware.offload else 0.0
    ranks = recipe.world_size if hardware.strategy == "fsdp" else 1
    if hardware.shard_within == "node":
        ranks = hardware.devices
    # trained weights, their average and two optimiser states; a frozen base is not saved
    checkpoint = ranks * (1.5 * memory.optimizer + memory.ema)
    loading = hardware.devices * codec_bytes(recipe)
    held = hardware.devices * (checkpoint / max(ranks, 1) + on_host) + loading
    is_rounded = recipe.model.lora.base != "full"
    merging = original_bytes(recipe, config) if is_rounded else 0.0  # an export reads the originals from files
    return Need(
        recipe=recipe.run.name,
        gpus=recipe.world_size,
        memory=gpu_memory * GB,
        phases=phases_of(recipe, memory, codec_bytes(recipe), codec_work(recipe, memory.rows)),
        tokens=layout_of_recipe(recipe).tokens(*own),
        checkpoint=checkpoint,
        disk=(recipe.checkpoint.keep + 1) * checkpoint,
        host=max(held, merging),
        context=hardware.context,
        exchanged=memory.exchanged,
        operations=step_operations(recipe, config, latents) if hardware.precision != "32-true" else None,
        clips=recipe.global_batch,
        steps=recipe.total_steps,
        whole=recipe.whole_weights if hardware.strategy != "fsdp" else "",
    )


def transformer_config_of(recipe: Recipe) -> dict[str, Any]:
    """Dimensions of the recipe's network: from its folder, or known for the published ones.

    Raises:
        UserError: neither is at hand, or the stage trains no such network.
    """
    model = recipe.model
    if not recipe.declared.turns:
        raise UserError(f"stage {recipe.stage.name} trains {recipe.declared.help}: there is nothing to plan")
    if model.init == "new":
        from anyflow.backbone.embedded import transformer_config

        return {**transformer_config(layout_of_recipe(recipe).channels), **model.network}
    for place in (Path(model.weights) / "model", Path(model.weights)):
        file = place / "transformer" / "config.json"
        if file.is_file():
            return {name: value for name, value in json.loads(file.read_text()).items() if name in _NEEDED}
    size = published(model.weights)
    if size is None and model.name in EMBEDDED:
        from anyflow.backbone.embedded import transformer_config

        return {**transformer_config(), **model.network}
    if size is None:
        raise UserError(
            f"model.weights={model.weights!r}: its dimensions are not known before it is there; give the folder of a "
            "model, or one of the published Wan and AnyFlow models"
        )
    return {**PUBLISHED[size], **{name: value for name, value in model.network.items() if name in _NEEDED}}


EMBEDDED = ("tiny", "tiny-causal")
"""Models whose dimensions are known before their weights are there."""

_NEEDED = {
    *(*PUBLISHED["1.3b"], "eps"),
    *("chunk_partition", "full_chunk_limit", "compressed_patch_size"),
}


def latent_shape(recipe: Recipe) -> tuple[int, int, int, int]:
    """``(F, C, H, W)`` of a clip's latents."""
    return layout_of_recipe(recipe).latents(*recipe.data.shapes[0])


def original_bytes(recipe: Recipe, config: dict[str, Any]) -> float:
    """The network as its files have it, in bfloat16."""
    import torch

    from anyflow.backbone.load import backbone_class

    _, kind = backbone_class(recipe.model.architecture)
    with torch.device("meta"):
        return 2.0 * sum(weight.numel() for weight in kind.from_config(config).parameters())  # type: ignore[attr-defined]


def codec_bytes(recipe: Recipe) -> float:
    """The frozen text encoder and autoencoder on a rank: from the files, or as published."""
    half = recipe.hardware.precision != "32-true"
    name = recipe.model.codec or recipe.model.weights
    place = Path(name)
    files = [file for part in ("vae", "text_encoder") for file in (place / part).glob("*.safetensors")]
    if files:
        return float(sum(file.stat().st_size for file in files))
    if recipe.model.name in EMBEDDED:
        return 20e6
    vae = WAN22_VAE_WEIGHTS if published(name) == "ti2v-5b" else WAN_VAE_WEIGHTS
    return UMT5_XXL_WEIGHTS * (2 if half else 4) + vae * 4


def memory_here() -> float | None:
    """GB of the smallest GPU of this machine, None if there is none; no GPU is touched."""
    try:
        asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
        return min(float(line) for line in done.stdout.split()) * 2**20 / GB
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def warn_in_background(recipe: Recipe) -> None:
    """Simulate beside a starting run, in a process of its own that speaks on stderr if the GPUs are too small."""
    memory = memory_here() if recipe.hardware.accelerator != "cpu" else None
    if memory is None:
        return
    with suppress(OSError):  # a warning may fail: the folder for temporary files may be full
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
            path = Path(file.name)
        save_recipe(recipe, path)
        hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        subprocess.Popen([sys.executable, "-m", "anyflow.memory.need", str(path), str(memory)], env=hidden)


def warning(need: Need) -> str | None:
    """One sentence if a recipe does not fit."""
    if need.fits:
        return None
    return (
        f"warning: this run needs about {need.needed / GIB:.0f} GiB of each GPU ({need.peak}), which has "
        f"{need.memory / GIB:.0f}: it will probably run out of memory; 'anyflow plan' lists what makes it fit"
    )


def _warn(path: Path, memory: float) -> None:
    recipe = load_recipe(str(path))
    path.unlink()
    try:
        sentence = warning(plan(recipe, gpu_memory=memory, remedies=False))
    except UserError:
        return  # a kind of network that cannot be simulated
    if sentence is not None:
        print(sentence, file=sys.stderr)


if __name__ == "__main__":
    _warn(Path(sys.argv[1]), float(sys.argv[2]))

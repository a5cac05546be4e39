"""The phases of a run, and what lies on a GPU in each: the step is not always where the most is needed.

A curve is sampled before training, while no optimiser exists; during training, beside it; and afterwards. Each time
the averaged weights stand in for the trained ones, of which a copy waits. Clips go through the autoencoder then and,
unless they were encoded beforehand, with every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyflow.recipe import Recipe

GIB = 2**30

CODEC, RESERVE = "text encoder and autoencoder", "context, NCCL, fragmentation"
WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients between passes", "optimiser"
AVERAGE, WAITING = "moving average", "trained weights, behind the average"
ACTIVATIONS, CLIPS = "activations, gathered blocks", "clips in the autoencoder"
"""What memory is needed for."""

STEP, ENCODING, READING, EXPORT = "training step", "encoding a batch", "reading prompts", "export"
BEFOREHAND = "encoding beforehand"
MOMENTS = ("before", "during", "after")
SAMPLING, DECODING = ({moment: f"{work} {moment}" for moment in MOMENTS} for work in ("sampling", "decoding"))
"""Names of the phases: the network samples and the autoencoder decodes before, during and after training."""

RESERVE_GIB = 3.0
"""CUDA context, NCCL's buffers and fragmentation of one GPU."""

READING_GIB = 0.12
"""Activations of UMT5-XXL in bfloat16 over one prompt of full length; prompts are read one by one."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, the peak divided among what it is made of.

    Attributes:
        weights: of all networks, this rank's part.
        gradients: those that wait for their update while the next pass runs (none without accumulation).
        optimizer: AdamW's two averages.
        ema: the averaged weights.
        activations: everything else: activations, gathered blocks, gradients on their way.
        sampling: what sampling takes beyond what lies there: activations and gathered blocks.
        student: this rank's part of the weights of the network that is sampled.
        largest: its largest weight, whole.
        rows: clips that are sampled in one pass.
        exchanged: what a step sends to the ranks that share its clips.
    """

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    sampling: float = 0.0
    student: float = 0.0
    largest: float = 0.0
    rows: int = 1
    exchanged: float = 0.0

    @property
    def peak(self) -> float:
        """All of a training step."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations

    @property
    def states(self) -> float:
        """What lies there from step to step; with offloading it lies in host memory."""
        return self.peak - self.activations


@dataclass(frozen=True)
class CodecWork:
    """Bytes that clips take in the autoencoder, its weights not included.

    Attributes:
        batch: encoding a training batch.
        clip: encoding one clip.
        curve: encoding and decoding what one pass of a curve samples, whichever is more.
    """

    batch: float = 0.0
    clip: float = 0.0
    curve: float = 0.0


def phases_of(recipe: Recipe, memory: Memory, codec: float, work: CodecWork) -> dict[str, dict[str, float]]:
    """Bytes of one GPU by phase, and within it by what they are for.

    Args:
        recipe: whose run.
        memory: of its step and its sampling, simulated.
        codec: bytes of text encoder and autoencoder.
        work: of the autoencoder.
    """
    hardware = recipe.hardware
    sharded = hardware.strategy == "fsdp" and recipe.world_size > 1
    reserve = {RESERVE: RESERVE_GIB * GIB if hardware.accelerator != "cpu" else 0.0}
    is_away = hardware.park_codec or recipe.data.precompute
    own, lent = {CODEC: 0.0 if is_away else codec}, {CODEC: codec}
    waiting = {WAITING: memory.ema}
    trained = {
        WEIGHTS: memory.weights,
        GRADIENTS: memory.gradients,
        OPTIMIZER: memory.optimizer,
        AVERAGE: memory.ema,
    }
    # outside of training a whole network lies on the GPU by itself; what is sharded lies there all the time
    alone = {WEIGHTS: memory.weights, AVERAGE: memory.ema} if sharded else {WEIGHTS: memory.student}
    still = {**trained, GRADIENTS: memory.gradients if recipe.world_size > 1 and not sharded else 0.0}
    lying = {"before": alone, "during": still, "after": still if sharded else alone}
    is_merged_here = recipe.model.lora.enabled and recipe.model.lora.base == "full"  # else from files, in host memory
    merged = memory.largest if sharded else memory.student if is_merged_here else 0.0

    phases: dict[str, dict[str, float]] = {STEP: {**trained, ACTIVATIONS: memory.activations, **own}}
    if recipe.data.precompute:
        phases[BEFOREHAND] = {**(alone if sharded else {}), CLIPS: work.clip, **lent}
    else:
        phases[ENCODING] = {**trained, CLIPS: work.batch, **lent}
        phases[READING] = {**trained, CLIPS: READING_GIB * GIB, **lent}
    for moment in MOMENTS if recipe.sampling.prompts else ():
        if moment == "during" and not recipe.sampling.every_steps:
            continue
        there = {**lying[moment], **waiting, **lent}
        phases[SAMPLING[moment]] = {**there, ACTIVATIONS: memory.sampling}
        phases[DECODING[moment]] = {**there, CLIPS: work.curve}
    phases[EXPORT] = {**lying["after"], **waiting, ACTIVATIONS: merged, **own}
    states = (WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE, WAITING)
    if hardware.offload:
        phases = {name: {**parts, **{s: 0.0 for s in states if s in parts}} for name, parts in phases.items()}
    return {name: {**parts, **reserve} for name, parts in phases.items()}

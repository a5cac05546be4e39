"""The schema of a recipe: every field that a person can set, its type, its default, its meaning and its range.

A recipe is model x stage x hardware: three short YAML files whose keys are the fields below, merged in that order,
then dotted overrides (``optimizer.lr=1e-4``). The schema holds types alone and imports nothing heavy. What a field
means is written once, in its ``help``; its range is written once, beside it, and :mod:`anyflow.recipe.check` enforces
both ranges and the rules between fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, get_args

from anyflow.backbone.options import Attention, BaseWeights, LoraOptions, ParallelOptions
from anyflow.flowmap.samplers import SAMPLERS, SamplerKind
from anyflow.stages.declaration import Declaration
from anyflow.stages.options import WHOLE_WEIGHTS, EmaSettings, OptimizerSettings, StageOptions
from anyflow.system.addresses import LOCAL_DATABASE
from anyflow.system.data_ranks import data_rank
from anyflow.system.option import option as _option


@dataclass(frozen=True)
class LoraRecipe(LoraOptions):
    """Which weights a LoRA run trains; without LoRA every weight of the network is trained."""

    enabled: bool = _option(False, "train low-rank adapters on a frozen network; false trains every weight")
    start: str = _option("", "run, or folder of an adapter, that training goes on from; empty: a new one", is_path=True)
    base: BaseWeights = _option(
        "full",
        "how the frozen network is kept: full: as hardware.precision says; int8, nf4: large layers in 8 or 4 bits, "
        "for small cards; an export merges into the original weights",
        choices=get_args(BaseWeights),
    )
    full: list[str] = _option(
        ["released"],
        "names (endings) of modules trained in full beside the adapters; released: what the published runs train, "
        "which is far_patch_embedding of a causal network; empty: none",
    )


@dataclass(frozen=True)
class ControlRecipe:
    """What the network is told of each frame: what an arm, a wheel or keys do."""

    names: list[str] = _option(
        [],
        "controls of the cards (anyflow data show), such as [actions], or [driving.actions, games.actions] where "
        "domains differ; empty: those that model.weights has learnt",
    )
    dropout: float = _option(
        0.1, "share of the samples trained without their controls, on a learned vector in their place", low=0, high=1
    )
    width: int = _option(256, "hidden numbers of the network that embeds them; of a new one", low=1)


@dataclass(frozen=True)
class ModelRecipe:
    """Which network, which weights."""

    name: str = _option("tiny", "name of the model file, for the record")
    weights: str = _option(
        "", "folder or hub id (owner/name) of the network; {model} in it stands for model.name", is_path=True
    )
    codec: str = _option(
        "", "folder or hub id of VAE, text encoder and tokenizer; empty: the same as model.weights", is_path=True
    )
    init: str = _option(
        "weights", "load the network from model.weights, or build a small one new", choices=("weights", "new")
    )
    architecture: str = _option(
        "bidirectional", "attention over all frames, or chunk by chunk", choices=("bidirectional", "causal")
    )
    shift: float = _option(
        5.0, "timestep shift s of sigma' = s sigma / (1 + (s-1) sigma), in training and sampling", above=0
    )
    negative_prompt: str = _option("", "text of the unconditional pass, and of samples whose text is dropped")
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    control: ControlRecipe = field(default_factory=ControlRecipe)
    network: dict[str, Any] = _option(
        {},
        "of a new network: dimensions that differ from the embedded one's; of one that becomes causal: its chunks "
        "(chunk_partition, full_chunk_limit, compressed_patch_size)",
    )


@dataclass(frozen=True)
class DataRecipe:
    """Which clips, in which shape."""

    card: list[str] = _option(
        [],
        "dataset cards: names in data/, paths, or addresses (s3://..., https://...); "
        "or WebDataset tars as they are: a path, a pattern (set/{000..099}.tar), several with :: between, a folder",
        is_path=True,
    )
    weights: list[float] = _option(
        [], "share of each card among the clips that are seen; empty: by their size", above=0
    )
    split: str = _option("train", "split that is trained on")
    heldout: str = _option("heldout", "split that prompts and the quality curve come from; never trained on")
    frames: int = _option(17, "frames of a clip (4n+1, as the VAE takes them)", low=1)
    height: int = _option(64, "pixel rows (multiple of 16; of 32 for Wan 2.2)", low=16)
    width: int = _option(96, "pixel columns (multiple of 16; of 32 for Wan 2.2)", low=16)
    buckets: list[str] = _option(
        [],
        "further shapes, as frames x height x width ([81x832x480, 49x480x832]): a clip comes in the one that crops it "
        "least; a batch is of one, with as many clips as fit into the tokens of batch_size clips of the shape above",
    )
    fps: float = _option(0.0, "frames a second that clips are brought to; 0: every clip's own", low=0)
    global_batch: int = _option(
        0,
        "clips of one optimiser step over all ranks, fitted by batch_size and accumulate; 0: whatever those two give",
        low=0,
    )
    batch_size: int = _option(8, "clips of one rank and pass, at most", low=1)
    num_workers: int = _option(1, "decoding processes of a rank", low=0)
    error_budget: float = _option(
        0.01, "share of bad clips that stops the run; fewer are skipped and named", low=0, high=1
    )
    streaming: bool = _option(
        False, "read tars as they come, in WebDataset's own pipeline, without the index that is made of them otherwise"
    )
    shuffle_buffer: int = _option(100, "clips that each worker shuffles together while data.streaming=true", low=1)
    precompute: bool = _option(
        False, "train on latents and texts encoded beforehand (anyflow data encode), without VAE and text encoder"
    )

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(frames, height, width) that clips come in: the run's own, which is sampled, and those of ``buckets``."""
        further = [tuple(int(side) for side in bucket.split("x")) for bucket in self.buckets]
        return [(self.frames, self.height, self.width), *further]  # type: ignore[list-item]


@dataclass(frozen=True)
class SamplingRecipe:
    """What is sampled before, during and after training: the same prompts and noise every time."""

    steps: list[int] = _option([1, 2, 4, 8, 16, 32], "step counts that each prompt is sampled at", low=1, high=1000)
    prompts: int = _option(4, "number of prompts, taken from the held-out split", low=0)
    seed: int = _option(0, "seed of the prompts' noise", low=0)
    given_frames: int = _option(
        0,
        "latent frames given from each prompt's own clip: 0 text-to-video, 1 image-to-video, more: video",
        low=0,
    )
    guidance_scale: float = _option(
        0.0,
        "classifier-free guidance of samples where the weights have none (stage teacher, plain Wan): two network calls "
        "a step; 1: none; 0: as much as stage.guidance_scale",
        low=0,
    )
    control_guidance_scale: float = _option(
        1.0,
        "guidance of samples by their controls, away from none known: a further network call a step; 1: none",
        low=1,
    )
    every_steps: int = _option(0, "training steps between samplings; 0: only before and after", low=0)
    encoders: list[str] = _option(
        [],
        "further judges: controls (a probe of the data set's own reads them back from samples); further distances, by "
        "the features of: probe (the data set's own, which judges its labels too), "
        "efficientnet-lite (frames), a file of I3D weights (FVD), or a local folder of a transformers video encoder",
        is_path=True,
    )


@dataclass(frozen=True)
class CheckpointRecipe:
    """When the run saves itself."""

    every_steps: int = _option(100, "training steps between checkpoints", low=1)
    keep: int = _option(2, "newest checkpoints that are kept", low=1)
    background: bool = _option(
        False, "write while training goes on, from a copy in host memory; false: training waits for the disk"
    )


@dataclass(frozen=True)
class HardwareRecipe(ParallelOptions):
    """On what it runs, and how it is made to fit."""

    name: str = _option("local", "name of the hardware file, for the record")
    accelerator: str = _option("auto", "kind of device; auto: a GPU if there is one", choices=("auto", "cpu", "gpu"))
    devices: int = _option(1, "devices of a node", low=1)
    num_nodes: int = _option(1, "machines that the run spans", low=1)
    precision: str = _option(
        "32-true",
        "arithmetic of the network (times and losses stay in float32); bf16-true also keeps the frozen base under "
        "adapters in bfloat16",
        choices=("32-true", "bf16-mixed", "bf16-true"),
    )
    strategy: str = _option(
        "auto",
        "one device or copies (auto, ddp), or weights spread over the ranks (fsdp)",
        choices=("auto", "ddp", "fsdp"),
    )
    accumulate: int = _option(
        1, "passes whose gradients make one optimiser step; set by itself from data.global_batch", low=1
    )
    threads: int = _option(0, "CPU threads of a rank; 0: all of its cores", low=0)
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward pass: less memory, slower")
    keep_attention: bool = _option(
        False, "keep attention's results where gradient_checkpointing recomputes the rest: faster, more memory"
    )
    recompute_jumps: bool = _option(
        False, "on-policy: keep one jump's activations of a rollout instead of three jumps': a tenth more time a step"
    )
    attention: Attention = _option(
        "auto",
        "attention kernel that a GPU tries first; auto: the fastest that anyflow doctor found here, before it torch's "
        "choice, cuDNN on Hopper; flash3, flash4: packages; flex: chunks of a causal network under a compiled mask",
        choices=get_args(Attention),
    )
    park_codec: bool = _option(
        False, "text encoder and autoencoder in host memory between batches: 11 GiB less for Wan, seconds more a batch"
    )
    shard_within: str = _option(
        "all", "fsdp: spread weights over all ranks, or within a node and repeat them (hsdp)", choices=("all", "node")
    )


@dataclass(frozen=True)
class RunRecipe:
    """Where it is recorded."""

    recipe: str = _option("", "stage file that the recipe was made from; set by itself")
    name: str = _option("", "name of the run and of its folder; empty: made of recipe and model")
    seed: int = _option(0, "seed of every draw", low=0, high=2**31 - 1)
    deterministic: bool = _option(
        False,
        "GPUs: kernels that give the same bits every time: a resumed run is then bitwise the uninterrupted one",
    )
    out: str = _option("runs", "folder that run folders are made in", is_path=True)
    tracking_uri: str = _option(
        LOCAL_DATABASE,
        "MLflow's database on this machine; `anyflow sync` sends it to a server",
        is_path=True,
    )
    experiment: str = _option("", "experiment that the run belongs to; in MLflow it stands below that experiment's run")


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, as the launcher takes it; ``sources`` says which layer set a dotted key (absent: the default)."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    stage: StageOptions = field(default_factory=StageOptions)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    data: DataRecipe = field(default_factory=DataRecipe)
    sampling: SamplingRecipe = field(default_factory=SamplingRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    hardware: HardwareRecipe = field(default_factory=HardwareRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)
    sources: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def declared(self) -> Declaration:
        """What the stage says of itself."""
        return self.stage.declared

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, an on-policy tail and its teacher included."""
        tail = self.stage.tail
        return self.stage.steps + (tail.steps + tail.teacher_steps if self.has_tail else 0)

    @property
    def has_tail(self) -> bool:
        """Whether an on-policy tail follows the fine-tuning."""
        return self.declared.trains_teacher

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained beside the student."""
        return self.declared.has_critic

    @property
    def has_teacher(self) -> bool:
        """Whether a second network teaches."""
        return self.declared.has_teacher

    @property
    def sampler(self) -> SamplerKind:
        """How what the stage trains is sampled: see :data:`anyflow.flowmap.samplers.SAMPLERS`."""
        return self.declared.sampler

    @property
    def fuses_guidance(self) -> bool:
        """Whether what the stage trains has guidance in its weights."""
        return SAMPLERS[self.sampler].fuses_guidance

    @property
    def teacher_guidance(self) -> float:
        """The scale that a network without guidance in its weights is sampled at."""
        return self.sampling.guidance_scale or self.stage.guidance_scale

    @property
    def sampled_guidance(self) -> float:
        """The scale that what the stage trains is sampled at: 1 unless it is plain flow matching."""
        return 1.0 if self.fuses_guidance else self.teacher_guidance

    @property
    def whole_weights(self) -> str:
        """The field that needs each weight whole on every rank, with its value; empty: none does."""
        if self.model.lora.base != "full":  # codes of 64 weights in a row, which FSDP2 would cut
            return f"model.lora.base={self.model.lora.base}"
        used = {"optimizer.name": self.optimizer}
        used |= {"stage.onpolicy.critic.name": self.stage.onpolicy.critic} if self.has_critic else {}
        used |= {"stage.tail.optimizer.name": self.stage.tail.optimizer} if self.has_tail else {}
        return next((f"{key}={item.name}" for key, item in used.items() if item.name in WHOLE_WEIGHTS), "")

    @property
    def on_full_base(self) -> Recipe:
        """The same on the base as it is stored, for who trains nothing: to export, or to look at what will be built."""
        lora = replace(self.model.lora, base="full")
        return replace(self, model=replace(self.model, lora=lora))

    @property
    def world_size(self) -> int:
        """Ranks: devices of a node x nodes."""
        return self.hardware.devices * self.hardware.num_nodes

    @property
    def data_ranks(self) -> int:
        """Ranks that clips are dealt out to: those that share a clip (``hardware.context``) count as one."""
        return data_rank(0, self.world_size, self.hardware.context)[1]

    @property
    def global_batch(self) -> int:
        """Clips of one optimiser step over all ranks."""
        return self.data.batch_size * self.data_ranks * self.hardware.accumulate


GROUPS: dict[str, type] = {
    "model": ModelRecipe,
    "stage": StageOptions,
    "optimizer": OptimizerSettings,
    "ema": EmaSettings,
    "data": DataRecipe,
    "sampling": SamplingRecipe,
    "checkpoint": CheckpointRecipe,
    "hardware": HardwareRecipe,
    "run": RunRecipe,
}
"""The top-level keys of a recipe file, in the order that they are shown."""

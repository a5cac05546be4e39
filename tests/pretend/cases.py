"""The runs that are watched: every stage, LoRA and full, chunk by chunk and not, and what the hardware files choose."""

from __future__ import annotations

from pathlib import Path

from anyflow.recipe import Recipe, load_recipe

SHORT = (
    "hardware.accelerator=gpu",
    "hardware.devices=1",
    "hardware.precision=bf16-mixed",
    "stage.steps=2",
    "data.frames=5",
    "data.height=32",
    "data.width=32",
    "data.global_batch=4",
    "data.batch_size=4",
    "data.num_workers=0",
    "data.precompute=false",
    "optimizer.warmup_steps=0",
    "ema.decay=0.5",
    "ema.start_step=0",
    "sampling.prompts=2",
    "sampling.steps=[1,2]",
    "sampling.every_steps=1",
    "stage.onpolicy.budgets=[4]",
    "run.tracking_uri=",
)
TINY = ("model.weights=data/models/tiny", "stage.onpolicy.teacher=data/models/tiny")
LORA = ("model.lora.enabled=true", "model.lora.rank=4", "model.lora.alpha=4", "stage.onpolicy.teacher=")
TAIL = ("stage.steps=1", "stage.tail.teacher_steps=1", "stage.tail.steps=1")
CAUSAL = (
    "model.architecture=causal",
    "model.weights=data/models/tiny-causal",
    "data.frames=17",
    "stage.long_context=1.0",
    "stage.bidirectional_prob=1.0",
)
GIVEN = ("stage.i2v_prob=1.0", "sampling.given_frames=1")
CHECKPOINTED = ("hardware.gradient_checkpointing=true", "hardware.keep_attention=true")
CODEC = ("model.weights=", "data.frames=9", "stage.codec.crop_width=32")

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "finetune": ("finetune/driving", ()),
    "on-policy, LoRA": ("onpolicy/tiny", (*LORA, *CHECKPOINTED, "hardware.recompute_jumps=true")),
    "teacher": ("teacher/tiny", ("model.init=weights", "model.codec=")),
    "forward": ("forward/tiny", ()),
    "forward, LoRA": ("forward/tiny", (*LORA, *CHECKPOINTED)),
    "forward, int8": ("forward/tiny", (*LORA, *CHECKPOINTED, "model.lora.base=int8")),
    "forward, guided tangent": ("forward/tiny", ("stage.guided_tangent=true",)),
    "forward, jvp": ("forward/tiny", ("stage.derivative=jvp",)),
    "forward, first frame given": ("forward/tiny", GIVEN),
    "finetune, LoRA": ("finetune/driving", (*LORA, "checkpoint.every_steps=1", "checkpoint.background=true")),
    "tail": ("finetune/driving", TAIL),
    "tail, LoRA": ("finetune/driving", (*TAIL, *LORA)),
    "on-policy": ("onpolicy/tiny", ()),
    "on-policy, first frame given": ("onpolicy/tiny", (*LORA, *GIVEN)),
    "consistency": ("consistency/tiny", ()),
    "dmd": ("dmd/tiny", ()),
    "codec": ("codec/tiny", CODEC),
    "causal, forward": ("forward/tiny-causal", CAUSAL),
    "causal, finetune, LoRA": ("finetune/driving-i2v", (*CAUSAL, *LORA, *CHECKPOINTED)),
    "causal, on-policy, LoRA": ("onpolicy/tiny", (*CAUSAL, *LORA)),
    "encoded beforehand": ("finetune/driving", ("data.precompute=true",)),
    "parked codec": ("finetune/driving", ("hardware.park_codec=true",)),
    "accumulated": ("finetune/driving", ("hardware.accumulate=2", "data.batch_size=2")),
    "accumulated, on-policy": ("onpolicy/tiny", (*LORA, "hardware.accumulate=2", "data.batch_size=2")),
    "float32": ("finetune/driving", ("hardware.precision=32-true",)),
}
QUICK = ("finetune", "on-policy, LoRA")


def recipe_of(case: str, card: Path, *more: str) -> Recipe:
    """The recipe of a case."""
    stage, options = CASES[case]
    return load_recipe(stage, overrides=[*SHORT, *TINY, f"data.card={card}", *options, *more])

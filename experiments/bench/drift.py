"""How far a network moves when its base is kept in 8 or 4 bits, or computes in bfloat16, before any training."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, get_args

import torch

from anyflow.backbone.conditions import Conditions
from anyflow.backbone.load import load_backbone
from anyflow.backbone.options import BaseWeights
from anyflow.backbone.quantized import check_quantizer, quantize_base
from anyflow.doctor.derivative import Question, difference, shipped_clips
from anyflow.flowmap.schedule import interpolate

STEPS, SHIFT = 4, 3.0


@torch.no_grad()
def drift_benchmark(model: str = "data/models/tiny", clips: int = 8) -> dict[str, Any]:
    """Answers of a bidirectional network in each way beside its own in float32, on held-out driving clips.

    Returns:
        {"model", "clips", "ways"}: ``ways`` has for each way the root mean square of what changed over that of what
        was: of the ``velocity``, of the finite difference that jumps are learnt by (``derivative``), of a ``sample``.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    question = shipped_clips(clips)
    own = _answers(model, "full", False, question)
    ways: dict[str, dict[str, float]] = {}
    for base in get_args(BaseWeights):
        check_quantizer(base)
        for narrow in (False, True):
            if base == "full" and not narrow:
                continue
            found = _answers(model, base, narrow, question)
            way = base + ", computed in bfloat16" * narrow
            ways[way] = {name: _relative(found[name], answer) for name, answer in own.items()}
    return {"model": model, "clips": clips, "ways": ways}


def _answers(model: str, base: BaseWeights, narrow: bool, question: Question) -> dict[str, torch.Tensor]:
    network = load_backbone(model, leave_stored=base != "full").eval()
    if base != "full":
        quantize_base(network, base, torch.device("cpu"))
    conditions = Conditions(question.text)
    with torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext():
        noisy = interpolate(question.clean, question.noise, question.t)
        return {
            "velocity": network(noisy, question.t, question.r, conditions).float(),
            "derivative": difference(network, question),
            "sample": network.sample(conditions, question.noise, STEPS, SHIFT).float(),
        }


def _relative(found: torch.Tensor, own: torch.Tensor) -> float:
    return float((found - own).square().mean().sqrt() / own.square().mean().sqrt())


def told(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    lines = [f"drift of {result['model']} from itself in float32, {result['clips']} clips:"]
    for way, figures in result["ways"].items():
        lines.append(f"  {way:<28}" + ", ".join(f"{name} {100 * share:.1f} %" for name, share in figures.items()))
    return lines

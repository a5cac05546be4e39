"""diffusers' causal AnyFlow pipeline, its attention corrected, for a model that is told controls.

This file goes with such an export as ``pipeline.py``; it needs diffusers and torch, and the two files beside it::

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    video = pipe("...", controls=array)
"""

from __future__ import annotations

from typing import Any

from diffusers import AnyFlowFARPipeline

from .control_embedding import ToldControls, steer  # noqa: TID252 - the files go together, out of this package
from .far_pipeline import WholeTokens, correct_attention  # noqa: TID252

# diffusers runs the file of every export in one module, and wants one pipeline in it: another export's may be there
for _name in ("ExactFARPipeline", "ExactPipeline"):
    globals().pop(_name, None)


class ToldPipeline(ToldControls, WholeTokens, AnyFlowFARPipeline):
    """``AnyFlowFARPipeline`` with right attention, whose call takes ``controls=``."""

    def __init__(self, tokenizer: Any, text_encoder: Any, transformer: Any, vae: Any, scheduler: Any) -> None:
        steer(transformer)
        super().__init__(tokenizer, text_encoder, correct_attention(transformer), vae, scheduler)

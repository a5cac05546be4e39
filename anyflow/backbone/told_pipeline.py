"""diffusers' AnyFlow pipeline for a model that is told controls. Needs diffusers and torch alone.

This file goes with such an export as ``pipeline.py``::

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    video = pipe("...", controls=array)
"""

from __future__ import annotations

from typing import Any

from diffusers import AnyFlowPipeline

from .control_embedding import ToldControls, steer  # noqa: TID252 - the two files go together, out of this package

# diffusers runs the file of every export in one module, and wants one pipeline in it: another export's may be there
globals().pop("ExactFARPipeline", None)


class ToldPipeline(ToldControls, AnyFlowPipeline):
    """``AnyFlowPipeline`` whose call takes ``controls=``."""

    def __init__(self, tokenizer: Any, text_encoder: Any, transformer: Any, vae: Any, scheduler: Any) -> None:
        steer(transformer)
        super().__init__(tokenizer, text_encoder, transformer, vae, scheduler)

"""diffusers' AnyFlow pipeline for a model that is told controls. Needs diffusers and torch alone.

This file goes with such an export as ``pipeline.py``::

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    video = pipe("...", controls=array)
"""

from __future__ import annotations

from typing import Any

from diffusers import AnyFlowPipeline

from .control_embedding import ToldControls, steer  # noqa: TID252 - the files go together, out of this package
from .exact_pipeline import WholeTokens, hold_given  # noqa: TID252

# diffusers runs the file of every export in one module, and wants one pipeline in it: another export's may be there
for _name in ("ExactFARPipeline", "ExactPipeline"):
    globals().pop(_name, None)


class ToldPipeline(ToldControls, WholeTokens, AnyFlowPipeline):
    """``AnyFlowPipeline`` whose call takes ``controls=``, and whose given frames stay at time 0."""

    def __init__(self, tokenizer: Any, text_encoder: Any, transformer: Any, vae: Any, scheduler: Any) -> None:
        steer(transformer)
        super().__init__(tokenizer, text_encoder, hold_given(transformer), vae, scheduler)

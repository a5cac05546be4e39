"""diffusers' AnyFlow pipeline, right where first frames are given and where tokens are large (Wan 2.2's TI2V-5B).

This file goes with such exports, as ``pipeline.py`` or beside it; it needs diffusers and torch alone::

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    video = pipe("...", video=frames)

diffusers' own ``AnyFlowPipeline`` asks about given frames from time 0 to the time that the others go to, which no
network was trained on. And it lets all sides pass that are multiples of 16, where a token may cover 32, and then fails
within.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnyFlowPipeline


class WholeTokens:
    """Mixed into a pipeline: sides that are no whole tokens are refused at once."""

    transformer: Any
    vae_scale_factor_spatial: int

    def check_inputs(self, prompt: Any, negative_prompt: Any, height: int, width: int, *rest: Any, **more: Any) -> None:
        """As the stock one.

        Raises:
            ValueError: a side is no multiple of a token's.
        """
        multiple = self.vae_scale_factor_spatial * self.transformer.config.patch_size[1]
        if height % multiple or width % multiple:
            raise ValueError(f"height={height} and width={width}: both must be multiples of {multiple}")
        super().check_inputs(prompt, negative_prompt, height, width, *rest, **more)  # type: ignore[misc]


def hold_given(transformer: Any) -> Any:
    """Let given frames, which are at time 0, stay there in every step; returns the transformer."""

    def hold(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if named.get("r_timestep") is not None:  # no step goes to a later time than it comes from
            named["r_timestep"] = torch.minimum(named["r_timestep"], named["timestep"])
        return arguments, named

    transformer.register_forward_pre_hook(hold, with_kwargs=True)
    return transformer


# diffusers runs the file of every export in one module, and wants one pipeline in it: another export's may be there
for _name in ("ExactFARPipeline", "ToldPipeline"):
    globals().pop(_name, None)


class ExactPipeline(WholeTokens, AnyFlowPipeline):
    """``AnyFlowPipeline`` whose given frames stay at time 0, and whose sides are whole tokens."""

    def __init__(self, tokenizer: Any, text_encoder: Any, transformer: Any, vae: Any, scheduler: Any) -> None:
        super().__init__(tokenizer, text_encoder, hold_given(transformer), vae, scheduler)

"""diffusers' causal AnyFlow pipeline with right cached attention. Needs diffusers and torch alone.

This file goes with every exported causal model, as ``pipeline.py``. diffusers' own ``AnyFlowCausalAttnProcessor`` pads
keys with zeros to a multiple of 128 and, where no mask excludes them, attends to the padding, so every chunk of a video
comes out slightly wrong. With this file it does not::

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)

or, for a pipeline loaded otherwise, ``correct_attention(pipe.transformer)``. The whole story is in anyflow's
docs/far-attention-padding.md.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnyFlowFARPipeline
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowCausalAttnProcessor
from torch.nn.attention.flex_attention import create_block_mask


class ExactFARAttnProcessor(AnyFlowCausalAttnProcessor):
    """The stock processor with its padding masked out."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: Any = None,
        rotary_emb: Any = None,
        kv_cache: Any = None,
        kv_cache_flag: Any = None,
    ) -> torch.Tensor:
        if attention_mask is None:
            queries = hidden_states.shape[1]
            keys = queries if encoder_hidden_states is None else encoder_hidden_states.shape[1]
            padding = -queries % 128  # what the stock processor adds to queries and keys alike
            if kv_cache is not None and not kv_cache_flag["is_cache_step"]:
                keys += kv_cache_flag["num_cached_compressed_tokens"] + kv_cache_flag["num_cached_full_tokens"]
            attention_mask = create_block_mask(
                lambda _b, _h, _q, key: key < keys,
                B=None,
                H=None,
                Q_LEN=queries + padding,
                KV_LEN=keys + padding,
                device=str(hidden_states.device),
            )
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, kv_cache, kv_cache_flag
        )


def correct_attention(transformer: Any) -> Any:
    """Put :class:`ExactFARAttnProcessor` on every block of an ``AnyFlowFARTransformer3DModel``; returns it."""
    for block in transformer.blocks:
        block.attn1.set_processor(ExactFARAttnProcessor())
    return transformer


class WholeTokens:
    """Mixed into a pipeline: sides that are no whole tokens are refused at once, and not within the network."""

    transformer: Any
    vae_scale_factor_spatial: int

    def check_inputs(self, prompt: Any, negative_prompt: Any, height: int, width: int, *rest: Any, **more: Any) -> None:
        """As the stock one, which lets all multiples of 16 pass where a token may cover 32.

        Raises:
            ValueError: a side is no multiple of a token's.
        """
        multiple = self.vae_scale_factor_spatial * self.transformer.config.patch_size[1]
        if height % multiple or width % multiple:
            raise ValueError(f"height={height} and width={width}: both must be multiples of {multiple}")
        super().check_inputs(prompt, negative_prompt, height, width, *rest, **more)  # type: ignore[misc]


# diffusers runs the file of every export in one module, and wants one pipeline in it: another export's may be there
for _name in ("ToldPipeline", "ExactPipeline"):
    globals().pop(_name, None)


class ExactFARPipeline(WholeTokens, AnyFlowFARPipeline):
    """``AnyFlowFARPipeline`` whose transformer has its attention corrected, and whose sides are whole tokens."""

    def __init__(self, tokenizer: Any, text_encoder: Any, transformer: Any, vae: Any, scheduler: Any) -> None:
        super().__init__(tokenizer, text_encoder, correct_attention(transformer), vae, scheduler)

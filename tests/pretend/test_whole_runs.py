"""Whole runs on a pretended GPU: measured before, trained, sampled in between, measured after, exported.

They fail where tensors of two devices meet, where network, autoencoder or text encoder work off the device, where a
phase computes in another precision than the recipe's, and where a step waits for the device at a place that is not
listed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import CASES, QUICK, recipe_of
from findings import Findings
from offloaded import offloaded
from watching import AFTER, START, STEP, devices, precisions, train_on_gpu, waits

from anyflow.backbone.codec import codec_dtypes

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
Runs = Callable[[str], Findings]
WORKERS = ("network", "vae", "text encoder")


def cases() -> pytest.MarkDecorator:
    """All cases, all but the quick ones slow; all tests of a case come one after the other."""
    marked = [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
    return pytest.mark.parametrize("case", marked, scope="module")


@pytest.fixture(scope="module")
def runs(card: Path, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What was found in a case's run; each runs once."""

    @cache
    def run(case: str) -> Findings:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(project)
            return train_on_gpu(recipe_of(case, card), tmp_path_factory.mktemp("runs") / "run")

    return run


@cases()
def test_no_operation_mixes_devices(case: str, runs: Runs) -> None:
    assert not runs(case).mismatches


@cases()
def test_work_is_on_the_device_before_and_during_training(case: str, runs: Runs) -> None:
    found = devices(runs(case))
    off = {key: where for key, where in found.items() if key[1] in WORKERS and key[0] != AFTER and "cpu" in where}
    assert not off
    assert found[STEP, "other"] == {"cuda"}, "the backward pass, and the optimiser's products"
    if case != "codec":
        assert {("before", "network"), ("sampling", "network"), (STEP, "network")} <= found.keys()


@cases()
def test_the_curve_after_training_is_made_on_the_device(case: str, runs: Runs) -> None:
    found = devices(runs(case))
    assert found[AFTER, "vae" if case == "codec" else "network"]
    assert not {key: where for key, where in found.items() if key[1] in WORKERS and key[0] == AFTER and "cpu" in where}


@cases()
def test_every_phase_computes_in_the_recipes_precision(case: str, card: Path, runs: Runs) -> None:
    """The network in the recipe's; the codec in its own, so that training sees what ``anyflow data encode`` makes."""
    precision = recipe_of(case, card).hardware.precision
    vae, text = codec_dtypes(precision)
    expected = {
        "network": torch.float32 if precision == "32-true" else torch.bfloat16,
        "vae": vae,
        "text encoder": text,
    }
    found = {key: dtype for key, dtype in precisions(runs(case)).items() if key[1] in WORKERS}
    if case == "codec":
        assert found.pop((STEP, "vae")) == "bfloat16", "where it is trained, it is the network"
    assert found == {(phase, who): str(expected[who]).removeprefix("torch.") for phase, who in found}


# How often a step waits for the device, by function, at most. A GPU is kept busy ahead of the host; every wait lets it
# run dry. Whoever adds one here says why it must be.

STEP_WAITS = {
    "training/callbacks/progress.py on_train_batch_end": 1,  # where a line is printed, not at every step
    "lightning/fabric/utilities/apply_func.py to_item": 2,  # figures that are logged
    "stages/base.py clip_norm": 1,  # a gradient that is not finite ends the run at once
}
TEXT_WAITS = {"backbone/codec.py _embed": 10}  # two a new caption, of 4 clips and the negative prompt
FLOW_WAITS = {**STEP_WAITS, **TEXT_WAITS}
TEACHER_WAITS = {**FLOW_WAITS, "backbone/conditions.py select": 1}
OBJECTIVE_WAITS = {"flowmap/objective.py flow_map_loss": 2, "backbone/conditions.py select": 3}
FORWARD_WAITS = {**FLOW_WAITS, **OBJECTIVE_WAITS}
ROLLOUT_WAITS = {"backbone/conditions.py select": 6, "stages/onpolicy.py watch": 1}
ONPOLICY_WAITS = {**FORWARD_WAITS, **ROLLOUT_WAITS}
DMD_WAITS = {**STEP_WAITS, **TEXT_WAITS, **ROLLOUT_WAITS, "flowmap/endpoint.py __call__": 4}
CODEC_WAITS = {**STEP_WAITS, "stages/codec.py crop": 8}
CAUSAL_WAITS = {"flowmap/objective.py flow_map_loss": 4, "backbone/conditions.py select": 4}


def allowed(case: str) -> dict[str, int]:
    """The waits of a case's step."""
    kinds = {"teacher": TEACHER_WAITS, "dmd": DMD_WAITS, "codec": CODEC_WAITS}
    is_onpolicy = "on-policy" in case or case.startswith("tail")
    found = kinds.get(case, ONPOLICY_WAITS if is_onpolicy else FORWARD_WAITS)
    if case.startswith("causal"):
        found = {**found, **CAUSAL_WAITS} | ({"backbone/conditions.py select": 8} if is_onpolicy else {})
    return found


@cases()
def test_a_step_waits_for_the_device_where_it_is_listed_and_nowhere_else(case: str, runs: Runs) -> None:
    more = waits(runs(case)) - Counter(allowed(case))
    places = sorted(place for phase, syncs in runs(case).syncs.items() if phase.startswith(STEP) for place in syncs)
    assert not more, "\n".join(places)


# Weights in host memory -----------------------------------------------------------------------------------------------

OFFLOAD = (
    "hardware.strategy=fsdp",
    "hardware.offload=true",
    "hardware.precision=32-true",
    "optimizer.name=adamw",
    "hardware.gradient_checkpointing=false",
)


@pytest.fixture(scope="module")
def offloaded_run(card: Path, project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, list[str]]:
    """On-policy training of three networks with their weights in host memory: findings, and where each is then."""
    with pytest.MonkeyPatch.context() as patch, offloaded() as places:
        patch.chdir(project)
        recipe = recipe_of("on-policy", card, *OFFLOAD)
        findings = train_on_gpu(recipe, tmp_path_factory.mktemp("runs") / "run")
        return findings, places


@pytest.mark.slow
def test_offloaded_weights_stay_in_host_memory(offloaded_run: tuple[Findings, list[str]]) -> None:
    assert offloaded_run[1] == ["cpu"] * 3, "student, critic, teacher"


@pytest.mark.slow
def test_offloaded_weights_compute_on_the_device(offloaded_run: tuple[Findings, list[str]]) -> None:
    findings, _ = offloaded_run
    assert not findings.mismatches
    assert not {key: where for key, where in devices(findings).items() if key[1] in WORKERS and "cpu" in where}


@pytest.mark.slow
def test_offloaded_weights_are_trained_on_the_device(offloaded_run: tuple[Findings, list[str]]) -> None:
    found = devices(offloaded_run[0])
    assert {where for (phase, _), places in found.items() if phase in (START, STEP) for where in places} == {"cuda"}

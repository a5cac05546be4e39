"""Wrong lines put back on purpose: for each, a test fails that is there to see it.

A mutant is one text replaced in a copy of the package, and the tests that must notice. That every text is still there
is checked quickly; that it is noticed takes a process each, and is slow.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Mutant:
    """What is wrong, where, and who sees it.

    Attributes:
        name: in words.
        file: under ``anyflow/``.
        old, new: the right text, which is there once, and the wrong one.
        seen_by: tests, as pytest takes them.
    """

    name: str
    file: str
    old: str
    new: str
    seen_by: str


WIRING, PASSES = "tests/wiring/test_wiring.py", "tests/stages/test_passes.py"
CONTROLS = "tests/wiring/test_control_wiring.py"
ONPOLICY, FORWARD, BASE = "stages/onpolicy.py", "stages/forward.py", "stages/base.py"
UPDATE, BATCH = "stages/update.py", "stages/batch.py"
EXPORTED = f"{WIRING}::test_the_exported_model_is_the_average"
SPLIT = f"{PASSES}::test_a_split_step_is_the_step_in_one_pass"

MUTANTS = [
    Mutant(
        "the critic learns the data",
        ONPOLICY,
        "            samples = self.rollouts.sample(data, self.rollouts.draw())",
        "            samples = data.clean",
        f"{WIRING}::test_the_critic_learns_the_students_samples",
    ),
    Mutant(
        "an adapter is exported without its average",
        "training/finish.py",
        "    with averaged(parts) if weights is None else nullcontext():",
        "    with nullcontext():",
        EXPORTED,
    ),
    Mutant(
        "the average is never applied",
        "stages/ema.py",
        "        self._assign(self.shadows)\n        try:",
        "        try:",
        EXPORTED,
    ),
    Mutant(
        "matching at unshifted times",
        ONPOLICY,
        'matching_timestep(update.draw_own("matching", samples), self.shift)',
        'matching_timestep(update.draw_own("matching", samples), 1.0)',
        f"{WIRING}::test_matching_is_at_uniform_times_of_the_models_shift",
    ),
    Mutant(
        "the model's shift does not reach the objective",
        "stages/parts.py",
        "self.options, shift=self.shift)",
        "self.options)",
        f"{WIRING}::test_intervals_have_the_models_shift",
    ),
    Mutant(
        "intervals of a fixed shift",
        FORWARD,
        "draw_intervals(uniforms, shares, shift, step=update.position)",
        "draw_intervals(uniforms, shares, step=update.position)",
        f"{WIRING}::test_intervals_have_the_models_shift",
    ),
    Mutant(
        "the groups' schedules stand still",
        BASE,
        "        schedule.step()\n",
        "",
        f"{WIRING}::test_every_groups_rate_follows_its_schedule",
    ),
    Mutant(
        "rollouts of dropped texts",
        BATCH,
        "self.conditions_of(self.own_rows)",
        "self.conditions_of(self.rows)",
        f"{WIRING}::test_rollouts_are_of_the_samples_own_prompts",
    ),
    Mutant(
        "the critic's gradient grows with the passes",
        ONPOLICY,
        "        backward(loss / update.passes)",
        "        backward(loss)",
        f"{SPLIT}[1x2-onpolicy]",
    ),
    Mutant(
        "the forward loss of a student's step grows with the passes",
        ONPOLICY,
        "            backward(forward / passes)",
        "            backward(forward)",
        f"{SPLIT}[1x2-onpolicy]",
    ),
    Mutant(
        "an on-policy average that stands still",
        BASE,
        "            self.ema.update(self.step + 1)",
        "            pass",
        f"{WIRING}::test_the_students_average_moves_with_its_updates",
    ),
    Mutant(
        "shares rounded alike at each step",
        FORWARD,
        "shares, shift, step=update.position)",
        "shares, shift)",
        "tests/stages/test_shipped_shares.py -k forward",
    ),
    Mutant(
        "shares by pass",
        FORWARD,
        'uniforms = update.draw_all("intervals", update.place_of(count)[1], 2)',
        'uniforms = update.draw_all("intervals", count, 2).repeat(update.place_of(count)[1] // count, 1)',
        f"{SPLIT}[1x2-forward]",
    ),
    Mutant(
        "intervals weighed against their own pass",
        FORWARD,
        "            self._diffusion = total if self._diffusion is None else self._diffusion + total",
        "            self._diffusion = total",
        f"{SPLIT}[1x8-forward]",
    ),
    Mutant(
        "a mean of means",
        UPDATE,
        "        return batch_size * self.data_rank[1] * self.passes / self.place_of(batch_size)[1]",
        "        return 1.0",
        f"{PASSES}::test_uneven_passes_weigh_their_clips",
    ),
    Mutant(
        "every update draws the same",
        UPDATE,
        "(self.seed, purpose, self.position, *position)",
        "(self.seed, purpose, 0, *position)",
        "tests/stages/test_stages.py::test_a_step_depends_on_seed_and_position_alone",
    ),
    Mutant(
        "every pass draws anew",
        UPDATE,
        "(self.seed, purpose, self.position, *position)",
        "(self.seed, purpose, self.position, self._begun, *position)",
        f"{SPLIT}[1x2-teacher]",
    ),
    Mutant(
        "checkpoints count passes whose gradients are lost",
        BASE,
        "self.counters() if self.update.is_complete else self._before_update",
        "self.counters()",
        f"{PASSES}::test_a_checkpoint_in_the_middle_of_an_update_is_of_its_beginning",
    ),
    Mutant(
        "the stream goes on behind passes whose gradients are lost",
        "data/stream.py",
        "begun = self.position - self.dataset.passes_before(self.position)",
        "begun = self.position",
        "tests/data/test_stream.py::test_a_stop_between_passes_goes_back_to_the_first",
    ),
    Mutant(
        "texts are never dropped",
        BATCH,
        'self._is_dropped("drop", self.conditioning.text_drop, count)',
        'self._is_dropped("drop", 0.0, count)',
        "tests/stages/test_stages.py::test_dropped_texts_use_the_negative_prompt",
    ),
    Mutant(
        "the first frame is never given",
        BATCH,
        "        if self.is_first_frame_given:",
        "        if False:",
        "tests/stages/test_stages.py::test_image_to_video_leaves_the_first_frame_without_loss",
    ),
    Mutant(
        "no rebalancing",
        FORWARD,
        "        if self.objective.rebalance:",
        "        if False:",
        "tests/stages/test_stages.py::test_the_forward_stage_is_the_plain_objective_balanced",
    ),
    Mutant(
        "the teacher's own guidance is left out",
        ONPOLICY,
        "settings=parts.options.onpolicy,",
        "settings=type(parts.options.onpolicy)(),",
        f"{WIRING}::test_options_of_the_recipe_reach_their_stage",
    ),
    Mutant(
        "the negative prompt is the empty one",
        "training/assemble.py",
        "        negative_prompt=recipe.model.negative_prompt,",
        '        negative_prompt="",',
        f"{WIRING}::test_options_of_the_recipe_reach_their_stage",
    ),
    Mutant(
        "a clip gets its neighbour's controls",
        BATCH,
        "self.controls[rows % count]",
        "self.controls[(rows + 1) % count]",
        f"{CONTROLS}::test_a_forward_step_asks_with_each_clips_own_controls",
    ),
    Mutant(
        "controls are never dropped",
        BATCH,
        'self._is_dropped("controls", self.conditioning.control_drop, count)',
        'self._is_dropped("controls", 0.0, count)',
        f"{CONTROLS}::test_a_forward_step_asks_with_each_clips_own_controls",
    ),
    Mutant(
        "an adapter's alpha is its rank",
        "training/assemble.py",
        "part_of(LoraSettings, lora, full=tuple(full))",
        "part_of(LoraSettings, lora, full=tuple(full), alpha=lora.rank)",
        EXPORTED,
    ),
]


def names(mutant: Mutant) -> str:
    """For pytest's ids."""
    return mutant.name.replace(" ", "-")


@pytest.mark.parametrize("mutant", MUTANTS, ids=names)
def test_the_line_is_still_there(mutant: Mutant, project: Path) -> None:
    text = (project / "anyflow" / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, "the code has changed: change the mutant with it"


def copied(project: Path, folder: Path) -> Path:
    """The package and its tests in a place where they may be spoilt; what is large is linked."""
    for name in ("anyflow", "tests", "recipes"):
        shutil.copytree(project / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(project / "pyproject.toml", folder)
    for name in ("data", "docs", "experiments"):
        (folder / name).symlink_to(project / name)
    return folder


def outcome_of(folder: Path, seen_by: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [*command, *seen_by.split()], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_unspoilt_code_passes(project: Path, tmp_path: Path) -> None:
    """Without it a test that always fails would see every mutant."""
    folder = copied(project, tmp_path / "copy")
    tests = dict.fromkeys(mutant.seen_by for mutant in MUTANTS if " " not in mutant.seen_by)
    done = outcome_of(folder, " ".join(tests))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=names)
def test_a_wrong_line_is_seen(mutant: Mutant, project: Path, tmp_path: Path) -> None:
    folder = copied(project, tmp_path / "copy")
    path = folder / "anyflow" / mutant.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
    done = outcome_of(folder, mutant.seen_by)
    assert done.returncode == 1 and "Error" not in done.stdout.partition("short test summary")[2].partition("::")[0]

"""Nothing is lost: a killed run goes on, and ends with bitwise the weights of a run that was never interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shell import command, environment, here, run, start, state_after

from anyflow.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, UserError
from anyflow.tracking.checkpoints import latest_checkpoint
from anyflow.tracking.runs import RunFolder

STEPS = 9


def training(model: Path, out: Path, *more: str) -> list[str]:
    """A training of a few seconds; an epoch of the starter clips is far longer, so it is always cut in the middle."""
    return [
        "train",
        "finetune/driving",
        f"model.weights={model}",
        f"stage.steps={STEPS}",
        "data.global_batch=2",
        "data.num_workers=1",
        "data.precompute=false",
        "optimizer.warmup_steps=2",
        "ema.start_step=2",
        "checkpoint.every_steps=2",
        "sampling.prompts=0",
        "run.tracking_uri=",
        "--out",
        str(out),
        *more,
    ]


def without_out(words: list[str]) -> list[str]:
    """A training's words without the folder that it names."""
    place = words.index("--out")
    return [*words[:place], *words[place + 2 :]]


def onpolicy_training(model: Path, out: Path, *more: str) -> list[str]:
    """On-policy distillation of a few seconds: three networks, two optimisers, two batches a step."""
    words = training(model, out, f"stage.onpolicy.teacher={model}", "data.card=driving", "checkpoint.every_steps=1")
    return ["train", "onpolicy/tiny", *words[2:], *more]


@pytest.fixture(scope="module")
def uninterrupted(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    finished = run(*training(small_model, out))
    assert finished.returncode == 0, finished.stderr
    return out


def start_and_stop(words: list[str], out: Path, number: signal.Signals, group: bool = False) -> int:
    """Start a run, wait for its first checkpoint, send it (or all its processes) a signal; returns its exit code."""
    process = start(*words, own_group=group)
    deadline = time.monotonic() + 200
    while latest_checkpoint(out / "checkpoints") is None:
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode is not None
    return process.returncode


def state(out: Path) -> dict[str, torch.Tensor]:
    return state_after(out, STEPS)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_goes_on_bitwise(
    number: signal.Signals, small_model: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    code = start_and_stop(training(small_model, out), out, number)
    if number == signal.SIGTERM:
        assert code == EXIT_PREEMPTED
        assert RunFolder(out).status["state"] == "preempted"
    else:
        assert code == -signal.SIGKILL
    finished = run(*training(small_model, out, "--resume", "auto"))
    assert finished.returncode == 0, finished.stderr
    whole, resumed = state(uninterrupted), state(out)
    assert whole.keys() == resumed.keys()
    different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert not different


def test_a_damaged_newest_checkpoint_is_passed_over_when_asked(
    small_model: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """One bit of a weight is another one, which torch does not see; the end is bitwise that of an unharmed run."""
    out = tmp_path / "cut"
    start_and_stop(training(small_model, out, "checkpoint.every_steps=1"), out, signal.SIGTERM)
    newest = latest_checkpoint(out / "checkpoints")
    assert newest is not None
    older = out / "checkpoints" / "step_00000000"
    shutil.copytree(newest.parent, older)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    for path in (out / "checkpoints").glob("step_*"):
        if path not in (older, newest.parent):
            shutil.rmtree(path)
    words = training(small_model, out)
    refused = run(*without_out(words), "--resume", str(out))
    sentence = f"anyflow: {newest} is damaged"
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith(sentence), refused.stderr
    remedy = f"step_00000000 is the newest whole checkpoint: go on from it by --resume auto --out {out}"
    assert remedy in refused.stderr and "Traceback" not in refused.stderr
    assert newest.parent.is_dir(), "nothing was moved"
    export = run("export", str(out), "--to", str(tmp_path / "export"))
    assert export.returncode == 2 and f"{newest} is damaged" in export.stderr and not (tmp_path / "export").exists()
    finished = run(*words, "--resume", "auto")
    assert finished.returncode == 0, finished.stderr
    assert f"put aside ({newest.parent.name}.damaged), and the run goes on from step_00000000" in finished.stderr
    whole, resumed = state(uninterrupted), state(out)
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert not list((out / "checkpoints").glob("*.damaged")), "a newer checkpoint is there"


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, EXIT_INTERRUPTED), pytest.param(signal.SIGTERM, EXIT_PREEMPTED, marks=pytest.mark.slow)],
)
def test_a_signal_to_the_whole_group_stops_the_run_and_not_its_workers(
    number: signal.Signals, code: int, small_model: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """As a terminal's Ctrl-C: workers that died of it took the step with them, and the run for failed."""
    out = tmp_path / "cut"
    assert start_and_stop(training(small_model, out), out, number, group=True) == code
    assert RunFolder(out).status["state"] == ("interrupted" if number == signal.SIGINT else "preempted")
    finished = run(*training(small_model, out, "--resume", "auto"))
    assert finished.returncode == 0, finished.stderr
    whole, resumed = state(uninterrupted), state(out)
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]


KILLED_WHILE_WRITING = """
import os, signal, torch
from anyflow.training.callbacks import checkpoints
from anyflow.cli.main import main

names = []
save, sync = torch.save, checkpoints.sync_tree

def kill_at_second(name):
    names.append(name)
    if names.count(name) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

def save_half(content, place, *rest, **options):
    save(content, place, *rest, **options)
    if {half}:
        kill_at_second("save")

def sync_once(folder):
    kill_at_second("sync")
    sync(folder)

torch.save, checkpoints.sync_tree = save_half, sync_once
main()
"""
"""The command line, killed by itself while its second checkpoint is written: in memory, or whole but without name."""


@pytest.mark.parametrize("half", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_run_killed_while_a_checkpoint_is_written_behind_has_the_one_before(
    half: bool, small_model: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    words = training(small_model, out, "checkpoint.background=true")
    script = KILLED_WHILE_WRITING.format(half=half)
    killed = run(*words, program=script)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    newest = latest_checkpoint(out / "checkpoints")
    assert newest is not None and newest.parent.name == "step_00000002"
    assert torch.load(newest, weights_only=True)["anyflow"]["step"] == 2
    assert list((out / "checkpoints").glob("*.partial"))
    finished = run(*words, "--resume", "auto")
    assert finished.returncode == 0, finished.stderr
    whole, resumed = state(uninterrupted), state(out)
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert not list((out / "checkpoints").glob("*.partial"))


KILLED_BEFORE_THE_CRITIC = """
import os, signal
from anyflow.training.callbacks.checkpoints import Checkpoints
from anyflow.cli.main import main
from anyflow.stages.base import Stage

move, saved = Stage.move, Checkpoints.on_train_batch_end

def save_now(self, trainer, stage, *rest):
    (self.save(trainer, stage) if stage.turn else saved(self, trainer, stage, *rest))

def move_once(self, name):
    if name == "critic" and self.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    move(self, name)

Checkpoints.on_train_batch_end, Stage.move = save_now, move_once
main()
"""
"""The command line, saving after every batch, and killed by itself when a critic's update is due."""


def tail_training(model: Path, out: Path, *more: str) -> list[str]:
    """Fine-tuning of a few seconds with an on-policy tail, over adapters: its three parts make up the steps."""
    parts = ["stage.steps=3", "stage.tail.teacher_steps=3", f"stage.tail.steps={STEPS - 6}"]
    lora = ["model.lora.enabled=true", "model.lora.rank=4"]
    return training(model, out, *parts, *lora, "checkpoint.every_steps=1", *more)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("words", [onpolicy_training, tail_training])
def test_a_run_stopped_between_student_and_critic_goes_on_bitwise(
    words: Callable[..., list[str]], number: signal.Signals, small_model: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "cut"
    finished = run(*words(small_model, whole))
    assert finished.returncode == 0, finished.stderr
    if number == signal.SIGKILL:
        script = KILLED_BEFORE_THE_CRITIC.format(step=STEPS - 2)
        killed = run(*words(small_model, out), program=script)
        assert killed.returncode == -signal.SIGKILL
        newest = latest_checkpoint(out / "checkpoints")
        assert newest is not None and newest.parent.name == f"step_{STEPS - 2:08d}_turn_1"
    else:
        assert start_and_stop(words(small_model, out), out, number) == EXIT_PREEMPTED
    finished = run(*words(small_model, out, "--resume", "auto"))
    assert finished.returncode == 0, finished.stderr
    expected, found = state(whole), state(out)
    assert expected.keys() == found.keys() and any("critic" in name for name in found)
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


STOPPED_WHILE_SAMPLING = """
import os, signal
from anyflow.training import finish
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.cli.main import main

sampled, sample, labels = finish._sampled, FlowMapBackbone.sample, []

def note(recipe, parts, label, *rest):
    labels.append(label)
    return sampled(recipe, parts, label, *rest)

def stop_at_second(self, *inputs, **options):
    if labels[-1] == "{label}":
        labels.append(labels[-1])
        if labels.count("{label}") == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    return sample(self, *inputs, **options)

finish._sampled, FlowMapBackbone.sample = note, stop_at_second
main()
"""
"""The command line, told to stop by itself while the second number of steps of a curve is sampled."""


@pytest.mark.slow
@pytest.mark.parametrize("label", ["before", "step_00000003", "after"])
def test_a_run_stopped_while_it_samples_goes_on_with_the_curve(
    label: str, small_model: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """Stopped between two calls of the network; what was sampled stays, the rest is measured, weights are the same."""
    out = tmp_path / "cut"
    words = training(small_model, out, "sampling.every_steps=3", "sampling.steps=[1,2,4]")
    words = ["sampling.prompts=2" if word == "sampling.prompts=0" else word for word in words]
    script = STOPPED_WHILE_SAMPLING.format(label=label)
    stopped = run(*words, program=script)
    assert stopped.returncode == EXIT_PREEMPTED, stopped.stderr
    assert RunFolder(out).status["state"] == "preempted" and "Traceback" not in stopped.stderr
    curves = out / "curves"
    assert not (curves / f"{label}.pt").exists() and len(list((curves / f".{label}").iterdir())) == 1
    newest = latest_checkpoint(out / "checkpoints")
    assert (newest.parent.name if newest else "before") in (label, "step_00000009")
    finished = run(*words, "--resume", "auto")
    assert finished.returncode == 0, finished.stderr
    found = sorted(path.name for path in curves.iterdir())
    assert found == ["after.pt", "before.pt", "step_00000003.pt", "step_00000006.pt"]
    whole, resumed = state(uninterrupted), state(out)
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]


def fails(words: list[str], limit: int = 0) -> str:
    """What a training says that the machine stops; ``limit`` is the largest size of a file in bytes."""
    import resource

    def prepare() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = subprocess.run(
        command(*words), capture_output=True, text=True, env=environment(), preexec_fn=prepare, timeout=300
    )
    assert process.returncode == 2, process.stderr
    return process.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_limit_of_file_sizes_is_one_sentence_and_the_run_has_failed(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    told = fails(training(small_model, out), limit=1 << 20)
    assert told.startswith("anyflow: a file would be larger") and "ulimit -f" in told and str(out) in told
    assert RunFolder(out).status["state"] == "failed" and latest_checkpoint(out / "checkpoints") is None


@pytest.mark.slow
def test_a_killed_data_worker_is_one_sentence_and_the_run_has_failed(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = training(small_model, out, "stage.steps=400")
    process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, env=environment(), text=True)
    while latest_checkpoint(out / "checkpoints") is None:
        assert process.poll() is None
        time.sleep(0.05)
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "Traceback" not in told
    assert "a process that decodes clips was killed" in told and "data.num_workers" in told
    assert RunFolder(out).status["state"] == "failed"


@pytest.mark.slow
def test_a_deterministic_run_takes_every_step(small_model: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """On the CPU nothing else comes out, and no operation of a step lacks such a kernel."""
    out = tmp_path / "same"
    finished = run(*training(small_model, out, "run.deterministic=true"))
    assert finished.returncode == 0, finished.stderr
    whole, found = state(uninterrupted), state(out)
    assert not [name for name in whole if not torch.equal(whole[name], found[name])]


def test_deterministic_kernels_are_asked_for_strictly() -> None:
    """With warn_only attention keeps its backward pass that adds in any order."""
    code = """
import os, torch
from anyflow.training.deterministic import make_deterministic
make_deterministic()
print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
print(torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, os.environ["CUBLAS_WORKSPACE_CONFIG"])
"""
    done = run(program=code)
    assert done.stdout.split() == ["True", "False", "True", "False", ":4096:8"], done.stderr


def test_a_finished_run_has_nothing_to_resume(small_model: Path, uninterrupted: Path) -> None:
    again = here(*training(small_model, uninterrupted, "--resume", "auto"))
    assert again.exit_code == 0
    assert "finished already" in again.stdout


def test_a_used_folder_is_refused(small_model: Path, uninterrupted: Path) -> None:
    with pytest.raises(UserError, match="--resume auto"):
        here(*training(small_model, uninterrupted))


def test_another_recipe_does_not_go_on_with_a_run(small_model: Path, uninterrupted: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr was .*0\.5.*--accept-changes"):
        here(*training(small_model, uninterrupted, "optimizer.lr=0.5", "--resume", str(uninterrupted)))


def test_a_changed_recipe_that_is_accepted_goes_on(small_model: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "changed"
    shutil.copytree(uninterrupted, out)
    shutil.rmtree(out / "checkpoints" / f"step_{STEPS:08d}")
    RunFolder(out).note(state="preempted")
    words = training(small_model, out, "optimizer.lr=5e-4", "--resume", str(out))
    finished = run(*words, "--accept-changes")
    assert finished.returncode == 0, finished.stderr
    assert "goes on with another recipe" in finished.stderr and "optimizer.lr was" in finished.stderr
    weights, others = state(out), state(uninterrupted)
    assert any(not torch.equal(weights[name], others[name]) for name in weights)
    assert "lr: 0.0005" in RunFolder(out).recipe.read_text()


def test_the_exported_model_is_the_average_and_loads_in_diffusers(uninterrupted: Path) -> None:
    from diffusers import AnyFlowPipeline

    pipeline = AnyFlowPipeline.from_pretrained(uninterrupted / "model")
    video = pipeline(
        "A green car.",
        num_frames=5,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="np",
    ).frames
    assert video.shape == (1, 5, 32, 32, 3)

"""Handing out work: as it is finished, with what workers hold built once, and with workers that are lost."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from anyflow.errors import UserError
from anyflow.system import engine_options, ray_engine
from anyflow.system.engine_options import EngineOptions, engine_of
from anyflow.system.engines import MAX_LOSSES, Done, Work, WorkerLost, in_order, values
from anyflow.system.pool import LocalEngine


def wait_for_last(folder: Path, number: int) -> int:
    """Task 0 ends after task 3 only."""
    limit = time.monotonic() + 60
    while number == 0 and not (folder / "3").exists():
        assert time.monotonic() < limit, "task 3 waits for task 0"
        time.sleep(0.01)
    (folder / str(number)).touch()
    return number


def test_nobody_waits_for_the_slowest(tmp_path: Path) -> None:
    done = list(LocalEngine(2).map_unordered(Work(partial(wait_for_last, tmp_path)), range(4)))
    assert [end.number for end in done] == [1, 2, 3, 0] and [end.value for end in done] == [1, 2, 3, 0]


def build(folder: Path) -> int:
    (folder / f"built-{os.getpid()}-{time.monotonic_ns()}").touch()
    return os.getpid()


def whose(state: int, number: int) -> tuple[bool, int]:
    return state == os.getpid(), number


@pytest.mark.parametrize("processes", [0, 2])
def test_a_worker_builds_what_it_holds_once(processes: int, tmp_path: Path) -> None:
    done = LocalEngine(processes).map_unordered(Work(whose, partial(build, tmp_path)), range(8))
    assert sorted(end.value for end in done) == [(True, number) for number in range(8)]
    assert len(list(tmp_path.iterdir())) <= max(processes, 1)


def fail(number: int) -> int:
    if number == 1:
        raise UserError("clip 1: is broken")
    return number


@pytest.mark.parametrize("processes", [0, 2])
def test_a_failure_is_a_value_and_the_others_go_on(processes: int) -> None:
    done = sorted(LocalEngine(processes).map_unordered(Work(fail), range(4)), key=lambda end: end.number)
    assert [end.value for end in done] == [0, None, 2, 3] and isinstance(done[1].error, UserError)
    with pytest.raises(UserError, match="clip 1: is broken"):
        list(values(LocalEngine(processes).map_unordered(Work(fail), range(4)), str, ""))


def die(folder: Path, times: int, number: int) -> int:
    """Task 2 ends its process so many times."""
    before = len(list(folder.glob("died-*")))
    if number == 2 and before < times:
        (folder / f"died-{before}").touch()
        os._exit(9)
    (folder / f"done-{number}-{time.monotonic_ns()}").touch()
    return number


def test_the_task_of_a_killed_worker_is_done_again_and_no_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = LocalEngine(2).map_unordered(Work(partial(die, tmp_path, MAX_LOSSES - 1)), range(6))
    assert sorted(end.value for end in done) == list(range(6))
    assert len(list(tmp_path.glob("done-*"))) == 6, "a task of another worker was done twice"
    assert capfd.readouterr().err.count("its task is done again") == MAX_LOSSES - 1


def test_a_task_that_kills_its_workers_is_told_when_all_others_are_done(tmp_path: Path) -> None:
    done = LocalEngine(2).map_unordered(Work(partial(die, tmp_path, MAX_LOSSES)), range(6))
    seen = []
    with pytest.raises(UserError, match=f"shard 2: .* killed {MAX_LOSSES} times.*: free some memory"):
        seen += [value for _, value in values(done, "shard {}".format, "free some memory")]
        pytest.fail("nothing is told")
    done = LocalEngine(2).map_unordered(Work(partial(die, tmp_path, 2 * MAX_LOSSES)), range(6))
    ends = {end.number: end for end in done}
    assert len(ends) == 6 and isinstance(ends[2].error, WorkerLost)


def sleep(folder: Path, number: int) -> int:
    (folder / str(os.getpid())).touch()
    time.sleep(600 if number else 0)
    return number


def test_closing_the_results_ends_workers_that_are_at_work(tmp_path: Path) -> None:
    done = LocalEngine(2).map_unordered(Work(partial(sleep, tmp_path)), range(3))
    assert next(done) == Done(0, 0)
    done.close()
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def gpus(number: int) -> tuple[int, str]:
    time.sleep(0.3)
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", "none")


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    engine = LocalEngine(2, gpus=True)
    seen = dict(end.value for end in engine.map_unordered(Work(gpus, gpu=True), range(6)))
    assert sorted(seen.values()) == ["4", "7"]
    assert {end.value[1] for end in engine.map_unordered(Work(gpus), range(2))} == {"4,7"}, "it asks for none"


def test_values_wait_for_their_turn() -> None:
    assert list(in_order([(1, "b"), (0, "a"), (2, "c")])) == ["a", "b", "c"]


def test_devices_are_of_this_machine() -> None:
    with pytest.raises(UserError, match="--devices 4 is of this machine"):
        EngineOptions("ray").check(devices=4)
    EngineOptions().check(devices=4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (EngineOptions("dask"), "--engine 'dask' is not known: give local or ray"),
        (EngineOptions(address="10.0.0.1:6379"), "--address 10.0.0.1:6379 is of a Ray cluster"),
        (EngineOptions("ray"), "Ray is not installed; run pip install -e '.[cluster]'"),
    ],
)
def test_an_engine_that_cannot_be_had_is_one_sentence(
    options: EngineOptions, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_options, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        engine_of(options, 1)
    assert told in str(error.value)


def test_a_worker_says_what_it_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a worker before it gets work; without a cluster."""
    here = ray_engine._versions()
    monkeypatch.chdir(tmp_path)
    assert ray_engine._Worker(str(tmp_path)).problem([str(tmp_path)], here) == ""
    told = ray_engine._Worker(str(tmp_path)).problem([str(tmp_path / "out" / f"{ray_engine.MARKER}12")], here)
    assert f"cannot see {tmp_path / 'out'}:" in told and "on a disk that all share" in told
    assert f"cannot see {tmp_path / 'gone'}:" in ray_engine._Worker(str(tmp_path / "gone")).problem([], here)
    told = ray_engine._Worker(str(tmp_path)).problem([], {**here, "torch": "1.0"})
    assert f"has torch {here['torch']} instead of 1.0: install the same versions" in told


def test_encoding_is_not_started_by_torchrun(anyflow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = anyflow("data", "encode", "driving")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--engine ray" in done.stderr


def test_no_cluster_is_one_sentence(anyflow: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "in").mkdir()
    words = ["data", "import", str(tmp_path / "in"), "--to", str(tmp_path / "out"), "--engine", "ray"]
    done = anyflow(*words, "--address", "127.0.0.1:1")
    assert done.returncode == 2 and "nobody answers" in done.stderr and done.stderr.count("\n") == 1
    done = anyflow(*words, "--address", "somewhere")
    assert done.returncode == 2 and "is not HOST:PORT" in done.stderr
    assert not (tmp_path / "out").exists()

"""Writing behind the training's back: a copy is written, in order, and what fails is told."""

from __future__ import annotations

from threading import Event

import pytest
import torch

from anyflow.training.callbacks.background import BackgroundWriter, Writer


def test_what_was_staged_stays_what_it_was() -> None:
    weight = torch.ones(3)
    content = {"state": {"weight": weight}, "counts": [1, 2]}
    staged = BackgroundWriter().stage(content)
    weight.zero_()
    content["counts"].append(3)  # type: ignore[attr-defined]
    assert staged["state"]["weight"].tolist() == [1, 1, 1] and staged["counts"] == [1, 2]
    assert Writer().stage(content) is content


def test_jobs_run_in_order_and_are_waited_for() -> None:
    writer, go, done = BackgroundWriter(), Event(), []
    writer.later(lambda: (go.wait(20), done.append("first")))
    writer.later(lambda: done.append("second"))
    assert not done
    go.set()
    writer.wait()
    assert done == ["first", "second"]
    Writer().later(lambda: done.append("at once"))
    assert done[-1] == "at once"


def test_a_failed_job_is_told_at_the_next_wait_once() -> None:
    writer = BackgroundWriter()
    writer.later(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.wait()

"""In a real browser: the runs in MLflow, the any-step curve in its comparison, and the report with its films.

Needs Debian's packages chromium and chromium-driver, and selenium (`pip install -e '.[dev]'`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from looking import keep_picture, text_of, wait_for
from study import TEXT, invent, invent_training, tasks_in_state, write_study

PROJECT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Site:
    """A server with an experiment in it: its address, the ids, and the report's folder."""

    address: str
    experiment: str
    runs: dict[str, str]
    report: Path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """An experiment whose curves are invented, recorded and reported as a real one is."""
    from mlflow import MlflowClient

    from anyflow.experiment.execute import record_piece
    from anyflow.experiment.report import write_report

    place = tmp_path_factory.mktemp("site")
    store = f"sqlite:///{place}/mlflow.db"
    before = Path.cwd()
    os.chdir(PROJECT)
    try:
        experiment, pieces = write_study(place, TEXT.replace("run.tracking_uri=", f"run.tracking_uri={store}"))
        for piece in pieces:
            if piece.recipe is not None:
                invent_training(piece)
        falls = {"base": 1.0, "plain": 1.3, "more": 0.6}
        invent(experiment, pieces, lambda arm, _, seed, n: falls[arm] * (1 + 1 / n + seed / 50), with_samples=True)
        for piece in pieces:
            record_piece(experiment, piece, piece.cards)
        report, _ = write_report(experiment, pieces, tasks_in_state(pieces))
    finally:
        os.chdir(before)
    client = MlflowClient(tracking_uri=store)
    number = client.get_experiment_by_name("study").experiment_id  # type: ignore[union-attr]
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([number])}
    return Site(store, number, {str(name): run for name, run in runs.items()}, report)


@pytest.fixture(scope="module")
def site(recorded: Site, serve: Any) -> Iterator[Site]:
    """The same, served by the command that a user types."""
    with serve("-m", "anyflow", "mlflow", "--serve", "--uri", recorded.address) as address:
        yield replace(recorded, address=address)


def test_the_experiments_runs_stand_below_it(browser: Any, site: Site) -> None:
    browser.get(f"{site.address}/#/experiments/{site.experiment}/runs?compareRunsMode=TABLE")
    expander = ".ag-row button[data-component-id*='runnamecellrenderer']"
    wait_for(browser, lambda: browser.find_elements("css selector", expander), "the experiment's own run")
    assert "base-0" not in text_of(browser)
    browser.find_element("css selector", expander).click()
    wait_for(browser, lambda: "base-0" in text_of(browser) and "more-2-games" in text_of(browser), "the runs below it")
    keep_picture(browser, "runs")


def test_the_comparison_draws_the_any_step_curve(browser: Any, site: Site) -> None:
    """Two runs compared; behind a metric's name each is a line over the step counts 1, 4 and 32.

    The table of metrics shows those in sight alone: the link of the first is made the deciding one's.
    """
    chosen = ",".join(f'"{site.runs[name]}"' for name in ("plain-0-games", "more-0-games"))
    browser.get(f'{site.address}/#/compare-runs?runs=[{chosen}]&experiments=["{site.experiment}"]')
    links = wait_for(browser, lambda: browser.find_elements("partial link text", "after/"), "the metrics")
    assert "Comparing 2 Runs" in text_of(browser)
    address = str(links[0].get_attribute("href"))
    assert "x_axis=step" in address
    browser.get(re.sub(r"after((?:%2F|/)games)?(%2F|/)[a-z_0-9]+", r"after\2games\2sliced_w1", address))
    lines = ".scatterlayer .trace path.js-line"
    wait_for(browser, lambda: len(browser.find_elements("css selector", lines)) >= 2, "the two curves")
    text = text_of(browser)
    assert "plain-0-games" in text and "more-0-games" in text
    data = "return [...document.querySelectorAll('.js-plotly-plot')].flatMap(p => p.data.map(t => t.x))"
    drawn = browser.execute_script(data)  # each run's line, and its smoothed one
    assert len(drawn) >= 2 and all(steps == [1, 4, 32] for steps in drawn)
    keep_picture(browser, "curve")


def check_report(browser: Any) -> None:
    """Every picture is decoded, every film has frames, and nothing is fetched from elsewhere."""
    films = "return [...document.querySelectorAll('video')].map(v => [v.readyState, v.videoWidth, v.duration])"

    def played() -> bool:
        shown = browser.execute_script(films)
        return len(shown) == 2 and all(ready >= 2 for ready, _, _ in shown)

    wait_for(browser, played, "two films that play")
    assert "Does it matter?" in text_of(browser)
    assert all(width > 0 and seconds > 0 for _, width, seconds in browser.execute_script(films))
    images = "return [...document.images].map(i => i.complete && i.naturalWidth > 0)"
    assert browser.execute_script(images) == [True] * 4
    fetched = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => n.startsWith('http'))"
    assert browser.execute_script(fetched) == []


def test_the_report_plays_its_films_from_the_disk(browser: Any, site: Site) -> None:
    browser.get(site.report.joinpath("report.html").as_uri())
    check_report(browser)
    keep_picture(browser, "report")


def test_the_report_plays_its_films_in_mlflow(browser: Any, site: Site) -> None:
    """As the artifact of the experiment's own run."""
    run = f"{site.address}/#/experiments/{site.experiment}/runs/{site.runs['study']}"
    browser.get(f"{run}/artifacts/report/report.html")
    frames = wait_for(browser, lambda: browser.find_elements("css selector", "iframe#html"), "the report's frame")
    browser.switch_to.frame(frames[0])
    try:
        check_report(browser)
    finally:
        browser.switch_to.default_content()
    keep_picture(browser, "artifact")

"""An experiment's report: one page that opens anywhere, the same as Markdown, the plots, and the figures for machines.

experiments/results/NAME/
    report.html    everything inside, pictures and films too      report.md     tables and answers
    figures.json   curves, floor, ratios, retention, answers      curves.png, cost.png, samples-CARD.png and .mp4
    measured/      every piece's curves, from which another machine goes on (kept.py)
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anyflow.experiment.claims import Answer, answer
from anyflow.experiment.content import Content, content_of
from anyflow.experiment.kept import keep
from anyflow.experiment.measured import Measured, figures_of, read_measured, short
from anyflow.experiment.pictures import Samples, as_jpeg, draw_samples
from anyflow.experiment.pieces import Piece
from anyflow.experiment.plots import plot_cost, plot_curves
from anyflow.experiment.schema import Experiment
from anyflow.experiment.tasks import Task, finished_pieces
from anyflow.system.files import partial_folder
from anyflow.tracking.mlflow import code_version, record_report


def write_report(experiment: Experiment, pieces: Sequence[Piece], tasks: Sequence[Task]) -> tuple[Path, list[Answer]]:
    """Write the report of what was measured so far, and give it to the tracker; returns its folder and the answers.

    Args:
        experiment: the question.
        pieces: all of its pieces.
        tasks: all of their trainings and curves. What is not done the report calls missing; the curves of those that
            are trained and measured here are kept beside it.
    """
    missing = sum(not task.is_done for task in tasks)
    kept = list(dict.fromkeys(task.piece.name for task in tasks if task.has_kept))
    measured = read_measured(experiment, tasks)
    answers = [answer(measured, claim) for claim in experiment.claims]
    folder = experiment.results
    with partial_folder(folder) as partial:
        content = content_of(measured, pieces, answers, missing, kept)
        if measured.cards():
            plot_curves(partial / "curves.png", measured)
            plot_cost(partial / "cost.png", measured)
        drawn = draw_samples(measured, pieces, partial, folder)
        (partial / "report.html").write_text(_page(content, drawn, partial), encoding="utf-8")
        (partial / "report.md").write_text(_markdown(content, partial), encoding="utf-8")
        document = {
            "experiment": experiment.name,
            "question": experiment.question,
            "missing": missing,
            "answers": [{"say": a.claim.say, "verdict": a.verdict, "reasons": a.reasons} for a in answers],
            **figures_of(measured),
            "settings": asdict(experiment.evaluation),
            "seeds": experiment.seeds,
            "pictures": {samples.card: samples.arms for samples in drawn},
            **code_version(),
        }
        (partial / "figures.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        keep(experiment, pieces, finished_pieces(tasks), partial)
        _replace(folder, partial)
    record_report(
        pieces[0].tracking_uri, experiment.name, mean_curves(measured), folder, "FINISHED" if not missing else "RUNNING"
    )
    return folder, answers


def _replace(folder: Path, partial: Path) -> None:
    """Put a new report's files in the place of an earlier one's, and take away what only that one had."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and not (partial / path.name).exists():
            path.unlink()
    for path in list(partial.iterdir()):
        target = folder / path.name
        if target.is_dir():
            target.rename(partial / f"{path.name}.old")
        path.rename(target)


def mean_curves(measured: Measured) -> dict[str, list[dict[str, Any]]]:
    """Every arm's mean over seeds and data sets as rows of a curve: ``ARM`` (several data sets: ``ARM/CARD`` too)."""
    experiment, curves = measured.experiment, {}
    for arm in experiment.shown:
        groups = {arm: measured.cards()}
        if len(measured.cards()) > 1:
            groups |= {f"{arm}/{short(card)}": [card] for card in measured.cards()}
        for name, cards in groups.items():
            curves[name] = [
                {"num_steps": steps, **row}
                for steps in sorted(experiment.evaluation.steps)
                if (row := _mean_row(measured, arm, cards, steps))
            ]
    return curves


def _mean_row(measured: Measured, arm: str, cards: Sequence[str], steps: int) -> dict[str, float]:
    row = {}
    for metric in measured.experiment.figures:
        means = [sum(v) / len(v) for card in cards if (v := measured.values(arm, card, steps, metric.name))]
        if means:
            row[metric.name] = sum(means) / len(means)
    return row


def _page(content: Content, drawn: Sequence[Samples], folder: Path) -> str:
    """The HTML with plots, pictures and films inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    plots = [
        {"alt": note, "data": _encoded((folder / name).read_bytes())}
        for name, note in content.plots.items()
        if (folder / name).exists()
    ]
    shown = [
        {
            "card": samples.card,
            "film": _encoded(samples.film.read_bytes()) if samples.film is not None else "",
            "picture": _encoded(as_jpeg(samples.picture)),
        }
        for samples in drawn
    ]
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html.j2")
    return template.render(content=content, plots=plots, samples=shown)


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _markdown(content: Content, folder: Path) -> str:
    lines = [f"# {content.question}", ""]
    lines += [f"Expected: {content.expect}", ""] if content.expect else []
    lines += [f"**{content.missing}**", ""] if content.missing else []
    for found in content.answers:
        lines += [f"- **{found.verdict}**: {found.claim.say}", *(f"  - {reason}" for reason in found.reasons)]
    lines += ["", content.note_claims, ""]
    lines += [f"![{note}]({name})\n" for name, note in content.plots.items() if (folder / name).exists()]
    for table in content.tables:
        lines += [f"**{table.title}**", "", *table.markdown(), ""]
    lines += [content.note_tables, ""]
    for path in sorted(folder.glob("samples-*.png")):
        moving = path.with_suffix(".mp4")
        lines.append(f"![samples]({path.name})\n" + (f"\n[moving]({moving.name})\n" if moving.exists() else ""))
    lines += [
        f"{content.arms.title}:",
        "",
        *content.arms.markdown(),
        "",
        content.note_arms,
        "",
    ]
    lines += ["```sh", content.commands, "```", "", content.provenance, ""]
    return "\n".join(lines)

"""An experiment's report: one page that opens anywhere, the same as Markdown, the plots, and the figures for machines.

experiments/results/NAME/
    report.html    everything inside, pictures and films too      report.md     tables and answers
    figures.json   curves, floor, ratios, retention, answers      curves.png, cost.png, samples-CARD.png
    measured/      every piece's curves, from which another machine goes on (kept.py)
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anyflow.evaluation.figures import Figure
from anyflow.evaluation.statistics import Estimate
from anyflow.experiment.claims import Answer, answer
from anyflow.experiment.figures import Measured, few_step_ratio, figures_of, measure, retention, short
from anyflow.experiment.jobs import Job, finished_pieces
from anyflow.experiment.kept import keep, origins
from anyflow.experiment.pieces import Piece
from anyflow.experiment.plots import plot_cost, plot_curves
from anyflow.experiment.samples import Samples, as_jpeg, draw_samples, film
from anyflow.experiment.schema import Experiment
from anyflow.tracking import code_version, machine, record_report

PAGE_BYTES = 2_900_000
"""Of the whole page."""

NOTE_CLAIMS = (
    "Compared seed by seed on the same prompts and noise; in brackets the 95 % interval (Student's t over the seeds, "
    "every data set with its own spread, Welch), then the mean change on each data set. A claim holds if the interval "
    "is on its side at every step count, does not hold if it is on the other side at one of them, and is not decided "
    "otherwise."
)


def write_report(experiment: Experiment, pieces: Sequence[Piece], jobs: Sequence[Job]) -> tuple[Path, list[Answer]]:
    """Write the report of what was measured so far, and give it to the tracker; returns its folder and the answers.

    Args:
        experiment: the question.
        pieces: all of its pieces.
        jobs: all of their trainings and curves. What is not done the report calls missing; the curves of those that are
            trained and measured here are kept beside it.
    """
    missing = sum(not job.is_done for job in jobs)
    kept = list(dict.fromkeys(job.piece.name for job in jobs if job.has_kept))
    measured = measure(experiment, jobs)
    answers = [answer(measured, claim) for claim in experiment.claims]
    folder = experiment.results
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".report-") as place:
        partial = Path(place)
        content = _content(measured, pieces, answers, missing, kept)
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
        keep(experiment, pieces, finished_pieces(jobs), partial)
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


def _content(
    measured: Measured, pieces: Sequence[Piece], answers: list[Answer], missing: int, kept: Collection[str]
) -> dict[str, Any]:
    """Everything that page and Markdown say, as text."""
    experiment = measured.experiment
    elsewhere = "; ".join(origins(experiment, pieces, kept))
    code, here = code_version(), machine()
    settings, clips = experiment.evaluation, sorted(set(measured.clips.values()))
    given = f", {settings.given_frames} latent frames given" if settings.given_frames else ""
    noise = f"the mean of {settings.draws} noises each, the same" if settings.draws > 1 else "the same noise"
    cost = experiment.figures[0].heading
    return {
        "name": experiment.name,
        "question": experiment.question,
        "expect": experiment.expect,
        "missing": f"{missing} trainings and curves are still missing: this is what there is so far."
        if missing
        else "",
        "answers": answers,
        "note_claims": NOTE_CLAIMS,
        "tables": [_table(measured, metric, card) for metric in experiment.figures for card in measured.cards()]
        + [table for metric in experiment.figures if _has_figures(table := _ratios(measured, metric))],
        "note_tables": (
            f"Mean over the seeds {experiment.seeds} [95 % interval]; {', '.join(map(str, clips)) or 'no'} prompts of "
            f"the {settings.split} split at a time, {noise} for every arm and step count{given}. Real clips: "
            "what other real clips of the same number get. Few-step ratio: how many times as bad "
            f"{experiment.few} steps are as {experiment.most}; retention: the ratio before over the ratio after, "
            "1 is kept, below 1 few steps became worse."
        ),
        "plot_notes": {
            "curves.png": "Quality against the number of steps: mean over seeds and 95 % interval",
            "cost.png": f"{cost} against the seconds that a clip took where it was sampled, decoding included",
        },
        "arms": _arms(experiment, pieces),
        "note_arms": _budget(experiment),
        "commands": f"make experiment NAME={experiment.name}\n.venv/bin/anyflow experiment {experiment.name} --dry-run",
        "provenance": (
            f"Commit {code['git.commit']}{' (with changes)' if code.get('git.dirty') == 'True' else ''}, "
            f"{here['machine.cpus']} CPU cores, devices: {here['machine.devices']}, torch {here['version.torch']}, "
            f"diffusers {here['version.diffusers']}."
            + (f" {len(kept)} of {len(pieces)} runs were measured earlier: {elsewhere}." if kept else "")
        ),
    }


def _table(measured: Measured, metric: Figure, card: str) -> dict[str, Any]:
    counts = sorted(measured.experiment.evaluation.steps)
    rows = []
    for arm in measured.experiment.shown:
        curve = measured.curve(arm, card, metric.name)
        rows.append([arm, *(_written(curve.get(count)) for count in counts)])
    floor = measured.real[card].get(metric.name)
    rows.append(["real clips", *([f"{floor:.3g}" if isinstance(floor, int | float) else "-"] * len(counts))])
    title = f"{metric.heading} on {short(card)} ({metric.better} is better)"
    return {"title": title, "headings": ["arm", *(f"{n} step{'s' * (n > 1)}" for n in counts)], "rows": rows}


def _ratios(measured: Measured, metric: Figure) -> dict[str, Any]:
    experiment = measured.experiment
    rows = [
        [arm, _written(few_step_ratio(measured, arm, metric)), _written(retention(measured, arm, metric))]
        for arm in experiment.shown
    ]
    headings = ["arm", f"few-step ratio ({experiment.few} / {experiment.most})", "retention"]
    return {
        "title": f"few steps against many, by {metric.heading}, all data",
        "headings": headings,
        "rows": rows,
    }


def _has_figures(table: dict[str, Any]) -> bool:
    """Whether anything stands in a table; a figure that is 0 at the most steps has no ratio."""
    return any(cell != "-" for row in table["rows"] for cell in row[1:])


def _written(found: Estimate | None) -> str:
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.mean:.3g}"
    return f"{found.mean:.3g} [{found.low:.3g}, {found.high:.3g}]"


def _arms(experiment: Experiment, pieces: Sequence[Piece]) -> dict[str, Any]:
    rows = []
    for name, arm in experiment.arms.items():
        own = [piece for piece in pieces if piece.arm == name]
        recipe = arm.folder or (arm.recipe or experiment.recipe)
        start = f"starts from {arm.start_from}" if arm.start_from else ""
        model = f"model {arm.model}" if arm.model else ""
        given = f"{arm.given_frames} latent frames given" if arm.given_frames >= 0 else ""
        changes = "; ".join(filter(None, [start, model, *arm.overrides, given]))
        steps = str(own[0].steps) if own and own[0].recipe is not None else "-"
        label = name if arm.shown else f"{name} (a start for others)"
        rows.append([label, arm.title, recipe, changes, steps, " ".join(map(str, experiment.seeds_of(name)))])
    return {"headings": ["arm", "what", "recipe or folder", "apart by", "steps", "seeds"], "rows": rows}


def _budget(experiment: Experiment) -> str:
    budget = experiment.budget
    every = f"Every arm: {' '.join(experiment.overrides)}. " if experiment.overrides else ""
    if not budget.steps:
        return every
    batch = f" of {budget.batch} clips" if budget.batch else ""
    apart = [f"{name} has {arm.steps}" for name, arm in experiment.arms.items() if arm.steps]
    return (
        f"{every}The budget of a trained arm is {budget.steps} steps{batch}{'; ' if apart else ''}{', '.join(apart)}."
    )


def _page(content: dict[str, Any], drawn: Sequence[Samples], folder: Path) -> str:
    """The HTML with plots, pictures and films inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    plots = [
        {"alt": note, "data": _encoded((folder / name).read_bytes())}
        for name, note in content["plot_notes"].items()
        if (folder / name).exists()
    ]
    pictures = [_encoded(as_jpeg(samples.picture)) for samples in drawn]
    used = sum(len(image["data"]) for image in plots) + sum(map(len, pictures))
    shown = []
    for index, (samples, image) in enumerate(zip(drawn, pictures, strict=True)):
        room = max(0, PAGE_BYTES - used) // (len(drawn) - index)
        moving = _encoded(film(samples.grid, folder / "film.mp4", room * 3 // 4)) if samples.grid is not None else ""
        used += len(moving)
        shown.append({"card": samples.card, "film": moving, "picture": image})
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html.j2")
    return template.render(**content, plots=plots, samples=shown)


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _markdown(content: dict[str, Any], folder: Path) -> str:
    lines = [f"# {content['question']}", ""]
    lines += [f"Expected: {content['expect']}", ""] if content["expect"] else []
    lines += [f"**{content['missing']}**", ""] if content["missing"] else []
    for found in content["answers"]:
        lines += [f"- **{found.verdict}**: {found.claim.say}", *(f"  - {reason}" for reason in found.reasons)]
    lines += ["", content["note_claims"], ""]
    lines += [f"![{note}]({name})\n" for name, note in content["plot_notes"].items() if (folder / name).exists()]
    for table in content["tables"]:
        lines += [f"**{table['title']}**", "", *_markdown_table(table), ""]
    lines += [content["note_tables"], ""]
    lines += [f"![samples]({path.name})\n" for path in sorted(folder.glob("samples-*.png"))]
    lines += ["What was compared:", "", *_markdown_table(content["arms"]), "", content["note_arms"], ""]
    lines += ["```sh", content["commands"], "```", "", content["provenance"], ""]
    return "\n".join(lines)


def _markdown_table(table: dict[str, Any]) -> list[str]:
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in (table["headings"], *table["rows"])]
    marks = "".join(["|---", *["|--:"] * (len(rows[0]) - 1), "|"])
    written = [f"| {' | '.join(row)} |" for row in rows]
    return [written[0], marks, *written[1:]]

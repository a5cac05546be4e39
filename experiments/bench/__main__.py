"""``make bench``: the project's figures."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from anyflow.cli.common import Json, print_json
from anyflow.cli.main import main
from anyflow.errors import UserError
from anyflow.system.files import require_place

FIGURES = ("step", "order", "onpolicy", "stream", "loader", "latents", "tars", "start")
ON_DEMAND = ("memory", "import", "engines", "play", "drift")
"""Measured only when they are asked for: minutes, footage of the user's, or a package more."""


def bench(
    only: Annotated[
        str, typer.Option(help=f"Which, with commas: {', '.join(FIGURES)}; and {', '.join(ON_DEMAND)}.")
    ] = ",".join(FIGURES),
    data: Annotated[str, typer.Option(help="Dataset card of the loader's figure and of memory's.")] = "driving",
    footage: Annotated[Path | None, typer.Option(help="Folder of import's figure, in any format.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the plot of memory.")] = Path("runs/bench"),
    recipe: Annotated[str, typer.Option(help="Recipe of the start's figure.")] = "finetune/driving",
    batch_size: Annotated[int, typer.Option(help="Clips of a step.", min=2)] = 16,
    model: Annotated[
        str, typer.Option(help="Causal model of the stream's figure and of play's.")
    ] = "data/models/tiny-causal",
    chunks: Annotated[int, typer.Option(help="Chunks of the stream's figure.", min=8)] = 24,
    plot: Annotated[Path | None, typer.Option(help="A picture of the stream's figure to write (.png).")] = None,
    as_json: Json = False,
) -> None:
    """Measure training steps, streaming, the data and the start, each beside a plainer way of work or its limit.

    order: steps of four stages, with their FLOPs, passes and memory. memory: a decoding worker over 10 epochs. import:
    importing a folder of footage beside bare decoding. engines: an import and an encoding by this process, its pool and
    Ray workers (needs: pip install -e '.[cluster]'). play: what a person at the keyboard waits for, of a --model that
    is told controls. drift: how far a base in 8 or 4 bits moves from itself (needs: pip install -e '.[quantized]').

    \b
    Examples:
      python -m experiments.bench
      python -m experiments.bench --only step --batch-size 32
      python -m experiments.bench --only stream --model runs/tiny-causal-forward --plot stream.png
      python -m experiments.bench --only loader --data games --json
      python -m experiments.bench --only memory --out runs/bench
      python -m experiments.bench --only import --footage my-drives
      python -m experiments.bench --only engines
      python -m experiments.bench --only play --model data/models/tiny-world
    """
    wanted = [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in FIGURES + ON_DEMAND:
            raise UserError(f"--only {name!r} is not known: give some of {', '.join(FIGURES + ON_DEMAND)}")
    if "import" in wanted and footage is None:
        raise UserError("--only import needs --footage: name a folder of footage in any format that can be imported")
    require_place(out, "--out")
    if plot is not None:
        require_place(plot.parent, "--plot in")
    from anyflow.system.console import quiet_libraries

    quiet_libraries()
    results: dict[str, Any] = {}
    for name in wanted:
        if name == "stream":
            results[name] = _stream(model, chunks, plot)
        elif name == "play":
            from experiments.bench.play import play_benchmark

            results[name] = play_benchmark(model)
        else:
            results[name] = _measure(name, data, recipe, batch_size, footage, out)
        if not as_json:
            typer.echo("\n".join(_told(name, results[name])) + "\n")
    if as_json:
        print_json(results)


def _measure(name: str, data: str, recipe: str, batch_size: int, footage: Path | None, out: Path) -> dict[str, Any]:
    if name == "loader":
        from experiments.bench.loader import loader_benchmark

        return loader_benchmark(data)
    if name == "tars":
        from experiments.bench.tars import tars_benchmark

        return tars_benchmark(data)
    if name == "latents":
        from experiments.bench.latents import latents_benchmark

        return latents_benchmark()
    if name == "memory":
        from experiments.bench.worker_memory import memory_benchmark

        return memory_benchmark(data, out)
    if name == "engines":
        from experiments.bench.engines import engines_benchmark

        return engines_benchmark(data)
    if name == "import" and footage is not None:
        from experiments.bench.footage import import_benchmark, usual_options

        return import_benchmark(footage, usual_options())
    if name == "drift":
        from experiments.bench.drift import drift_benchmark

        return drift_benchmark()
    if name == "order":
        from experiments.bench.order import order_benchmark

        return order_benchmark()
    if name == "start":
        from experiments.bench.start import start_benchmark

        return start_benchmark(recipe)
    if name == "onpolicy":
        from experiments.bench.onpolicy import onpolicy_benchmark, role_weights

        return {"step": onpolicy_benchmark(), "weights": role_weights()}
    from experiments.bench.step import step_benchmark

    return {
        "prompts padded to 512 tokens": step_benchmark(batch_size=batch_size),
        "prompts without padding": step_benchmark(batch_size=batch_size, padded_length=0),
    }


def _stream(model: str, chunks: int, plot: Path | None) -> dict[str, Any]:
    from anyflow.evaluation.models import check_model, load_model, native_shape
    from experiments.bench.stream import plot_stream, stream_benchmark

    check_model(model)
    shape = native_shape(model, frames=None, height=None, width=None, fps=None)
    codec, backbone, shift = load_model(model)
    result = stream_benchmark(codec, backbone, shift, height=shape.height, width=shape.width, chunks=chunks)
    if plot is not None:
        plot_stream(result, plot)
    return result


def _told(name: str, result: dict[str, Any]) -> list[str]:
    """A figure in words."""
    if name == "loader":
        rates = f"{result['loader_clips_per_second']:.0f} clips/s, bare PyAV {result['pyav_clips_per_second']:.0f}"
        return [f"loader: {rates}: {result['ratio']:.2f} of it ({result['clips']} clips)"]
    if name == "latents":
        rates = f"{result['clips_per_second']:.0f} clips/s, bare reading {result['reading_clips_per_second']:.0f}"
        return [f"cached latents: {rates} ({result['bytes_per_clip']} bytes a clip, seconds of one core)"]
    if name == "tars":
        return _told_tars(result)
    if name == "memory":
        told = ", ".join(f"{size:.1f}" for size in result["mib"])
        slope = f"{result['slope_mib_per_epoch']:+.3f} MiB an epoch after the first"
        return [f"memory of a decoding worker: {slope} ({told} MiB; {result['plot']})"]
    if name == "import":
        limits = f"bare decoding {result['decoding_clips_per_second']:.0f}, with encoding "
        limits += f"{result['coding_clips_per_second']:.0f}"
        rates = f"{result['clips_per_second']:.0f} clips/s, {limits}: {result['ratio']:.2f} of that"
        return [f"import: {rates} ({result['clips']} clips, seconds of one core)"]
    if name == "start":
        parts = [f"  {seconds:6.2f} s  {part}" for part, seconds in result.items() if part != "total"]
        return [f"start: {result['total']:.1f} s from the command to the end of the first training step", *parts]
    if name == "stream":
        return _told_stream(result)
    if name in ("drift", "engines", "order", "play"):
        say: Callable[[dict[str, Any]], list[str]] = import_module(f"experiments.bench.{name}").told
        return say(result)
    if name == "onpolicy":
        return _told_onpolicy(result["step"], result["weights"])
    return [line for terms, figures in result.items() for line in _told_step(terms, figures)]


def _told_step(terms: str, result: dict[str, Any]) -> list[str]:
    """A step's figure in words: which prompts, how much faster, each way's cost."""
    faster, smaller = f"{result['speedup']:.2f}", f"1/{result['memory_ratio']:.2f}"
    lines = [
        f"step, {terms}: {faster} times as fast as the plain order of work, in {smaller} of its memory "
        f"({result['batch_size']} clips, {result['device']}, losses within {result['loss_difference']:.1e})"
    ]
    for way, facts in result["ways"].items():
        lines.append(
            f"  {way:<9} {facts['seconds']:7.3f} s  {facts['peak_bytes'] / 1e6:8.1f} MB  loss {facts['loss']:.6f}"
        )
    return lines


def _told_onpolicy(step: dict[str, Any], weights: list[dict[str, Any]]) -> list[str]:
    """The on-policy figures in words."""
    faster, smaller = f"{step['speedup']:.2f}", f"1/{step['memory_ratio']:.2f}"
    lines = [
        f"on-policy step: {faster} times as fast by backward simulation as by whole rollouts, in {smaller} of their "
        f"memory ({step['batch_size']} clips, {step['device']})"
    ]
    for way, facts in step["ways"].items():
        lines.append(f"  {way:<20} {facts['seconds']:7.3f} s  {facts['peak_bytes'] / 1e6:8.1f} MB")
    lines.append("weights of three roles on one base, beside three networks:")
    for held in weights:
        sizes = f"{held['one_base_bytes'] / 1e9:.3f} GB of {held['three_copies_bytes'] / 1e9:.3f} GB"
        lines.append(f"  {held['network']:<16} rank {held['rank']:<4} {held['ratio']:.3f} ({sizes})")
    return lines


def _told_tars(result: dict[str, Any]) -> list[str]:
    """The figures of somebody else's tars in words, each beside WebDataset's bare pipeline."""
    lines = [f"tars of {result['clips']} clips, read where they lie (the machine's load was {result['load']:.1f}):"]
    for place, ways in (("this disk", result["disk"]), ("an S3 server", result["s3"])):
        for way, rates in ways.items():
            rate = "cpu_clips_per_second" if "cpu_clips_per_second" in rates else "clips_per_second"
            unit = "clips a CPU second" if rate.startswith("cpu") else "clips/s"
            share = rates[rate] / ways["webdataset"][rate]
            lines.append(f"  {way:<11} from {place:<13} {rates[rate]:7.1f} {unit}, {share:.2f} of webdataset's")
    return lines


def _told_stream(result: dict[str, Any]) -> list[str]:
    """The stream's figures in words."""
    lines = [f"stream: {result['chunks']} chunks of {result['num_steps']} steps, decoded ({result['device']})"]
    for way, facts in result["ways"].items():
        growth = result["growth"][way]
        lines.append(
            f"  {way:<14} {facts['seconds'][-1]:7.3f} s  {facts['bytes'][-1] / 1e6:8.1f} MB  the last chunk; "
            f"since the middle x {growth['seconds']:.2f} time, x {growth['bytes']:.3f} memory"
        )
    return lines


if __name__ == "__main__":
    door = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    door.command()(bench)
    main(door)

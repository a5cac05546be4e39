"""Pieces and their state: what is done stays done until its recipe, data or start changes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from study import TEXT, invent_curve, invent_training, write_study

from anyflow.errors import UserError
from anyflow.experiment import curves, execute, together
from anyflow.experiment.children import PROGRESS
from anyflow.experiment.pieces import Piece, curve_settings
from anyflow.experiment.tasks import left, select, tasks_of

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings and curves that take no time; the list says in which order they were done."""
    order: list[str] = []

    def train(piece: Piece, *_: Any) -> str:
        order.append(piece.name)
        if "broken" in piece.words[-1]:
            return "it is broken"
        invent_training(piece)
        return ""

    def evaluate(experiment: Any, piece: Piece, card: str, place: Any) -> None:
        order.append(f"{piece.name} on {card}")
        invent_curve(experiment, piece, card, lambda *_: 1.0)

    monkeypatch.setattr(execute, "_train", train)
    monkeypatch.setattr(execute, "_evaluate", evaluate)
    return order


def test_a_piece_has_its_folder_recipe_and_start(tmp_path: Path) -> None:
    _, pieces = write_study(tmp_path)
    names = [piece.name for piece in pieces]
    assert names[:5] == ["base-0", "plain-0-driving", "plain-0-games", "more-0-driving", "more-0-games"]
    assert len(names) == 15 and names[5] == "base-1"
    more = pieces[4]
    assert more.recipe is not None and more.needs == ("plain-0-games",)
    assert more.recipe.model.weights == str(tmp_path / "runs" / "study" / "plain-0-games" / "model")
    assert more.recipe.data.card == ["games"] and more.recipe.sampling.prompts == 0
    assert (more.recipe.run.seed, more.recipe.run.experiment) == (0, "study")
    assert pieces[0].cards == ("driving", "games") and pieces[0].recipe is None


def test_arms_and_seeds_bring_what_they_need(tmp_path: Path) -> None:
    experiment, pieces = write_study(tmp_path)
    chosen = select(experiment, pieces, ["more"], [1])
    assert [piece.name for piece in chosen] == [
        f"{arm}-1-{card}" for arm in ("plain", "more") for card in ("driving", "games")
    ]
    with pytest.raises(UserError, match="--only les"):
        select(experiment, pieces, ["les"], [])
    with pytest.raises(UserError, match="--seeds 7"):
        select(experiment, pieces, [], [7])


def test_what_is_missing_is_done_once(tmp_path: Path, done: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    experiment, pieces = write_study(tmp_path)
    chosen = select(experiment, pieces, [], [0])
    assert execute.run_pieces(experiment, chosen) == {}
    assert done[:4] == ["base-0 on driving", "base-0 on games", "plain-0-driving", "plain-0-driving on driving"]
    assert len(done) == 10
    tasks = tasks_of(experiment, pieces)
    assert sum(task.state == "done" for task in tasks) == 10 and sum(task.state == "missing" for task in tasks) == 20
    assert left(tasks, str) == f"20 to go, about {8 * 40.0 + 12 * 10.0}"
    assert left(tasks, str, at_once=4) == f"20 to go, about {(8 * 40.0 + 12 * 10.0) / 4}"
    execute.run_pieces(experiment, chosen)
    assert len(done) == 10 and "nothing to do" in capsys.readouterr().err


def test_what_has_changed_is_done_again_and_kept(
    tmp_path: Path, done: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, pieces = write_study(tmp_path)
    execute.run_pieces(experiment, select(experiment, pieces, [], [0]))
    done.clear()
    longer = TEXT.replace("consistency_share=0]", "consistency_share=0, optimizer.lr=3e-4]")
    experiment, pieces = write_study(tmp_path, longer)
    states = {
        task.title: (task.state, task.reason) for task in tasks_of(experiment, select(experiment, pieces, [], [0]))
    }
    assert states["plain-0-games: train 20 steps"] == ("changed", "optimizer.lr was 0.001 and is 0.0003")
    assert states["more-0-games: train 20 steps"] == ("changed", "it starts from plain-0-games")
    assert states["base-0: evaluate on games"] == ("done", "")
    execute.run_pieces(experiment, select(experiment, pieces, ["plain"], [0]))
    assert "plain-0-driving" in done and "more-0-driving" not in done
    assert (tmp_path / "runs" / "study" / "replaced" / "plain-0-driving-1" / "recipe.yaml").is_file()
    assert "optimizer.lr was" in capsys.readouterr().err


def test_other_data_and_another_start_change_a_training(tmp_path: Path, done: list[str]) -> None:
    experiment, pieces = write_study(tmp_path)
    chosen = select(experiment, pieces, ["more"], [0])
    execute.run_pieces(experiment, chosen)
    chosen[0].run.note(data="0123")
    states = {task.title: (task.state, task.reason) for task in tasks_of(experiment, chosen)}
    assert states["plain-0-driving: train 20 steps"] == ("changed", "data is another one")
    (chosen[1].run.model / "weights.safetensors").write_text("other")
    states = {task.title: (task.state, task.reason) for task in tasks_of(experiment, chosen)}
    assert states["more-0-games: train 20 steps"] == ("changed", "start is another one")
    assert states["plain-0-games: evaluate on games"][0] == "changed"


def test_a_cut_training_goes_on(tmp_path: Path, done: list[str]) -> None:
    experiment, pieces = write_study(tmp_path)
    chosen = select(experiment, pieces, ["plain"], [0])
    execute.run_pieces(experiment, chosen)
    chosen[0].run.note(state="running", train_seconds=30.0)
    tasks = tasks_of(experiment, chosen)
    assert (tasks[0].state, tasks[0].seconds) == ("cut", 10.0)
    assert tasks[1].state == "missing"  # what it will be measured as is not known yet


def test_a_failure_leaves_the_others(tmp_path: Path, done: list[str]) -> None:
    experiment, pieces = write_study(tmp_path, TEXT.replace("consistency_share=0]", "consistency_share=0, run.out=x]"))
    broken = [
        piece if piece.arm != "plain" else Piece(**{**vars(piece), "words": (*piece.words, "broken")})
        for piece in select(experiment, pieces, [], [0])
    ]
    failed = execute.run_pieces(experiment, broken)
    assert failed["plain-0-games"] == "it is broken" and failed["more-0-games"] == "it needs plain-0-games"
    assert "base-0 on games" in done


def test_one_process_at_a_time(tmp_path: Path, done: list[str]) -> None:
    from anyflow.system.locks import locked

    experiment, pieces = write_study(tmp_path)
    home = pieces[0].run.path.parent
    home.mkdir(parents=True)
    with locked(home / ".lock"), pytest.raises(UserError, match="another process"):
        execute.run_pieces(experiment, pieces)


def test_tasks_at_once_wait_for_what_they_need(tmp_path: Path, done: list[str]) -> None:
    experiment, pieces = write_study(tmp_path)
    assert execute.run_pieces(experiment, select(experiment, pieces, [], [0]), at_once=3) == {}
    assert len(done) == 4 + 6 and len(set(done)) == 10
    for card in ("driving", "games"):
        assert done.index(f"plain-0-{card}") < done.index(f"more-0-{card}") < done.index(f"more-0-{card} on {card}")
    assert {task.state for task in tasks_of(experiment, select(experiment, pieces, [], [0]))} == {"done"}


def test_a_training_that_all_others_wait_for_has_the_machine(
    tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, str] = {}
    train = execute._train

    def note(piece: Piece, children: Any, place: Any, say: Any) -> str:
        threads[piece.name] = place.environment["OMP_NUM_THREADS"]
        return train(piece, children, place, say)

    monkeypatch.setattr(execute, "_train", note)
    monkeypatch.setattr(together, "_processors", lambda: 8)
    text = TEXT.replace("cards: [driving, games]", "cards: [driving]").replace(
        "  base: {folder: data/models/tiny}\n", ""
    )
    experiment, pieces = write_study(tmp_path, text.replace("before: base\n", ""))
    execute.run_pieces(experiment, select(experiment, pieces, [], [0]), at_once=4)
    assert threads["plain-0-driving"] == "8"  # more-0 starts from it
    assert threads["more-0-driving"] == "2"  # beside the other's curve
    threads.clear()
    execute.run_pieces(experiment, select(experiment, pieces, ["plain"], [1, 2]), at_once=4)
    assert set(threads.values()) == {"2"}


def test_places_share_the_gpus_and_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    found = together.places(4)
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in found] == ["3", "5", "3", "5"]
    assert int(found[0].environment["OMP_NUM_THREADS"]) >= 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" not in together.places(1)[0].environment


@pytest.mark.parametrize("error", [UserError("no clips"), RuntimeError("out of memory\nwhere it was")])
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_curve_that_fails_leaves_the_others(
    tmp_path: Path, done: list[str], monkeypatch: Any, error: Exception, at_once: int
) -> None:
    """Also those of models that start from its own."""
    evaluate = execute._evaluate

    def fails_once(experiment: Any, piece: Piece, card: str, place: Any) -> None:
        if (piece.name, card) == ("plain-0-games", "games"):
            raise error
        evaluate(experiment, piece, card, place)

    monkeypatch.setattr(execute, "_evaluate", fails_once)
    experiment, pieces = write_study(tmp_path)
    failed = execute.run_pieces(experiment, pieces, at_once)
    assert failed == {"plain-0-games on games": str(error).splitlines()[0]}
    assert [task.name for task in tasks_of(experiment, pieces) if not task.is_done] == ["plain-0-games on games"]


def test_a_place_keeps_its_process_and_tells_of_its_death() -> None:
    place = together.Place({"OMP_NUM_THREADS": "1", "SAID": "yes"}, threading.Lock())
    place.run(exec, 'import os; assert os.environ["SAID"] == "yes"')
    with pytest.raises(UserError, match="fewer --jobs"):
        place.run(os._exit, 1)
    place.run(exec, 'import os; assert os.environ["SAID"] == "yes"')
    place.close()


def test_each_prompt_may_be_sampled_from_several_noises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two pieces share a noise by accident, and one draw is what was measured before there were several."""
    asked: list[list[int]] = []

    def curve_of(backbone: Any, codec: Any, prompts: Any, how: Any, **options: Any) -> Any:
        asked.append(list(how.seeds))
        raise UserError("enough")

    monkeypatch.setattr("anyflow.evaluation.heldout.curve_of", curve_of)
    for draws, wanted in ((1, [[0], [1]]), (3, [[0, 1000, 2000], [1, 1001, 2001]])):
        text = TEXT.replace("prompts: 4", f"prompts: 4, draws: {draws}")
        experiment, pieces = write_study(tmp_path / str(draws), text)
        bases = [piece for piece in pieces if piece.arm == "base"][:2]
        for piece in bases:
            with pytest.raises(UserError, match="enough"):
                curves.measure_piece(experiment, piece, "driving")
        assert asked == wanted
        asked.clear()
        assert ("draws" in curve_settings(experiment, bases[0])) == (draws > 1)


@pytest.mark.parametrize(
    ("line", "tells"),
    [
        ("finetune  step 33/900  loss 0.7582  12.5 clips/s  9:16 left", True),
        ("encoding driving-full train  703/1500", True),
        ("sampling before  14/16  16 steps", True),
        ("the 3/4 of it that was left out", False),
    ],
)
def test_what_tells_where_a_training_is(line: str, tells: bool) -> None:
    assert bool(PROGRESS.search(line)) == tells

"""Who is answered and what: the guard, the one seat, and the stream as a page reads it."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import av
import drawn
import pytest
from drawn import DrawnRollout, make_player
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from anyflow.play.server import FILES, GONE, TAKEN, Site

PORT = 8123
HERE = f"http://127.0.0.1:{PORT}"


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    player, facts = make_player(tmp_path)
    return TestClient(Site(facts, player, lambda: False).app(PORT, drawn.TOKEN), base_url=HERE)


PATHS = [f"/{drawn.TOKEN}/{path}" for path in (*FILES, "wish", "stream")]


@pytest.mark.parametrize(
    "path", ["/", "/page.js", "/the-toke/", "/the-tokenx/", "/the-token%00/", "/THE-TOKEN/", "/ünlich/"]
)
def test_nothing_is_answered_without_the_token(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 403 and "lacks its token" in answer.text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": f"evil.example:{PORT}"},
        {"host": "127.0.0.1"},
        {"host": f"127.0.0.1:{PORT + 1}"},
        {"host": f"127.0.0.1.evil.example:{PORT}"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": f"http://evil.example:{PORT}"},
        {"origin": "null"},
        {"origin": f"https://127.0.0.1:{PORT}"},
        {"origin": f"http://localhost:{PORT}"},
        {"origin": f"http://127.0.0.1:{PORT + 1}"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ],
    ids=str,
)
def test_other_sites_and_names_are_refused(client: TestClient, path: str, method: str, headers: dict[str, str]) -> None:
    answer = client.request(method, path, headers=headers)
    assert answer.status_code == 403 and len(answer.text.splitlines()) == 1
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_two_hosts_are_none(client: TestClient) -> None:
    pairs = [(b"host", f"127.0.0.1:{PORT}".encode()), (b"host", b"evil.example")]
    assert client.get(PATHS[0], headers=pairs).status_code == 403


@pytest.mark.parametrize("host", [f"127.0.0.1:{PORT}", f"localhost:{PORT}", f"LOCALHOST:{PORT}"])
def test_the_page_is_served_and_locked_up(client: TestClient, host: str) -> None:
    origin = {"origin": f"http://{host}", "host": host}
    for path, name in FILES.items():
        answer = client.get(f"/{drawn.TOKEN}/{path}", headers=origin)
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert {"html": "text/html", "css": "text/css", "js": "javascript"}[name.split(".")[1]] in answer.headers[
            "content-type"
        ]
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert answer.headers["referrer-policy"] == "no-referrer" and answer.headers["cache-control"] == "no-store"
        assert "http:" not in answer.text.replace("http://127.0.0.1", "") and "https:" not in answer.text
        assert " style=" not in answer.text and " onclick=" not in answer.text


def test_a_link_in_a_chat_may_be_followed(client: TestClient) -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get(PATHS[0], headers=headers).status_code == 200


def test_no_website_may_ask_beforehand_and_no_websocket_opens(client: TestClient) -> None:
    assert client.options(PATHS[-2], headers={"access-control-request-method": "POST"}).status_code == 405
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(PATHS[-1]):
        pass


@pytest.mark.parametrize("body", [b"", b"[]", b"nope", b"\xff", b'"x"', b"[" * 5000, b"{}", b'{"seat": 1}'])
def test_a_malformed_wish_is_refused_in_words(client: TestClient, body: bytes) -> None:
    answer = client.post(PATHS[-2], content=body)
    assert answer.status_code == 400 and len(answer.text.splitlines()) == 1


def test_a_huge_wish_is_not_read_to_its_end(client: TestClient) -> None:
    assert client.post(PATHS[-2], content=b" " * 2**17).status_code == 413


def test_a_wish_without_a_stream(client: TestClient) -> None:
    wish = {"number": 1, "keys": [], "sticks": [0, 0], "sliders": {}, "steps": 2, "paused": False, "shown": 0, "run": 0}
    answer = client.post(PATHS[-2], json={**wish, "start": 0, "film": 0, "seat": 1})
    assert (answer.status_code, answer.text) == (409, GONE)


def test_it_listens_on_this_machine_alone(site: Any) -> None:
    with site() as served:
        for address in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)} - {"127.0.0.1"}:
            with pytest.raises(OSError):
                socket.create_connection((address, served.port), timeout=2)


# The stream -----------------------------------------------------------------------------------------------------------


def lines(stream: Any, kind: str) -> dict[str, Any]:
    """The next line of a kind."""
    while True:
        line = json.loads(stream.readline())
        if line["kind"] == kind:
            return line


def test_a_key_acts_in_the_next_chunk(site: Any) -> None:
    with site() as served, served.open() as stream:
        first = lines(stream, "chunk")
        assert (len(first["frames"]), first["run"], first["steps"]) == (1, 0, 2)
        served.tell(shown=1, keys=["ArrowLeft"])
        number = served.number
        second = lines(stream, "chunk")
        assert second["wish"] == number and len(second["frames"]) == 8
        assert second["values"][-1] == [10.0, -0.5] and second["seconds"] == 1.0
        served.tell(shown=2, steps=8)
        third = lines(stream, "chunk")
        assert third["steps"] == 8 and third["values"][-1] == [10.0, 0.0]


def test_no_chunk_is_made_for_a_page_that_shows_none(site: Any) -> None:
    with site() as served, served.open() as stream:
        lines(stream, "chunk")
        time.sleep(0.6)
        assert len(DrawnRollout.made) == 1


def test_a_second_page_is_told_so_and_takes_over_when_the_first_is_closed(site: Any) -> None:
    with site() as served:
        with served.open() as stream:
            lines(stream, "chunk")
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(served.address + "stream")
            assert (refused.value.code, refused.value.read().decode()) == (409, TAKEN)
            seat = served.facts["seat"]
            with pytest.raises(urllib.error.HTTPError) as refused:
                served.tell(seat=seat + 1, shown=1)
            assert (refused.value.code, refused.value.read().decode()) == (409, TAKEN)
            assert served.tell(shown=1) == 204
        deadline = time.monotonic() + 20
        while True:
            try:
                stream = served.open()
                break
            except urllib.error.HTTPError:
                assert time.monotonic() < deadline, "the seat stays taken"
                time.sleep(0.1)
        with stream:
            assert served.facts["seat"] == seat + 1 and lines(stream, "chunk")["number"] == 1


def test_a_new_beginning_from_another_frame(site: Any) -> None:
    with site() as served, served.open() as stream:
        assert [start["label"] for start in served.facts["starts"]] == ["clip 0", "clip 1", "clip 2"]
        lines(stream, "chunk")
        served.tell(shown=1, keys=["ArrowUp"])
        assert lines(stream, "chunk")["values"][-1][0] == 14.0
        served.tell(shown=1, run=1, start=2, paused=True)
        again = lines(stream, "chunk")
        assert again["run"] == 1 and len(again["frames"]) == 1 and again["values"] == [[10.0, 0.0]]


def test_a_film_is_whole_and_its_place_is_told(site: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with site() as served, served.open() as stream:
        lines(stream, "chunk")
        served.tell(shown=1, film=1)
        told = lines(stream, "film")
        assert told["is_recording"] and str(tmp_path / "film.mp4") in told["said"]
        lines(stream, "chunk")
        assert not (tmp_path / "film.mp4").exists()
        served.tell(shown=2, film=2)
        assert "recorded 8 frames" in lines(stream, "film")["said"]
        lines(stream, "chunk")
        for press in (3, 4):  # nothing is shown, so nothing is made meanwhile
            served.tell(shown=2, film=press)
            told = lines(stream, "film")
        assert told["said"] == "nothing was recorded"
    with av.open(str(tmp_path / "film.mp4")) as film:
        assert film.streams.video[0].average_rate == 8
        assert len(list(film.decode(video=0))) == 8
    assert str(tmp_path / "film.mp4") in capfd.readouterr().err
    assert not list(tmp_path.glob("*.partial"))


def test_a_page_that_is_closed_leaves_its_film(site: Any, tmp_path: Path) -> None:
    with site() as served:
        with served.open() as stream:
            lines(stream, "chunk")
            served.tell(shown=1, film=1)
            lines(stream, "film")
            lines(stream, "chunk")
        deadline = time.monotonic() + 20
        while not (tmp_path / "film.mp4").exists():
            assert time.monotonic() < deadline, "the film was not finished"
            time.sleep(0.1)
    with av.open(str(tmp_path / "film.mp4")) as film:
        assert len(list(film.decode(video=0))) == 8


def test_a_full_disk_costs_the_film_alone(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyflow.evaluation.report.mp4 import Mp4

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Mp4, "add", full)
    with site() as served, served.open() as stream:
        lines(stream, "chunk")
        served.tell(shown=1, film=1)
        assert lines(stream, "film")["is_recording"]
        ended = lines(stream, "film")
        assert not ended["is_recording"] and "the disk is full" in ended["said"]
        assert lines(stream, "chunk")["number"] == 2
        served.tell(shown=2, film=2)
        assert lines(stream, "chunk")["number"] == 3
    assert not list(tmp_path.glob("*.mp4*"))


def test_the_page_waits_while_the_model_is_loaded_and_hears_of_the_end(site: Any) -> None:
    with site(load=False) as served:
        stream = served.open()
        served.player._model, served.player.is_ready = object(), True
        assert lines(stream, "chunk")["number"] == 1
    assert lines(stream, "over")


def test_a_slow_model_is_told(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DrawnRollout, "seconds", 1.3)
    with site() as served, served.open() as stream:
        lines(stream, "chunk")
        served.tell(shown=1)
        slow = lines(stream, "chunk")
        assert slow["is_behind"] and 0 < slow["rate"] < 8 and slow["seconds"] > 1.2


def test_what_serves_the_page_comes_with_mlflow() -> None:
    """No dependency of our own: if MLflow ever drops it, this says what to declare."""
    brought = [line.partition(";") for line in requires("mlflow-skinny") or []]
    always = {name.split("<")[0].split(">")[0].strip() for name, _, condition in brought if "extra" not in condition}
    assert {"starlette", "uvicorn"} <= {name.split("[")[0].split("!")[0].split("=")[0] for name in always}

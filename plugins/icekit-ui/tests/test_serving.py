"""The server, asked over HTTP as a browser asks, and as somebody asks who is after other files."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from icekit_ui import serving, ui
from icekit_ui.serving import Served, free_port, is_closed, is_this_machine
from PIL import Image

from icekit import InputError, load_settings

httpx = pytest.importorskip("httpx", reason="Gradio is not installed")
pytest.importorskip("gradio", reason="Gradio is not installed")

SECRET = "the secret words"
LIMIT = 2**20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with links out of it, and files beside it that are nobody's business."""
    place = tmp_path_factory.mktemp("ui")
    (place / "secret.txt").write_text(SECRET)
    run = place / "runs" / "photo"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    Image.new("RGB", (40, 32), "teal").save(run / "image.png")
    (run / "leak.txt").symlink_to(place / "secret.txt")
    (place / "runs" / "linked").symlink_to(place)
    return place


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "MAX_UPLOAD", LIMIT)
        with serving.serving(place / "runs", load_settings()) as served:
            yield served


@pytest.fixture(scope="module")
def config(served: Served) -> dict[str, Any]:
    return dict(httpx.get(f"{served.url}config").json())


def part(config: dict[str, Any], label: str) -> dict[str, Any]:
    [one] = [one for one in config["components"] if one.get("props", {}).get("label") == label]
    return dict(one)


def call(
    served: Served, config: dict[str, Any], label: str, event: str, data: list[Any], event_data: Any = None
) -> str:
    """What the page answers to an event, all of it. data: after the state of the session."""
    target = part(config, label)["id"]
    [number] = [
        one["id"] for one in config["dependencies"] if [target, event] in [list(pair) for pair in one["targets"]]
    ]
    session = f"session-{label}-{event}"
    asked = {"data": [None, *data], "fn_index": number, "session_hash": session, "event_data": event_data}
    base = f"{served.url}gradio_api/queue"
    assert httpx.post(f"{base}/join", json=asked).status_code == 200
    said = []
    with httpx.stream("GET", f"{base}/data", params={"session_hash": session}, timeout=60) as answer:
        for line in answer.iter_lines():
            said.append(line)
            if "process_completed" in line:
                break
    return "\n".join(said)


def test_the_page_is_there_and_loads_nothing_from_elsewhere(served: Served, config: dict[str, Any]) -> None:
    answer = httpx.get(served.url)
    assert answer.status_code == 200
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert served.url.startswith("http://127.0.0.1:")
    assert config["analytics_enabled"] is False


@pytest.mark.parametrize(
    "path",
    [
        "file=/etc/passwd",
        "gradio_api/file=/etc/passwd",
        "gradio_api/file%3D/etc/passwd",
        "/gradio_api/file=/etc/passwd",
        "gradio_api/file=../secret.txt",
        "gradio_api/file=..%2f..%2f..%2fetc%2fpasswd",
        "gradio_api/file=RUNS/photo/image.png",
        "gradio_api/file=RUNS/photo/leak.txt",
        "gradio_api/file=RUNS/linked/secret.txt",
        "gradio_api/file=RUNS/../secret.txt",
        "gradio_api/file=RUNS",
        "gradio_api/file=http://127.0.0.1:9/",
        "gradio_api/file/etc/passwd",
        "proxy=http://127.0.0.1:9/",
        "gradio_api/proxy=http://127.0.0.1:9/",
        "gradio_api/stream/x/y/0/playlist.m3u8",
        "static/../../../../../../etc/passwd",
        "static/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "gradio_api/component_server",
    ],
)
def test_no_file_is_handed_out(served: Served, place: Path, path: str) -> None:
    host, port = served.url.removeprefix("http://").rstrip("/").split(":")
    wanted = path.replace("RUNS", str(place / "runs"))
    with socket.create_connection((host, int(port)), timeout=30) as link:  # no client that tidies the path up
        link.sendall(f"GET /{wanted} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: link.recv(65536), b""))
    assert int(answer.split(b" ", 2)[1]) in (403, 404, 405)
    assert SECRET.encode() not in answer and b"root:" not in answer and b"PNG" not in answer


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "SECRET", "RUNS/photo/image.png", "RUNS/photo/leak.txt", "../secret.txt"]
)
def test_a_path_that_a_client_sends_is_not_opened(
    served: Served, config: dict[str, Any], place: Path, path: str
) -> None:
    wanted = path.replace("RUNS", str(place / "runs")).replace("SECRET", str(place / "secret.txt"))
    file = {"path": wanted, "meta": {"_type": "gradio.FileData"}, "orig_name": "photo.png"}
    said = call(served, config, "Drop a picture here, or click to choose one", "upload", [file])
    assert SECRET not in said and "root:" not in said and "Now find its objects" not in said
    assert '"success":false' in said or "has to be sent to the page" in said
    assert Path(place / "secret.txt").exists() and (place / "runs" / "photo" / "image.png").exists()


@pytest.mark.parametrize("name", ["../secret", "..", "linked", "/etc", "photo/../photo", {"a": 1}])
def test_a_run_outside_of_the_folder_is_not_opened(served: Served, config: dict[str, Any], name: Any) -> None:
    said = call(served, config, "Runs", "pick", [], {"pick": name, "run": name})
    assert "there is no run" in said


def test_a_picture_that_is_sent_is_read_by_icekits_own_reader(
    served: Served, config: dict[str, Any], tmp_path: Path
) -> None:
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "photo.webp")
    programs = {"photo.webp": "50 x 40 pixels", "photo.png": "is not an image that can be read"}
    for name, expected in programs.items():
        data = (tmp_path / "photo.webp").read_bytes() if name.endswith("webp") else b"%!PS-Adobe-3.0 EPSF-3.0\n"
        sent = httpx.post(f"{served.url}gradio_api/upload", files={"files": (name, data)})
        assert sent.status_code == 200
        [path] = sent.json()
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": name}
        said = call(served, config, "Drop a picture here, or click to choose one", "upload", [file])
        assert expected in said, said[-2000:]
        assert not Path(path).exists()  # it is the program's business no more
        assert httpx.get(f"{served.url}gradio_api/file={path}").status_code == 404


def test_what_is_too_large_is_refused(served: Served) -> None:
    for size in (LIMIT + 1, LIMIT + 2**20):
        sent = httpx.post(f"{served.url}gradio_api/upload", files={"files": ("photo.png", b"0" * size)})
        assert sent.status_code == 413


def test_others_may_not_ask(served: Served) -> None:
    port = served.url.rstrip("/").rpartition(":")[2]
    assert httpx.get(served.url, headers={"host": f"evil.example:{port}"}).status_code == 403
    assert httpx.get(served.url, headers={"origin": "http://evil.example"}).status_code == 403
    assert httpx.get(served.url, headers={"host": f"localhost:{port}"}).status_code == 200


def test_which_paths_are_closed() -> None:
    closed = ("/file=x", "//gradio_api/file=x", "/gradio_api/proxy=x", "/gradio_api/stream/x")
    open_ones = ("/", "/config", "/gradio_api/queue/join", "/gradio_api/upload", "/assets/x.js")
    assert [is_closed(one) for one in (*closed, *open_ones)] == [True] * 4 + [False] * 5


def test_where_it_listens(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = ("127.0.0.1", "localhost", "::1"), ("0.0.0.0", "192.168.1.2", "me.example")
    assert [is_this_machine(one) for one in (*here, *elsewhere)] == [True] * 3 + [False] * 3
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port} is taken"):
            free_port("127.0.0.1", port)
        monkeypatch.setattr(serving, "PORT", port)
        assert free_port("127.0.0.1", None) > port
    with pytest.raises(InputError, match="cannot listen on 203"):
        free_port("203.0.113.7", None)


def test_the_command_warns_where_others_can_reach_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: Any, **given: Any) -> None:
        raise InputError(json.dumps(given, default=str))

    monkeypatch.setattr(serving, "serving", stop)
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        done = CliRunner().invoke(ui, ["--host", host, "--runs", str(tmp_path), "--no-browser"])
        assert ("whoever reaches this machine can use it, without a password" in done.output) is warned

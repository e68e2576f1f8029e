"""The server of the page: where it listens, who may ask, and that it hands out no file."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from icekit import InputError, Settings
from icekit_ui import PORT

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from icekit_ui.studio import Studio

TRIES = 100
"""Ports that are tried, from ``PORT`` on."""
MAX_UPLOAD = 64 * 2**20
"""Largest picture file that a browser may send, bytes."""
CLOSED = (
    "file=",
    "file/",
    "proxy=",
    "stream/",
    "runs",
    "workflow",
    "deep_link",
    "vibe",
    "monitoring",
    "reload",
    "dev/",
)
"""What Gradio's server offers that the page does not need, above all files: every picture is in the page itself."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'self'; "
    "form-action 'self'"
)
"""What the browser may load: nothing from elsewhere. Gradio's templates are compiled in the browser."""


class Guard:
    """Stands before Gradio: refuses hosts that are not this one, and whatever hands out files.

    hosts: the names by which the page may be asked for; None: any. A page of another site whose name is made to point
    to this machine asks by its own name.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.hosts is not None and _host_of(headers.get("host", "")) not in self.hosts:
            await _refuse(send, scope, 403, "this page is for its own machine")
            return
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower():
            await _refuse(send, scope, 403, "this page takes no orders from others")
            return
        if is_closed(scope["path"]):
            await _refuse(send, scope, 404, "no file is served here")
            return
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_UPLOAD + 2**16:
            await _refuse(send, scope, 413, f"at most {MAX_UPLOAD // 2**20} MiB")
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, receive, with_policy)


def is_closed(path: str) -> bool:
    """Whether a path is of what is not offered, however it is written."""
    parts = path.lstrip("/")
    for prefix in ("gradio_api/", ""):
        if any(parts.removeprefix(prefix).startswith(closed) for closed in CLOSED):
            return True
    return False


def _host_of(value: str) -> str:
    """A host's name without its port."""
    if value.startswith("["):
        return value.partition("]")[0] + "]"
    return value.rpartition(":")[0].lower() if ":" in value else value.lower()


async def _refuse(send: Send, scope: Scope, status: int, why: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = why.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def is_this_machine(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_port(host: str, port: int | None) -> int:
    """The port, if one was asked for and is free; else the first free one.

    Raises:
        InputError: it is taken, or there is no such address.
    """
    for candidate in [port] if port is not None else range(PORT, PORT + TRIES):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                if error.errno == errno.EADDRINUSE and port is None:
                    continue
                if error.errno == errno.EADDRINUSE:
                    raise InputError(f"--port {port} is taken: leave it out, and a free one is found") from error
                raise InputError(f"cannot listen on {host}, port {candidate}: {error.strerror or error}") from error
            return candidate
    raise InputError(f"the ports {PORT} to {PORT + TRIES - 1} are all taken: give a free one by --port")


@dataclass(frozen=True)
class Served:
    """A page that is being served. url: its address."""

    url: str
    studio: Studio


@contextlib.contextmanager
def serving(runs: Path, settings: Settings, *, host: str = "127.0.0.1", port: int | None = None) -> Iterator[Served]:
    """Serve the page for the length of the block, in a thread beside it.

    Raises:
        InputError: the folder, the settings or the address are wrong.
    """
    from icekit_ui.runs import Runs
    from icekit_ui.studio import Studio

    folder = Runs(runs)
    port = free_port(host, port)
    # Gradio reads these when it is imported: nobody is told of anything, and uploads have a folder of their own.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with tempfile.TemporaryDirectory(prefix="icekit-ui-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        import gradio as gr
        from starlette.middleware import Middleware

        from icekit_ui.page import FILES, Page

        studio = Studio(folder, settings)
        page = Page(studio, Path(uploads)).blocks()
        hosts = frozenset({"127.0.0.1", "localhost", "[::1]", host.lower()}) if is_this_machine(host) else None
        guard: Any = Middleware(Guard, hosts=hosts)
        plain = ("system-ui", "sans-serif")
        shown = f"[{host}]" if ":" in host else host
        try:
            page.launch(
                server_name=shown,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inbrowser=False,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                strict_cors=True,
                allowed_paths=[],
                blocked_paths=[str(folder.folder)],
                max_file_size=MAX_UPLOAD,
                state_session_capacity=200,
                app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None, "openapi_url": None},
                theme=gr.themes.Default(font=plain, font_mono=("ui-monospace", "monospace")),
                css_paths=[FILES / "page.css"],
            )
            yield Served(f"http://{shown}:{port}/", studio)
        finally:
            studio.close()
            page.close(verbose=False)


def serve(runs: Path, settings: Settings, *, host: str, port: int | None, browser: bool) -> None:
    """Serve the page until Ctrl-C."""
    if not is_this_machine(host):
        click.echo(
            f"icekit: warning: the page listens on {host}: whoever reaches this machine can use it, without a "
            f"password, and see the runs in {runs}",
            err=True,
        )
    with serving(runs, settings, host=host, port=port) as served:
        click.echo(served.url)
        click.echo("Ctrl-C ends it; what is being done then goes on by `Go on` another time.", err=True)
        sys.stdout.flush()
        if browser:
            webbrowser.open(served.url)
        import threading

        threading.Event().wait()

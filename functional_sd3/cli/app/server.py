"""The server of the page: a socket that is bound first, Gradio's app behind the guard, and its end."""

import asyncio
import contextlib
import errno
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fastapi
import gradio
import uvicorn

from functional_sd3.cli.app import calls, view
from functional_sd3.cli.app.guard import Guard
from functional_sd3.cli.app.limits import Limits
from functional_sd3.cli.app.sharing import is_loopback

_FRAME = 2**20
"""Bytes of an upload beside its file."""
_ANY = ("0.0.0.0", "::", "")


class Running(NamedTuple):
    """A server in a thread of its own."""

    url: str
    thread: threading.Thread
    server: uvicorn.Server

    def wait(self) -> None:
        """Return when the server has ended; Ctrl-C is raised here."""
        while self.thread.is_alive():
            self.thread.join(0.5)


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to an address. Raises ValueError, with the flag, where it cannot be."""
    address = host.strip("[]")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((address, port))
        except PermissionError:
            raise ValueError(f"--port {port} is the system's: choose one from 1024 to 65535") from None
        except socket.gaierror:
            raise ValueError(f"--host {host} is no address of this machine") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"--port {port} is taken by another program; --port 0 takes a free one") from None
            raise ValueError(f"--host {host} --port {port}: {error.strerror or error}") from None
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def running(page: gradio.Blocks, bound: socket.socket, folder: str, limits: Limits) -> Iterator[Running]:
    """The page served at a bound socket until the context ends; folder: of Gradio's files."""
    host, port = bound.getsockname()[:2]
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gradio.mount_gradio_app(
        app,
        page,
        "/",
        server_name=host,
        server_port=port,
        footer_links=["api"],
        run_history=False,
        root_path="",
        allowed_paths=[],
        blocked_paths=[],
        show_error=True,
        max_file_size=limits.upload * 2**20,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=view.CSS,
    )
    _close_event_loop()
    # A mounted page does not check that files were uploaded unless it believes that it was launched.
    page.has_launched = True
    page.is_running = True

    full = (
        f"{limits.waiting} requests wait already, the limit (--max-queue {limits.waiting} of functional-sd3 app): "
        "try again later"
    )
    hosts = {"127.0.0.1", "localhost", "::1", host} if is_loopback(host) else None
    guard: Any = Guard(
        app, folder=Path(folder), hosts=hosts, body=limits.upload * 2**20 + _FRAME, problem=calls.checker(page),
        full=full,
    )  # fmt: skip
    config = uvicorn.Config(guard, log_level="error", lifespan="on", ws="none", timeout_graceful_shutdown=1,
                            server_header=False)  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), name="functional-sd3 app: server", daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise ValueError("the server of the page did not start")
            time.sleep(0.01)
        shown = "127.0.0.1" if host in _ANY else f"[{host}]" if ":" in host else host
        yield Running(f"http://{shown}:{port}/", thread, server)
    finally:
        page.is_running = False
        page._queue.close()
        server.should_exit = True
        thread.join(10)


def _close_event_loop() -> None:
    """Closes the event loop that Gradio makes for a thread where none runs, and neither uses nor closes."""
    loop = asyncio.get_event_loop()
    if not loop.is_running():
        loop.close()
        asyncio.set_event_loop(None)


def theme() -> gradio.themes.Base:
    """Gradio's default colours in the fonts of the system: none is fetched."""
    fonts = ("system-ui", "sans-serif")
    return gradio.themes.Default(font=fonts, font_mono=("ui-monospace", "monospace"))

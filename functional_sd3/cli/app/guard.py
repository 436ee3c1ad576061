"""Middleware that bounds Gradio's server: to the routes of the page, the names of this machine and uploaded files.

Gradio has more routes than the page (a proxy, a monitor, an editor of its own source, calls past the queue), downloads
URLs that a request calls files, and checks uploads only of apps that it launched itself. None of that depends on
its version here: what is not named below is refused before Gradio sees it.
"""

import json
import re
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from functional_sd3.formats.printable import shorten

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Message, Receive, Send], Awaitable[None]]

_API = "/gradio_api"
_GET = re.compile(
    rf"/|/config/?|/(assets|static|svelte)/.*|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon.*|"
    rf"{_API}/(info/?|openapi\.json|app_id|theme\.css|startup-events|upload_progress|queue/(data|status)|heartbeat/\w+|"
    rf"call/(v2/)?\w+/\w+|file=.+)",
    re.DOTALL,
)
_POST = re.compile(rf"{_API}/(upload|queue/join|cancel|reset/?|component_server/?|call/(v2/)?\w+)")
_JSON = re.compile(rf"{_API}/(queue/join|call/(v2/)?\w+)")
_MAX_JSON = 2**20
_POLICY = "; ".join(
    (
        "default-src 'self'", "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:", "worker-src 'self' blob:",
        "style-src 'self' 'unsafe-inline'", "img-src 'self' data: blob:", "font-src 'self' data:",
        "connect-src 'self' data: blob:", "frame-src 'self' blob:", "object-src 'none'", "base-uri 'self'",
        "form-action 'self'", "frame-ancestors 'self'",
    )
)  # fmt: skip
"""Policy by which the browser requests nothing from another machine, whatever a page of Gradio's names."""
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Refused(Exception):
    """A request that is not answered: its status and the words of the reply."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


class Guard:
    """An ASGI app before another, which sees only the requests that pass.

    folder: of the files that may be read: what was uploaded, and what the page made. hosts: names that the server may
    be called by, None for any. body: largest body in bytes. problem: "" or what is wrong with a call, of its path and
    JSON. full: the words for a call that finds the queue full.
    """

    def __init__(
        self,
        app: Asgi,
        *,
        folder: Path,
        hosts: Collection[str] | None,
        body: int,
        problem: Callable[[str, Any], str],
        full: str,
    ):
        self.app, self.folder, self.hosts, self.body = app, folder.resolve(), hosts, body
        self.problem, self.full = problem, full

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            self._check_route(scope)
            receive = self._counted(receive)
            if not _JSON.fullmatch(scope["path"]):
                return await self.app(scope, receive, _with_headers(send))
            receive = await self._checked_body(scope, receive)
            # Gradio alone knows whether the queue is full when the call joins it: of several at once one may be late.
            replied = _Unless503(_with_headers(send))
            await self.app(scope, receive, replied)
            if replied.is_full:
                raise Refused(503, self.full)
        except Refused as refused:
            await _reply(_with_headers(send), refused.status, str(refused))

    def _check_route(self, scope: Message) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = _host(headers.get(b"host", ""))
        if self.hosts is not None and host not in self.hosts:
            raise Refused(403, f"this server is none of {shorten(host)}: it answers to {', '.join(sorted(self.hosts))}")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != headers.get(b"host"):
            raise Refused(403, "pages of other sites may not use this server")
        path, method = scope["path"], scope["method"]
        routes = _GET if method in ("GET", "HEAD") else _POST if method == "POST" else None
        if routes is None or not routes.fullmatch(path):
            raise Refused(404, f"there is no {method} {shorten(path)} here")
        if path.startswith(f"{_API}/file="):
            self._check_file(unquote(path.removeprefix(f"{_API}/file=")))
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > self.body:
            raise Refused(413, f"a body of {shorten(length)} bytes is above the limit of {self.body:,} (--max-upload)")

    def _check_file(self, name: Any) -> None:
        """Raises Refused for anything but the path of a file in the folder."""
        try:
            inside = Path(name).resolve().is_relative_to(self.folder) and Path(name).is_absolute()
        except (TypeError, ValueError, OSError):
            inside = False
        if not inside:
            raise Refused(403, f"{shorten(repr(name))} is no file that was uploaded: upload it to {_API}/upload first")

    def _counted(self, receive: Receive) -> Receive:
        """`receive` that ends a body beyond the limit, also one without a length."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.body:
                raise Refused(413, f"the body is above the limit of {self.body:,} bytes (--max-upload)")
            return message

        return counted

    async def _checked_body(self, scope: Message, receive: Receive) -> Receive:
        """The same body again, after its files were checked."""
        content, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise Refused(400, "the request ended early")
            content, more = content + message.get("body", b""), message.get("more_body", False)
            if len(content) > _MAX_JSON:
                raise Refused(413, f"a request has more than {_MAX_JSON:,} bytes; images are uploaded first")
        try:
            data = json.loads(content)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is no JSON") from None
        for name in _paths(data):
            self._check_file(name)
        if words := self.problem(scope["path"], data):
            raise Refused(422, words)
        sent = False

        async def again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": content, "more_body": False}

        return again


def _paths(data: Any) -> Iterator[Any]:
    """The values of "path" anywhere in JSON: Gradio takes an object that has one for a file."""
    waiting = [data]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if part.get("path") is not None:
                yield part["path"]
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


class _Unless503:
    """`send` but for a reply of status 503, which is kept back."""

    def __init__(self, send: Send):
        self.send, self.is_full = send, False

    async def __call__(self, message: Message) -> None:
        self.is_full |= message["type"] == "http.response.start" and message["status"] == 503
        if not self.is_full:
            await self.send(message)


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name for name, _ in _HEADERS}
            kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in own]
            message = {**message, "headers": [*kept, *_HEADERS]}
        await send(message)

    return sent


async def _reply(send: Send, status: int, words: str) -> None:
    content = json.dumps({"detail": words, "error": words}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})

"""Watch over the processes of a run: when one dies or fails the others end at once and report which, and why.

Every process holds a connection to the first one. The system closes it when a process ends, however it does, so a
death is known at once, on any backend, while the others wait in a collective, which some backends never leave. A
process that raises sends its reason first; one that ends as all do reports that.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

_CONNECTING = 60.0
_GRACE = 3.0
"""Seconds that a failed collective waits for the word of the process whose end was its cause, and that a process has
to end by itself when another failed."""


class Loss(NamedTuple):
    """The end of a process: its rank, the step that this one had done, None before the first, and the reason that it
    gave, None where it gave none, as when it is killed."""

    rank: int
    step: int | None
    reason: str | None


class Watch:
    """This process's end of the watch; all processes of a group make one together.

    on_loss: called once, in a thread, when another process was lost; it should end this process.
    """

    def __init__(self, on_loss: Callable[[Loss], None]) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._on_loss, self._is_closed = on_loss, False
        self._lost, self._leaving = threading.Event(), threading.Event()
        self._loss: Loss | None = None
        self._step: int | None = None
        self._peers: dict[int, socket.socket] = _connect(self.rank, self.count)
        self._sending = threading.Lock()
        threading.Thread(target=self._listen, daemon=True, name="watch").start()

    def reached(self, step: int) -> None:
        """Note that this process has done a step, for `Loss.step`."""
        self._step = step

    def close(self) -> None:
        """End the watch: this process ends as all do."""
        self._is_closed = True
        self._leaving.set()
        for rank in list(self._peers):
            self._send(rank, {"bye": True})
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    def failed(self, error: BaseException) -> None:
        """Tell the others why this process ends before them.

        Where the error is that of a collective, whose cause is the end of another process, this one is ended first.
        """
        if isinstance(error, RuntimeError) and self._lost.wait(_GRACE) and self._loss is not None:
            self._on_loss(self._loss)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        for rank in list(self._peers):
            self._send(rank, {"lost": self.rank, "reason": reason})
        self.close()

    def _listen(self) -> None:
        waiting = selectors.DefaultSelector()
        received = dict.fromkeys(self._peers, b"")
        for rank, peer in self._peers.items():
            waiting.register(peer, selectors.EVENT_READ, rank)
        while received and not self._is_closed:
            for key, _ in waiting.select(1.0):
                rank = key.data
                try:
                    data = self._peers[rank].recv(4096)
                except OSError:
                    data = b""
                *messages, rest = (received[rank] + data).split(b"\n")
                received[rank] = rest
                is_done = not data
                for message in map(json.loads, messages):
                    is_done |= self._take(message)
                if not data and rank in received and not self._is_closed:
                    self._tell(rank, None)
                if is_done:
                    waiting.unregister(key.fileobj)
                    received.pop(rank)

    def _take(self, message: dict[str, Any]) -> bool:
        """Act on a message; True if it is the last of its process."""
        if "lost" in message:
            self._tell(message["lost"], message["reason"])
        return "bye" in message

    def _tell(self, rank: int, reason: str | None) -> None:
        """Say on all processes that one was lost: the first one passes on what it learns."""
        if self._lost.is_set() or self._is_closed:
            return
        self._loss = Loss(rank, self._step, reason)
        self._lost.set()
        if self.rank == 0:
            for other in self._peers:
                self._send(other, {"lost": rank, "reason": reason})
        # Where all raise the same each reports its own; what waits in a collective does not.
        if reason is None or not self._leaving.wait(_GRACE):
            self._on_loss(self._loss)

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._peers[rank].sendall(json.dumps(message).encode() + b"\n")


def _connect(rank: int, count: int) -> dict[int, socket.socket]:
    """Connections: of the first process with each other one, of the others with the first. All call it together."""
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE", str(count)) == str(count)
    place: list[Any] = [None]
    if rank == 0:
        server = socket.create_server(("127.0.0.1" if is_one_machine else "", 0), backlog=count)
        server.settimeout(_CONNECTING)
        host = "127.0.0.1" if is_one_machine else os.environ.get("MASTER_ADDR", socket.gethostname())
        place = [(host, server.getsockname()[1], secrets.token_hex(16))]
    dist.broadcast_object_list(place, 0)
    host, port, secret = place[0]
    if rank:
        peer = socket.create_connection((host, port), _CONNECTING)
        peer.sendall(f"{secret} {rank:8d}\n".encode())
        return {0: _kept(peer)}
    peers: dict[int, socket.socket] = {}
    with server:
        while len(peers) < count - 1:
            peer, _ = server.accept()
            peer.settimeout(_CONNECTING)
            words = peer.makefile("rb", buffering=0).readline(64).decode("ascii", "replace").split()
            if len(words) == 2 and secrets.compare_digest(words[0], secret):
                peers[int(words[1])] = _kept(peer)
            else:
                peer.close()
    return peers


def _kept(peer: socket.socket) -> socket.socket:
    """The connection, which is known to be broken half a minute after the other machine is lost."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer

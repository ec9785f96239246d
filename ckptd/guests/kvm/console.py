"""The console's socket: clients type, and get what was released. A unix stream socket; several clients may come.

What is typed goes to the guest at once, since taking it back costs nobody anything. What the guest says comes here only
after its release, and after it went to the output file; a client that comes late has missed what came before. One that
does not read is disconnected rather than waited for. Input beyond what the console holds is left in the socket.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

from ckptd.guests.kvm.devices import Console
from ckptd.guests.kvm.gate import KvmGate
from ckptd.guests.process.wire import socket_address

__all__ = ["ConsoleServer"]

_MAX_CLIENTS = 16


class ConsoleServer:
    """Bound at `listen`; until then it has no descriptors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener: socket.socket | None = None
        self._clients: dict[int, socket.socket] = {}
        self._crowded = False  # the guest does not fetch: nobody is listened to

    def listen(self) -> None:
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with socket_address(self._path) as address:
            listener.bind(address)
        self._path.chmod(0o600)
        listener.listen(_MAX_CLIENTS)
        self._listener = listener

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)

    @property
    def descriptors(self) -> list[int]:
        """What to wait for."""
        if self._listener is None:
            return []
        return [self._listener.fileno(), *(() if self._crowded else self._clients)]

    def serve(self, ready: list[int], console: Console, gate: KvmGate) -> bool:
        """Take clients and their input, pass on what was released. True: there is new input."""
        if self._listener is not None and self._listener.fileno() in ready:
            self._accept(self._listener)
        typed = False
        for fd in ready:
            if fd in self._clients and console.room:
                typed |= self._read(fd, console)
        self._crowded = console.room == 0
        self._pass_on(gate)
        return typed

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            client, _ = listener.accept()
            if len(self._clients) >= _MAX_CLIENTS:
                client.close()
                return
            client.setblocking(False)
            self._clients[client.fileno()] = client

    def _read(self, fd: int, console: Console) -> bool:
        try:
            data = self._clients[fd].recv(console.room)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._drop(fd)
        console.typed(data)
        return bool(data)

    def _pass_on(self, gate: KvmGate) -> None:
        data = gate.unsent()
        if not data:
            return
        for fd, client in list(self._clients.items()):
            try:
                whole = client.send(data) == len(data)
            except OSError:
                whole = False
            if not whole:
                self._drop(fd)
        gate.passed_on(len(data))

    def _drop(self, fd: int) -> None:
        self._clients.pop(fd).close()

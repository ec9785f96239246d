"""The gate's place in a chardev: its backend is changed to a socket of ours, and to a plain file when we leave.

`chardev-change` is one step of QEMU's main loop, under the lock that devices write with, so no byte falls between two
backends. A virtio console can be changed only while the guest runs (QEMU takes its handlers away at each stop), a
serial port at any time. What frontends do with a socket that is full: a serial port keeps its byte and tries again, a
virtserialport waits, and a virtconsole drops; QEMU's main loop waits for none of them.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ckptd.errors import GuestError
from ckptd.guests.process.output import append
from ckptd.guests.qemu import filters
from ckptd.guests.qemu.cmdline import parse
from ckptd.guests.qemu.gate import Holder
from ckptd.guests.qemu.qmp import Monitor, QmpError
from ckptd.guests.qemu.streams import Stream

__all__ = ["Chardevs", "refused"]

_NAME, _OPAQUE = "ckptd-chardev-", "ckptd"
_BUFFER = 4 << 20  # bytes; a write takes 768 of them and more, and a virtconsole drops what finds no room
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
_CONNECTED = ("unix:", "tcp:", "telnet:", "tn3270:", "websocket:", "vsock:", "fd:")
_TWO_WAY = ("spicevmc", "spiceport", "qemu-vdagent", "dbus", "msmouse", "wctablet", "braille", "hub", "testdev")


def refused(label: str, filenames: Mapping[str, str], monitors: Iterable[str]) -> str:
    """Why a chardev cannot be held, and the cure; empty if it can. `filenames`: what QEMU has, by label. Pure."""
    name = f"The chardev {label}"
    filename = filenames.get(label)
    if filename is None:
        return f"QEMU has no chardev {label}: it has {', '.join(sorted(filenames)) or 'none'}."
    if filters.is_ours(label):
        return f"{name} is ckptd's own."
    if label in monitors or label.startswith("compat_monitor"):
        return f"{name} is a monitor's: name the chardev of a serial port or a virtio console."
    if filename == "mux":
        return f"{name} is a mux, which QEMU cannot change: give the serial port a chardev of its own."
    if filename in _TWO_WAY:
        return f"{name} is {filename}, which talks with the host's side: ckptd holds output only."
    if filename.startswith(_CONNECTED):
        return f"A client is connected to the chardev {label} ({filename}), and would be cut off: end it first."
    return ""


class Chardevs:
    """The chardevs of one QEMU that are held. `spare`: a directory for what cannot be written elsewhere at the end."""

    def __init__(self, monitor: Monitor, holder: Holder, files: Mapping[str, Path], spare: Path) -> None:
        self._monitor, self._holder, self._files, self._spare = monitor, holder, files, spare
        self._fdsets: list[int] = []
        self._changed: list[tuple[Stream, Path, int]] = []  # with the bytes of the file when QEMU got it

    def __bool__(self) -> bool:
        return bool(self._files)

    def check(self, argv: Sequence[str]) -> None:
        """Before anything is changed. Raises GuestError."""
        if not self._files:
            return
        monitors = {str(option.pairs.get("chardev", "")) for option in parse(argv[1:]) if option.name == "mon"}
        filenames = {one["label"]: str(one["filename"]) for one in self._monitor.execute("query-chardev")}
        if why := [said for label in self._files if (said := refused(label, filenames, monitors))]:
            raise GuestError("this QEMU's chardevs cannot be held: " + " ".join(why), hint="change guest.chardevs")

    def enter(self) -> None:
        """While the guest runs, or a virtio console refuses. Raises GuestError."""
        for number, (label, path) in enumerate(self._files.items()):
            self._holder.add_stream(label, self._change(f"{_NAME}{number}", label), path)

    def _change(self, name: str, label: str) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                _enlarge(theirs)
                self._monitor.execute("getfd", {"fdname": name}, [theirs.fileno()])
                self._monitor.execute("chardev-change", {"id": label, "backend": {"type": "socket", "data": {
                    "addr": {"type": "fd", "data": {"str": name}}, "server": False,
                }}})  # fmt: skip
        except QmpError as error:
            ours.close()
            with suppress(QmpError):
                self._monitor.execute("closefd", {"fdname": name})
            raise GuestError(
                f"the output of the chardev {label} cannot be held: {error.reason}",
                hint="serial ports (isa-serial, pci-serial) and, while the guest runs, virtio consoles can be held",
            ) from error
        except BaseException:
            ours.close()
            raise
        return ours

    def leave(self) -> bool:
        """QEMU goes on with each file by itself; False: for some of them the guest must run."""
        changed = {stream.label for stream, _, _ in self._changed}
        left = [stream for stream in self._holder.streams if stream.label not in changed and stream.open]
        return all([self._to_file(stream) for stream in left])

    def _to_file(self, stream: Stream) -> bool:
        path = stream.path
        try:
            if stream.trouble:
                path = self._spare / f"{stream.label.replace('/', '_')}.output"
                append(path, self._holder.rest(stream))
                print(f"{stream.trouble}: its output goes to {path}", file=sys.stderr, flush=True)
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except (GuestError, OSError) as error:
            print(f"the output of {stream.label} is lost from here on: {error}", file=sys.stderr, flush=True)
            return True
        try:
            size = os.fstat(fd).st_size
            number = int(self._monitor.execute("add-fd", {"opaque": _OPAQUE}, [fd])["fdset-id"])
            self._fdsets.append(number)
            self._monitor.execute("chardev-change", {"id": stream.label, "backend": {"type": "file", "data": {
                "out": f"/dev/fdset/{number}", "append": True,
            }}})  # fmt: skip
        except QmpError:
            return False
        finally:
            os.close(fd)
        self._changed.append((stream, path, size))
        return True

    def finish(self) -> None:
        """With the guest stopped: what came to us just before the change goes before what QEMU has written since."""
        for stream, path, size in self._changed:
            data = self._holder.rest(stream)
            if data:
                with open(path, "r+b", buffering=0) as file:
                    file.seek(size)
                    later = file.read()
                    file.seek(size)
                    file.write(data + later)
        self._changed.clear()

    def forget(self) -> None:
        """The descriptors; QEMU keeps copies of those it writes to."""
        for number in self._fdsets:
            with suppress(QmpError):
                self._monitor.execute("remove-fd", {"fdset-id": number})
        self._fdsets.clear()


def _enlarge(sock: socket.socket) -> None:
    """As far as we may: beyond the system's limit only with CAP_NET_ADMIN."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)

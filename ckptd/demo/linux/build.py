"""Builds the Linux guest into a folder, once: a second build finds it whole, and a broken one is built again."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckptd.demo.linux import packages
from ckptd.demo.linux.archive import Entry, pack
from ckptd.demo.linux.programs import PROGRAMS, assemble
from ckptd.errors import ConfigError

__all__ = ["LinuxGuest", "build", "default_folder"]

Say = Callable[[str], None]

_MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "virtio_console")
_SOURCES = Path(__file__).parent
_RECORD = "guest.json"  # written last: with it the guest is whole
_ASIDE = ".aside-"

_KERNEL_OPTIONS = (
    "console=ttyS0",
    "quiet",
    "panic=-1",
    # No tests of ciphers that nobody uses: a tenth of the whole boot.
    "cryptomgr.notests",
    # On a busy host QEMU's timers are late while the kernel boots. It then may find that its timer does not work, and
    # give up; or take the processor for a slower one, so that time in the guest runs fifty times too fast. So: no test
    # of the timer, and the time from the HPET, whose speed is known. It stands still while the guest is stopped, and is
    # the same on a host with another processor. Under KVM the kernel goes by KVM's clock all the same.
    "no_timer_check",
    "tsc=unstable",
)


@dataclass(frozen=True, slots=True)
class LinuxGuest:
    """A guest that has been built."""

    folder: Path

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd.gz"

    def command_line(
        self,
        *,
        ips: Sequence[str] = (),
        gateway: str | None = None,
        patterns: int | tuple[int, int] | None = None,
        dirty: tuple[int, int] | None = None,
        spin: bool = False,
        say: int = 0,
        shell: bool = False,
        extra: Sequence[str] = (),
    ) -> str:
        """The kernel's command line.

        ips        addresses with their prefix, of eth0, eth1 and so on; else that which QEMU's user networking expects
        gateway    or "none"; else that of QEMU's user networking
        patterns   MiB, or MiB and pages a second: pages that say what they are, checked and written anew
        dirty      pages a second and MiB: writes to pages that chance picks
        spin       whether a loop counts as fast as it can
        say        lines a second on ttyS0
        shell      whether there is one on ttyS0
        extra      words for the kernel itself
        """
        words = [*_KERNEL_OPTIONS]
        for number, address in enumerate(ips):
            words.append(f"ckptd.ip{number or ''}={address}")
        if gateway is not None:
            words.append(f"ckptd.gateway={gateway}")
        if patterns is not None:
            numbers = (patterns,) if isinstance(patterns, int) else patterns
            words.append(f"ckptd.patterns={','.join(map(str, numbers))}")
        if dirty is not None:
            words.append(f"ckptd.dirty={','.join(map(str, dirty))}")
        if say:
            words.append(f"ckptd.say={say}")
        words += [f"ckptd.{name}=1" for name, wanted in (("spin", spin), ("shell", shell)) if wanted]
        return " ".join([*words, *extra])

    def arguments(self, command_line: str | None = None) -> list[str]:
        """What QEMU is told of it; `command_line` if more than the counter is wanted."""
        said = self.command_line() if command_line is None else command_line
        return ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", said]


def default_folder() -> Path:
    """CKPTD_DEMO_GUEST, or a folder in the user's cache."""
    if named := os.environ.get("CKPTD_DEMO_GUEST"):
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "ckptd" / "demo-guest"


def build(folder: Path, say: Say = lambda _: None) -> LinuxGuest:
    """The guest in this folder, built if it is not there, damaged, or of another version.

    It is built aside, by one at a time; `say` is told what takes a while. Raises GuestError, and ConfigError if the
    folder cannot be used; both with the cure.
    """
    guest = LinuxGuest(folder.absolute())
    if _whole(guest):
        return guest
    with _alone(guest.folder):
        if _whole(guest):  # another has built it while we waited
            return guest
        for left in guest.folder.glob(f"{_ASIDE}*"):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=guest.folder) as place:
            aside = Path(place)
            programs = {name: assemble(name) for name in PROGRAMS}  # first, for what fails here fails at once
            found = packages.fetch(guest.folder / "packages", aside, say)
            say("building the guest")
            for package in found:
                packages.unpack(package, aside / "files")
            kernel = packages.kernel_in(aside / "files")
            shutil.copyfile(kernel.image, aside / guest.kernel.name)
            files = pack(_files(aside / "files", kernel, programs))
            # No time of day: the same sources and packages give the same file.
            (aside / guest.initrd.name).write_bytes(gzip.compress(files, 6, mtime=0))
            record = {
                "recipe": _recipe(),
                "release": kernel.release,
                "files": {name: _hash(aside / name) for name in (guest.kernel.name, guest.initrd.name)},
            }
            (aside / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
            for name in (*record["files"], _RECORD):
                os.replace(aside / name, guest.folder / name)
    return guest


def _files(place: Path, kernel: packages.Kernel, programs: Mapping[str, bytes]) -> Iterator[Entry]:
    for name in ("bin", "dev", "modules"):
        yield Entry.folder(name)
    # The kernel opens it for the first process before that can make it.
    yield Entry.character_device("dev/console", 5, 1)
    yield Entry.program("init", (_SOURCES / "init.sh").read_bytes())
    yield Entry.program("bin/busybox", packages.busybox_in(place))
    for name, program in programs.items():
        yield Entry.program(f"bin/{name}", program)
    modules = packages.modules_of(kernel, _MODULES)
    for name, module in modules.items():
        yield Entry.file(f"modules/{name}.ko", module)
    yield Entry.file("modules/order", "".join(f"{name}.ko\n" for name in modules).encode())


def _whole(guest: LinuxGuest) -> bool:
    try:
        record = json.loads((guest.folder / _RECORD).read_text())
        return bool(record["recipe"] == _recipe()) and all(
            _hash(guest.folder / name) == record["files"][name] for name in (guest.kernel.name, guest.initrd.name)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _recipe() -> str:
    """Changes with anything that goes into the guest, or into how it is built."""
    found = hashlib.sha256()
    for path in sorted(path for path in _SOURCES.iterdir() if path.is_file()):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One build in a folder at a time; a builder that dies lets go."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(
            f"the Linux guest cannot be built in {folder}: {error.strerror}",
            hint="name a folder that can be written to in CKPTD_DEMO_GUEST",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)

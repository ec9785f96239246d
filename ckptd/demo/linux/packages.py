"""What is taken from Debian's packages: a kernel, the modules that its virtual devices need, and busybox.

Nothing is installed: packages are downloaded into a folder, unpacked aside, and kept, so that the guest can be built
again without a network. Where this machine's lists of packages are missing or too old, lists of our own are fetched.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ckptd.errors import GuestError

__all__ = ["Kernel", "busybox_in", "fetch", "kernel_in", "modules_of", "unpack"]

_KERNEL = "linux-image-cloud-amd64"  # a package that depends on the newest kernel of its kind
_BUSYBOX = "busybox-static"
_AS_WE_ARE = "APT::Sandbox::User="  # apt's own user may not write into our folders
_ELSEWHERE = "build it on a Debian machine, copy the folder, and name it in CKPTD_DEMO_GUEST"


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel package."""

    release: str
    image: Path
    modules: Path


def fetch(folder: Path, aside: Path, say: Callable[[str], None]) -> list[Path]:
    """The packages, from `folder` or downloaded into it by way of `aside`. Raises GuestError."""
    folder.mkdir(parents=True, exist_ok=True)
    found = _found(folder)
    if len(found) == 2:
        return found
    _check_machine()
    try:
        say("downloading a kernel and busybox from Debian")
        _download(folder, aside, [])
    except GuestError:
        say("this machine's lists of packages are missing or old: fetching lists")
        options = _own_lists(aside)
        _run("apt-get", [*options, "-qq", "update"], "the lists of Debian's packages could not be fetched")
        _download(folder, aside, options)
    return _found(folder)


def unpack(package: Path, place: Path) -> None:
    """All files of a package, under `place`. Raises GuestError; a damaged package is gone then."""
    try:
        _run("dpkg", ["-x", str(package), str(place)], f"{package.name} cannot be unpacked")
    except GuestError as error:
        package.unlink(missing_ok=True)
        raise GuestError(error.message, hint="it is deleted: build again, and it is downloaded again") from error


def kernel_in(place: Path) -> Kernel:
    """The kernel among unpacked files. Raises GuestError."""
    images = sorted((place / "boot").glob("vmlinuz-*"))
    for image in images:
        release = image.name.removeprefix("vmlinuz-")
        for root in ("lib", "usr/lib"):
            if (modules := place / root / "modules" / release).is_dir():
                return Kernel(release, image, modules)
    raise GuestError("the kernel's package has no kernel with modules", hint=_ELSEWHERE)


def busybox_in(place: Path) -> bytes:
    """busybox among unpacked files. Raises GuestError."""
    for path in ("bin/busybox", "usr/bin/busybox"):
        if (place / path).is_file():
            return (place / path).read_bytes()
    raise GuestError("busybox's package has no busybox", hint=_ELSEWHERE)


def modules_of(kernel: Kernel, wanted: Iterable[str]) -> dict[str, bytes]:
    """Modules and all that they depend on, unpacked, in the order in which they can be loaded. Those that are built
    into the kernel are left out. Raises GuestError."""
    files = {_module_name(path): path for path in sorted(kernel.modules.rglob("*.ko*"))}
    builtin = {_module_name(Path(line)) for line in (kernel.modules / "modules.builtin").read_text().split()}
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded or name in builtin:
            return
        if name not in files:
            raise GuestError(f"the kernel {kernel.release} has no module {name}", hint=_ELSEWHERE)
        module = _plain(files[name])
        # depmod's list is made when a package is installed; the module itself says the same.
        for needed in re.findall(rb"\0depends=([^\0]*)\0", module):
            for other in needed.decode().split(","):
                if other:
                    load(other.replace("-", "_"))
        loaded[name] = module

    for name in wanted:
        load(name)
    return loaded


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _plain(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix != ".ko":
        raise GuestError(f"the kernel's modules are packed in a way that is not known here: {path.name}")
    return data


def _found(folder: Path) -> list[Path]:
    """The newest package of each kind that is there."""
    kinds = (folder.glob("linux-image-*.deb"), folder.glob(f"{_BUSYBOX}_*.deb"))
    return [max(packages, key=lambda path: path.stat().st_mtime) for kind in kinds if (packages := list(kind))]


def _own_lists(place: Path) -> list[str]:
    """Options by which apt keeps its lists in `place`, whoever runs it."""
    (place / "lists" / "partial").mkdir(parents=True)
    options = [f"Dir::State::Lists={place}/lists", f"Dir::Cache={place}", _AS_WE_ARE, "APT::Update::Error-Mode=any"]
    return [word for option in options for word in ("-o", option)]


def _check_machine() -> None:
    for tool in ("apt-get", "apt-cache", "dpkg"):
        if shutil.which(tool) is None:
            raise GuestError(
                f"the Linux guest is built from Debian packages, and there is no {tool!r} here", hint=_ELSEWHERE
            )
    found = _run("dpkg", ["--print-architecture"], "dpkg does not say what this machine is").strip()
    if found != "amd64":
        raise GuestError(f"the Linux guest is built from packages for amd64; this machine is {found}", hint=_ELSEWHERE)


def _download(folder: Path, aside: Path, options: list[str]) -> None:
    kernel = _dependency([*options, "depends", _KERNEL])
    wanted = [*options, "-o", _AS_WE_ARE, "-qq", "download", kernel, _BUSYBOX]
    _run("apt-get", wanted, "Debian's packages could not be downloaded", aside)
    for package in aside.glob("*.deb"):
        os.replace(package, folder / package.name)


def _dependency(arguments: list[str]) -> str:
    text = _run("apt-cache", arguments, f"apt knows no package {_KERNEL}")
    found = re.search(r"Depends: (linux-image-\S+)", text)
    if found is None:
        raise GuestError(f"apt says nothing of what {_KERNEL} depends on", hint=_ELSEWHERE)
    return found[1]


def _run(tool: str, arguments: list[str], failed: str, place: Path | None = None) -> str:
    done = subprocess.run(
        [tool, *arguments], cwd=place, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"{tool} ended with {done.returncode}"
        cure = f"it needs a network and Debian's package sources; else {_ELSEWHERE}"
        raise GuestError(f"{failed}: {said}", hint=cure)
    return done.stdout

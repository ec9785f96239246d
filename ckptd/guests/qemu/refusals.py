"""What ckptd cannot protect in a QEMU, in plain sentences that name the thing and the cure. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from ckptd.errors import ConfigError, GuestError
from ckptd.guests.qemu.cmdline import parse
from ckptd.guests.qemu.survey import Device, Netdev, Survey
from ckptd.units import PAGE_SIZE, format_size

__all__ = ["DISK_CHOICES", "MIGRATING", "RUN_STATES", "Disks", "RunState", "refusals", "run_state"]

Disks = Literal["refuse", "shared", "ignore"]
DISK_CHOICES = get_args(Disks)
"""What becomes of writable disks: the guest is refused; both hosts reach the same image; they are left alone."""

Verdict = Literal["protect", "wait", "refuse"]


@dataclass(frozen=True, slots=True)
class RunState:
    """What ckptd does with a guest that is in a state, why, and what the operator can do."""

    verdict: Verdict
    why: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.why}; {self.cure}" if self.cure else self.why


RUN_STATES = {
    "running": RunState("protect", "the guest runs"),
    # These end by themselves, or when whoever began them goes on.
    "debug": RunState("wait", "a debugger has stopped the guest", "let it continue"),
    "io-error": RunState("wait", "a disk error has stopped the guest", "repair the storage, then `cont`"),
    "paused": RunState("wait", "someone else has paused the guest", "continue it with `cont`"),
    "prelaunch": RunState("wait", "the guest has not been started (-S)", "start it with `cont`"),
    "restore-vm": RunState("wait", "a snapshot of the guest is being loaded"),
    "save-vm": RunState("wait", "a snapshot of the guest is being saved"),
    "suspended": RunState("wait", "the guest is suspended to RAM", "wake it with `system_wakeup`"),
    # These do not.
    "colo": RunState("refuse", "COLO replicates the guest already", "end that with `x-colo-lost-heartbeat`"),
    "finish-migrate": RunState("refuse", "the guest is being migrated away", "attach where it arrives"),
    "guest-panicked": RunState("refuse", "the guest has panicked", "reset it with `system_reset` and `cont`"),
    "inmigrate": RunState(
        "refuse", "QEMU waits for an incoming migration (-incoming)",
        "attach when it has completed; a standby of ckptd's own is not to be attached to",
    ),
    "internal-error": RunState("refuse", "QEMU has stopped the guest for an internal error", "start it anew"),
    "postmigrate": RunState(
        "refuse", "the guest has been migrated away", "attach where it arrived, or take it back here with `cont`"
    ),
    "shutdown": RunState("refuse", "the guest has shut down", "reset it with `system_reset` and `cont`, or start it"),
    "watchdog": RunState("refuse", "the guest's watchdog has stopped it", "reset it with `system_reset` and `cont`"),
}  # fmt: skip
"""All of QEMU's RunState. "wait": nothing is broken, ckptd attaches when it runs."""

MIGRATING = frozenset({
    "active", "cancelling", "colo", "device", "postcopy-active", "postcopy-paused", "postcopy-recover",
    "postcopy-recover-setup", "pre-switchover", "setup", "wait-unplug",
})  # fmt: skip

_BEHIND = {
    "vfio": ("is a device of the host's that writes to guest memory by DMA", "use a virtio device of QEMU's instead"),
    "x-vfio": ("is a device of another process's that writes to guest memory", "use a device of QEMU's instead"),
    "vhost-user-fs": ("is virtiofs: its daemon writes to guest memory", "use NFS or 9p instead, or detach it"),
    "vhost-user": ("is served by another process, which writes to guest memory", "use a device of QEMU's instead"),
    "vhost-vdpa": ("is served by hardware that writes to guest memory", "use a virtio device of QEMU's instead"),
    "vhost-vsock": ("is served by the host's kernel, which writes to guest memory", "detach it, or use a serial port"),
    "vhost-scsi": ("is served by the host's kernel, which writes to guest memory", "use virtio-scsi-pci instead"),
    "vdpa": ("is served by hardware that writes to guest memory", "use a virtio device of QEMU's instead"),
    "ivshmem": ("shares memory with other processes, whose writes are not seen", "detach it"),
}
"""Drivers by how their names begin; the first that fits counts."""


def run_state(status: str) -> RunState:
    """What to do with a guest whose `query-status` says `status`. Raises GuestError for one that QEMU newly has."""
    state = RUN_STATES.get(status)
    if state is None:
        raise GuestError(f"QEMU says that the guest is in the state {status!r}, which this ckptd does not know")
    return state


def refusals(survey: Survey, *, disks: str, ignore_blocks: Collection[str]) -> list[str]:
    """Every reason why this guest is refused, one sentence each; none means that it can be protected.

    `ignore_blocks` has RAM blocks whose contents may be lost at a promotion, by full name or by what follows its last
    "/" ("vga.vram"). States that are waited for are no reasons: see `run_state`. Raises ConfigError for another
    `disks`.
    """
    if disks not in DISK_CHOICES:
        raise ConfigError(f"disks cannot be {disks!r}", hint=f"one of {', '.join(DISK_CHOICES)}", field="disks")
    return [
        *_state(survey),
        *_abilities(survey),
        *(reason for device in survey.devices for reason in _device(device)),
        *(reason for netdev in survey.netdevs for reason in _netdev(netdev)),
        *_descriptors(survey),
        *_disks(survey, disks),
        *_ram(survey, ignore_blocks),
    ]


def _state(survey: Survey) -> Iterable[str]:
    state = run_state(survey.status)
    if state.verdict == "refuse":
        yield f"{state}."
    if survey.migration in MIGRATING and survey.status not in ("inmigrate", "finish-migrate", "colo"):
        yield (
            f"A migration is going on ({survey.migration}): wait until it has ended, or end it with `migrate_cancel`."
        )
    for job in survey.jobs:
        if job.startswith(("snapshot-", "backup ")):
            yield f"A job is going on ({job}): wait until it has ended, or cancel it with `job-cancel`."
    for reason in survey.blocked:
        yield f"This QEMU cannot save its device state: {reason.rstrip('.')}; take that device or setting away."


def _abilities(survey: Survey) -> Iterable[str]:
    if survey.architecture != "x86_64":
        yield f"The guest is {survey.architecture}: ckptd protects x86_64 guests."
    if survey.machine == "none":
        yield "The machine is `none`, which has nothing to protect."
    if survey.confidential:
        yield (
            f"The guest's memory is encrypted ({survey.confidential}), so that no one else can read it: "
            "start it without confidential-guest-support."
        )
    if "xen-save-devices-state" not in survey.commands and "x-ignore-shared" not in survey.capabilities:
        yield (
            "This QEMU can save no device state without RAM: it has neither xen-save-devices-state nor "
            "x-ignore-shared; use a QEMU that has one of them."
        )


def _device(device: Device) -> Iterable[str]:
    name = f"The device {device.id or device.path} ({device.driver})"
    for start, (why, cure) in _BEHIND.items():
        if device.driver.startswith(start):
            yield f"{name} {why}, where ckptd does not see it: {cure}."
            break
    if device.reporting:
        yield f"{name} gives guest memory back to the host unseen: start it with free-page-reporting=off."


def _netdev(netdev: Netdev) -> Iterable[str]:
    name = f"The netdev {netdev.id} ({netdev.kind})"
    if netdev.kind in ("vhost-user", "vhost-vdpa"):
        yield f"{name} is served outside QEMU, so its packets pass by the gate: use tap with vhost=off."
    elif netdev.vhost:
        yield f"{name} is served by the kernel's vhost, so its packets pass by the gate: use it with vhost=off."
    elif netdev.kind in ("af-xdp", "passt", "vmnet-host", "vmnet-shared", "vmnet-bridged"):
        yield f"{name} is of a kind that ckptd has not been tried with: use tap with vhost=off."


def _descriptors(survey: Survey) -> Iterable[str]:
    """What is open but belongs to no device that was named above: one that device lists do not show."""
    named = " ".join(device.driver for device in survey.devices)
    for path in survey.descriptors:
        if path == "/dev/vhost-net":
            known = any(netdev.vhost for netdev in survey.netdevs)
        else:
            known = any(start in named for start in ("vfio", "vhost", "vdpa"))
            known |= any(netdev.kind == "vhost-vdpa" for netdev in survey.netdevs)
        if not known:
            yield f"QEMU has {path} open, through which guest memory is written unseen: detach what uses it."


def _disks(survey: Survey, disks: str) -> Iterable[str]:
    writable = [disk for disk in survey.disks if disk.writable]
    if disks == "refuse":
        for disk in writable:
            yield (
                f"The disk {disk.name} ({disk.file}) is writable, and ckptd does not replicate disks: set "
                'disks = "shared" if both hosts reach the same image, or "ignore" if its contents do not matter.'
            )
    elif disks == "shared" and writable and any(option.name == "snapshot" for option in parse(survey.argv[1:])):
        yield (
            "QEMU runs with -snapshot, so what the guest writes to its disks is in files of this host's, not in the "
            'shared image: start it without, or set disks = "ignore".'
        )


def _ram(survey: Survey, ignore: Collection[str]) -> Iterable[str]:
    used = [backend for backend in survey.ram if backend.used]
    if all(backend.firmware for backend in used) and survey.machine != "none":
        yield "The guest has no memory backend, so ckptd does not know where its RAM is: start it with `-m`."
    for backend in used:
        name = f"The memory backend {backend.id}"
        if backend.problem:
            yield f"{name} cannot be read: {backend.problem}; take it away, or start the guest with another."
        if backend.size % PAGE_SIZE:
            yield f"{name} has {backend.size} bytes, which are not whole pages: give it a multiple of 4 KiB."
        if backend.kind in ("memory-backend-epc", "memory-backend-cxl"):
            yield f"{name} is {backend.kind}, which no one else can read: start the guest without."
    for block in survey.blocks:
        if block.kind == "rom" or block.name in ignore or block.name.rpartition("/")[2] in ignore:
            continue
        what = {
            "video": "is video RAM, which ckptd does not replicate: start the guest with `-vga none` and a serial "
            "console, or have it ignored (the screen is wrong after a promotion until it is redrawn)",
            "flash": "is writable flash, which ckptd does not replicate: have it ignored if both hosts have the same "
            "file for it",
            "other": "is writable RAM of a device that ckptd does not know: take the device away, or have it ignored "
            "if its contents do not matter",
        }[block.kind]
        yield f"The RAM block {block.name} ({format_size(block.size)}) {what}: ignore_ram = [{block.name!r}]."

"""What follows from the findings for each kind of guest: which tracker to choose, and what is missing. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ckptd.doctor.findings import Finding, State, unknown

__all__ = ["Advice", "Choice", "Rating", "advise"]

Rating = Literal["recommended", "possible", "discouraged", "unavailable", "unknown"]

# Either will do: asynchronous write protection asks nothing of what UFFD_USER_MODE_ONLY lacks. The device file is no
# help, as the descriptor must be made inside QEMU, by one system call.
_USERFAULTFD = ("userfaultfd_user_mode", "userfaultfd_syscall")
_ATTACH = ("ptrace", "pidfd_getfd", "process_vm_readv")


@dataclass(frozen=True, slots=True)
class Choice:
    """A tracker, and why it is rated so."""

    tracker: str
    rating: Rating
    why: str


@dataclass(frozen=True, slots=True)
class Advice:
    """For one kind of guest. `ready`: whether such a guest can be protected here as things are.

    `cures` are those of the findings that stand in the way, by the finding's name.
    """

    ready: State
    recommended: str | None
    trackers: tuple[Choice, ...]
    cures: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same for `--json`."""
        return asdict(self)


def advise(findings: Iterable[Finding]) -> dict[str, Advice]:
    """By kind of guest. A finding that is not there counts as unknown."""
    found = _Found({one.name: one for one in findings})
    return {"sim": _sim(), "kvm": _kvm(found), "qemu": _qemu(found)}


class _Found:
    def __init__(self, by_name: Mapping[str, Finding]) -> None:
        self._by_name = by_name

    def __getitem__(self, name: str) -> Finding:
        return self._by_name.get(name) or unknown(name, "was not looked at")

    def all(self, *names: str) -> State:
        """The worst: no, then unknown, then yes."""
        return _worst(self[name].state for name in names)

    def any(self, *names: str) -> State:
        states = {self[name].state for name in names}
        return next((state for state in _BEST if state in states), "unknown")

    def cures(self, *names: str) -> dict[str, str]:
        found = (self[name] for name in names)
        return {one.name: one.cure for one in found if one.state == "no" and one.cure}

    def because(self, *names: str) -> str:
        """What stands in the way."""
        return "; ".join(f"{name}: {self[name].detail}" for name in names if self[name].state != "yes")


_BEST: tuple[State, ...] = ("yes", "unknown", "no")


def _worst(states: Iterable[State]) -> State:
    given = set(states)
    return next((state for state in reversed(_BEST) if state in given), "yes")


def _sim() -> Advice:
    choices = (
        Choice("bitmap", "recommended", "needs nothing of this machine"),
        Choice("ring", "possible", "needs nothing of this machine; for trying what happens when a ring fills"),
    )
    return Advice("yes", "bitmap", choices, {})


def _kvm(found: _Found) -> Advice:
    initially_set = bool(found["kvm_manual_clear"].data.get("initially_set"))
    manual = _choice(
        found, "kvm-manual", ("kvm_manual_clear",), "recommended" if initially_set else "possible",
        "pages are protected again in pieces, just before they are copied" if initially_set
        else "without INITIALLY_SET the guest stands still while logging begins",
    )  # fmt: skip
    first = manual.rating == "recommended"
    bitmap = _choice(
        found, "kvm-bitmap", ("kvm_dirty_bitmap",), "possible" if first else "recommended",
        "works on every KVM; reading it protects all its pages again at once, during the pause",
    )  # fmt: skip
    choices = (manual, bitmap, _ring(found))
    recommended = _recommended(choices)
    needs = ("kvm_device", "binutils")
    notes = ("this KVM emulates: good for trying things out, not for measuring",) if found["kvm_device"].data.get(
        "emulates"
    ) else ()  # fmt: skip
    return Advice(
        _worst((found.all(*needs), _state(choices, recommended))), recommended, choices,
        found.cures(*needs, "kvm_dirty_bitmap"), notes,
    )  # fmt: skip


def _ring(found: _Found) -> Choice:
    """Never the first choice: whether an epoch dirties few pages is the guest's affair, and a bitmap is never full."""
    ring, bounded, paging = found["kvm_dirty_ring"], found["kvm_ring_bounded"], found["kvm_hardware_paging"]
    size = ring.data.get("entries")
    if bounded.state != "yes":
        why = bounded.detail + (f"; {bounded.cure}" if bounded.cure else "")
        return _choice(found, "kvm-ring", (ring.name,), "discouraged", why)
    if paging.state != "yes":
        why = "with shadow paging the guest's page tables take entries too, so the ring fills early"
        return _choice(found, "kvm-ring", (ring.name,), "discouraged", why)
    why = (
        f"take it where an epoch dirties few pages of a large memory: its cost follows the dirty pages, a bitmap's the"
        f" memory; at most {size} entries a vCPU, and a ring that fills stops the vCPU"
    )
    return _choice(found, "kvm-ring", (ring.name,), "possible", why)


def _qemu(found: _Found) -> Advice:
    makes = found.any(*_USERFAULTFD)
    tracked = ("page_tracking", *_ATTACH)
    pagemap = _choice(
        found, "pagemap", tracked if makes == "yes" else (*tracked, *_USERFAULTFD), "recommended",
        "one exact log of what vCPUs and devices write, for a QEMU that runs already, with KVM or TCG",
    )  # fmt: skip
    soft_dirty = _choice(
        found, "soft-dirty", ("soft_dirty", "process_vm_readv"),
        "possible" if pagemap.rating == "recommended" else "recommended",
        "works without userfaultfd; but clearing walks all of QEMU's memory, and some mappings are reported whole",
    )  # fmt: skip
    choices = (pagemap, soft_dirty)
    recommended = _recommended(choices)
    in_the_way = ("qemu", "userfaultfd_wp_async", "pagemap_scan", *tracked) + (_USERFAULTFD if makes != "yes" else ())
    notes = []
    if found["qemu"].state == "yes" and found["qemu_accel_kvm"].state == "no":
        notes.append(f"-accel kvm: {found['qemu_accel_kvm'].detail}")
    if found["cap_sys_ptrace"].state == "no":
        notes.append("only a QEMU of this user can be attached to")
    return Advice(
        _worst((found["qemu"].state, _state(choices, recommended))), recommended, choices, found.cures(*in_the_way),
        tuple(notes),
    )  # fmt: skip


def _choice(found: _Found, tracker: str, needs: tuple[str, ...], rating: Rating, why: str) -> Choice:
    state = found.all(*needs)
    if state == "yes":
        return Choice(tracker, rating, why)
    return Choice(tracker, "unavailable" if state == "no" else "unknown", found.because(*needs))


def _recommended(choices: Iterable[Choice]) -> str | None:
    return next((one.tracker for one in choices if one.rating == "recommended"), None)


def _state(choices: Iterable[Choice], recommended: str | None) -> State:
    if recommended:
        return "yes"
    return "unknown" if any(one.rating == "unknown" for one in choices) else "no"

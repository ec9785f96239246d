"""A computer in miniature: vCPUs that run deterministic programs over memory.

The state after step n is a pure function of (parameters, n). Step n belongs to vCPU n mod vcpus, which reads a batch
of words, mixes each with chance and with its registers, writes them back and folds them into its registers:

    new  = mix((old xor chance) + a)         a wrong page makes wrong values, wrong registers, wrong outputs
    a, b = fold of all new words

Chance is counter-based (splitmix64 of vCPU, step and access), so a machine continues from any saved state. Pure:
memory and log are passed in. Source of the mixing function: Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", 2014.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt

from ckptd.errors import ConfigError, GuestError
from ckptd.guests.sim.workloads import WORKLOADS, Layout
from ckptd.memory.dirtyset import Gfns
from ckptd.memory.regions import Geometry, Region
from ckptd.trackers.base import Log
from ckptd.units import PAGE_SIZE

__all__ = ["Header", "Machine", "Output", "Params", "header_of"]

U64 = npt.NDArray[np.uint64]

STATE_VERSION = 1

_BLOCK = 16  # steps of a vCPU whose accesses are chosen at once: numpy's cost is by the call
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHIFT = np.uint64(29)
_MUL = np.uint64(_M1)
_WORDS = np.uint64(PAGE_SIZE // 8)


@dataclass(frozen=True, slots=True)
class Params:
    """What a guest is. `rate` (pages a second, 0: flat out) and nothing else leaves the states as they are."""

    geometry: Geometry
    seed: int = 1
    vcpus: int = 1
    workload: str = "uniform"
    output_every: int = 16
    rate: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            raise ConfigError(f"no workload {self.workload!r}", hint=f"one of {', '.join(WORKLOADS)}", field="workload")
        if min(self.vcpus, self.output_every, self.batch) < 1 or self.rate < 0:
            raise ConfigError("vcpus, output_every and batch must be at least 1, rate at least 0")

    @property
    def step_seconds(self) -> float:
        """The time between steps that makes the rate; 0 for flat out."""
        return self.batch * WORKLOADS[self.workload].written / self.rate if self.rate else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "regions": [[region.name, region.pages] for region in self.geometry],
            "seed": self.seed,
            "vcpus": self.vcpus,
            "workload": self.workload,
            "output_every": self.output_every,
            "rate": self.rate,
            "batch": self.batch,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Params:
        rest = {key: value for key, value in raw.items() if key != "regions"}
        return cls(Geometry(tuple(Region(name, pages) for name, pages in raw["regions"])), **rest)


class Output(NamedTuple):
    """What the guest says to the world."""

    number: int
    """From 1."""
    step: int
    """The step that said it was the step-th."""
    content: bytes
    """16 bytes."""


class Header(NamedTuple):
    """What a saved state says of its guest."""

    params: Params
    step: int
    outputs: int


def header_of(state: bytes) -> Header:
    """Whose state this is, and how far it is. Raises GuestError if it is none."""
    raw = _unpack(state)
    return Header(Params.from_dict(raw["params"]), raw["step"], raw["outputs"])


class Machine:
    """Runs steps over `memory`, flat u64 arrays of the regions; tells `log` what it wrote."""

    __slots__ = (
        "_accesses", "_blocks", "_keys", "_layout", "_memory", "_offsets", "_registers", "_workload", "log",
        "outputs", "params", "step",
    )  # fmt: skip

    def __init__(self, params: Params, memory: Sequence[U64], log: Log | None = None) -> None:
        sizes = [len(words) * 8 for words in memory]
        if sizes != [region.size_bytes for region in params.geometry]:
            raise GuestError(f"memory of {sizes} bytes is not that of {params.geometry}")
        self.params = params
        self.log = log
        self.step = 0
        self.outputs = 0
        self._memory = memory
        self._layout = Layout([region.pages for region in params.geometry])
        self._workload = WORKLOADS[params.workload]
        self._keys = [_mix(params.seed * _GOLDEN + vcpu * _M2) for vcpu in range(params.vcpus)]
        self._registers = [(key, _mix(key)) for key in self._keys]
        # chance of access j in step c of a vCPU: mix(key + (c * (batch + 1) + j) * golden)
        counters = np.arange(_BLOCK * (params.batch + 1), dtype=np.uint64)
        self._offsets = counters.reshape(_BLOCK, -1) * np.uint64(_GOLDEN)
        self._blocks = [-1] * params.vcpus
        self._accesses: list[_Block] = [_Block([], [], [], [], [])] * params.vcpus

    @classmethod
    def restored(cls, state: bytes, memory: Sequence[U64], log: Log | None = None) -> Machine:
        """The machine of a saved state, over the memory of that moment. Raises GuestError if it is no state."""
        raw = _unpack(state)
        machine = cls(Params.from_dict(raw["params"]), memory, log)
        machine.step, machine.outputs = raw["step"], raw["outputs"]
        machine._registers = [(a, b) for a, b in raw["registers"]]
        return machine

    def save(self) -> bytes:
        """All that is not memory. A few hundred bytes."""
        raw = {
            "v": STATE_VERSION,
            "params": self.params.as_dict(),
            "step": self.step,
            "outputs": self.outputs,
            "registers": self._registers,
        }
        packed: bytes = msgpack.packb(raw)
        return packed

    @property
    def emits_next(self) -> bool:
        """The next step ends with an output."""
        return (self.step + 1) % self.params.output_every == 0

    def run_step(self) -> Output | None:
        """One step of one vCPU; returns what it said, if anything."""
        count, vcpu = divmod(self.step, self.params.vcpus)
        number, row = divmod(count, _BLOCK)
        if self._blocks[vcpu] != number:
            self._choose(vcpu, number)
        block = self._accesses[vcpu]
        a, b = self._registers[vcpu]
        region, places, stores = block.regions[row], block.places[row], block.stores[row]
        words = self._memory[region]
        old = words[places]
        new = (old ^ block.chance[row]) + np.uint64(a)
        new *= _MUL
        new ^= new >> _SHIFT
        # One word twice in a batch: both read the old value, and numpy assigns in order, so the last one stays.
        words[places[:stores]] = new[:stores]
        # The store first, the mark second: a harvest in between misses a page that the next harvest then reports. The
        # other way round the page would be taken with its old content, and the store after it never reported.
        if self.log is not None:
            self.log.mark(vcpu, region, block.gfns[row][:stores])
        a = _mix(a ^ int(np.bitwise_xor.reduce(new)))
        b = (b * _M1 + int(np.add.reduce(new))) & _MASK
        self._registers[vcpu] = (a, b)
        self.step += 1
        if self.step % self.params.output_every:
            return None
        self.outputs += 1
        return Output(self.outputs, self.step, self._content(int(old[-1]) if self._workload.replies else None))

    def _content(self, reply: int | None) -> bytes:
        one = other = 0
        for a, b in self._registers:
            one, other = _mix(one ^ a), _mix(other ^ b)
        return (one if reply is None else reply).to_bytes(8, "little") + (other ^ one).to_bytes(8, "little")

    def _choose(self, vcpu: int, number: int) -> None:
        params = self.params
        first = number * _BLOCK
        start = (self._keys[vcpu] + first * (params.batch + 1) * _GOLDEN) & _MASK
        chance = _mix_array(self._offsets + np.uint64(start))
        counters = np.arange(first, first + _BLOCK, dtype=np.uint64)
        chosen = self._workload.pick(chance, counters, vcpu, params.vcpus, self._layout)
        self._accesses[vcpu] = _Block(
            chosen.regions.tolist(),
            list(chosen.gfns.astype(np.int64)),
            list((chosen.gfns * _WORDS + chosen.words).astype(np.int64)),
            list(chance[:, :-1]),
            chosen.stores.tolist(),
        )
        self._blocks[vcpu] = number


class _Block(NamedTuple):
    """The accesses of a block of steps, ready for use: one element for each step."""

    regions: list[int]
    gfns: list[Gfns]
    places: list[npt.NDArray[np.int64]]
    chance: list[U64]
    stores: list[int]


def _unpack(state: bytes) -> dict[str, Any]:
    try:
        raw = msgpack.unpackb(state, max_array_len=4096, max_map_len=64, max_str_len=4096)
    except Exception as error:  # msgpack raises many kinds
        raise GuestError("the saved state is damaged") from error
    if not isinstance(raw, dict) or raw.get("v") != STATE_VERSION:
        raise GuestError(f"not a saved state of version {STATE_VERSION} of a sim guest")
    return raw


def _mix(x: int) -> int:
    z = (x + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _M1) & _MASK
    z = ((z ^ (z >> 27)) * _M2) & _MASK
    return z ^ (z >> 31)


def _mix_array(x: U64) -> U64:
    z = x + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_M1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_M2)
    return z ^ (z >> np.uint64(31))

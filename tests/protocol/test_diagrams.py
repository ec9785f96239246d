"""docs/ARCHITECTURE.md draws both machines exactly as their transition tables are.

`python -m tests.protocol.test_diagrams` prints the drawings.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.protocol.peer import Peer
from ckptd.protocol.primary import PrimaryMachine, PrimaryState
from ckptd.protocol.secondary import SecondaryMachine, SecondaryState

DOCUMENT = Path(__file__).parents[2] / "docs" / "ARCHITECTURE.md"
MACHINES: dict[str, tuple[type[Peer], str]] = {
    "primary": (PrimaryMachine, PrimaryState.START.name),
    "secondary": (SecondaryMachine, SecondaryState.GREETING.name),
}
ENDS = {"NACK", "BYE", "nack", "bye"}


def drawing(machine: type[Peer], first: str) -> list[str]:
    """The lines of a Mermaid diagram: every edge, with heartbeats and last words said in a note each."""
    edges: dict[tuple[str, str], list[str]] = {}
    beating, ending = [], []
    for (before, trigger), after in machine.TRANSITIONS.items():
        if trigger == "HEARTBEAT":
            assert before is after
            beating.append(before.name)
        elif trigger in ENDS:
            assert after.name == "CLOSED"
            ending.append((before.name, trigger))
        else:
            edges.setdefault((before.name, after.name), []).append(trigger)
    states = {name for pair in edges for name in pair} | {name for name, _ in ending}
    assert len(ending) == len(states) * len(ENDS) - 2  # all of them everywhere; after the end nothing arrives any more
    silent = sorted(states - set(beating))
    return [
        "stateDiagram-v2",
        f"    [*] --> {first}",
        *(f"    {before} --> {after}: {', '.join(triggers)}" for (before, after), triggers in edges.items()),
        f"    note right of {first}: HEARTBEAT is heard and sent in every state but {', '.join(silent)}",
        "    note right of CLOSED: NACK, BYE, nack and bye lead here from every state",
        "    CLOSED --> [*]",
    ]


def drawn(name: str) -> list[str]:
    """What the document has between the machine's marker and the end of the block after it."""
    text = DOCUMENT.read_text().split(f"<!-- {name} machine -->")
    assert len(text) == 2, f"the document must have one marker of the {name} machine"
    return text[1].split("```mermaid\n", 1)[1].split("\n```", 1)[0].splitlines()


@pytest.mark.parametrize("name", MACHINES)
def test_the_document_draws_the_transition_table(name: str) -> None:
    assert drawn(name) == drawing(*MACHINES[name]), "python -m tests.protocol.test_diagrams prints what belongs there"


@pytest.mark.parametrize(("machine", "first"), MACHINES.values(), ids=MACHINES)
def test_every_state_can_be_reached(machine: type[Peer], first: str) -> None:
    reached = {first}
    while more := {a.name for (b, _), a in machine.TRANSITIONS.items() if b.name in reached} - reached:
        reached |= more
    assert reached == {state.name for state in type(next(iter(machine.TRANSITIONS.values())))}


if __name__ == "__main__":
    for name, (machine, first) in MACHINES.items():
        print(f"<!-- {name} machine -->\n\n```mermaid", *drawing(machine, first), "```\n", sep="\n")

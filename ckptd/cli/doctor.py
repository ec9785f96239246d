"""`ckptd doctor`: what does this machine offer, and which tracker suits it?"""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ckptd.cli.common import Json, emit

__all__ = ["doctor"]

_STYLES = {
    "yes": "green", "recommended": "green", "possible": "", "no": "yellow", "discouraged": "yellow",
    "unavailable": "yellow", "unknown": "red",
}  # fmt: skip


def doctor(*, as_json: Json = False) -> None:
    """Try what this machine offers, say what is missing and its cure, and which tracker suits each kind of guest.

    Changes nothing and leaves nothing behind. What is missing is no failure: the exit code is 0.
    """
    from ckptd.doctor import advise, examine

    findings = list(examine())
    report = {
        "findings": [finding.as_dict() for finding in findings],
        "advice": {guest: advice.as_dict() for guest, advice in advise(findings).items()},
    }
    emit(report, as_json, _shown)


def _shown(report: dict[str, Any]) -> Group:
    return Group(_findings(report["findings"]), *(_advice(*one) for one in report["advice"].items()))


def _findings(findings: list[dict[str, Any]]) -> Table:
    from ckptd.doctor import GROUPS

    last = {checks[-1].__name__ for checks in GROUPS.values()}
    table = Table("", "offered", "what was found, and what to do about it")
    table.columns[0].no_wrap = True
    for one in findings:
        # Text, since rich would take brackets for markup.
        found = Text(one["detail"])
        if one["cure"]:
            found.append(f"\n-> {one['cure']}", "cyan")
        table.add_row(one["name"], _word(one["state"]), found, end_section=one["name"] in last)
    return table


def _advice(guest: str, advice: dict[str, Any]) -> Table:
    title = Text.assemble(f"\n{guest} guests: ready ", _word(advice["ready"]))
    if advice["cures"]:
        title.append(f"; see the cure of {', '.join(advice['cures'])}")
    table = Table("tracker", "", "why", title=title, title_justify="left", title_style="")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for one in advice["trackers"]:
        table.add_row(one["tracker"], _word(one["rating"]), Text(one["why"]))
    if advice["notes"]:
        table.caption, table.caption_justify = Text("\n".join(advice["notes"])), "left"
    return table


def _word(word: str) -> Text:
    return Text(word, _STYLES[word])

"""The condition of a guest's protection, as an operator sees it: one word, the reason, and since when."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

__all__ = ["Condition", "Word"]

Word = Literal["unprotected", "resyncing", "protected", "fenced", "promoted", "receiving", "waiting"]


class Condition:
    """Changes are reported once each, to the log."""

    def __init__(self, word: Word, reason: str, report: Callable[[str, str], None]) -> None:
        self.word, self.reason = word, reason
        self.since = time.time()
        self._report = report

    def become(self, word: Word, reason: str) -> None:
        """`reason` is a sentence for the operator."""
        if (word, reason) == (self.word, self.reason):
            return
        if word != self.word:
            self.since = time.time()
        self.word, self.reason = word, reason
        self._report(word, reason)

    def as_dict(self) -> dict[str, object]:
        return {"condition": self.word, "reason": self.reason, "since": round(self.since, 3)}

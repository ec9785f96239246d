"""The error tree: what people, scripts and `--json` see."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptd.errors
from ckptd.errors import CkptdError, ConfigError, CorruptFrame, DigestMismatch, Refused, VersionMismatch

EXIT_CODES = {
    "ConfigError": 3, "TransportError": 4, "Unreachable": 4, "StateError": 5, "Inconsistent": 5, "Fenced": 6,
    "VerifyFailed": 7,
}  # fmt: skip
"""All others are 1. Scripts depend on them."""


def tree(root: type[CkptdError] = CkptdError) -> Iterator[type[CkptdError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def test_the_text_says_what_where_and_what_to_do() -> None:
    error = DigestMismatch("the image differs", hint="resync", region="ram", gfn=5, epoch=7, term=None)
    assert str(error) == "the image differs (region ram, gfn 5, epoch 7); resync"
    assert str(CkptdError("only this")) == "only this"


def test_the_json_form_survives_json() -> None:
    error = ConfigError("is wrong", hint="mend it", file=Path("/etc/ckptd.toml"), line=3)
    expected = {
        "error": "ConfigError",
        "message": "is wrong",
        "hint": "mend it",
        "where": {"file": "/etc/ckptd.toml", "line": 3},
    }
    assert json.loads(json.dumps(error.as_dict())) == expected


def test_every_error_is_exported_and_has_its_exit_code() -> None:
    ours = {error.__name__: error for error in tree() if error.__module__ == "ckptd.errors"}
    assert sorted(ours) == sorted(ckptd.errors.__all__)
    assert {name: error.exit_code for name, error in ours.items() if error.exit_code != 1} == EXIT_CODES


@pytest.mark.parametrize(
    ("error", "code"),
    [(CorruptFrame("x"), "corrupt"), (VersionMismatch("x"), "version"), (Refused("x", code="term"), "term")],
)
def test_protocol_errors_carry_the_code_for_the_peer(error: CorruptFrame, code: str) -> None:
    assert error.code == code

"""The daemons' log: structlog to stderr, as text for people and journald, or one JSON object a line."""

from __future__ import annotations

import logging
import sys

import structlog

__all__ = ["set_up_log"]


def set_up_log(level: str, form: str) -> None:
    """Level "debug", "info", "warning" or "error"; form "text" or "json". May be called again to change them."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )

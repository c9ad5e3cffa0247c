"""Logs: one JSON object per line on stdout, from `logging` everywhere, `extra` fields included."""

from __future__ import annotations

import asyncio
import logging
import sys

import structlog

from server.settings import LogLevel


def configure_logging(level: LogLevel) -> None:
    """Called once, by the process' entry. `level` is ours; libraries tell only what went wrong."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in ("server", "skipllm_core"):
        logging.getLogger(name).setLevel(level.upper())
    logging.getLogger("uvicorn.error").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Not so: responses that uvicorn itself cancelled at the end, each with a traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))

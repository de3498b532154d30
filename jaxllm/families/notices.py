"""Warnings about a checkpoint, once in the life of the process: its configuration is read more than once."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger(__name__)


@functools.cache
def say_once(message: str) -> None:
    """Log a warning, unless the same one was logged before."""
    log.warning("%s", message)

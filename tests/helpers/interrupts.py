"""An exception at any line: what a signal may do to a program, at a place that can be chosen."""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

PACKAGE = "/jaxllm/"


@contextlib.contextmanager
def raised_at(line: int, again: int = 0) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt before the `line`-th line that this thread runs in the package.

    With `again`, once more at that many function calls after the first. The lines of `with` statements are left
    out: an interpreter looks for signals between none of the steps that take or give back a lock.

    Yields:
        Where it struck, so far.
    """
    struck: list[str] = []
    left, calls = line, again

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        name = frame.f_code.co_filename
        if PACKAGE not in name:
            return None
        if event == "line" and not linecache.getline(name, frame.f_lineno).lstrip().startswith("with "):
            left -= 1
            if left == 0:
                struck.append(f"{name.rpartition(PACKAGE)[2]}:{frame.f_lineno}")
                raise KeyboardInterrupt
        return trace

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        if not struck or event != "call" or PACKAGE not in frame.f_code.co_filename or not calls:
            return
        calls -= 1
        if calls == 0:
            struck.append(f"{frame.f_code.co_filename.rpartition(PACKAGE)[2]}:{frame.f_lineno}")
            raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    if again:
        sys.setprofile(profile)
    try:
        yield struck
    finally:
        sys.settrace(before)
        sys.setprofile(None)

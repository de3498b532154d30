"""What a template's failure means for whoever sent the messages, in one line and without Python's words.

Input: the exception, and the message at which it came where that is known. Output: a sentence.
"""

from __future__ import annotations

import re

from jinja2.exceptions import SecurityError, TemplateNotFound, TemplateRuntimeError, UndefinedError

_OTHER_TEMPLATE = "give another template with --chat-template"


class TemplateRefusal(TemplateRuntimeError):
    """The template called `raise_exception`."""


def failure(error: Exception, place: tuple[int, str] | None) -> str:
    """A sentence; `place` is the index and the role of the message at fault."""
    where = "these messages" if place is None else f"messages[{place[0]}] (role {place[1]!r})"
    if isinstance(error, TemplateRefusal):
        at = "" if place is None else f" (at {where})"
        return f"the chat template refused these messages: {one_line(error)}{at}"
    if isinstance(error, UndefinedError):
        return f"the chat template cannot render {where}: {_missing(error)}"
    if isinstance(error, TemplateNotFound):
        return f"the chat template includes another file, {one_line(error)}, which is not allowed; {_OTHER_TEMPLATE}"
    if isinstance(error, SecurityError | TemplateRuntimeError | OverflowError):
        return f"the chat template does what is not allowed here: {one_line(error)}; {_OTHER_TEMPLATE}"
    if isinstance(error, RecursionError):
        return f"the chat template calls itself without end; {_OTHER_TEMPLATE}"
    return (
        f"the chat template cannot render {where}: a field is missing or has a form that it does not take; "
        f"send the content as text, or {_OTHER_TEMPLATE}"
    )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def _missing(error: UndefinedError) -> str:
    text = one_line(error)
    if found := re.search(r"has no (?:attribute|element) '?([\w.]+)'?", text):
        return f"it needs {found[1]!r}, which is not there; send that field, or {_OTHER_TEMPLATE}"
    if found := re.match(r"'([\w.]+)' is undefined", text):
        return f"it needs {found[1]!r} is undefined; set it in chat_template_kwargs, or {_OTHER_TEMPLATE}"
    return f"it needs a field that is not there; {_OTHER_TEMPLATE}"

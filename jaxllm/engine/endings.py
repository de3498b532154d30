"""How requests end, and how they are set back: what the tokens so far say of both."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from jaxllm.scheduling.request import Ending, Request

log = logging.getLogger(__name__)


def rewound(request: Request) -> bool:
    """Set a request's listener and constraint back to its known tokens, where that is possible."""
    try:
        if request.constraint is not None:
            request.constraint.rewind(request.output_ids)
        return request.listener is None or request.listener.rewind(request)
    except Exception as error:
        log.error("%s cannot be set back", request.request_id, exc_info=error)
        return False


def ending_of(request: Request, tokens: Sequence[int]) -> Ending | None:
    """How a request ends with its last tokens, as far as tokens say: a stop token, its limit, or its constraint."""
    last = request.token_ids[-1]
    if last in request.stop_ids and len(request.token_ids) > request.num_prompt:
        return Ending("stop", last if last in (request.params.stop_token_ids or ()) else None)
    if len(request.token_ids) >= request.limit:
        return Ending("length")
    if (constraint := request.constraint) is None:
        return None
    for token in tokens:
        constraint.accept(token)
    if constraint.error is not None:
        return Ending("abort", error=ValueError(constraint.error))
    return Ending("stop") if constraint.finished else None

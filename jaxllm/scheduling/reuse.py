"""What of a request is in some cache already: page lists to start from. Plain Python: it decides, nothing moves.

A request that is about to run -> `Found`, from the first of these that applies: its own pages that were swapped out,
the pages of a request with the same prompt (copy-on-write), the prefix cache on the device and in the tiers below.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.tiers import Tiers


@dataclass(frozen=True, slots=True)
class Found:
    """The beginning of a request's cache, one reference taken on each page.

    Attributes:
        pages: None where the content is in a lower tier, 0 where nothing to come can see it.
        num_tokens: how many tokens are computed once all of it is on the device.
        keys: page index -> what the lower tier calls it, for every None.
    """

    pages: list[int | None] = field(default_factory=list)
    num_tokens: int = 0
    keys: dict[int, bytes] = field(default_factory=dict)


def find_reusable(request: Request, pool: PagePool, tiers: Tiers | None) -> Found:
    """Look a waiting request up everywhere, and take references on what is on the device."""
    swapped = request.held.swapped
    if tiers is not None and swapped is not None:
        extent = pool.pages_for(swapped.num_tokens)
        return Found([None if i in swapped.keys else 0 for i in range(extent)], swapped.num_tokens, swapped.keys)
    parent = request.parent
    if parent is not None and _can_share(parent, request, pool):
        shared = pool.share(parent.held.pages[: pool.pages_for(request.num_tokens)])
        return Found(list(shared), request.num_tokens - 1)
    if not pool.enable_prefix_caching:
        return Found()
    digests = request.page_hashes = pool.hashes(request.token_ids, request.cache_salt, request.page_hashes)
    hits = pool.match(digests, request.num_tokens, tiers.has if tiers is not None else lambda _: False)
    keys = {i: digests[i] for i, page in enumerate(hits) if page is None}
    return Found(hits, len(hits) * pool.page_size, keys)


def _can_share(parent: Request, child: Request, pool: PagePool) -> bool:
    """Whether the parent still holds all that the child's first query sees, and the child has its prompt only."""
    sees = pool.first_visible(child.num_tokens - 1)
    return parent.prompt_is_computed and child.num_tokens == parent.num_prompt and parent.held.num_dropped <= sees

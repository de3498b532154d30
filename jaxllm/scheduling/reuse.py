"""What of a request is in some cache already: page lists to start from. Plain Python: it decides, nothing moves.

A request that is about to run -> `Found`, from the first of these that applies: its own pages that were swapped out,
the pages of a request with the same prompt (copy-on-write), the prefix cache on the device and in the tiers below,
and then what another engine offers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.tiers import Span, Tiers


@dataclass(frozen=True, slots=True)
class Found:
    """The beginning of a request's cache, one reference taken on each page.

    Attributes:
        pages: None where the content is in a lower tier, 0 where nothing to come can see it.
        num_tokens: how many tokens are computed once all of it is on the device.
        keys: page index -> what the lower tier calls it, for every None.
        spans: for those of the keys that another engine offers, its tokens.
        num_headless: so many first pages are not to be found as a prefix by others: the last of them lacks tokens that
            this request cannot see.
    """

    pages: list[int | None] = field(default_factory=list)
    num_tokens: int = 0
    keys: dict[int, bytes] = field(default_factory=dict)
    spans: dict[bytes, Span] = field(default_factory=dict)
    num_headless: int = 0


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
        return _with_offer(request, pool, Found())
    digests = request.page_hashes = pool.hashes(request.token_ids, request.page_salt, request.page_hashes)
    hits = pool.match(digests, request.num_tokens, tiers.has if tiers is not None else lambda _: False)
    keys = {i: digests[i] for i, page in enumerate(hits) if page is None}
    return _with_offer(request, pool, Found(hits, len(hits) * pool.page_size, keys))


def _with_offer(request: Request, pool: PagePool, found: Found) -> Found:
    """What was found, and after it what another engine has computed further, the last page part-filled.

    Only if nothing that a query to come sees is missing in between.
    """
    offer = request.offer
    if offer is None:
        return found
    num_tokens, size = min(offer.num_tokens, request.num_tokens - 1), pool.page_size
    if num_tokens <= found.num_tokens:
        return found
    first = max(len(found.pages), pool.first_visible(num_tokens))
    needed = max(first * size, 0 if pool.window is None else num_tokens - pool.window + 1)
    if offer.first_token > needed:
        return found
    keys, spans, headless = dict(found.keys), {}, 0
    for i in range(first, pool.pages_for(num_tokens)):
        start, stop = max(i * size, offer.first_token), min((i + 1) * size, num_tokens)
        headless = i + 1 if start > i * size else headless
        is_whole = stop - start == size and i < len(request.page_hashes)
        key = request.page_hashes[i] if is_whole else b"offered %d %s" % (i, request.request_id.encode())
        keys[i], spans[key] = key, Span(offer, start, stop)
    pages = found.pages + [0] * (first - len(found.pages))
    pages += [None] * (pool.pages_for(num_tokens) - len(pages))
    return Found(pages, num_tokens, keys, spans, headless)


def _can_share(parent: Request, child: Request, pool: PagePool) -> bool:
    """Whether the parent still holds all that the child's first query sees, and the child has its prompt only."""
    sees = pool.first_visible(child.num_tokens - 1)
    return parent.prompt_is_computed and child.num_tokens == parent.num_prompt and parent.held.num_dropped <= sees

"""Two servers, one for prompts and one for answers, driven as a router would. Prints one JSON object.

    python scripts/drive_pools.py equal --model FOLDER [--router VLLM_ROUTER] [--trace FILE.csv] [--requests N]
    python scripts/drive_pools.py kills --model FOLDER [--kills 50]
    python scripts/drive_pools.py route --model FOLDER --router VLLM_ROUTER --trace FILE.jsonl [--requests 300]
    python scripts/drive_pools.py even --model FOLDER [--prompt-len 4096] [--seconds 40] [--plot FILE.png]
    python scripts/drive_pools.py overlap --model FOLDER [--prompt-len 4096] [--rounds 7]
    python scripts/drive_pools.py admission --model FOLDER [--seconds 40]

`equal` sends a trace's requests through the router (without one: both requests of the contract itself), streams and
not, and compares every answer with the decode server's own. `kills` ends either server at random moments, starts it
again, and checks that every request is answered rightly or fails soon with an error that may be retried, and that no
page stays in use; what it times is a request, not a server's start. `route` compares the router's policies
`cache_aware` and `random` in front of two plain servers by how much of the prompts was cached, and kills one of them.
`even` measures the time between tokens of 8 streams with and without long prompts arriving all the time: two pools on
a core each, and one server on both. `overlap` measures how much of a transfer goes by while its prompt is computed,
and what the first token costs more than on one server. `admission` compares predicted and measured times to the first
token, and says how long admitted requests wait at 1.5 times the load that one server sustains. What stands after `--`
are flags of every server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from two_pools.admission import admission
from two_pools.equal import equal
from two_pools.even import even
from two_pools.kills import kills
from two_pools.overlap import overlap
from two_pools.route import route

COMMANDS = {"equal": equal, "kills": kills, "route": route, "even": even, "overlap": overlap, "admission": admission}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--router", metavar="PATH")
    parser.add_argument("--trace", metavar="FILE")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=15.0, help="seconds that a request may take in `kills`")
    parser.add_argument("--prompt-len", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of one iteration in `overlap`")
    parser.add_argument("--slo", type=float, help="seconds, in `admission`; default: 4 medians")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=1 << 30)
    parser.add_argument("--plot", metavar="FILE")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    args.flags = sys.argv[at + 1 :]
    result = asyncio.run(COMMANDS[args.what](args))
    print(json.dumps(result))
    if not result.get("holds", True):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Start a command as several processes on this machine, each with its own emulated CPU devices.

    python scripts/launch_local.py --processes 2 --devices-per-process 4 -- jaxllm generate "Hello" --mesh tp=8

Process 0 has standard output; Ctrl-C and the first process that fails end all. Exit code: the first that is not 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

_GRACE_SECONDS = 15.0


def main() -> int:
    """Start, watch, and end together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices-per-process", type=int, default=1)
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args()
    address = f"127.0.0.1:{_free_port()}"
    processes = [_start(args, address, i) for i in range(args.processes)]
    stop = {signal.SIGINT: False}

    def on_signal(signum: int, frame: object) -> None:
        stop[signal.SIGINT] = True

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    while any(process.poll() is None for process in processes) and not stop[signal.SIGINT]:
        if any(process.poll() for process in processes):
            break
        time.sleep(0.05)
    return _end(processes, interrupted=stop[signal.SIGINT])


def _start(args: argparse.Namespace, address: str, number: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(args.devices_per_process),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(args.processes),
        "JAX_PROCESS_ID": str(number),
    }
    # A session of its own: Ctrl-C reaches it through us alone, once.
    return subprocess.Popen(
        args.command, env=environment, stdout=None if number == 0 else subprocess.DEVNULL, start_new_session=True
    )


def _end(processes: list[subprocess.Popen[bytes]], *, interrupted: bool) -> int:
    """Wait for what ends by itself; ask, then kill, what does not."""
    if interrupted:
        for process in processes:
            process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _GRACE_SECONDS
    codes = []
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        codes.append(process.returncode)
    if interrupted:
        return 130
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())

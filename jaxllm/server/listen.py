"""Where a server listens: the socket is bound before anything is loaded, so that a taken port is known at once.

Imports nothing of the server; knows no protocol.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Where to listen and how long a drain may take (seconds)."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    shutdown_timeout: float = 30.0

    @property
    def url(self) -> str:
        """What a person on this machine types into a browser."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        host = f"[{host}]" if ":" in host else host
        return f"http{'s' if self.ssl_certfile else ''}://{host}:{self.port}"

    def bind(self) -> socket.socket:
        """The socket, on which nobody is heard yet. Raises ValueError, one line, where it cannot be had."""
        where = self.uds or f"{self.host}:{self.port}"
        try:
            return self._bind_path(self.uds) if self.uds else self._bind_port()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                advice = "choose another --uds" if self.uds else "choose another --port, or end what listens there"
                raise ValueError(f"{where} is taken; {advice}") from None
            raise ValueError(f"cannot listen on {where}: {error.strerror or error}") from None

    def _bind_port(self) -> socket.socket:
        family, kind, protocol, _, address = socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _bound(made, address)

    def _bind_path(self, path: str) -> socket.socket:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(path) == errno.ECONNREFUSED:
                    os.unlink(path)  # nobody listens there any more
        return _bound(socket.socket(socket.AF_UNIX), path)


def _bound(made: socket.socket, address: object) -> socket.socket:
    try:
        made.bind(address)  # pyright: ignore[reportArgumentType]
        made.setblocking(False)
    except OSError:
        with contextlib.suppress(OSError):
            made.close()
        raise
    return made

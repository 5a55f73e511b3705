"""In: nothing. Out: S3 servers of two makes on loopback, each behind a wire that counts requests and can be cut."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_REQUEST = re.compile(rb"^(GET|PUT|POST|HEAD|DELETE) (\S+) HTTP/1\.1\r\n")
STARTS_WITHIN = 60.0
BUCKET = "bucket"


class Wire:
    """A TCP relay to a server; requests are told by the first line of what a client sends at once."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self.requests: list[tuple[str, str]] = []
        self._open: set[socket.socket] = set()
        self.before: Callable[[str, str], None] = lambda method, path: None
        """Called with method and path of every request before it is passed on."""

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(64)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def cut(self) -> None:
        """Refuse new connections and end those that are open."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Take connections again, at the same port."""
        self._listener = self._listen(self.port)

    def counted(self) -> Counter[str]:
        """Return the number of requests by method."""
        return Counter(method for method, _ in self.requests)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._open |= {client, server}
            for source, sink, asks in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._relay, args=(source, sink, asks), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, asks: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if asks and (found := _REQUEST.match(data)):
                    self.requests.append((found[1].decode(), found[2].decode()))
                    self.before(*self.requests[-1])
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            self._open.discard(end)


class ObjectServer:
    """A server of objects in a process of its own, with a bucket, behind a wire."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        self.wire = Wire(self.port)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.wire.port}"

    def start(self) -> None:
        """Start the process; localbucket has the objects that it had, moto none."""
        words = ["-m", "moto.server", "-p", str(self.port)]
        if self.kind == "localbucket":
            words = ["-m", "localbucket", "--port", str(self.port), str(self.folder)]
        self._process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        with suppress(urllib.error.HTTPError):  # it may be there already
            self.tell("PUT", f"/{BUCKET}")

    def stop(self) -> None:
        """Kill the process."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def tell(self, method: str, path: str, content: bytes | None = None) -> bytes:
        """Send a request past the wire."""
        address, plain = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(address, method=method, data=content, headers=plain)
        with urllib.request.urlopen(request) as answer:
            return bytes(answer.read())

"""In: requests for an object store. Out: the answers of the one process that talks to object stores for this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, final

from cache_kd.errors import CacheKDError, SettingError

RETRY = "CACHE_KD_RETRY_SECONDS"
RETRY_SECONDS = 180.0
PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")
"""Environment variables of object stores: credentials, regions, endpoints."""


def retry_seconds() -> float:
    """Return for how long a request is repeated: `CACHE_KD_RETRY_SECONDS`."""
    text = os.environ.get(RETRY)
    try:
        return float(text) if text else RETRY_SECONDS
    except ValueError:
        raise SettingError(f"{RETRY}={text!r}; allowed: a number of seconds") from None


@final
class ObjectProcess:
    """The object server of this process, started when it is first needed; forked children use their parent's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._address: str | None = None
        self._process: subprocess.Popen[str] | None = None
        self._connections: dict[tuple[int, int], Connection[Any, Any]] = {}
        os.register_at_fork(after_in_child=self._after_fork)

    def ask(self, name: str, url: str, arguments: Sequence[Any]) -> tuple[str, Any]:
        """Return (status, answer) of a request; a server that died is replaced once."""
        environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith(PREFIXES)))
        request = (name, ((url, environment, retry_seconds()), *arguments))
        for again in (True, False):
            connection = self._connection()
            try:
                connection.send(request)
                status, answer = connection.recv()
                return str(status), answer
            # After an interrupt, too, the answer to this request must not be the next one's.
            except BaseException as error:
                self._drop(connection)
                if not isinstance(error, (EOFError, OSError)):
                    raise
                if not again:
                    raise CacheKDError(
                        f"the process that talks to the object store ended in the middle of a request ({error}); run "
                        "the same command again"
                    ) from error
        raise AssertionError("unreachable")

    def _connection(self) -> Connection[Any, Any]:
        key = (os.getpid(), threading.get_ident())
        found = self._connections.get(key)
        if found is not None:
            return found
        with self._lock:
            if self._address is not None and not self._answers():
                self._address = None
            if self._address is None:
                self._address = self._start()
            made: Connection[Any, Any] = Client(self._address, "AF_UNIX")
            self._connections[key] = made
        return made

    def _answers(self) -> bool:
        assert self._address is not None
        try:
            Client(self._address, "AF_UNIX").close()
        except OSError:
            return False
        return True

    def _start(self) -> str:
        folder = tempfile.mkdtemp(prefix="cache-kd-objects-")  # readable by its owner alone; the server deletes it
        address = str(Path(folder, "socket"))
        told = {"address": address, "parent": os.getpid()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cache_kd.cache.object_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt is for its parent, which may still have something to write
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.close()
        said = self._process.stdout.readline().strip()
        self._process.stdout.close()
        if said == "absent":
            raise CacheKDError("caches in object stores need the package obstore: pip install 'cache-kd[remote]'")
        if said != "ready":
            raise CacheKDError(f"the process that talks to object stores did not start ({said or 'it said nothing'})")
        return address

    def close(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            for connection in self._connections.values():
                connection.close()
            self._connections, self._address = {}, None
            if self._process is not None:
                self._process.terminate()
                self._process.wait()

    def _drop(self, connection: Connection[Any, Any]) -> None:
        with self._lock:
            self._connections = {key: held for key, held in self._connections.items() if held is not connection}
        connection.close()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._connections = {}


OBJECTS = ObjectProcess()

"""JSON over HTTP with nothing but the standard library."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

__all__ = ["FAILURES", "Flight", "reason"]

FAILURES = (OSError, http.client.HTTPException)
"""What a request raises where no answer comes."""


class Flight:
    """Requests under way, which can be given up together, from any thread."""

    def __init__(self, url: str):
        self._at = urlsplit(url)
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()
        self._stopped = False

    def request(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> tuple[int, Any]:
        """Status and answer, parsed if it is JSON. Raises OSError or HTTPException; TimeoutError after ``timeout``."""
        kind = http.client.HTTPSConnection if self._at.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._at.hostname or "", self._at.port, timeout=timeout)
        with self._lock:
            if self._stopped:
                raise ConnectionAbortedError("given up")
            self._open.add(connection)
        try:
            data = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request(method, self._at.path.rstrip("/") + path, data, headers)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text) if is_json and text else text

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for connection in self._open:
                if connection.sock is not None:
                    with suppress(OSError):  # of a socket that the other side has closed
                        connection.sock.shutdown(socket.SHUT_RDWR)


def reason(status: int, answer: Any) -> str:
    """Why a request was refused, as the server puts it."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = error.get("message", error) if isinstance(error, dict) else error
    return f"{text} (HTTP {status})"

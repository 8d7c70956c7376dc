"""A page on this machine alone: a server at 127.0.0.1 that answers who knows its address, and nobody else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from secrets import token_urlsafe
from socket import SHUT_RDWR
from socketserver import TCPServer
from types import MappingProxyType
from typing import Any

from AutomaticEval.errors import AutomaticEvalError
from AutomaticEval.report.page.document import json_block, policy
from AutomaticEval.safe_text import shown

HOST = "127.0.0.1"
SECONDS = 10
"""So long a connection may say nothing."""
HTML, JSON, TEXT = (f"{kind}; charset=utf-8" for kind in ("text/html", "application/json", "text/plain"))
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"{policy(is_served=True)}; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
Answer = Callable[[str], Any]
"""(what a page asks for, such as `rows/3`) -> a value for JSON, or None where there is nothing. It is called from several threads."""


class LocalServer(ThreadingHTTPServer):
    """Gives a page, and answers what the page asks. The address holds a secret: who does not know it is refused, and so is another host."""

    daemon_threads = False  # the end waits for each

    def __init__(self, page: str, answer: Answer) -> None:
        self.page, self.answer = page.encode("utf-8", "backslashreplace"), answer
        self.secret = token_urlsafe(32)
        self._open: set[Any] = set()
        super().__init__((HOST, 0), _Request)

    @property
    def hosts(self) -> list[str]:
        """What the Host of a request may be: with another name, a foreign page has had this address put in the place of its own."""
        return [f"{name}:{self.server_port}" for name in (HOST, "localhost")]

    @property
    def address(self) -> str:
        """Of the page. Whoever knows it reads the run, as long as the server runs."""
        return f"http://{HOST}:{self.server_port}/{self.secret}/"

    def run(self) -> None:
        """Answer until Ctrl-C, or another exception. Then no connection and no thread is left."""
        with self, suppress(KeyboardInterrupt):
            self.serve_forever(poll_interval=0.2)

    def server_bind(self) -> None:
        """Bind, without asking a name server for a name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread."""
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """End all connections, and wait for their threads."""
        for each in list(self._open):
            with suppress(OSError):  # it has just ended
                each.shutdown(SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what failed. A browser that does not wait for its answer is no failure."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Request(BaseHTTPRequestHandler):
    """One request; its connection ends with it."""

    server: LocalServer
    server_version, sys_version = "AutomaticEval", ""
    timeout = SECONDS

    def parse_request(self) -> bool:
        """Whether the request is one to answer. Any other is refused here, before anything is looked up."""
        if not super().parse_request():
            return False
        secret = self.path.encode("latin-1").split(b"/")[1:2]
        if self.headers.get_all("Host") not in [[host] for host in self.server.hosts]:
            self.send_error(403, f"this server is {self.server.hosts[0]}, and answers to no other name.")
        elif not compare_digest(b"".join(secret), self.server.secret.encode()):
            self.send_error(403, "open the whole address that the command said, with its secret.")
        elif self.command != "GET":
            self.send_error(405, "only GET is answered.")
        else:
            return True
        return False

    def do_GET(self) -> None:
        """Give the page, or what it asks for."""
        whole = f"/{self.server.secret}/"
        if f"{self.path}/" == whole:  # from there, what a page asks for would be beside the secret
            return self._send(308, TEXT, b"", {"Location": whole})
        asked = self.path.removeprefix(whole)
        if not asked:
            return self._send(200, HTML, self.server.page)
        try:
            found = self.server.answer(asked)
        except AutomaticEvalError as failure:
            return self._send_json(500, {"error": shown(str(failure))})
        return (
            self._send_json(404, {"error": "there is no such thing."}) if found is None else self._send_json(200, found)
        )

    def _send_json(self, code: int, value: Any) -> None:
        self._send(code, JSON, json_block(value).encode("utf-8", "backslashreplace"))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse, in plain words."""
        self._send(code, TEXT, f"{code}: {message or explain or 'refused.'}\n".encode("utf-8", "backslashreplace"))

    def _send(self, code: int, kind: str, body: bytes, more: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS, **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing: the lines would tell the secret."""

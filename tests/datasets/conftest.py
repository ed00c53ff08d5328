import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Start a web server on this machine that answers each path with the given bytes; returns its address."""
    servers: list[tuple[ThreadingHTTPServer, threading.Event]] = []

    def start(answers: dict[str, bytes], *, stall_from_request: int | None = None) -> str:
        release = threading.Event()
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                body = answers.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                try:
                    if stall_from_request is not None and len(asked) >= stall_from_request:
                        self.wfile.write(body[: len(body) // 2])
                        self.wfile.flush()
                        release.wait(20)
                    else:
                        self.wfile.write(body)
                except OSError:
                    pass  # a probe hangs up without reading

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append((server, release))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, release in servers:
        release.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")

import base64
import http.server
import threading
from collections.abc import Iterator

import pytest

from infra.http import answers
from tests.services import free_ports

WANTED = "Basic " + base64.b64encode(b"ada:hunter/2").decode()


class Server(http.server.BaseHTTPRequestHandler):
    """`/closed` asks who you are, `/private` knows ada, `/broken` fails, anything else is open."""

    def do_GET(self) -> None:
        private = self.path == "/private" and self.headers.get("Authorization") != WANTED
        self.send_response({"/closed": 401, "/broken": 500}.get(self.path, 404 if private else 200))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("address", "answer"),
    [
        ("127.0.0.1:{}/open", True),
        ("127.0.0.1:{}/closed", True),
        ("127.0.0.1:{}/broken", False),
        ("127.0.0.1:{}/private", False),
        ("ada:hunter%2F2@127.0.0.1:{}/private", True),
        ("ada:guess@127.0.0.1:{}/private", False),
        ("127.0.0.1:port/open", False),
        ("", False),
    ],
)
def test_a_server_answers(port: int, address: str, answer: bool) -> None:
    assert answers(f"http://{address.format(port)}") is answer


def test_nobody_answers_on_a_free_port() -> None:
    assert not answers(f"http://127.0.0.1:{free_ports(1)[0]}/")


def test_a_proxy_is_not_asked_for_this_machine(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = f"http://127.0.0.1:{free_ports(1)[0]}"
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, dead)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert answers(f"http://127.0.0.1:{port}/open")
    assert not answers(f"http://localhost:{port}/open"), "elsewhere the proxy is obeyed"

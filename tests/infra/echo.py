"""A background server that starts in a blink: answers 200 to everything, and has a child process, as MLflow's has.

`python -m tests.infra.echo DIRECTORY PORT [SECONDS]` ensures it and prints its record; it answers after SECONDS.
"""

import os
import sys
from pathlib import Path

from infra.process import BackgroundServer

SERVER = """
import http.server, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Echo(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
time.sleep(float(sys.argv[2]))
print("listening on", sys.argv[1], flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Echo).serve_forever()
"""


def echo_server(directory: Path, port: int, seconds: float = 0.0, program: str = SERVER) -> BackgroundServer:
    return BackgroundServer(
        name="echo",
        directory=directory,
        first_port=port,
        health="/health",
        command=lambda port: ["-c", program, str(port), str(seconds)],
        environment=lambda _: dict(os.environ),
    )


if __name__ == "__main__":
    record = echo_server(Path(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:])).ensure()
    print(record.model_dump_json())

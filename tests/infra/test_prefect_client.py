import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.errors import ServiceUnavailable
from infra.prefect_client import configure_prefect
from infra.settings import Settings
from tests.infra.echo import echo_server
from tests.services import free_ports

CONFIGURE = """
import json, os, sys
from pathlib import Path
if "after" in sys.argv:
    import prefect
from infra.prefect_client import configure_prefect
from infra.settings import Settings
settings = Settings(home=Path(sys.argv[1]), prefect_api_url=sys.argv[2])
answer = configure_prefect(settings)
assert configure_prefect(settings) == answer
import logging
from prefect import flow
from prefect.settings import get_current_settings, temporary_settings, PREFECT_API_URL
now = get_current_settings()
with temporary_settings({PREFECT_API_URL: "http://harness/api"}):
    within = configure_prefect(Settings(home=Path("/nowhere"), prefect_api_url="http://nowhere"))
console = [h.level for h in logging.getLogger().handlers if type(h).__name__ == "PrefectConsoleHandler"]
print(json.dumps({"answer": answer, "api": now.api.url, "home": str(now.home), "within": within, "console": console,
                  "ephemeral": now.server.ephemeral.enabled, "analytics": now.server.analytics_enabled}))
"""


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[str]:
    """A server of somebody else's that answers."""
    server = echo_server(tmp_path / "remote", free_ports(1)[0])
    yield f"http://127.0.0.1:{server.ensure().port}/api"
    server.stop()


@pytest.mark.parametrize("order", ["before", "after"])
def test_prefect_uses_the_server_of_the_settings_whether_imported_before_or_after(
    tmp_path: Path, remote: str, order: str
) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    other = {"PREFECT_API_URL": "http://another:1/api", "PREFECT_HOME": str(tmp_path / "other")}
    output = subprocess.run(
        [sys.executable, "-c", CONFIGURE, str(tmp_path / "home"), remote, order],
        env={**inherited, **other, "PYTHONPATH": str(Path.cwd())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (output.returncode, output.stderr) == (0, "")
    assert json.loads(output.stdout) == {
        "answer": remote,
        "api": remote,
        "home": str(tmp_path / "home" / "prefect"),
        "within": "http://harness/api",
        "console": [30],
        "ephemeral": False,
        "analytics": False,
    }


def test_a_server_of_the_settings_that_does_not_answer_is_an_error_and_not_replaced(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}/api"
    before = dict(os.environ)
    with pytest.raises(ServiceUnavailable, match="does not answer") as caught:
        configure_prefect(Settings(home=tmp_path, prefect_api_url=address))
    assert "REGRAFT_PREFECT_API_URL" in caught.value.remedy
    assert dict(os.environ) == before
    assert not (tmp_path / "services").exists()

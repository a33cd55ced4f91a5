"""Every test process has a Regraft home of its own and never reaches for a hub."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

with suppress(ImportError):  # kernels are also tried where PyTorch and pytest are all there is
    from hypothesis import settings

    settings.register_profile("regraft", deadline=None)  # a busy machine is no failure
    settings.load_profile("regraft")

_HOME = tempfile.TemporaryDirectory(prefix="regraft-tests-")
os.environ.update(
    REGRAFT_HOME=_HOME.name,
    REGRAFT_ACTOR="tester",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    DO_NOT_TRACK="1",
)
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker: with more, tiny models wait for threads, not for results
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job is started with SIGINT ignored, which every process that a test starts would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

for _name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_"))]:
    del os.environ[_name]


@pytest.fixture(scope="session", autouse=True)
def regraft_home() -> Iterator[Path]:
    """The home of this test process; its local servers are stopped at the end."""
    yield Path(_HOME.name)
    services = Path(_HOME.name) / "services"
    if services.is_dir():
        from infra.services import LocalServices
        from infra.settings import get_settings

        LocalServices(get_settings()).down()
    _HOME.cleanup()

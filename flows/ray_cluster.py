"""The Ray cluster that work is spread over, where the setting `ray` names one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from infra.errors import InvalidInput
from infra.settings import get_settings

_LOCAL = "local:"


def ray_runner() -> Any | None:
    """A Prefect task runner for the cluster.

    Workers on other machines need Regraft, its settings and the same home or stores as here.

    Returns:
        None where the settings name no cluster.

    Raises:
        InvalidInput: Ray is not installed.
    """
    named = get_settings().ray
    if named is None:
        return None
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise InvalidInput(
            f"The setting ray is '{named}', but Ray is not installed here.", "pip install 'regraft[ray]'"
        ) from None
    if not named.startswith(_LOCAL):
        return RayTaskRunner(address=named)
    workers = int(named.removeprefix(_LOCAL))
    # "local": one of its own, where a cluster happens to run on this machine, too
    options = {"address": "local", "num_cpus": workers, "include_dashboard": False, "log_to_driver": False}
    return RayTaskRunner(init_kwargs=options)


@contextmanager
def one_worker_each() -> Iterator[None]:
    """Within it, in a flow of such a runner, each task that is submitted gets a CPU, and a GPU where there are any."""
    import ray
    from prefect_ray.context import remote_options

    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    with remote_options(num_cpus=1, num_gpus=gpus):
        yield

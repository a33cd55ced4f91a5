"""The catalogue of built-in tasks. A task's module is imported when it is asked for."""

from importlib import import_module

from infra.documents import did_you_mean
from infra.errors import NotFound
from training.tasks.task import Task

# Each name is a module of this package that holds the task as `TASK`.
CATALOG = (
    "boolean_expressions",
    "date_understanding",
    "dyck_languages",
    "formal_fallacies",
    "logical_deduction",
    "multistep_arithmetic",
    "navigate",
    "object_counting",
    "python_functions",
    "temporal_sequences",
    "tracking_shuffled_objects",
    "web_of_lies",
    "word_sorting",
)


def get_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        NotFound: no such task; suggests the closest name.
    """
    if name not in CATALOG:
        raise NotFound(f"'{name}' is not a task. {did_you_mean(name, list(CATALOG))}", "See: regraft tasks list")
    task: Task = import_module(f"training.tasks.{name}").TASK
    return task

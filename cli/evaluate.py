"""`regraft evaluate`."""

from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import Json, console, print_json

if TYPE_CHECKING:
    from registry import AdapterRegistry


def evaluate(
    subject: Annotated[str, typer.Argument(help="NAME@VERSION, NAME@ALIAS, or a base model (its bare performance).")],
    task: Annotated[list[str] | None, typer.Option(help="Built-in task(s) instead of the recipe's suites.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples in front of every question.")] = 0,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Held-out items. Default: the suite's own, or 200.")
    ] = None,
    harness: Annotated[
        list[str] | None, typer.Option(help="Task(s) of the EleutherAI harness (pip install 'regraft\\[harness]').")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Another version: a paired test on the same items.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a version on held-out data, with intervals, and record it in the registry.

    Examples:
      [bold]regraft evaluate counting@3[/]
      [bold]regraft evaluate counting@3 --task object_counting --shots 3[/]
      [bold]regraft evaluate counting@4 --against counting@production[/]
      [bold]regraft evaluate smollm2-135m-instruct --task object_counting[/]  (the bare model)
    """
    from cli.session import connect_flows, live_progress
    from cli.train import tell_results
    from infra.errors import InvalidInput, NotFound
    from registry import AdapterRegistry

    registry = AdapterRegistry()
    is_version = registry.has_adapter(subject.partition("@")[0])
    if not is_version and not _is_base(registry, subject):
        raise NotFound(
            f"'{subject}' is neither an adapter nor a base model.", "See: regraft adapters list, regraft base list"
        )
    if harness and (against or task):
        raise InvalidInput("--harness goes alone.", "Leave out --task and --against.")
    if against and not is_version:
        raise InvalidInput(f"--against compares two versions, and '{subject}' is not one.")
    if not (is_version or harness or task):
        raise InvalidInput(
            f"'{subject}' is a base model: say on which task to measure it.",
            f"regraft evaluate {subject} --task NAME; for the names: regraft tasks list",
        )
    for address in filter(None, [subject if is_version else None, against]):
        registry.get(address)
    connect_flows()  # what needs no server has come first
    from flows.evaluate_adapter import compare_versions, evaluate_adapter, evaluate_base, run_harness_tasks
    from flows.suites import suites_for

    with live_progress():
        if harness:
            results = run_harness_tasks(subject, harness, limit=samples)
        elif is_version:
            results = evaluate_adapter(subject, suites_for(task, shots, samples))
        else:
            results = evaluate_base(subject, suites_for(task, shots, samples))
        comparisons = compare_versions(subject, against, suites_for(task, shots, samples)) if against else []
    if as_json:
        print_json({"results": results, "comparisons": comparisons} if against else results)
        return
    tell_results(results)
    for found in comparisons:
        console.print(
            f"{found.suite}: {subject} is {100 * found.difference:+.1f} points against {against} "
            f"({found.only_first} items only {subject} gets right, {found.only_second} only {against}; "
            f"exact McNemar p = {found.p_value:.3g})"
        )


def _is_base(registry: "AdapterRegistry", subject: str) -> bool:
    from infra.errors import NotFound

    if ":" in subject:  # a reference, which need not be registered yet
        return True
    try:
        registry.base_model(subject)
    except NotFound:
        return False
    return True

"""`regraft evaluate`."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cli.console import Json, console, errors, print_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from flows.comparisons import Comparison
    from infra.errors import RegraftError
    from registry import AdapterRegistry


def evaluate(
    subject: Annotated[str, typer.Argument(help="NAME@VERSION, NAME@ALIAS, or a base model (its bare performance).")],
    task: Annotated[list[str] | None, typer.Option(help="Built-in task(s) instead of the recipe's suites.")] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="Suite file(s): NAME of suites/NAME.yaml, NAME/SUITE for one of its suites, or a path."),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples in front of every question.")] = 0,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Held-out items. Default: the suite's own, or 200.")
    ] = None,
    harness: Annotated[
        list[str] | None, typer.Option(help="Task(s) of the EleutherAI harness (pip install 'regraft\\[harness]').")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Other version(s): a paired test on the same items, for each.")
    ] = None,
    forgetting: Annotated[
        bool, typer.Option("--forgetting", help="A paired test against the bare base. Default suite: general.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a version on held-out data, with intervals, and record it in the registry.

    What is measured is the recipe's suites, or what --task or --suite name.
    A suite file says data, metrics (exact match, multiple choice, perplexity,
    ROUGE, BLEU, chrF, BERTScore, token F1, pass@K of programs that are run)
    and buckets of prompt length.

    With --against and --forgetting each suite is tested item by item: exact
    McNemar where items are right or wrong, else sign flips. p-values come
    plain, and corrected for the number of tests (Holm).

    Examples:
      [bold]regraft evaluate counting@3[/]
      [bold]regraft evaluate counting@3 --task object_counting --shots 3[/]
      [bold]regraft evaluate counting@4 --against counting@production --against counting@2[/]
      [bold]regraft evaluate counting@3 --suite general --forgetting[/]  (what has it cost?)
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
    if harness and (against or task or suite or forgetting):
        raise InvalidInput("--harness goes alone.", "Leave out --task, --suite, --against and --forgetting.")
    if (against or forgetting) and not is_version:
        option = "--against compares two versions" if against else "--forgetting compares a version with its base"
        raise InvalidInput(f"{option}, and '{subject}' is not one.")
    if not (is_version or harness or task or suite):
        raise InvalidInput(
            f"'{subject}' is a base model: say on which task to measure it.",
            f"regraft evaluate {subject} --task NAME; for the names: regraft tasks list",
        )
    own = registry.get(subject).address if is_version else None
    others: dict[str, str] = {}
    for address in against or ():
        others.setdefault(registry.get(address).address, address)
    if own in others:
        raise InvalidInput(f"{others[own]} is {subject} itself.", "Name another version with --against.")
    from flows.suites import suites_for

    files = suite or (["general"] if forgetting and not task else [])
    suites = suites_for(task, shots, samples, files)
    connect_flows()  # what needs no server has come first
    from flows.comparisons import compare_versions
    from flows.comparisons import forgetting as against_base
    from flows.evaluate_adapter import PartlyMeasured, evaluate_adapter, evaluate_base, run_harness_tasks

    comparisons: list[Comparison] = []
    with live_progress():
        if harness:
            results, failed = run_harness_tasks(subject, harness, limit=samples), None
        else:
            measure = evaluate_adapter if is_version else evaluate_base
            results, failed = _as_far_as_it_goes(partial(measure, subject, suites))
        if failed and not results:
            raise failed
        failures = [failed] if failed else []
        without = failed.failed if isinstance(failed, PartlyMeasured) else ()
        for compared in (
            *([partial(compare_versions, subject, list(others.values()), suites, without)] if others else []),
            *([partial(against_base, subject, suites, without)] if forgetting else []),
        ):
            found, failed = _as_far_as_it_goes(compared)
            comparisons += found
            failures += [failed] if failed else []
    if as_json:
        print_json({"results": results, "comparisons": comparisons} if against or forgetting else results)
    else:
        tell_results(results)
        for each in comparisons:
            console.print(_told(subject, each, len(comparisons)))
    for error in failures[:-1]:
        errors.print(f"[bold red]✗[/] {escape(error.what)}", soft_wrap=True)
    if failures:
        raise failures[-1]


def _as_far_as_it_goes(measure: "Callable[[], list[Any]]") -> "tuple[list[Any], RegraftError | None]":
    """What was measured, and the error that there is to tell at the end."""
    from flows.evaluate_adapter import PartlyMeasured
    from infra.errors import Interrupted, RegraftError

    try:
        return measure(), None
    except Interrupted:
        raise
    except RegraftError as error:
        return error.done if isinstance(error, PartlyMeasured) else [], error


def _told(subject: str, found: "Comparison", tests: int) -> str:
    """A comparison in a sentence."""
    if found.metric in ("perplexity", "brier"):
        difference, unit = f"{found.difference:+.3g}", ""
    else:
        difference, unit = f"{100 * found.difference:+.1f}", " points"
        if found.low is not None and found.high is not None:
            unit += f" [{100 * found.low:+.1f} to {100 * found.high:+.1f}]"
    what = "gets right" if found.test == "exact McNemar" else "does better on"
    metric = "" if found.test == "exact McNemar" else f" {found.metric}"
    corrected = f", of {tests} tests (Holm) {found.p_holm:.3g}" if tests > 1 else ""
    items = (
        f"{found.only_first} items only {subject} {what}, {found.only_second} only {found.against}; "
        if found.only_first or found.only_second
        else ""
    )
    return escape(
        f"{found.suite}{metric}: {subject} is {difference}{unit} against {found.against} "
        f"({items}{found.test} p = {found.p_value:.3g}{corrected})"
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

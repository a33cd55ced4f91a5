"""`regraft export`, `regraft import` and `regraft check`: adapters to and from other tools, in their formats."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.console import Json, console, facts, percent, print_json, show, size
from cli.session import whole
from infra.errors import InvalidInput

if TYPE_CHECKING:
    from registry.serving_rules import Subject
    from training.interchange.probes import Difference
    from training.interchange.truncation import Loss


class Tool(StrEnum):
    """Whose format to write."""

    PEFT = "peft"
    KOHYA = "kohya"
    MLX = "mlx"
    MERGED = "merged"
    STORED = "stored"


class Server(StrEnum):
    """What shall serve an adapter."""

    VLLM = "vllm"
    LORAX = "lorax"
    PEFT = "peft"
    LLAMA_CPP = "llama.cpp"


class Dtype(StrEnum):
    """Of a merged model's weights."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def export(
    address: Annotated[str, typer.Argument(help="NAME@VERSION or NAME@ALIAS.")],
    directory: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    to: Annotated[
        Tool | None,
        typer.Option(
            "--to",
            help="peft: a folder for peft, vLLM and others (the default). kohya: one file, for image tools. mlx: for "
            "mlx-lm. merged: a plain model, for tools that know no adapters. stored: as Regraft holds it; of a "
            "compressed version, the small files.",
        ),
    ] = None,
    as_lora: Annotated[
        bool, typer.Option("--as-lora", help="As a plain LoRA, for tools that do not know the method; loses nothing.")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="As a plain LoRA of this rank, the nearest there is; what that loses is measured."),
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="The same as --to merged.")] = False,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of a merged model. Default: that of the base's own files.")
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The most that one file of a merged model takes: 5GB, 500MB.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a version in another tool's format. Every byte is checked on the way, and a merged model proves itself.

    Examples:
      [bold]regraft export counting@production ./counting[/]
      [bold]regraft export counting@7 ./counting --as-lora[/]  (whatever is of low rank: paca, vera, hydra, …)
      [bold]regraft export counting@7 ./counting --rank 16[/]  (whatever changes linear layers only: dora, oft, ia3, …)
      [bold]regraft export counting@7 ./counting-mlx --to mlx[/]
      [bold]regraft export counting@7 ./counting-model --to merged[/]
    """
    chosen = _tool(to, merged)
    if chosen in (Tool.MERGED, Tool.STORED) and (as_lora or rank):
        raise InvalidInput(f"--as-lora or --rank and --to {chosen} are two different things to write.", "Give one.")
    if chosen is not Tool.MERGED and (dtype or shard_size):
        raise InvalidInput("--dtype and --shard-size are for a merged model.", "Give --to merged with them.")
    sharded = {"shard_size": shard_size} if shard_size else {}
    with whole("The export", "nothing was written"):
        from flows.export_adapter import export_adapter

        exported = export_adapter(
            address, directory, chosen.value, as_lora=as_lora, rank=rank, dtype=dtype and dtype.value, **sharded
        )
    if as_json:
        print_json(exported)
        return
    console.print(f"[bold]{escape(address)}[/] is in {escape(str(directory))}")
    if exported.loss is not None:
        _tell_loss(exported.loss, exported.difference, rank)
    if exported.proof is not None:
        proof = exported.proof
        lines = [
            ("changed", f"{proof.changed} of the base's tensors" + _untouched(proof.untouched)),
            ("weights", f"{proof.dtype}, {size(proof.size_bytes)}; the base in it {size(proof.base_bytes)}"),
        ]
        facts([*lines, ("logits", _moved(proof.difference, "merged and not"))])


def import_(
    path: Annotated[
        Path,
        typer.Argument(
            help="A folder of peft's or MLX's, a kohya or diffusers .safetensors file, or a whole model's folder."
        ),
    ],
    name: Annotated[str, typer.Argument(help="The adapter that it becomes a version of.")],
    base: Annotated[str, typer.Option(help="The base model it was trained on: a registered name or a reference.")],
    task: Annotated[str | None, typer.Option(help="The built-in task that it is for.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of a whole model: extract a LoRA of this rank from what differs.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Instead: the share of the difference to hold, e.g. 0.99.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="Of a file with several parts of a pipeline: lora_te1, text_encoder, …")
    ] = None,
    as_json: Json = False,
) -> None:
    """Register an adapter that was trained elsewhere; its format is told by the files themselves.

    The files are distrusted until checked: links, programs and pickles are refused, but for peft's old
    adapter_model.bin, which is read without running anything and converted.

    Examples:
      [bold]regraft import ./counting counting --base smollm2-135m-instruct[/]
      [bold]regraft import ./adapters-mlx counting --base smollm2-135m-instruct[/]
      [bold]regraft import ./tuned-model counting --base smollm2-135m-instruct --rank 32[/]
    """
    if rank is not None and energy is not None:
        raise InvalidInput("--rank and --energy are two ways to say how much to keep.", "Give one of them.")
    if energy == 0:
        raise InvalidInput("--energy 0 would keep nothing of the difference.", "Give more, up to 1: --energy 0.99")
    with whole("The import", "nothing was registered"):
        from flows.import_foreign import import_foreign
        from registry.records import as_json as plain
        from training.interchange.truncation import Keep

        keep = Keep(rank, energy) if rank is not None or energy is not None else None
        imported = import_foreign(path, name, base, task, keep=keep, part=part)
    version = imported.version
    if as_json:
        told = {"found": imported.found, "loss": imported.loss, "difference": imported.difference}
        print_json({**plain(version), **{key: value for key, value in told.items() if value is not None}})
        return
    layers = f", {imported.layers} layers of rank {imported.rank} or less" if imported.layers else ""
    console.print(f"[dim]found {escape(imported.found)}{layers}[/]")
    if imported.loss is not None:
        _tell_loss(imported.loss, imported.difference, imported.rank)
    console.print(f"[bold green]✓[/] [bold]{version.address}[/]  {version.method} on {version.base.name}")


def check(
    address: Annotated[str, typer.Argument(help="NAME@VERSION, NAME@ALIAS, or the path of a peft folder.")],
    server: Annotated[Server, typer.Option("--for", help="What shall serve it.")],
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="The highest rank that this server takes. Default: the server's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say before the server does whether it will take an adapter: line by line, with the remedy. Loads no model.

    Exit code 7: it will not, or would serve something else than what was trained.

    Examples:
      [bold]regraft check counting@production --for vllm[/]
      [bold]regraft check ./counting-lora --for llama.cpp[/]
    """
    from registry.serving_rules import examine

    subject = _subject(address)
    lines = examine(subject, server.value, max_rank)
    passed = all(line.passed for line in lines)
    if as_json:
        print_json({"adapter": address, "server": server.value, "passed": passed, "lines": lines})
    else:
        marks = ("[red]✗[/]", "[green]✓[/]")
        show(("", "~asked", "~found"), [(marks[line.passed], line.name, escape(line.found)) for line in lines], "")
        for line in lines:
            if line.remedy:
                console.print(f"  [dim]→ {line.name}:[/] {escape(line.remedy)}", soft_wrap=True)
    if not passed:
        raise typer.Exit(7)


def _subject(address: str) -> "Subject":
    """The adapter at an address, or in a folder: what has a slash or is a folder's name with one is a path."""
    from registry import AdapterRegistry
    from registry.adapter_directory import inspect_adapter
    from registry.serving_rules import Subject, tied_head

    if "/" in address:
        return Subject(address, inspect_adapter(Path(address)))
    registry = AdapterRegistry()
    version = registry.get(address)
    files = inspect_adapter(registry.materialise(version.address))
    return Subject(version.address, files, version.base.family, tied_head(version.base.reference))


def _tool(to: Tool | None, merged: bool) -> Tool:
    if merged and to not in (None, Tool.MERGED):
        raise InvalidInput(f"--merged and --to {to} are two different things to write.", "Give one of them.")
    return Tool.MERGED if merged else to or Tool.PEFT


def _tell_loss(loss: "Loss", difference: "Difference | None", rank: int | None) -> None:
    """What was lost: of the update as a whole and where most, and what it does to the answers."""
    place, most = loss.worst
    lines = [
        ("lost", f"{percent(loss.total)} of the update at rank {rank}; most in {place}: {percent(most)}"),
        ("logits", _moved(difference, "cut down and not")),
    ]
    if loss.left_out:
        names = sorted(loss.left_out, key=lambda name: -loss.left_out[name])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(("left out", f"[yellow]{', '.join(names[:3])}{more}: no LoRA can change them[/]"))
    facts(lines)


def _moved(difference: "Difference | None", between: str) -> str:
    if difference is None:
        return "not compared: the model reads neither tokens nor pixels"
    return (
        f"at most {difference.largest:.2g} apart, {between} (they reach {difference.range:.3g}); the same choice at "
        f"{percent(difference.top1)} of {difference.positions} positions"
    )


def _untouched(places: tuple[str, ...]) -> str:
    if not places:
        return ""
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return f"; its update of {', '.join(places[:3])}{more} is zero"

"""`regraft lineage`."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.tree import Tree

from cli.console import Json, console, print_json


class Format(StrEnum):
    """How a family is drawn."""

    tree = "tree"
    mermaid = "mermaid"
    json = "json"


def lineage(
    address: Annotated[str, typer.Argument(help="NAME@VERSION or NAME@ALIAS.")],
    format_: Annotated[Format, typer.Option("--format", "-f", help="tree, mermaid or json.")] = Format.tree,
    as_json: Json = False,
) -> None:
    """Where a version comes from and what came of it, across base models; and which data sets it was made from.

    Example: [bold]regraft lineage counting@8 --format mermaid[/]
    """
    from registry import AdapterRegistry

    graph = AdapterRegistry().lineage(address)
    if as_json or format_ is Format.json:
        print_json(graph.to_json())
    elif format_ is Format.mermaid:
        print(graph.to_mermaid())
    else:
        nodes = {node.address: node for node in graph.nodes}
        children: dict[str, list[tuple[str, str]]] = {}
        for edge in graph.edges:
            children.setdefault(edge.parent, []).append((edge.child, edge.relation))

        def label(node_address: str, relation: str = "") -> str:
            node = nodes[node_address]
            aliases = f" [green]{', '.join(node.aliases)}[/]" if node.aliases else ""
            name = f"[bold reverse]{node_address}[/]" if node_address == graph.subject else f"[bold]{node_address}[/]"
            came = f"[dim]{relation} →[/] " if relation else ""
            kept = "".join(f" [dim]+ {relation.replace('_', ' ')}[/]" for relation in node.attachments)
            return f"{came}{name}  {node.method} on {node.base}{aliases}{kept}"

        def grow(tree: Tree, parent: str) -> None:
            for child, relation in sorted(children.get(parent, [])):
                grow(tree.add(label(child, relation)), child)

        for data in graph.data_sets:
            tree = Tree(f"[dim]data set[/] [bold]{data.address}[/]  {data.rows:,} rows")
            for child in data.made:
                grow(tree.add(label(child, "made_from")), child)
            console.print(tree)
        born = {edge.child for edge in graph.edges} | {child for data in graph.data_sets for child in data.made}
        for root in sorted(nodes.keys() - born):
            tree = Tree(label(root))
            grow(tree, root)
            console.print(tree)

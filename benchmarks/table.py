"""All results in one markdown table, written between two marks in docs/benchmarks.md: python -m benchmarks.table"""

import json
from pathlib import Path

from benchmarks.results_file import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: python -m benchmarks.table -->", "<!-- end of results -->"


def table(results: Path = RESULTS) -> str:
    """The markdown table of every row of every result file; rows below their goal stay in it."""
    lines = [
        "| claim | ours | peer | ratio | goal | | device | date |",
        "|---|---:|---:|---:|---:|---|---|---|",
    ]
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["rows"]:
            sign = "≥" if row["better"] == "higher" else "≤"
            cells = (
                f"{row['claim']} (`{content['script']}`)",
                f"{row['ours']:,.4g} {row['unit']}",
                f"{row['peer']:,.4g} {row['unit']} ({row['peer_name']})",
                f"{row['ratio']:.2f}",
                f"{sign} {row['goal']:g}",
                "✓" if row["met"] else "✗",
                f"{content['device']}, {content['cores']} cores",
                content["date"],
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def insert(page: str, content: str, begin: str = BEGIN) -> str:
    """`page` with what stands between the marks replaced by `content`; the marks are added at the end if need be."""
    before, found, rest = page.partition(begin)
    _, _, after = rest.partition(END)
    if not found:
        before, after = page.rstrip() + "\n\n", "\n"
    return f"{before}{begin}\n{content}\n{END}{after}"


if __name__ == "__main__":
    current = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "# Benchmarks\n"
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(insert(current, table()), encoding="utf-8")
    print(f"{PAGE} updated")

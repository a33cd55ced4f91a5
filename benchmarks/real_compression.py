"""How small a real adapter gets, and what that costs: `regraft compress` on a LoRA of SmolLM2-135M.

    python -m benchmarks.real_compression [--address counting@1]

Without an address, recipes/counting.yaml is trained first, in REGRAFT_HOME. Needs models.txt, and takes about twenty
minutes on two cores. The results go to benchmarks/results and, as a table, to docs/compression.md.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.real_migration import RECIPE, regraft
from benchmarks.results_file import Row, write
from benchmarks.table import insert
from flows.compress_adapter import WALK, WALK_OF_LORAS
from training.compression.rice import entropy_bits

PAGE = Path(__file__).parents[1] / "docs" / "compression.md"
BEGIN = "<!-- results: python -m benchmarks.real_compression -->"
ONE_BIT = "codebook:bits=1"
SMALL = 16  # times smaller, at which a point may be lost
LOSS = 0.01


def report(found: dict[str, Any]) -> None:
    """Write the results and the table of docs/compression.md."""
    (before,), dense = found["before"], found["dense_bytes"]
    elements = dense // 2
    lines = [
        "| form | bytes | smaller than bfloat16 | entropy of the sheet | validation accuracy |",
        "|---|---:|---:|---:|---:|",
        f"| as it is | {found['source_bytes']:,} | – | – | {100 * before:.1f} % |",
    ]
    rows = []
    for form in sorted(found["forms"], key=lambda form: -form["size_bytes"]):
        (value,) = form["values"]
        bound = "–"
        if form["steps"].startswith("compeft"):
            density = float(form["steps"].partition("density=")[2].partition(",")[0])
            least = entropy_bits(density, elements) / 8
            bound = f"{least:,.0f} ({form['size_bytes'] / least - 1:+.1%})"
            claim = f"ComPEFT file at density {density:g}, header included"
            rows.append(Row(claim, form["size_bytes"], least, "entropy", "bytes", 1.03, "lower"))
        if form["steps"] == ONE_BIT:
            bits = 8 * form["size_bytes"] / elements
            rows.append(Row("one-bit file, header included", bits, 1, "one bit", "bits a number", 1.05, "lower"))
        lines.append(
            f"| `{form['steps']}` | {form['size_bytes']:,} | {form['ratio']:.1f} × | {bound} | {100 * value:.1f} % |"
        )
    small = [form for form in found["forms"] if form["ratio"] >= SMALL]
    best = max(form["values"][0] for form in small)
    claim = f"accuracy at {SMALL} times smaller or more, on validation items"
    rows.append(Row(claim, 100 * best, 100 * (before - LOSS), "the adapter, less a point", "%", 1))
    if found["measured"]:
        (suite,) = found["measured"]
        old, new = suite["parents"][0], suite["child"]
        told = (
            f"{100 * each['value']:.1f} % ({100 * each['low']:.0f}–{100 * each['high']:.0f})" for each in (old, new)
        )
        lines += [
            "",
            f"Chosen within a point: `{found['steps']}`. On {suite['samples']} test items: {', '.join(told)}.",
        ]
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), "\n".join(lines), BEGIN), encoding="utf-8")
    write("real_compression", rows, details=found)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address")
    options = parser.parse_args()
    address = options.address or regraft("train", str(RECIPE), "--no-kit")["address"]
    codecs = [part for line in (*WALK, *WALK_OF_LORAS) for part in ("--codec", line)]
    report(regraft("compress", address, *codecs))


if __name__ == "__main__":
    main()

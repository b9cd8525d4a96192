"""Writes the table of wrong implementations, and of the check that rejects each.

    python docs/figures/mutants.py

`mutants.md` is written beside this file, and a test fails when it is not what this script would write.
"""

from __future__ import annotations

from pathlib import Path

from dat_ref.testing import OPS, OpSpec

FOLDER = Path(__file__).parent


def outputs() -> dict[str, str]:
    """Return what this script writes, by name."""
    return {"mutants.md": "\n".join(table(op) for op in OPS)}


def table(op: OpSpec) -> str:
    """Return a section: a row for each check, with the mistakes that fail there first."""
    lines = [
        f"### `{op.name}`: {len(op.mutants)}",
        "",
        f"{op.title[0].upper()}{op.title[1:]}.",
        "",
        "| the first check that fails | mistakes |",
        "|---|---|",
    ]
    for check in op.checks:
        names = [mutant.name.replace("|", "\\|") for mutant in op.mutants if mutant.check == check.name]
        if names:
            lines.append(f"| `{check.name}` | {'<br>'.join(names)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    for name, content in outputs().items():
        (FOLDER / name).write_text(content, encoding="utf-8")

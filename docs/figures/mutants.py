"""Write the table of the mutants, with the first check that rejects each.

    python docs/figures/mutants.py

writes `mutants.md` into this folder; a test fails if it differs from the output of this script.
"""

from __future__ import annotations

from pathlib import Path

from dat_ref.testing import OPS, OpSpec

FOLDER = Path(__file__).parent


def outputs() -> dict[str, str]:
    """Return the files of this script by name."""
    return {"mutants.md": "\n".join(table(op) for op in OPS)}


def table(op: OpSpec) -> str:
    """Return a section: a row for each check, with the mistakes that this check rejects first."""
    lines = [
        f"### `{op.name}`: {len(op.mutants)}",
        "",
        f"{op.title[0].upper()}{op.title[1:]}.",
        "",
        "| first failing check | mistakes |",
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

"""Tables of the results, for the terminal and for the pages of the site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .implementations import BACKWARD, EAGER, FORWARD
from .models import RELEASED

Results = Mapping[str, Any]  # result of `run`, as stored in JSON

HEADINGS = {
    "core": "The core: deformable attention with its bias",
    "neighborhood": "Neighborhood attention with relative bias",
    "model": "Whole models",
    "resolution": "Forward pass of the core on larger maps, one key per pixel",
    "profile": "Time of an optimized model by kind of operation",
    "first_use": "First call of a process, seconds",
}


class Table(NamedTuple):
    """Table with text columns on the left and number columns on the right."""

    key: str  # key of HEADINGS
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    text_columns: int  # number of text columns
    notes: list[str]


def build_tables(results: Results) -> list[Table]:
    """Return one table for each kind of measurement."""
    tables = []
    for kind in ("core", "neighborhood"):
        comparisons = [comparison for comparison in results["comparisons"] if comparison["kind"] == kind]
        if comparisons:
            tables.append(_attention(kind, comparisons))
    models = [comparison for comparison in results["comparisons"] if comparison["kind"] == "model"]
    if models:
        tables.append(_models(models))
        if any(comparison["shares"] for comparison in models):
            tables.append(_profile(models))
    if results["resolutions"]:
        tables.append(_resolutions(results["resolutions"]))
    if results["first_use"]:
        tables.append(_first_use(results["first_use"]))
    return tables


def format_text(results: Results) -> str:
    """Return all tables for a terminal."""
    parts = [_environment(results["machine"])]
    if results["machine"]["missing"]:
        parts[0] += "".join(f"\nunavailable: {name} ({why})" for name, why in results["machine"]["missing"].items())
    for table in build_tables(results):
        widths = [max(map(len, column)) for column in zip(table.header, *table.rows)]
        lines = [HEADINGS[table.key], ""]
        for row in (table.header, *table.rows):
            cells = (
                cell.ljust(width) if index < table.text_columns else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths))
            )
            lines.append("  ".join(cells).rstrip())
        parts.append("\n".join([*lines, *table.notes]))
    return "\n\n".join(parts)


def format_markdown(results: Results) -> str:
    """Return the tables as named sections of a Markdown file. A page of the site includes the sections."""
    parts = [
        _section("machine", [_environment(results["machine"]), "", f"```bash\n{results['machine']['command']}\n```"])
    ]
    for table in build_tables(results):
        rules = [":---"] * table.text_columns + ["---:"] * (len(table.header) - table.text_columns)
        lines = ["| " + " | ".join(row) + " |" for row in (table.header, rules, *table.rows)]
        parts.append(_section(table.key, [*lines, *(f"\n{note}" for note in table.notes)]))
    return "\n\n".join(parts) + "\n"


def _section(name: str, lines: Iterable[str]) -> str:
    return "\n".join([f"<!-- --8<-- [start:{name}] -->", "", *lines, "", f"<!-- --8<-- [end:{name}] -->"])


def _environment(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    return f"{machine['hardware']}{threads}; {versions}; {machine['date']}."


# ------------------------------------------------------------------------------------------------ the tables


def _attention(kind: str, comparisons: list[Results]) -> Table:
    header = ("shape", "dtype", "backend", "forward", "×", "forward + backward", "×", "memory", "with backward")
    rows, notes = [], []
    for comparison in comparisons:
        baseline = _baseline_row(comparison["rows"], EAGER)
        for index, row in enumerate(comparison["rows"]):
            cells = (
                [f"{comparison['case']}: {comparison['description']}", comparison["dtype"]] if index == 0 else ["", ""]
            )
            cells.append("torch's attention, no bias" if row["error"] is None else row["name"])
            for mode in (FORWARD, BACKWARD):
                cells += [_milliseconds(row["seconds"][mode]), _speedup(baseline, row, mode)]
            rows.append((*cells, *(_megabytes(row["bytes"].get(mode)) for mode in (FORWARD, BACKWARD))))
        notes += [
            f"{comparison['case']}, {comparison['dtype']}: {name}: {why}."
            for name, why in comparison["skipped"].items()
        ]
    return Table(kind, header, rows, 3, notes)


def _models(comparisons: list[Results]) -> Table:
    rates = ("images/s", "×", "× in its dtype", "training images/s", "×", "× in its dtype")
    header = ("model", "dtype", "variant", *rates, "memory", "training")
    rows, notes = [], []
    for comparison in comparisons:
        baseline = _baseline_row(comparison["rows"], RELEASED, "float32")
        for index, row in enumerate(comparison["rows"]):
            same_dtype = _baseline_row(comparison["rows"], RELEASED, row["dtype"])
            cells = [
                f"{comparison['case']}, {comparison['description']}" if index == 0 else "",
                row["dtype"],
                row["name"] + (": not available on this processor" if "unavailable" in row else ""),
            ]
            if "unavailable" in row:
                notes.append(f"{comparison['case']}, {row['dtype']}: {row['name']}: {row['unavailable']}.")
            for mode in (FORWARD, BACKWARD):
                rate = f"{comparison['batch'] / row['seconds'][mode]:.1f}" if mode in row["seconds"] else "–"
                cells += [rate, _speedup(baseline, row, mode), _speedup(same_dtype, row, mode)]
            rows.append((*cells, *(_megabytes(row["bytes"].get(mode)) for mode in (FORWARD, BACKWARD))))
    return Table("model", header, rows, 3, notes)


def _profile(comparisons: list[Results]) -> Table:
    parts = [
        (comparison["case"], dtype, time_shares)
        for comparison in comparisons
        for dtype, time_shares in comparison["shares"].items()
    ]
    rows: list[tuple[str, ...]] = []
    rows += [(kind, *(f"{100 * time_shares[kind]:.0f} %" for _, _, time_shares in parts)) for kind in parts[0][2]]
    return Table("profile", ("", *(f"{name}, {dtype}" for name, dtype, _ in parts)), rows, 1, [])


def _resolutions(comparisons: list[Results]) -> Table:
    names = list(dict.fromkeys(row["name"] for comparison in comparisons for row in comparison["rows"]))
    header = ("map", *(f"{name}, {unit}" for unit in ("ms", "MB") for name in names))
    rows, notes = [], []
    for comparison in comparisons:
        by_name = {row["name"]: row for row in comparison["rows"]}
        times = [_significant(1e3 * by_name[name]["seconds"][FORWARD]) if name in by_name else "–" for name in names]
        sizes = [_megabytes(by_name[name]["bytes"][FORWARD], "") if name in by_name else "–" for name in names]
        rows.append((comparison["case"], *times, *sizes))
        notes += [f"{comparison['case']}: {name}: {why}." for name, why in comparison["skipped"].items()]
    return Table("resolution", header, rows, 1, notes)


def _first_use(entries: list[Results]) -> Table:
    rows: list[tuple[str, ...]] = []
    rows += [(entry["backend"], entry["dtype"], f"{entry['first']:.1f}", f"{entry['again']:.1f}") for entry in entries]
    return Table("first_use", ("backend", "dtype", "compiles", "from the cache"), rows, 2, [])


# ------------------------------------------------------------------------------------------------ cells


def _baseline_row(rows: list[Results], name: str, dtype: str = "") -> Results | None:
    return next((row for row in rows if row["name"] == name and row["dtype"].startswith(dtype)), None)


def _speedup(baseline: Results | None, row: Results, mode: str) -> str:
    """Format the speedup over the baseline."""
    if baseline is None or mode not in row["seconds"] or mode not in baseline["seconds"]:
        return "–"
    return f"{_significant(baseline['seconds'][mode] / row['seconds'][mode])}×"


def _milliseconds(seconds: float) -> str:
    return f"{_significant(1e3 * seconds)} ms"


def _megabytes(size: int | None, unit: str = " MB") -> str:
    return "–" if size is None else f"{_significant(size / 1e6, 2)}{unit}"


def _significant(number: float, digits: int = 3) -> str:
    """Format a number with `digits` significant digits, without exponent.

    >>> _significant(0.18342), _significant(2614.3), _significant(11.92, 2)
    ('0.183', '2 614', '12')
    """
    if number == 0:
        return "0"
    decimals = max(digits - len(str(int(abs(number)))) if abs(number) >= 1 else digits, 0)
    return f"{number:,.{decimals}f}".replace(",", " ")

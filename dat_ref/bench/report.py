"""What was measured, as tables: for people, and for the pages of the site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .contenders import BACKWARD, EAGER, FORWARD
from .models import RELEASED

Found = Mapping[str, Any]  # what `run` gathers and JSON holds

HEADINGS = {
    "core": "The core: deformable attention with its bias",
    "neighborhood": "Neighborhood attention with relative bias",
    "model": "Whole models",
    "resolution": "The core's forward pass on larger maps, a key for every pixel",
    "profile": "Where the time of an optimized model goes",
    "first_use": "The first call of a process, seconds",
}


class Table(NamedTuple):
    """One table: columns of text left, of numbers right."""

    key: str  # of HEADINGS
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    texts: int  # how many columns are text
    notes: list[str]


def tables(found: Found) -> list[Table]:
    """Return a table for each kind of thing that was measured."""
    built = []
    for kind in ("core", "neighborhood"):
        some = [each for each in found["comparisons"] if each["kind"] == kind]
        if some:
            built.append(_attention(kind, some))
    models = [each for each in found["comparisons"] if each["kind"] == "model"]
    if models:
        built.append(_models(models))
        if any(each["shares"] for each in models):
            built.append(_profile(models))
    if found["resolutions"]:
        built.append(_resolutions(found["resolutions"]))
    if found["first_use"]:
        built.append(_first_use(found["first_use"]))
    return built


def text(found: Found) -> str:
    """Return everything for a terminal."""
    parts = [_where(found["machine"])]
    if found["machine"]["missing"]:
        parts[0] += "".join(f"\nnot here: {name} ({why})" for name, why in found["machine"]["missing"].items())
    for table in tables(found):
        widths = [max(map(len, column)) for column in zip(table.header, *table.rows)]
        lines = [HEADINGS[table.key], ""]
        for row in (table.header, *table.rows):
            cells = (
                cell.ljust(width) if place < table.texts else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths))
            )
            lines.append("  ".join(cells).rstrip())
        parts.append("\n".join([*lines, *table.notes]))
    return "\n\n".join(parts)


def markdown(found: Found) -> str:
    """Return the tables as named sections of a file that a page includes by section."""
    parts = [_section("machine", [_where(found["machine"]), "", f"```bash\n{found['machine']['command']}\n```"])]
    for table in tables(found):
        rules = [":---"] * table.texts + ["---:"] * (len(table.header) - table.texts)
        lines = ["| " + " | ".join(row) + " |" for row in (table.header, rules, *table.rows)]
        parts.append(_section(table.key, [*lines, *(f"\n{note}" for note in table.notes)]))
    return "\n\n".join(parts) + "\n"


def _section(name: str, lines: Iterable[str]) -> str:
    return "\n".join([f"<!-- --8<-- [start:{name}] -->", "", *lines, "", f"<!-- --8<-- [end:{name}] -->"])


def _where(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    return f"{machine['hardware']}{threads}; {versions}; {machine['date']}."


# ------------------------------------------------------------------------------------------------ the tables


def _attention(kind: str, comparisons: list[Found]) -> Table:
    header = ("shape", "dtype", "by", "forward", "×", "forward + backward", "×", "memory", "with backward")
    rows, notes = [], []
    for each in comparisons:
        base = _base(each["rows"], EAGER)
        for place, row in enumerate(each["rows"]):
            cells = [f"{each['case']}: {each['what']}", each["dtype"]] if place == 0 else ["", ""]
            cells.append("torch's attention, no bias" if row["error"] is None else row["name"])
            for passes in (FORWARD, BACKWARD):
                cells += [_milliseconds(row["seconds"][passes]), _times(base, row, passes)]
            rows.append((*cells, *(_megabytes(row["bytes"].get(passes)) for passes in (FORWARD, BACKWARD))))
        notes += [f"{each['case']}, {each['dtype']}: {name}: {why}." for name, why in each["skipped"].items()]
    return Table(kind, header, rows, 3, notes)


def _models(comparisons: list[Found]) -> Table:
    rates = ("images/s", "×", "× in its dtype", "training images/s", "×", "× in its dtype")
    header = ("model", "dtype", "how", *rates, "memory", "training")
    rows = []
    for each in comparisons:
        base = _base(each["rows"], RELEASED, "float32")
        for place, row in enumerate(each["rows"]):
            alike = _base(each["rows"], RELEASED, row["dtype"])
            cells = [f"{each['case']}, {each['what']}" if place == 0 else "", row["dtype"], row["name"]]
            for passes in (FORWARD, BACKWARD):
                rate = f"{each['batch'] / row['seconds'][passes]:.1f}" if passes in row["seconds"] else "–"
                cells += [rate, _times(base, row, passes), _times(alike, row, passes)]
            rows.append((*cells, *(_megabytes(row["bytes"].get(passes)) for passes in (FORWARD, BACKWARD))))
    return Table("model", header, rows, 3, [])


def _profile(comparisons: list[Found]) -> Table:
    parts = [(each["case"], dtype, shares) for each in comparisons for dtype, shares in each["shares"].items()]
    rows: list[tuple[str, ...]] = []
    rows += [(kind, *(f"{100 * shares[kind]:.0f} %" for _, _, shares in parts)) for kind in parts[0][2]]
    return Table("profile", ("", *(f"{name}, {dtype}" for name, dtype, _ in parts)), rows, 1, [])


def _resolutions(comparisons: list[Found]) -> Table:
    names = list(dict.fromkeys(row["name"] for each in comparisons for row in each["rows"]))
    header = ("map", *(f"{name}, {unit}" for unit in ("ms", "MB") for name in names))
    rows, notes = [], []
    for each in comparisons:
        by_name = {row["name"]: row for row in each["rows"]}
        times = [_digits(1e3 * by_name[name]["seconds"][FORWARD]) if name in by_name else "–" for name in names]
        sizes = [_megabytes(by_name[name]["bytes"][FORWARD], "") if name in by_name else "–" for name in names]
        rows.append((each["case"], *times, *sizes))
        notes += [f"{each['case']}: {name}: {why}." for name, why in each["skipped"].items()]
    return Table("resolution", header, rows, 1, notes)


def _first_use(entries: list[Found]) -> Table:
    rows: list[tuple[str, ...]] = []
    rows += [(each["backend"], each["dtype"], f"{each['first']:.1f}", f"{each['again']:.1f}") for each in entries]
    return Table("first_use", ("backend", "dtype", "compiled", "kept from then on"), rows, 2, [])


# ------------------------------------------------------------------------------------------------ cells


def _base(rows: list[Found], name: str, dtype: str = "") -> Found | None:
    return next((row for row in rows if row["name"] == name and row["dtype"].startswith(dtype)), None)


def _times(base: Found | None, row: Found, passes: str) -> str:
    """Return how many times as fast as the base."""
    if base is None or passes not in row["seconds"] or passes not in base["seconds"]:
        return "–"
    return f"{_digits(base['seconds'][passes] / row['seconds'][passes])}×"


def _milliseconds(seconds: float) -> str:
    return f"{_digits(1e3 * seconds)} ms"


def _megabytes(size: int | None, unit: str = " MB") -> str:
    return "–" if size is None else f"{_digits(size / 1e6, 2)}{unit}"


def _digits(number: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, and no exponent.

    >>> _digits(0.18342), _digits(2614.3), _digits(11.92, 2)
    ('0.183', '2 614', '12')
    """
    if number == 0:
        return "0"
    places = max(digits - len(str(int(abs(number)))) if abs(number) >= 1 else digits, 0)
    return f"{number:,.{places}f}".replace(",", " ")

"""`dat-ref check`: printed reports, options, exit codes, and messages about targets that cannot be checked."""

import sys

import numpy as np
import pytest

from dat_ref.cli import main

# A sampler that drops points outside the pixel centers, one with an unknown name, key grids, and others.
PORT = """
import numpy as np
from dat_ref.ops.sampling import bilinear_sample as right, bilinear_sample_vjp as gradients

def bilinear_sample(x, points_px):
    last = np.array(x.shape[2:]) - 1
    inside = ((points_px >= 0) & (points_px <= last)).all(axis=-1)
    return right(x, points_px) * inside[:, None].astype(x.dtype)

def sample(x, points_px):
    return right(x, points_px)

def in_single_precision(x, points_px):
    return right(x.astype(np.float32), points_px.astype(np.float32)).astype(x.dtype)

def cells(key_size, size):
    y, x = ((np.arange(keys) + 0.5) * length / keys - 0.5 for keys, length in zip(key_size, size))
    return np.stack(np.meshgrid(y, x, indexing="ij"), -1)

class Port:
    def bilinear_sample(self, x, points_px):
        return right(x, points_px)

class Shifted:
    def bilinear_sample(self, x, points_px):
        return right(x, points_px + 0.5)

def doubled(x, points_px):
    return right(x, points_px)

def doubled_vjp(cotangent, x, points_px):
    return [2 * grad for grad in gradients(cotangent, x, points_px)]

class Built:
    def __init__(self, size):
        pass

def nothing(x, points_px):
    pass

def noisy(x, points_px):
    return right(x, points_px) + np.random.default_rng().random()

def not_single_rows(x, points_px):
    if 1 in x.shape[2:]:
        raise NotImplementedError("single rows")
    return right(x, points_px)

number = 3
"""


@pytest.fixture
def port(tmp_path, monkeypatch):
    """Write a module of this name into an empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("port", "broken", "needs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "port.py").write_text(PORT, encoding="utf-8")
    yield tmp_path
    for name in ("port", "broken", "needs"):
        sys.modules.pop(name, None)


def run(*arguments, code):
    """Run the command with few examples and assert its exit code."""
    assert main(["check", *arguments, "--max-examples", "3"]) == code


def test_a_wrong_implementation(port, capsys):
    """Failed checks, the name of the mistake, a drawing of the counter-example, and a program that reproduces it."""
    run("port", code=1)
    printed = capsys.readouterr().out
    assert "✓ zeros_outside" in printed
    assert "✗ border_fades" in printed
    assert "like the reference with one mistake:\n    points outside the outermost pixel centers read zero" in printed
    assert "    a: (y, x) = (-0.5, -0.5)" in printed
    assert "15 of 24 checks hold, 4 fail, 5 not run" in printed
    assert np.all(shown_by(printed) == 0)
    assert "# expected [[[0.25]]]" in printed


def shown_by(printed):
    """Run the first program of a report without changes, and return its output."""
    program, shown = printed.split("to reproduce:\n")[1].split("\n\n✗")[0].split("\n\nAlso")[0], []
    exec("\n".join(line[4:] for line in program.splitlines()), {"print": shown.append})
    return shown[0]


def test_a_wrong_class(port, capsys):
    """The program creates an instance as well."""
    run("port:Shifted", code=1)
    assert shown_by(capsys.readouterr().out).shape == (1, 1, 1)


def test_a_wrong_gradient_next_to_a_function(port, capsys):
    """The gradient belongs to the named function, and the program calls it."""
    run("port:doubled", "--op", "sampler", code=1)
    printed = capsys.readouterr().out
    assert "✗ gradient_of_the_map" in printed
    assert "smallest counter-example: gradient of x: " in printed
    assert "# the reference gives x: " in printed
    assert len(shown_by(printed)) == 2


def test_a_wrong_gradient_as_an_attribute(port, capsys):
    """The program calls ``function.vjp``."""
    attribute = PORT + "doubled.vjp = doubled_vjp\ndel doubled_vjp\n"
    (port / "port.py").write_text(attribute.replace("def doubled_vjp", "def twice").replace("doubled_vjp", "twice"))
    run("port:doubled", "--op", "sampler", code=1)
    assert "doubled.vjp(" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["port:sample", "port:Port", "port:Port.bilinear_sample", "dat_ref.ops.sampling"])
def test_correct_targets_of_every_form(target, port, capsys):
    """Correct targets: a function of any name, a class, a method, a module."""
    if target == "port:Port.bilinear_sample":
        (port / "port.py").write_text(PORT + "Port = Port()\n", encoding="utf-8")
    run(target, "--op", "sampler", code=0)
    assert " 0 fail" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "it returned object, expected a numeric dtype"),
        ("noisy", "a second call with the same inputs gave another result: 4 of 4 differ"),
    ],
)
def test_a_failed_smoke_check_stops_the_other_checks(name, words, port, capsys):
    run(f"port:{name}", "--op", "sampler", code=1)
    printed = capsys.readouterr().out
    assert words in printed
    assert "· first_pixel              not run: a smoke check fails" in printed


def test_options_that_are_not_there(port, capsys):
    """Cases with a missing option are skipped. A check without other cases is not run."""
    run("port:not_single_rows", "--op", "sampler", code=0)
    printed = capsys.readouterr().out
    assert "· single_row               not run: not implemented: single rows" in printed
    assert "✓ anywhere " in printed
    assert "(not run on some cases: not implemented: single rows)" in printed


def test_conventions(port, capsys):
    """The convention is detected or selected. If the selected one is wrong, the report names the right one."""
    run("port:cells", "--op", "reference_grid", code=0)
    assert capsys.readouterr().out.startswith("reference_grid follows CELL_CENTER\n")
    run("port:cells", "--op", "reference_grid", "--convention", "cell_center", code=0)
    assert "follows" not in capsys.readouterr().out
    run("port:cells", "--op", "reference_grid", "--convention", "cvpr2022", code=1)
    assert "follows CELL_CENTER: try --convention cell_center" in capsys.readouterr().out


def test_single_precision_inside(port, capsys):
    """Single precision is detected. The implementation is correct in its own precision."""
    run("port:in_single_precision", "--op", "sampler", code=1)
    assert "check it with --dtype float32" in capsys.readouterr().out
    run("port:in_single_precision", "--op", "sampler", "--dtype", "float32", code=0)


def test_expected_failures(port, capsys):
    """A listed check that fails is no failure, and one that passes is. A failure outside the list is shown in full."""
    known = port / "known.txt"
    everything = (
        "border_fades # we drop them\nsingle_row # so\nsampler.anywhere # so\n\n# the same\nzeros_around # so\n"
    )
    known.write_text(everything, encoding="utf-8")
    run("port", "--xfails", str(known), code=0)
    assert "fails as expected: we drop them" in capsys.readouterr().out
    known.write_text(everything.replace("single_row # so\n", ""), encoding="utf-8")
    run("port", "--xfails", str(known), code=1)
    printed = capsys.readouterr().out
    assert "✗ single_row\n  property:" in printed
    assert "✗ border_fades\n" not in printed
    known.write_text(everything + "first_pixel # was wrong once\n", encoding="utf-8")
    run("port", "--xfails", str(known), code=1)
    assert "holds, but is listed as an expected failure: remove it from the list" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("border_fades", "expected `name  # reason` in known.txt, line 1"),
        ("border_fade # why", "'border_fade' is not a check; did you mean 'border_fades'?"),
        ("bias.border_fade # why", "'bias.border_fade' is not a check; did you mean 'bias.border_fades'?"),
        (None, "known.txt: No such file"),
    ],
)
def test_lists_that_cannot_be_used(listed, words, port, capsys):
    if listed is not None:
        (port / "known.txt").write_text(listed, encoding="utf-8")
    run("port", "--xfails", "known.txt", code=2)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("", "expected package.module:object, got ''"),
        ("port.", "expected package.module:object, got 'port.'"),
        ("elsewhere:sample", "found no module 'elsewhere'"),
        ("port.sampling:sample", "found no module 'port.sampling'"),
        ("port.py:sample", "found no module 'port.py'; use the module name of a file: port\n"),
        ("port:absent", "port has no 'absent'"),
        ("port:number", "port:number has none of the expected functions:\n  bilinear_sample(x, points_px)"),
        ("port:sample", "unknown operation of the function 'sample'."),
        ("port:Built", "port:Built is a class; calling it without arguments raised TypeError"),
        ("broken", "importing broken raised ZeroDivisionError: division by zero (" ),
        ("needs", "importing needs raised ModuleNotFoundError: No module named 'nowhere'"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_checked(target, words, port, capsys):
    """Exit code 2. Exit code 1 means that an implementation ran and is wrong."""
    (port / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    (port / "needs.py").write_text("import nowhere\n", encoding="utf-8")
    run(target, code=2)
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_options_that_make_no_sense(port, capsys):
    run("port", "--op", "sampling", code=2)
    assert "--op: expected one of sampler, reference_grid" in capsys.readouterr().err
    run("port", "--op", "bias", code=2)
    assert "table       (M, Y, X)" in capsys.readouterr().err  # the requested operation is described in full
    assert main(["check", "port", "--max-examples", "0"]) == 2
    assert main(["check"]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["check", "port", "--convention", "none"])
    assert stop.value.code == 2


def test_the_list(capsys):
    """Information that an author of an adapter needs."""
    assert main(["check", "--list", "--op", "sampler", "--op", "bias"]) == 0
    printed = capsys.readouterr().out
    assert "bilinear_sample(x, points_px) -> (N, C, P)" in printed
    assert "its gradient: bilinear_sample_vjp(cotangent, x, points_px) -> (x, points_px)" in printed
    assert "may take convention=" in printed
    assert "border_fades" in printed

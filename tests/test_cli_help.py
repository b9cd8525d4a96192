"""`dat-ref COMMAND --help`: groups, help texts, defaults, an example, standard terms, width."""

import argparse
import re
import shlex

import pytest
from lint import language

from dat_ref.cli import build_parser, main

WIDTH = 100
COMMANDS = (
    "explain",
    "agree",
    "check",
    "complexity",
    "claims",
    "bench",
    "convert",
    "train",
    "evaluate",
    "diagnose",
    "suggest",
)
ARGPARSE_TITLES = ("positional arguments", "options", "optional arguments")  # titles of groups without one


def subparsers():
    """Return the parsers of the commands by name."""
    (found,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return found.choices


def shown(parser):
    """Return the arguments that the help shows, except --help."""
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    return [action for action in actions if not isinstance(action, argparse._HelpAction)]


def label(action):
    """Return the name of an argument as the user types it."""
    return action.option_strings[0] if action.option_strings else action.metavar or action.dest


def without_title(parser):
    """Return the options outside a group with a title of its own."""
    titled = {
        id(action)
        for group in parser._action_groups
        if group.title and group.title not in ARGPARSE_TITLES
        for action in group._group_actions
    }
    return [label(action) for action in shown(parser) if action.option_strings and id(action) not in titled]


def without_help(parser):
    """Return the arguments without a help text."""
    return [label(action) for action in shown(parser) if not (action.help or "").strip()]


def without_default(parser):
    """Return the arguments that have a default and do not show it, as in "(default: 7)"."""
    missing = []
    for action in shown(parser):
        value = action.default
        if value is None or value is False or value == argparse.SUPPRESS or value == []:
            continue
        text = parser._get_formatter()._expand_help(action) if action.help else ""
        values = value if isinstance(value, list | tuple) else [value]
        if "default: " not in text or not all(str(one) in text.partition("default: ")[2] for one in values):
            missing.append(label(action))
    return missing


def examples(parser):
    """Return the command lines under "example:" at the end of the help, without their explanations."""
    heading, _, text = (parser.epilog or "").partition("\n")
    if not re.fullmatch(r"[Ee]xamples?:", heading.strip()):
        return []
    lines = [line.strip() for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines()]
    return [re.split(r"\s{2,}|#", line)[0].strip() for line in lines if line.startswith("dat-ref ")]


def replaced_words(text):
    """Return the words of a help text that the project replaces by standard terms."""
    return [found.message for found in language.word_findings("help.md", text)]


@pytest.fixture
def help_text(monkeypatch, capsys):
    """Return a function that prints the help of a command, or of dat-ref itself, at 100 columns."""

    def run(*command):
        monkeypatch.setenv("COLUMNS", str(WIDTH))
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return run


def test_every_command_is_listed(help_text):
    """`dat-ref --help` lists each command with a line of help, in standard terms."""
    assert tuple(subparsers()) == COMMANDS
    text = help_text()
    for name in COMMANDS:
        assert re.search(rf"^    {name}\s+\S", text, re.MULTILINE), name
    assert replaced_words(text) == []
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_grouped(name):
    """Every option except --help is in a group with a title."""
    assert without_title(subparsers()[name]) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_has_a_help_text(name):
    """Every argument has a help text."""
    assert without_help(subparsers()[name]) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_shown(name):
    """Every default value is in the help text of its option."""
    assert without_default(subparsers()[name]) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name, help_text):
    """The help ends with an example of this command, and the parser accepts it."""
    parser = subparsers()[name]
    lines = examples(parser)
    assert lines, "no example at the end"
    last = [line.strip() for line in parser.epilog.splitlines() if line.strip()][-1]
    assert help_text(name).rstrip().endswith(last), "the example is not printed line by line"
    for line in lines:
        program, *arguments = shlex.split(line)
        assert (program, arguments[0]) == ("dat-ref", name)
        build_parser().parse_args(arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_uses_standard_terms(name, help_text):
    """The help contains no word that the project replaces by a standard term."""
    assert replaced_words(help_text(name)) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_the_terminal(name, help_text):
    """No line is longer than a terminal of 100 columns."""
    assert [line for line in help_text(name).splitlines() if len(line) > WIDTH] == []


def test_the_checks_reject_a_wrong_parser():
    """Options without a group, without help and without their default are found; so is an epilog without example."""
    parser = argparse.ArgumentParser(epilog="Good luck.")
    group = parser.add_argument_group("Output")
    group.add_argument("--out", default="run", help="output folder (default: run)")
    group.add_argument("--rounds", type=int, default=7, help="maximum number of rounds (default: %(default)s)")
    group.add_argument("--names", nargs="+", default=["a", "b"], help="cases to run (default: a b)")
    group.add_argument("--json", action="store_true", help="print JSON")
    assert without_title(parser) == without_help(parser) == without_default(parser) == []
    group.add_argument("--seed", type=int, default=0, help="random seed")
    group.add_argument("--size", type=int, default=224, help="image size (default: 256)")
    parser.add_argument("--loose", help="")
    parser.add_argument("--hidden", default=3, help=argparse.SUPPRESS)
    assert without_default(parser) == ["--seed", "--size"]
    assert without_title(parser) == without_help(parser) == ["--loose"]
    assert examples(parser) == []
    assert replaced_words("threads beside the first") != []


def test_examples_are_read_without_their_explanations():
    """Explanations after two spaces or a hash sign, continued lines and other programs are not part of a command."""
    lines = [
        "example:",
        "  dat-ref train --out a    first run",
        "  dat-ref train \\",
        "      --out b  # the second",
        "  torchrun -m x",
    ]
    parser = argparse.ArgumentParser(epilog="\n".join(lines))
    assert examples(parser) == ["dat-ref train --out a", "dat-ref train --out b"]

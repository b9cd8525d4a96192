"""The ledger: every check runs and agrees with its record, a wrong record is noticed, and the page is in step."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dat_ref.claims import (
    LEDGER,
    Figure,
    Outcome,
    Verdict,
    comparison,
    cost,
    equal_keys,
    geometry,
    markdown,
    offsets,
    run,
    space,
    table,
)
from dat_ref.claims.claim import HOLDS, REFUTED
from dat_ref.cli import claims as command

PAGE = Path(__file__).parents[1] / "docs" / "claims.md"
BY_NUMBER = {claim.number: claim for claim in LEDGER}


@pytest.fixture(scope="module")
def findings():
    return {claim.number: run(claim) for claim in LEDGER}


def numbers(findings, claim):
    return {key: figure.value for key, figure in findings[claim].figures.items()}


def command_line(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    options = parser.parse_args(["claims", *arguments])
    return options.run(options)


# The ledger ---------------------------------------------------------------------------------------


def test_numbers_are_unique_and_complete():
    assert [claim.number for claim in LEDGER] == list(range(1, 26))


@pytest.mark.parametrize("number", sorted(BY_NUMBER))
def test_verdict_on_record_is_what_the_check_finds(findings, number):
    finding = findings[number]
    assert finding.matches, f"recorded: {finding.claim.verdict}; found: {finding.verdict}"


@pytest.mark.parametrize("number", sorted(BY_NUMBER))
def test_claim_says_where_it_stands_and_explains_itself(findings, number):
    claim = BY_NUMBER[number]
    assert claim.statement
    assert claim.sources
    assert findings[number].figures
    assert "{" not in findings[number].explanation
    needs_words = claim.verdict.outcome in (Outcome.CONDITIONAL, Outcome.UNTESTABLE)
    assert bool(claim.verdict.condition) == needs_words


# What the figures are -----------------------------------------------------------------------------


def test_worked_example_is_ten_times_too_large(findings):
    found = numbers(findings, 6)
    assert found["total"] == 79_629_312
    assert found["offset"] == found["formula"] == 508_032
    assert found["percent"] == pytest.approx(0.638, abs=5e-4)
    assert found["window"] == 4 * 196 * 384**2 + 2 * 49 * 196 * 384


def test_parameters_are_those_of_the_released_state_dicts(findings):
    released = json.loads((Path(__file__).parent / "golden" / "official_state_dicts.json").read_text())
    found = numbers(findings, 17)
    for name in cost.PUBLISHED:
        release, size = ("datpp2023", name.replace("dat_pp", "dat")) if "pp" in name else ("cvpr2022", name)
        assert found[f"{name}_params"] * 1e6 == pytest.approx(released[f"{release}/{size}"]["parameters"], abs=0.5)


def test_settings_of_the_equal_keys_claim(findings):
    found = numbers(findings, 16)
    assert found["memory"] == pytest.approx(2.582, abs=1e-3)
    assert found["macs"] == pytest.approx(1.316, abs=1e-3)


def test_space_grows_with_the_powers_claimed(findings):
    assert numbers(findings, 2)["power"] == 4
    assert numbers(findings, 3)["power"] == 2
    assert numbers(findings, 4)["power"] == 2


def test_clamp_silences_a_fifth_of_the_offsets(findings):
    assert 18 < numbers(findings, 21)["silent"] < 26


def test_released_reset_would_visit_no_module():
    nn = pytest.importorskip("torch").nn
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 5))
    assert not [leaf for leaf in module.parameters() if isinstance(leaf, (nn.Linear, nn.Conv2d))]
    for layer in module:
        bound = float(np.sqrt(1 / layer.weight[0].numel()))
        assert layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound


# A checker that could not say no would prove nothing ----------------------------------------------


OTHER_SIZES = ("training", "training_few", "detection_few")


def wrong_figures(finding, **values):
    return {key: replace(figure, value=values.get(key, figure.value)) for key, figure in finding.figures.items()}


@pytest.mark.parametrize(
    ("number", "judge", "wrong", "verdict"),
    [
        (1, space.judge_convolution, {"equal": 2}, REFUTED),
        (2, space.judge_per_query_keys, {"power": 2.0}, REFUTED),
        (3, space.judge_four_keys, {"macs_power": 4.0}, REFUTED),
        (4, space.judge_shared_keys, {"coarse": 1}, REFUTED),
        (5, cost.judge_formula, {"equal": 3}, REFUTED),
        (5, cost.judge_formula, {"left_out": 0}, HOLDS),
        (6, cost.judge_example, {"offset": 5_080_320}, HOLDS),
        (7, cost.judge_growth_in_channels, {"macs_768": 1}, REFUTED),
        (8, geometry.judge_references, {"both": "none"}, REFUTED),
        (9, geometry.judge_range, {"as_wide": "PAPER"}, REFUTED),
        (10, offsets.judge_compulsory_shift, {"without": 0.5}, REFUTED),
        (10, offsets.judge_compulsory_shift, {"without": 0.0, "built": 0.0}, HOLDS),
        (11, offsets.judge_groups, {"features_kept": False}, REFUTED),
        (11, offsets.judge_groups, {"other_keys": 0.0}, HOLDS),
        (12, geometry.judge_table, {"fixed": "PAPER"}, REFUTED),
        (13, comparison.judge_predicted_weights, {"other_map": 0.1}, REFUTED),
        (13, comparison.judge_predicted_weights, {"dot_product": 0.0}, REFUTED),
        (14, comparison.judge_sigmoid, {"same": False}, REFUTED),
        (
            15,
            comparison.judge_memory_limit,
            {"training_few": 100.0, "training": 100.0, "detection_few": 100.0},
            HOLDS,
        ),
        (17, cost.judge_models, {"apart_macs": 10.0}, REFUTED),
        (18, cost.judge_samples, {"equal": 0}, REFUTED),
        (19, comparison.judge_locality, {"near": 9.0}, REFUTED),
        (19, comparison.judge_locality, {"window_4": 9}, HOLDS),
        (21, offsets.judge_initialization, {"visited": 3}, REFUTED),
        (21, offsets.judge_initialization, {"silent": 0.0}, REFUTED),
    ],
)
def test_other_figures_give_another_verdict(findings, number, judge, wrong, verdict):
    found = judge(wrong_figures(findings[number], **wrong))
    assert found == verdict
    assert found != BY_NUMBER[number].verdict


@pytest.mark.parametrize("wrong", [{"fit": 0}, {"common": "one thing; another"}])
def test_equal_keys_without_a_single_setting_cannot_be_tested(findings, wrong):
    assert equal_keys.judge_equal_keys(wrong_figures(findings[16], **wrong)).outcome is Outcome.UNTESTABLE


def test_condition_is_part_of_the_verdict(findings):
    found = geometry.judge_references(wrong_figures(findings[8], both="PAPER, CVPR2022"))
    assert found.outcome is BY_NUMBER[8].verdict.outcome
    assert found != BY_NUMBER[8].verdict


# The command --------------------------------------------------------------------------------------


def test_wrong_record_is_reported_and_fails(monkeypatch, capsys):
    """The article's 5.08 M, recorded as right."""
    monkeypatch.setattr(command, "LEDGER", [replace(BY_NUMBER[6], verdict=HOLDS), BY_NUMBER[7]])
    assert command_line() == 1
    printed = capsys.readouterr().out
    assert "MISMATCH: recorded: holds; found: refuted by arithmetic" in printed
    assert printed.strip().endswith("no longer as recorded: 6.")


def test_wrong_condition_is_reported_and_fails(monkeypatch, capsys):
    wrong = replace(BY_NUMBER[8], verdict=Verdict(Outcome.CONDITIONAL, "the convention is CVPR2022"))
    monkeypatch.setattr(command, "LEDGER", [wrong])
    assert command_line("--json") == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["matches"] is False
    assert row["found"] == "holds if the convention is PAPER"


def test_table_of_one_claim(capsys):
    assert command_line("--only", "6") == 0
    printed = capsys.readouterr().out
    assert "508,032" in printed
    assert printed.count("refuted by arithmetic\n") == 1
    assert printed.strip().endswith("every verdict is as recorded.")


def test_json_gives_figures_as_numbers(capsys):
    assert command_line("--json", "--only", "7", "--only", "6") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["number"] for row in rows] == [6, 7]
    assert rows[0]["figures"]["offset"] == {
        "label": "the offset network, as it ran",
        "value": 508_032,
        "unit": "multiply-adds",
    }


def test_unknown_number_is_refused():
    with pytest.raises(ValueError, match="--only: expected numbers of claims, 1 to 25, got 26"):
        command_line("--only", "26")


# The text -----------------------------------------------------------------------------------------


def test_page_is_in_step(findings):
    written = markdown([findings[number] for number in sorted(findings)])
    assert PAGE.read_text(encoding="utf-8") == written, "run `dat-ref claims --markdown > docs/claims.md`"


def test_every_claim_can_be_linked_to(findings):
    page = markdown(list(findings.values()))
    for number in BY_NUMBER:
        assert page.count(f"(#claim-{number})") == 1
        assert page.count(f"{{#claim-{number}}}") == 1


def test_table_rows_of_the_page_have_two_cells(findings):
    """A bar in a label, as in |w|, must not end its cell."""
    rows = [line for line in markdown([findings[21]]).splitlines() if line.startswith("| ") and "\\|" in line]
    assert rows
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)


def test_terminal_table_stays_narrow(findings):
    assert max(map(len, table(list(findings.values())).splitlines()[:-1])) <= 100


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(508_032, "", "multiply-adds"), "508,032 multiply-adds"),
        (Figure(0.6380, "", "%", digits=2), "0.64 %"),
        (Figure(True, ""), "yes"),
        (Figure("PAPER", ""), "PAPER"),
    ],
)
def test_figures_read_well(figure, text):
    assert str(figure) == text

"""The table of planted bugs keeps up with the sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.__main__ import main
from tests.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]


def test_there_are_enough_in_each_part() -> None:
    files = [mutant.file for mutant in MUTANTS]
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12
    for part in ("losa_runtime/cache/", "losa_runtime/scheduler/", "server/losa_server/"):
        assert sum(file.startswith(part) for file in files) >= 4


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_line_is_there_once_and_the_test_exists(mutant: Mutant) -> None:
    """If not: the line was changed; bring tests/mutants/table.py along."""
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    file, _, test = mutant.test.partition("::")
    assert f"def {test}" in (ROOT / file).read_text()


def test_unknown_names_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["no such bug"])
    assert "tenants share" in capsys.readouterr().err

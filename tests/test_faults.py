"""Each row of the table of faults has tests that exist, and held when it was last run."""

import pytest

import faults


@pytest.mark.parametrize("row", faults.ROWS)
def test_each_row_has_tests_that_exist(row: str):
    for test in faults.ROWS[row]:
        file, name = test.split("::")
        assert name.startswith("test_")
        assert name in faults.functions(file), test


@pytest.mark.skipif(not faults.RESULTS.exists(), reason="no results yet: run tests/run.sh --faults")
@pytest.mark.parametrize("row", faults.ROWS)
def test_each_row_held_when_it_was_last_run(row: str):
    result = faults.newest().get(row)
    assert result is not None, "run tests/run.sh --faults"
    assert result["held"], result

"""Each row of the table of faults has tests that exist."""

import pytest

import faults


@pytest.mark.parametrize("row", faults.ROWS)
def test_each_row_has_tests_that_exist(row: str):
    for test in faults.ROWS[row]:
        file, name = test.split("::")
        assert name.startswith("test_")
        assert name in faults.functions(file), test

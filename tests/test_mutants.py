"""tests/mutants.py: what it changes stands in today's code, once."""

import pytest
from conftest import ROOT
from mutants import MUTANTS


@pytest.mark.parametrize("description, file, right, wrong", MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_a_mistake_can_be_made(description, file, right, wrong):
    assert (ROOT / file).read_text(encoding="utf-8").count(right) == 1 and wrong != right

"""Faults are refused outside tests; what each of them breaks is shown by `make mutants`."""

import pytest

from sglang_dcp import mutants
from sglang_dcp.mutants import MUTANT_VARIABLE, MUTANTS, TESTING_VARIABLE, MutantError, install_mutant


def test_no_variable_installs_nothing():
    assert install_mutant({}) is None
    assert install_mutant({TESTING_VARIABLE: "1"}) is None


@pytest.mark.parametrize("testing", [{}, {TESTING_VARIABLE: "0"}, {TESTING_VARIABLE: "true"}])
def test_refused_outside_a_test(testing):
    with pytest.raises(MutantError, match=f"refused unless {TESTING_VARIABLE}=1"):
        install_mutant({MUTANT_VARIABLE: "shard-dropped", **testing})


def test_unknown_mutant_names_those_there_are():
    with pytest.raises(MutantError, match="no-such-fault is unknown; there are shard-dropped, .*wrong-owner"):
        install_mutant({MUTANT_VARIABLE: "no-such-fault", TESTING_VARIABLE: "1"})


def test_one_at_a_time(monkeypatch):
    monkeypatch.setattr(mutants, "_installed", "lse-ignored")
    assert install_mutant({MUTANT_VARIABLE: "lse-ignored", TESTING_VARIABLE: "1"}) == "lse-ignored"
    with pytest.raises(MutantError, match="lse-ignored is installed already"):
        install_mutant({MUTANT_VARIABLE: "shard-dropped", TESTING_VARIABLE: "1"})


def test_every_mutant_says_what_it_breaks():
    assert all(install.__doc__ for install in MUTANTS.values())

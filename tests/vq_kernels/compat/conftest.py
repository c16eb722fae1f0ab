"""Adds lines to pytest's summary: how often theirs chose another code than the nearest."""

import pytest

WRONG_ROWS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WRONG_ROWS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[WRONG_ROWS]:
        terminalreporter.write_line(line)


@pytest.fixture
def wrong_rows(request: pytest.FixtureRequest) -> list[str]:
    """Lines for the summary."""
    return request.config.stash[WRONG_ROWS]

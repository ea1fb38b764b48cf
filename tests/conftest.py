"""What holds for all tests: a table at the end of a run, of what the patches did on each release of the DSL."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "patches"
    ]
    if not rows:
        return
    terminalreporter.section("the block-scaled warp MMA for sm_121a, by release of nvidia-cutlass-dsl")
    widths = {column: max(len(str(row[column])) for row in [*rows, {column: column}]) for column in rows[0]}
    for row in [{column: column for column in widths}, *sorted(rows, key=lambda row: row["release"])]:
        terminalreporter.write_line("  ".join(str(row[column]).ljust(width) for column, width in widths.items()))

"""The printed table and summary."""

from __future__ import annotations

from benchmarks import costs
from benchmarks.measurements import WRONG, CaseResult, Measurement
from benchmarks.report.summary import summary_lines
from benchmarks.report.table import CallTable
from benchmarks.suites import dense

from ..samples import PEAKS, measured, sample_run


def test_the_table_is_aligned_and_gives_no_speed_to_the_wrong() -> None:
    run = sample_run()
    table = CallTable([result.case for result in run.results], ["fastattn", "sdpa", "eager"], PEAKS)
    head = table.head()
    rows = [row for result in run.results for row in table.rows(result)]
    timed, wrong = [row for row in rows if "wrong" not in row], [row for row in rows if "wrong" in row]
    assert {len(row) for row in timed} == {len(head)}
    assert [row.split("wrong: ")[1] for row in wrong] == ["out is off by 1"]
    # 2 heads, 16 x 16 pairs, head_dim 16, in 2 s.
    assert costs.flops(run.results[0].case) == 2 * 2 * 2 * 16 * 16 * 16
    assert timed[0].split()[-9:] == [
        "fastattn",
        "2000.0",
        "1500.0-3000.0",
        "1.00",
        "0.0",
        "0%",
        "0.00",
        "0%",
        "1.0",
    ]
    assert not any("xformers" in row for row in rows)


def test_the_table_prints_rates_and_shares() -> None:
    case = dense("tiny", seqlen=1024, dtype="bfloat16")
    table = CallTable([case], ["fastattn"], PEAKS)
    (row,) = table.rows(CaseResult(case, [measured("fastattn", [1e-2], ours=True)]))
    # 4 * 8 * 1024^2 * 64 operations and 4 * 8 * 1024 * 64 * 2 bytes in 10 ms, of 400 GFLOP/s and 30 GB/s.
    assert row.split()[-5:] == ["214.7", "54%", "0.42", "1%", "1.0"]


def test_the_summary_names_means_worst_cases_and_what_did_not_run() -> None:
    run = sample_run()
    run.results[0].measurements[0] = Measurement("fastattn", True, WRONG, "out is off by 3", {"out": 3.0})
    lines = list(summary_lines(run))
    assert any(line.split() == ["tiny", "sdpa", "1.22", "(2", "cases)"] for line in lines)
    assert any(line.split()[:2] == ["0.500", "sdpa"] for line in lines)
    assert "  xformers, 3 cases: not installed" in lines
    assert lines[-1] == f"FAILED: fastattn wrong on tiny: {run.results[0].case.name}: out is off by 3"

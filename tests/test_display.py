"""Numbers as people read them."""

import math

from rich.console import Console

from llmx import display


def test_counts_are_exact_or_short():
    assert [display.count(x) for x in (None, 0, 1234567, 1234.56)] == ["-", "0", "1,234,567", "1,234.6"]
    numbers = (None, 0.0, 12.0, 1234.0, 5.6e12, math.inf)
    assert [display.short(x) for x in numbers] == ["", "0", "12", "1.23 k", "5.6 T", ""]


def test_bytes_have_three_digits_and_a_decimal_unit():
    assert [display.size(n) for n in (0, 7, 999, 1000, 13_476_831_232, 999_999_999, 12_345 * 10**12)] == [
        "0 bytes", "7 bytes", "999 bytes", "1.00 kB", "13.5 GB", "1,000 MB", "12,345 TB"
    ]  # fmt: skip


def test_shares_seconds_and_settings():
    assert display.percent(0.01234) == "1.23 %"
    assert [display.share(*x) for x in ((1, 3), (0, 3), (None, 3), (1, 0), (1, None))] == ["33.3", "0.0", "-", "-", "-"]
    assert display.seconds(0.012345) == "0.0123 s"
    assert [display.setting(x) for x in (4096, 0.05, "text", None)] == ["4,096", "0.05", "text", "None"]


def test_losses_have_four_digits_and_say_how_sure_they_are():
    assert [display.loss(1.5), display.loss(0.25, signed=True)] == ["1.5000", "+0.2500"]
    assert display.with_half_width(-0.5, 0.01, signed=True) == "-0.5000 ± 0.0100"
    assert display.with_half_width(0.5, math.inf) == "0.5000"
    assert [display.with_deviation(x) for x in ([1.0], [1.0, 2.0])] == ["1.0000", "1.5000, SD 0.7071"]
    assert [display.p_value(x) for x in (None, 0.01234)] == ["", "0.012"]


def test_a_table_folds_text_and_never_cuts_a_number():
    table = display.table("name", display.number_column("loss"))
    table.add_row("a" * 30, "1.433000")
    console = Console(width=20, record=True)
    console.print(table)
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert lines[0] == ["name", "loss"]
    assert [line[1] for line in lines[2:] if len(line) == 2] == ["1.433000"]
    assert sum(line[0].count("a") for line in lines[2:]) == 30

"""The page of the collection agrees with the code, the configs and the measured rows."""

from docs.generate import PAGE, render


def test_the_page_is_in_step_with_code_configs_and_rows():
    assert PAGE.read_text() == render(), "run python -m docs.generate"

"""The page of the collection is what the code, the configs and the measured rows say."""

import json

import pytest

from benchmarks.collection import collection, header
from docs.generate import PAGE, ROOT, Entry, render

ROWS = json.loads((ROOT / "docs" / "results" / "collection.json").read_text())


def test_the_page_is_in_step_with_code_configs_and_rows():
    assert PAGE.read_text() == render(), "run python -m docs.generate"


@pytest.mark.parametrize("name", ROWS)
def test_the_header_of_what_was_measured_states_the_row(name: str):
    assert header(ROWS[name]) in (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()


@pytest.mark.parametrize("name", collection())
def test_an_entry_names_its_time_and_explains_its_components(name: str):
    entry = Entry(name, ROWS.get(name))
    assert "O(" in entry.index_row()
    assert entry.section(set()).count("```text") == len(entry.modules) > 0

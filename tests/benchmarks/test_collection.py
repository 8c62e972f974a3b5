"""Every config of the collection has an entry on its page, and the header of a measured one states its row."""

import json

import pytest

from benchmarks.collection import CONFIGS, ROWS, collection, header
from docs.generate import Entry

MEASURED = json.loads(ROWS.read_text())


@pytest.mark.parametrize("name", MEASURED)
def test_the_header_of_what_was_measured_states_the_row(name: str):
    assert header(MEASURED[name]) in (CONFIGS / f"{name}.yaml").read_text().splitlines()


@pytest.mark.parametrize("name", collection())
def test_an_entry_names_its_time_and_explains_its_components(name: str):
    entry = Entry(name, MEASURED.get(name))
    assert "O(" in entry.index_row()
    assert entry.section(set()).count("```text") == len(entry.modules) > 0

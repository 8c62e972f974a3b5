"""Mini-batches are counted from the text's start, whatever piece of it is at hand."""

import pytest
import torch
from torch.testing import assert_close

from llmx.parts.mini_batches import MiniBatches

SIZE = 4


@pytest.mark.parametrize("time", [1, 3, 4, 9])
def test_a_token_stands_at_its_position_modulo_the_size_in_every_row_by_itself(time: int):
    positions = torch.tensor([[0], [3], [6]]) + torch.arange(time)
    x = (positions + 1.0)[..., None]  # each token says its position
    batches = MiniBatches(time, SIZE, positions, x)
    cut = batches.cut(x)[:, :, 0]  # (B, N, b)
    for row, (first, places) in enumerate(zip(positions[:, 0].tolist(), cut.flatten(1).long().tolist(), strict=True)):
        start = first - first % SIZE
        expected = [p + 1 if first <= p < first + time else 0 for p in range(start, start + len(places))]
        assert places == expected
        assert batches.begins[row].tolist() == [place > 0 for place in places[::SIZE]]
    assert_close(batches.present[:, :, 0], (cut > 0).to(x.dtype))
    assert_close(batches.join(cut[:, :, None, :, None])[..., 0], x)


def test_without_positions_the_text_starts_here():
    x = torch.randn(2, 9, 3, 5)
    batches = MiniBatches(9, SIZE, None, x)
    placed = MiniBatches(9, SIZE, torch.arange(9).expand(2, 9), x)
    assert_close(batches.cut(x), placed.cut(x)[:, :3])
    assert_close(batches.join(batches.cut(x)), x)
    assert batches.begins.all()

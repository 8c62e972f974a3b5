"""Claims of a new folder, the newest run, and JSON that is never half written."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmx.errors import UserError
from llmx.runs.folder import claim_version, is_best, last_checkpoint, newest_run, run_of, write_json


def test_claims_at_once_get_folders_of_their_own(tmp_path):
    (tmp_path / "runs" / "version_3").mkdir(parents=True)
    with ThreadPoolExecutor(8) as threads:
        numbers = sorted(threads.map(lambda _: claim_version(tmp_path / "runs", 3), range(16)))
    assert numbers == list(range(4, 20))


def test_the_newest_run_is_the_one_with_the_highest_number_that_has_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="ckpt_path: 'last' found no run with a checkpoint below"):
        newest_run(tmp_path)
    for name in ("version_9", "version_10", "version_old", "other"):
        checkpoint = last_checkpoint(tmp_path / "lightning_logs" / name)
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
    (tmp_path / "lightning_logs" / "version_11").mkdir()
    assert newest_run(tmp_path) == tmp_path / "lightning_logs/version_10/checkpoints/last.ckpt"


def test_a_checkpoint_tells_its_run():
    assert run_of("lightning_logs/version_0/checkpoints/best.ckpt") == Path("lightning_logs/version_0")
    assert run_of("copies/last.ckpt") == Path("copies")
    assert is_best("a/best.ckpt")
    assert not is_best("a/last.ckpt")


def test_json_that_cannot_be_written_leaves_the_former_file(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})
    assert json.loads(path.read_text()) == {"step": 1}

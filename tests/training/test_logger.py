from pathlib import Path

from llmx.training.logger import RunLogger


def test_two_runs_that_start_at_once_have_folders_of_their_own(tmp_path, monkeypatch):
    first, second = (RunLogger(tmp_path, "lightning_logs") for _ in range(2))
    # both look at what there is before either has made its folder
    monkeypatch.setattr("lightning.pytorch.loggers.TensorBoardLogger._get_next_version", lambda self: 0)
    assert [Path(logger.log_dir).name for logger in (first, second)] == ["version_0", "version_1"]
    assert first.log_dir == first.log_dir
    assert sorted(path.name for path in (tmp_path / "lightning_logs").iterdir()) == ["version_0", "version_1"]

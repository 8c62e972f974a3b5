from pathlib import Path

from llmx.runs.record import read_curves
from llmx.training.logger import RunLogger


def test_two_runs_that_start_at_once_have_folders_of_their_own(tmp_path, monkeypatch):
    first, second = (RunLogger(tmp_path, "lightning_logs") for _ in range(2))
    # both look at what there is before either has made its folder
    monkeypatch.setattr("lightning.pytorch.loggers.TensorBoardLogger._get_next_version", lambda self: 0)
    assert [Path(logger.log_dir).name for logger in (first, second)] == ["version_0", "version_1"]
    assert first.log_dir == first.log_dir
    assert sorted(path.name for path in (tmp_path / "lightning_logs").iterdir()) == ["version_0", "version_1"]


def test_a_run_continued_within_a_second_is_read_in_its_order(tmp_path):
    first = RunLogger(tmp_path, "lightning_logs")
    first.log_metrics({"train/loss": 2.0}, 0)
    first.finalize("success")
    first.experiment.close()
    (events,) = Path(first.log_dir).glob("events.*")
    events.rename(events.with_name(".".join([*events.name.split(".")[:4], "zzz", "1", "9"])))  # of the same second
    second = RunLogger(tmp_path, "lightning_logs", "version_0", purge_step=1)
    second.log_metrics({"train/loss": 1.0}, 1)
    second.experiment.close()
    assert read_curves(Path(first.log_dir))["train/loss"] == [(0, 2.0), (1, 1.0)]

"""TensorBoard's logger in a run folder that no other process takes too."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class RunLogger(TensorBoardLogger):
    """Makes its `version_N` the moment it chooses the number: of two runs that start at once each has its own."""

    def _get_next_version(self) -> int:
        version = super()._get_next_version()
        while rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            try:
                Path(self.root_dir, f"version_{version}").mkdir(parents=True)
                break
            except FileExistsError:
                version += 1
        return version

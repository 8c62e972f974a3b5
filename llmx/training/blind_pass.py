"""The blind pass of a run: each validation is scored a second time, so that no prediction can see its answer.

The last validation of a fit, `validate` and `test` score the whole split twice, an earlier validation a tenth of it.
`model.audit` says what a leak does: `error` ends the fit, `warn` marks the run as leaking, `off` leaves the pass out.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from llmx.audits import blind as audit
from llmx.audits.blind import Blind, BlindResult, Change, Seen
from llmx.audits.blind_location import Location, locate
from llmx.audits.causality_report import ADVICE
from llmx.data.windows import Batch
from llmx.errors import UserError
from llmx.runs.record import note_blind
from llmx.training.lightning_types import Model, language_model
from llmx.training.logger import run_folder
from llmx.training.stopping import stop_together

SAMPLE = 0.1  # of a validation that is not the last one


class BlindPass(Callback):
    """Scores a split again once it has been scored. A LanguageModel makes it the first callback of every trainer: an
    averaging callback takes its weights back at the end of the split."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []  # inputs, targets, losses

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.batches = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        if language_model(pl_module).hparams["audit"] != "off" and not trainer.sanity_checking:
            self.batches.append((batch.inputs, batch.targets, outputs))  # on the device, which works on meanwhile

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._judge(trainer, language_model(pl_module), "val")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.batches = []

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        self.on_validation_batch_end(trainer, pl_module, outputs, batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._judge(trainer, language_model(pl_module), "test")

    def _judge(self, trainer: pl.Trainer, model: Model, split: str) -> None:
        if not self.batches:
            return
        started = time.perf_counter()
        loss = getattr(model, f"{split}_loss").compute().item()
        fit = trainer.state.fn == "fit"
        whole = not fit or trainer.should_stop or trainer.global_step >= model.total_steps
        seen = Seen(*(torch.cat(parts).cpu() for parts in zip(*self.batches, strict=True)))
        again = len(self.batches) if whole else math.ceil(SAMPLE * len(self.batches))
        rows_of_a_batch, share = len(self.batches[0][0]), again / len(self.batches)
        self.batches = []
        generator = torch.Generator().manual_seed(trainer.global_step)
        order = torch.randperm(len(seen.inputs), generator=generator)
        rows = order[torch.arange(again * rows_of_a_batch) % len(order)]  # the first rows fill up the last batch
        cuts = audit.draw_cuts(seen.targets, generator)[rows]
        location: Any = None
        with trainer.precision_plugin.val_step_context():
            blind = audit.blind_pass(model.score, seen, rows, cuts, rows_of_a_batch, model.device)
            changed = audit.change(seen, blind)
            result, worst_rank = _result(model, seen, blind, changed, loss, share, started)
            if fit and result.verdict == "LEAKING" and model.device_mesh is None:
                here = trainer.global_rank == worst_rank
                location = locate(model.score, seen, blind, changed, rows_of_a_batch, model.device) if here else None
                location = trainer.strategy.broadcast(location, worst_rank)
                result = replace(result, verdict=location.verdict)
        known = model.leaking
        model.leaking = known or result.verdict == "LEAKING"
        model.log(f"{split}/blind", result.loss)
        model.log_dict({f"blind/{key}": value for key, value in result.to_numbers().items()}, logger=False)
        folder = run_folder(trainer) if fit else None
        if folder is not None and trainer.is_global_zero:
            note_blind(folder, result.to_dict(), model.leaking)
        if fit and result.verdict in ("LEAKING", "RANDOM") and not known:
            _stop(trainer, model, result, location)


def _result(
    model: Model, seen: Seen, blind: Blind, changed: Change, loss: float, share: float, started: float
) -> tuple[BlindResult, int]:
    """The verdict of all processes together, and the rank of the one with the largest change."""
    sizes, drawn = changed.losses.abs(), changed.drawn
    suspect = changed.finite and bool(sizes.any()) and model.device_mesh is None
    found = suspect and audit.beyond_rounding(model.network, seen, blind, changed, model.score.precision)
    own = (len(drawn), drawn.sum(), drawn.square().sum(), sizes.max(), found, changed.finite)
    together: Any = model.all_gather(torch.tensor([float(x) for x in own], dtype=torch.float64, device=model.device))
    by_rank = together.view(-1, len(own)).cpu()
    count, total, squares = by_rank[:, :3].sum(0).tolist()
    gain, error = audit.gain_of(count, total, squares)
    largest = by_rank[:, 3].max().item()
    if not by_rank[:, 5].all():
        verdict = "NOT FINITE"
    elif by_rank[:, 4].any() or audit.is_leak(gain, error, largest, model.score.precision):
        verdict = "LEAKING"
    else:
        verdict = "within rounding" if largest else "identical"
    seconds = round(time.perf_counter() - started, 2)
    result = BlindResult(verdict, loss + gain, gain, error, largest, int(count), share, seconds)
    return result, int(by_rank[:, 3].argmax())


def _stop(trainer: pl.Trainer, model: Model, result: BlindResult, location: Location | None) -> None:
    """Ends the fit if `model.audit` is `error`; otherwise one line says what was found."""
    verdict, _, found = str(result).partition(": ")
    said = [f"{verdict} at step {trainer.global_step}", *filter(None, (found, location and str(location)))]
    message = f"{said[0]}: {'; '.join(said[1:])}."
    if model.hparams["audit"] == "error":
        stop_together(trainer, UserError(f"{message} {ADVICE}"))
    rank_zero_warn(message)

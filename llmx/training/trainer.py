"""Lightning's Trainer with the laboratory's own verbs, so that the command line offers them beside fit."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import rich
import torch

from llmx.audits.causality import CausalityReport, audit_causality
from llmx.audits.hidden_future import hidden_future_loss
from llmx.data.datamodule import TextDataModule
from llmx.training.checkpoints import read_checkpoint
from llmx.training.module import LanguageModel


class Trainer(pl.Trainer):
    """A Trainer that can also audit."""

    def audit(self, model: LanguageModel, datamodule: TextDataModule, ckpt_path: str | None = None) -> CausalityReport:
        """Audit the network for leaks: later tokens, other rows.

        Args:
            model: whose network is audited.
            datamodule: of the validation split, for the loss of a leaking network whose future is hidden.
            ckpt_path: a checkpoint. If its network leaks, its loss is measured again with the future hidden.
        """
        report = audit_causality(model.network, model.window)
        rich.print(report.summary())
        if ckpt_path is not None and report.leaking:
            checkpoint = read_checkpoint(ckpt_path)
            model.load_state_dict(checkpoint["state_dict"])
            counts = np.bincount(datamodule.tokens("train"), minlength=model.tokenizer.vocab_size)
            print("Measuring the loss with the future hidden: a pass over a window for every character and draw ...")
            mixed = checkpoint.get("llmx", {}).get("precision") == "bf16-mixed"
            with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
                honest = hidden_future_loss(model.network, datamodule.tokens("val"), counts, model.window)
            rich.print(
                f"val loss with the future hidden: {honest.loss:.4f} nats, "
                f"mean of {honest.draws} draws (spread {honest.spread:.4f}) over {honest.predictions:,} characters"
            )
        return report

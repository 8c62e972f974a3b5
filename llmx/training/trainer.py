"""Lightning's Trainer with the laboratory's own verbs, so that the command line offers them beside fit."""

from dataclasses import replace
from functools import partial
from typing import Literal

import lightning.pytorch as pl
import numpy as np
import rich
import torch

from llmx import display
from llmx.audits.causality import audit_causality
from llmx.audits.equivalence import audit_equivalence
from llmx.audits.hidden_future import hidden_future_loss
from llmx.audits.live_run import audit_live_run
from llmx.data.datamodule import TextDataModule
from llmx.runs.archive import read_checkpoint
from llmx.training.module import LanguageModel


class Trainer(pl.Trainer):
    """A Trainer that can also audit."""

    def audit(self, model: LanguageModel, datamodule: TextDataModule, ckpt_path: str | None = None) -> bool:
        """Audit the network: causality, the equality of its forms, the reach of its gradients.

        Args:
            model: whose network is audited.
            datamodule: of the validation split, for the loss of a leaking network whose future is hidden.
            ckpt_path: a checkpoint, whose weights are audited. If they leak, their loss is measured again with the
                future hidden.

        Returns whether the network passes them all.
        """
        parameters = model.learning.audits(model)
        checkpoint = {} if ckpt_path is None else read_checkpoint(ckpt_path)
        if checkpoint:
            model.load_state_dict(checkpoint["state_dict"])
        mixed = checkpoint.get("llmx", {}).get("precision") == "bf16-mixed"
        autocast = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=mixed)
        text = datamodule.beginning()
        report = audit_causality(model.network, model.window, text=text)
        breach = audit_live_run(model.network, model.window, autocast(), text, perturb=not checkpoint)
        if breach is not None:
            report = replace(report, breaches=(*report.breaches, breach))
        equivalence = audit_equivalence(model.network, model.window)
        for summary in (report.summary(), equivalence.summary(), *(audit.summary() for audit in parameters)):
            rich.print(summary)
        if checkpoint and report.leaking:
            counts = np.bincount(np.asarray(datamodule.tokens("train")), minlength=model.tokenizer.vocab_size)
            print("Measuring the loss with the future hidden: a pass over a window for every character and draw ...")
            with autocast():
                honest = hidden_future_loss(model.network, np.asarray(datamodule.tokens("val")), counts, model.window)
            rich.print(
                f"val loss with the future hidden: {display.loss(honest.loss)} nats, "
                f"mean of {honest.draws} draws (spread {display.loss(honest.spread)}) "
                f"over {honest.predictions:,} characters"
            )
        return not (report.failing or equivalence.failing or any(audit.failing for audit in parameters))

    def describe(
        self, model: LanguageModel, length: int | None = None, format: Literal["table", "json"] = "table"
    ) -> None:
        """Describe the network: parameters, FLOPs and state, layer by layer and in sum.

        The command line carries this out itself, before there is a trainer; the signature makes its flags.

        Args:
            model: whose network is described.
            length: tokens of the sequence whose FLOPs and state are given; the window if not given.
            format: a table for people, or json.
        """

"""The causality audit of every fit, and what follows from a leak.

Before the first step the network is audited by itself, then as it runs: in the trainer's precision and on its device.
`model.audit` says what a leak does: `error` stops all processes, `warn` marks the run as leaking, `off` skips the
audits. The blind pass (llmx/training/blind_pass.py) looks for leaks from then on.
"""

from __future__ import annotations

from dataclasses import replace

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from llmx.audits.causality import audit_causality
from llmx.audits.causality_report import CausalityError
from llmx.audits.live_run import audit_live_run
from llmx.data.datamodule import TextDataModule
from llmx.errors import UserError
from llmx.training.corpus_watch import watched
from llmx.training.lightning_types import Model, language_model, text_data
from llmx.training.stopping import stop_together
from llmx.training.trials import tell_silent_parameters, try_forms


class CausalityAudit(Callback):
    """Audits before the first step of a fit. A LanguageModel brings it to every trainer."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        trainer.num_sanity_val_steps = 0  # the network itself first reads a training batch: it may count what it reads
        model, data = language_model(pl_module), text_data(trainer)
        if data is not None and model.learning.needs_counting:  # an empty table would tell an audit nothing
            with watched(model, data):
                model.learning.count(data)
        audit_network(model, data)
        audit_start(model)


def audit_network(model: Model, data: TextDataModule | None = None) -> None:
    """Audits a network that is not yet sharded, by itself and once, and notes the report in `model.causality`. Then it
    puts the forms of the network on trial.

    The training split of `data` gives the audit tokens beside the random ones. Raises CausalityError for a leak if
    `model.audit` is `error`, and UserError for a network on the meta device.
    """
    policy = model.hparams["audit"]
    first = policy != "off" and model.causality is None
    if first:
        if any(parameter.is_meta for parameter in model.network.parameters()):
            raise UserError("model.audit: only a whole network can be audited, not one on the meta device")
        text = None if data is None else data.beginning()
        with watched(model, data):
            model.causality = audit_causality(model.network, model.window, text=text)
        model.leaking = model.leaking or model.causality.leaking
    if model.causality is not None and model.causality.failing and policy == "error":
        raise CausalityError(model.causality)
    if first:
        with watched(model, data):
            try_forms(model)
            tell_silent_parameters(model)


def audit_start(model: Model) -> None:
    """Audits, once, how the network will run in its trainer. Raises CausalityError as `audit_network` does."""
    if model.run_audited or model.causality is None or model.causality.failing or model.device_mesh is not None:
        return
    model.run_audited = True
    trainer, data = model.trainer, text_data(model.trainer)
    with watched(model, data):
        breach = audit_live_run(
            model.network,
            model.window,
            trainer.precision_plugin.forward_context(),
            None if data is None else data.beginning(),
            device=trainer.strategy.root_device,  # the network moves there later, if it has not yet
            perturb=True,
        )
    if breach is not None:
        model.causality = replace(model.causality, breaches=(breach,))
        model.leaking = model.leaking or model.causality.leaking
        if model.hparams["audit"] == "error":
            stop_together(trainer, CausalityError(model.causality))
        rank_zero_warn(f"{model.causality.verdict} before step 1: {breach}.")

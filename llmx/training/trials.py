"""What a fit tries before step 1, on copies: whether the forms of the network agree, and whether gradients reach it."""

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from llmx.audits.equivalence import short_trial
from llmx.errors import UserError
from llmx.training.lightning_types import Model


def try_forms(model: Model) -> None:
    """Compares forward, prefill and step over a few tokens. Where they differ, `model.audit: error` raises UserError
    with component, file and line, and `warn` says it in one line."""
    if not model.network.stateful:
        return
    try:
        fault = short_trial(model.network, model.window)
    except UserError as error:
        fault = str(error)
    if fault is None:
        return
    message = f"model.network: it would generate as another network than the one that learns: {fault}"
    if model.hparams["audit"] == "error":
        raise UserError(message)
    rank_zero_warn(message)


@rank_zero_only
def tell_silent_parameters(model: Model) -> None:
    """One line where a parameter gets no gradient."""
    silent = [name for report in model.learning.audits(model) for name in report.silent]
    if silent:
        count = sum(model.network.get_parameter(name).numel() for name in silent)
        print(f"model.network: no gradient reaches {', '.join(silent)} ({count:,} parameters)")

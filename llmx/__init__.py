"""llmx: a laboratory for language-model architectures.

The public names are imported when first used, so that `import llmx` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmx.data.datamodule import TextDataModule
    from llmx.networks.decoder import Decoder
    from llmx.training.logger import RunLogger
    from llmx.training.module import LanguageModel
    from llmx.training.recording import run_callbacks

__all__ = ["Decoder", "LanguageModel", "RunLogger", "TextDataModule", "run_callbacks"]
__version__ = "0.1.0"

_HOMES = {
    "Decoder": "llmx.networks.decoder",
    "LanguageModel": "llmx.training.module",
    "RunLogger": "llmx.training.logger",
    "TextDataModule": "llmx.data.datamodule",
    "run_callbacks": "llmx.training.recording",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

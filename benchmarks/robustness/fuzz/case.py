"""One case of the fuzzer, and the valid config that the cases spoil."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml
from hypothesis import strategies as st

from testbed.tiny import network


@dataclass(frozen=True)
class Case:
    """A command line and the files that it finds. If it is refused, the message must contain one of `names`."""

    kind: str
    arguments: list[str]
    names: list[str]
    files: dict[str, bytes | None] = field(default_factory=dict)  # name -> content; None is a folder


def config() -> dict[str, Any]:
    """A valid config whose fit takes a second."""
    return {
        "seed_everything": 3,
        "trainer": {
            "max_steps": 1,
            "val_check_interval": 1,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "precision": "32-true",
            "accelerator": "cpu",
        },
        "data": {"corpus": "corpus.txt", "window": 8, "batch_size": 4, "split": [0.8, 0.1, 0.1]},
        "model": {"network": network(depth=1), "sampling": {"max_new_tokens": 4}},
    }


def yaml_bytes(content: Any) -> bytes:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode(errors="surrogatepass")


VERBS = st.sampled_from(["fit", "fit", "fit", "validate", "test", "audit", "describe"])


def command_line(verb: str, *more: str) -> list[str]:
    """A command on tiny.yaml that writes no run."""
    quiet = [] if verb == "describe" or "--trainer.logger" in more else ["--trainer.logger=false"]
    return [verb, "--config", "tiny.yaml", *quiet, *more]

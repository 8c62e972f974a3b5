"""Faults in the numbers: NaN or infinity."""

from __future__ import annotations

from random import Random

from benchmarks.robustness.faults.laboratory import CONFIGS, FaultLaboratory, damage, wrong_refusal


def not_finite(name: str, lab: FaultLaboratory, random: Random) -> str:
    """A user's mixer gives NaN or infinity at some step, in its output or its gradient.

    There is one message, and the checkpoint before stays good. Without the fault the run resumes and loses nothing.
    """
    fault = {
        "FAULTY_RANK": str(random.randrange(CONFIGS[name]["trainer"].get("devices", 1))),
        "FAULTY_AT": str(random.randrange(1, 17)),
        "FAULTY_NUMBER": random.choice(["nan", "inf"]),
        "FAULTY_IN": random.choice(["forward", "backward"]),
    }
    lost = wrong_refusal(lab.fit(name, environment=fault), "training has diverged", "good checkpoint is")
    return lost or damage(lab.last) or lab.loss_after_resuming(name)

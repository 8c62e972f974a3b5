import platform
import subprocess
import sys
from functools import partial

import pytest
import torch

from llmx import Decoder
from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.generation import Sampling, generate
from llmx.mixers.hyena import Hyena
from llmx.training.hardware import can_compile, compiled_decode
from tests.forms import perturbed

STEPS = """
import resource, torch
from llmx.training.hardware import keep_freed_memory

def step():
    return sum(x.sum() for x in [torch.ones(2**18) for _ in range(64)])  # 64 MiB

def pages_mapped():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

{call}
step()
before = pages_mapped()
for _ in range(5):
    step()
print(pages_mapped() - before)
"""


def pages_mapped(call: str) -> int:
    command = [sys.executable, "-c", STEPS.format(call=call)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a remedy for glibc")
def test_memory_that_a_step_frees_serves_the_next_one():
    assert pages_mapped("keep_freed_memory()") < pages_mapped("") / 4  # 513 of 16,343 where it was written


@pytest.mark.skipif(not can_compile(), reason="no compiler")
@pytest.mark.parametrize("inference", [False, True])  # the latter as in `predict`
def test_compiled_decoding_writes_the_same_text_and_is_compiled_once(inference):
    """With a mixer that Inductor, told to keep more between its loops, computed wrongly from the third token on."""
    block = partial(PreNormBlock, mixer=partial(Hyena, max_length=32), feed_forward=SwiGLU)
    torch.manual_seed(0)
    network = perturbed(Decoder(65, block=block, dim=32, depth=1))  # float64: no argmax near a tie
    prompt, sampling = torch.zeros(1, 1, dtype=torch.int64), Sampling(20, temperature=0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode(inference):
        compiled = generate(network, prompt, 32, sampling, compiled_decode())
    assert compiled.tolist() == generate(network, prompt, 32, sampling).tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # every state has the strides of the first

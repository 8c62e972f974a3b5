import subprocess
import sys

import pytest


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_llmx_loads_neither_torch_nor_lightning():
    heavy = run(
        "import sys, llmx; print([name for name in ('torch', 'lightning', 'torchmetrics') if name in sys.modules])"
    )
    assert heavy == "[]"


def test_importing_the_decoder_does_not_load_lightning():
    assert run("import sys; from llmx import Decoder; print('torch' in sys.modules, 'lightning' in sys.modules)") == (
        "True False"
    )


def test_an_unknown_public_name_is_an_attribute_error():
    import llmx

    with pytest.raises(AttributeError, match="no attribute 'Decodre'"):
        _ = llmx.Decodre

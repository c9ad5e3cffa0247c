"""The device of these tests: a CUDA device where there is one (TRITON_INTERPRET=0 pytest -m gpu),
else the CPU, on which Triton's interpreter runs the kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")


@pytest.fixture(
    params=[
        "interpreter",
        pytest.param("cuda", marks=[pytest.mark.gpu]),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    from triton import knobs

    if request.param == "interpreter":
        if not knobs.runtime.interpret:
            pytest.skip("the kernels are compiled: TRITON_INTERPRET=0")
        return torch.device("cpu")
    if not torch.cuda.is_available() or knobs.runtime.interpret:
        pytest.skip("needs a CUDA device, and TRITON_INTERPRET=0")
    return torch.device("cuda", 0)

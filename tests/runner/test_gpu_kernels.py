"""Whether the GPU's kernels can be had, by what Triton says when its driver is first asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from skipllm_core.runner.model_runner import resolve_device
from skipllm_core.worker import gpu_kernels
from tests.runner.tiny import engine_config

driver = pytest.importorskip("triton.runtime", reason="no Triton for this platform").driver


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    active = SimpleNamespace(
        get_current_target=lambda: SimpleNamespace(arch=capability), get_current_device=lambda: 0
    )
    monkeypatch.setattr(driver, "_active", active)


def test_without_a_compiler_torch_decodes_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def fail() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(driver, "_active", None)
    monkeypatch.setattr(type(driver), "default", property(lambda self: fail()))
    assert gpu_kernels(engine_config(tmp_path)) is None
    assert "torch alone" in caplog.text
    assert "C compiler" in caplog.text


@pytest.mark.parametrize(("capability", "has_kernels"), [(80, False), (89, True), (90, True)])
def test_fp8_weights_need_a_device_that_knows_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, has_kernels: bool
) -> None:
    fake_gpu(monkeypatch, capability)
    assert gpu_kernels(engine_config(tmp_path)) is not None
    fp8 = engine_config(tmp_path, quantization="fp8")
    assert (gpu_kernels(fp8) is not None) is has_kernels


@pytest.mark.parametrize(("has_cuda", "device"), [(True, "cuda"), (False, "cpu")])
def test_cuda_is_picked_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, has_cuda: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert resolve_device("auto").type == device

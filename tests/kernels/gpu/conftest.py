import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

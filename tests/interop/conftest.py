"""What the comparisons with torch share."""

import pytest

from tests.torch_engine import torch_engine


@pytest.fixture
def fbgemm():
    """Torch's fbgemm kernels, and its random numbers from the start."""
    torch = pytest.importorskip("torch")
    with torch_engine("fbgemm"):
        torch.manual_seed(0)
        yield

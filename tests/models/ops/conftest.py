import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In this mode PyTorch fills uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

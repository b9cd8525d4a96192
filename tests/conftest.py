"""What every test shares: Hypothesis profiles, the golden fixtures, the rule for GPU tests."""

import os

import pytest
from helpers.golden import load_golden
from hypothesis import settings

# "ci" draws the same examples on every run, so that a red build can be repeated; "deep" looks for new ones.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, print_blob=True)
settings.register_profile("deep", derandomize=False, deadline=None, max_examples=400, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def golden():
    """Return the loader of golden fixtures: `meta, arrays = golden("module22_square")`."""
    return load_golden


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where there is no CUDA device; torch is imported only for them."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _cuda_is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _cuda_is_available() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()

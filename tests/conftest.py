"""Shared fixtures and settings: Hypothesis profiles, the golden fixtures, the rule for GPU tests."""

import gc
import multiprocessing
import os

import pytest
from helpers.browser import FLAGS, find_chromium
from helpers.golden import load_golden
from helpers.site import build_site, built_site
from hypothesis import settings

# "ci" draws the same examples on every run, so that a failure can be repeated; "deep" draws new ones.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, print_blob=True)
settings.register_profile("deep", derandomize=False, deadline=None, max_examples=400, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def data_loading_processes_end_with_their_test():
    """Collect garbage if processes are left: an error's traceback keeps those that load data.

    They hold the pipes of the browser's driver open, which then waits for them at the end of the session.
    """
    yield
    if multiprocessing.active_children():
        gc.collect()


@pytest.fixture(scope="session")
def golden():
    """Return the loader of golden fixtures: `meta, arrays = golden("module22_square")`."""
    return load_golden


@pytest.fixture(scope="session")
def site_folder(tmp_path_factory):
    """Return the folder of the site; build it, without executing the notebooks, unless `make test` has built it."""
    if built_site():
        return built_site()
    for package in ("mkdocs", "material", "mkdocstrings_handlers", "mkdocs_jupyter"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    build_site(folder)
    return folder


@pytest.fixture(scope="session")
def chromium():
    """Return a headless Chromium that cannot reach any other host."""
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright().start()
    try:
        path = find_chromium(playwright)
        if path is None:
            if os.environ.get("CI"):
                pytest.fail("found no Chromium: .ci/run installs it")
            pytest.skip("found no Chromium")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()
    finally:
        playwright.stop()


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` without a CUDA device; torch is imported only for them."""
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

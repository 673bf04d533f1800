"""One load of the bundled pipeline for all tests of this folder."""

from __future__ import annotations

import pytest
from diffusers import WanPipeline

from dit_sparse.pipelines.bundled import load_bundled


@pytest.fixture(scope="session")
def pipe() -> WanPipeline:
    pipeline = load_bundled()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

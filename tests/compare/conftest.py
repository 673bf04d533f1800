from __future__ import annotations

from pathlib import Path

import pytest

from tests.compare.tiny import save_tiny_wan


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("model") / "tiny-wan")

"""What every test gets: caches of its own."""

import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def caches() -> Iterator[None]:
    """Totals of data sets, in a folder of this run; the environment reaches processes that tests start, too.

    What DeepSpeed compiles at its first start, in half a minute, stays where later runs find it.
    """
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    compiled = usual / "torch_extensions" / f"py{sys.version_info[0]}{sys.version_info[1]}_torch{version('torch')}"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", folder)
        if "TORCH_EXTENSIONS_DIR" not in os.environ:
            environment.setenv("TORCH_EXTENSIONS_DIR", str(compiled))
        yield

import os

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """Waiting for the disk is most of the time of many small files, and no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield

import pytest
from evaluation.subjects import compile_quickly


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    compile_quickly(monkeypatch)

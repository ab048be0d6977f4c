"""Accelerators that are not there are not looked for."""

import pytest

from rwkv_jax import platforms


@pytest.mark.parametrize(
    "installed, device, before, after",
    [
        ("libtpu", "", None, "cpu"),
        ("jax_plugins.xla_cuda13", "", "", "cpu"),
        ("jax_plugins.xla_cuda13", "nvidia0", None, None),
        ("jax_plugins.xla_cuda13", "dxg", None, None),  # Windows' Linux
        ("libtpu", "vfio/3", None, None),
        ("libtpu", "accel0", None, None),
        ("libtpu", "", "tpu", "tpu"),
        ("", "", None, None),
    ],
)
def test_leave_out_absent(tmp_path, monkeypatch, installed, device, before, after):
    def find(name):
        if name.startswith("jax_plugins.") and not installed.startswith("jax_plugins."):
            raise ModuleNotFoundError(name)
        return True if name == installed else None

    monkeypatch.setattr(platforms, "find_spec", find)
    (tmp_path / "null").touch()
    (tmp_path / "nvidiactl").touch()
    if device:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    environment = {} if before is None else {"JAX_PLATFORMS": before}
    platforms.leave_out_absent(environment, tmp_path)
    assert environment.get("JAX_PLATFORMS") == after
    platforms.leave_out_absent(environment, tmp_path / "none")
    assert platforms.wants("tpu", {}) and not platforms.wants("tpu", {"JAX_PLATFORMS": "cpu,cuda"})


def test_no_dev_at_all(tmp_path):
    environment = {}
    platforms.leave_out_absent(environment, tmp_path / "none")
    assert environment == {}

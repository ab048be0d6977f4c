"""Which device a program is traced for."""

import jax


def device_kind() -> str:
    """Its name: that of the mesh that is set, or of this process' first device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind

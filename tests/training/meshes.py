"""The meshes that steps are tried on, and a run that divides over each of them."""

from rwkv_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig

MESHES = {
    "data8": MeshConfig(data=8, fsdp=1),
    "fsdp8": MeshConfig(),
    "fsdp4-tensor2": MeshConfig(tensor=2),
    "data2-sequence4": MeshConfig(data=2, fsdp=1, sequence=4),
    "data2-fsdp2-tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def config(mesh, version="7", **train):
    head = 64 if version == "4" else 32
    return Config(
        model=ModelConfig(version=version, layers=2, width=128, head_size=head, vocab_size=66),
        # An epsilon that makes updates smooth in gradients: those of one sign are not compared.
        optimizer=OptimizerConfig(peak_lr=3e-2, warmup_steps=0, eps=1e-3),
        train=TrainConfig(**{"batch": 16, "context": 32, "steps": 8, **train}),
        mesh=mesh,
    )

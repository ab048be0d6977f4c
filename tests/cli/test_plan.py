"""`plan`: its tables and messages."""

from rwkv_jax.cli.plan import main


def test_the_command(tmp_path, capsys):
    path = tmp_path / "x.toml"
    path.write_text(
        "[model]\nversion = '4'\nlayers = 1\nwidth = 64\n"
        "[data]\ntokenizer = 'bytes'\n[train]\nbatch = 8\n"
    )
    assert main([str(path), "--topology", "here", "train.context=32"]) == 0
    out = capsys.readouterr().out
    assert "vocabulary 257, context 32" in out
    assert "8 x cpu (fsdp 8)" in out and "FLOP per token" in out and "over fsdp" in out
    assert main([str(path), "--topology", "here", "train.batch=9"]) == 2
    assert "set train.batch = 8 or 16, or mesh.fsdp = " in capsys.readouterr().err
    assert main([str(path), "--topology", "here", "--fit"]) == 2
    assert "--fit: the memory of the devices here is not known" in capsys.readouterr().err

"""A script that sets malloc up runs once more, with the settings, and as the same interpreter."""

import os
import subprocess
import sys

import pytest

from rwkv_jax import malloc

PROGRAM = """
import os, sys
from rwkv_jax import malloc
malloc.set_up()
print(os.environ.get("GLIBC_TUNABLES", ""), sys.argv[1:], sys.prefix, sep="|")
"""


def run(tmp_path, tunables, **options):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    root = os.path.dirname(os.path.dirname(malloc.__file__))
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        "PYTHONPATH": root,
        "GLIBC_TUNABLES": tunables,
    }
    command = [options.pop("name", sys.executable), str(script), "a b", "--c"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n").split("|")


@pytest.mark.skipif(not malloc._has_glibc(), reason="malloc is not glibc's")
@pytest.mark.parametrize("tunables", ["", "glibc.cpu.x86_ibt=off"])
def test_settings_are_added_and_arguments_kept(tmp_path, tunables):
    found, arguments, prefix = run(tmp_path, tunables)
    assert found == ":".join(filter(None, (tunables, malloc.SETTINGS)))
    assert arguments == "['a b', '--c']"
    assert prefix == sys.prefix


def test_the_users_settings_stay(tmp_path):
    assert run(tmp_path, "glibc.malloc.check=0")[0] == "glibc.malloc.check=0"


def test_an_interpreter_under_another_name_keeps_its_environment(tmp_path):
    assert run(tmp_path, "", name="python3", executable=sys.executable)[2] == sys.prefix

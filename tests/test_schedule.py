"""benchmarks.schedule: what it reads in compilers' files, and what its check says."""

import shutil
from pathlib import Path

import pytest

from benchmarks import sass, schedule, vliw
from benchmarks.aot import Call
from rwkv_jax.hardware import GPUS

DUMPS = Path(__file__).parent / "dumps"
"""libtpu's files of a kernel for v5p, cut short."""
UTILIZATION = "1-wkv7_forward.1-70-final_hlo-static-per-bundle-utilization.txt"
SASS = """\
	.target	sm_90a
.text.wkv7_forward:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, RZ ;
        /*0040*/              @!P0 LDL.LU R5, [R1+0x4] ;
.L_x_2:
        /*0050*/                   FFMA R8, R8, R9, R10 ;
        /*0060*/               @P2 BRA `(.L_x_2) ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_1:
        /*0090*/                   BRA `(.L_x_1);
        /*00a0*/                   NOP;
.L_x_3:
"""


@pytest.fixture
def dumps(tmp_path):
    return Path(shutil.copytree(DUMPS, tmp_path / "dumps"))


def test_what_libtpu_wrote(dumps):
    found = vliw.read(dumps, "wkv7_forward")
    assert (found.scheduled, found.issued) == (9871, 7311)
    assert found.used["MXU"] == 24 and found.slots["MXU"] == 4
    assert found.used["VSTORE"] == 1 and found.used["VSTORE:SPILL"] == 0
    assert found.rows == 16 + 2 * 16 + 8 + 16


def test_a_loop_inside_a_program_is_not_counted(dumps):
    (path,) = dumps.glob("*-72-final_bundles.txt")
    path.write_text(path.read_text() + " 0x1e LB: > { }\n" + " 0x2e LB: >> { }\n")
    with pytest.raises(ValueError, match="a loop inside"):
        vliw.read(dumps, "wkv7_forward")


def test_cycles_of_a_token_and_head(dumps):
    """Two cores share three independent programs of four steps, each of 1,024 tokens and heads."""
    call = Call((3, 1, 4), 3, bytes=12 * 1024 * 1280)
    found = vliw.counts(vliw.TPUS["v5p"], dumps, "wkv7_forward", 12 * 1024, call)
    assert found["scheduled"] == pytest.approx(9871 / 1024, abs=1e-3)
    assert found["hbm"] == pytest.approx(1280 / (2.765e12 / 2 / 1.751e9), rel=1e-3)
    assert found["mxu"] == pytest.approx(72 / 4 / 1024, rel=1e-2)
    assert found["milliseconds"] == pytest.approx(2 * 4 * 9871 / 1.751e6, rel=1e-3)
    with pytest.raises(ValueError, match="4 matrix units, not 2"):
        vliw.counts(vliw.TPUS["v6e"], dumps, "wkv7_forward", 12 * 1024, call)


def test_clocks():
    """They are the makers' where those are published."""
    clocks = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75}
    assert {name: round(vliw.TPUS[name].clock / 1e9, 2) for name in clocks} == clocks


def test_files_that_libtpu_did_not_write(dumps):
    with pytest.raises(ValueError, match=r"wrote 0 files \*wkv6_forward\*"):
        vliw.read(dumps, "wkv6_forward")
    shutil.copy(dumps / UTILIZATION, dumps / UTILIZATION.replace("1-", "2-", 1))
    with pytest.raises(ValueError, match="wrote 2 files"):
        vliw.read(dumps, "wkv7_forward")


@pytest.mark.parametrize(
    ("ending", "text", "message"),
    [
        ("packed-bundles-post-ra", "Schedule analysis:\n", "no total"),
        ("per-bundle-utilization", "MXU\n4\n", "table of units"),
        ("per-bundle-utilization", "== CAPACTIY:\nMXU, XLU\n4 3\n== UTILIZATION:\n1 2 3\n", "zip"),
    ],
)
def test_files_of_another_form(dumps, ending, text, message):
    (path,) = dumps.glob(f"*{ending}.txt")
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        vliw.read(dumps, "wkv7_forward")


def test_the_loop_of_machine_code():
    names = sass.loop(SASS)
    assert names == ["BAR", "HMMA", "LDL", "FFMA", "BRA", "BRA"]
    counts = sass.by_kind(names)
    assert {kind: n for kind, n in counts.items() if n} == {
        **{"barriers": 1, "tensor": 1, "local": 1, "float": 1},
        "other": 2,
    }
    with pytest.raises(ValueError, match="not a disassembly"):
        sass.loop("nvdisasm fatal")


def test_programs_on_a_multiprocessor():
    h100 = GPUS["H100"]
    assert sass.programs(h100, threads=256, registers=255, shared=0) == 1
    assert sass.programs(h100, threads=128, registers=40, shared=0) == 12
    assert sass.programs(h100, threads=128, registers=168, shared=112 << 10) == 2


def test_launch():
    line = "003: kCustomKernel [] wkv7_forward grid: [2, 4, 1] threads: [256, 1, 1]  "
    assert sass.launch(line + "shared_memory: 16384 bytes", "wkv7_forward") == (256, 16384)
    with pytest.raises(ValueError, match="no wkv7_backward"):
        sass.launch(line, "wkv7_backward")


def row(heads=32, target="v5e", **numbers):
    implementation = "pallas_tpu" if target == "v5e" else "pallas_gpu"
    case = schedule.Case(implementation, "7", heads=heads)
    return {"target": target, "kernel": "wkv7_forward", **case._asdict(), **numbers}


def test_the_check(monkeypatch, capsys):
    here = {"jaxlib": "3", "libtpu": "1", "ptxas": "13"}
    monkeypatch.setattr(schedule, "compilers", lambda: here)
    gpu = {"issue": 1000, "spilled_bytes": 0}
    known = [row(scheduled=4.0), row(target="H100", **gpu)]
    results = {"versions": {"ours": dict(here)}, "rows": known}

    def wrong(*rows):
        return schedule.slower(list(rows), results)

    assert wrong(row(scheduled=4.1), row(target="H100", **gpu)) == []
    slow, advice = wrong(row(scheduled=4.2))
    assert slow.startswith("v5e, wkv7_forward, 2 x 1024 x 32 x 64, bfloat16: 4.20 cycles")
    assert "4.00 in the results" in slow and "makes new results" in advice
    assert wrong(row(scheduled=3.8))  # the results are not of this code
    assert "16.00 bytes of spilled" in wrong(row(target="H100", **gpu | {"spilled_bytes": 16}))[0]
    assert "1,200.00 cycles to begin" in wrong(row(target="H100", **gpu | {"issue": 1200}))[0]
    assert "not in the results" in wrong(row(heads=2, scheduled=4.0))[0]

    results["versions"]["ours"]["libtpu"] = "2"
    assert wrong(row(scheduled=9.0)) == []
    said = " ".join(capsys.readouterr().out.split())
    assert "not compared: the results are of jaxlib 3 libtpu 2, this is jaxlib 3 libtpu 1" in said
    assert wrong(row(target="H100", **gpu | {"issue": 1200}))


def test_what_is_missing_is_said_first(monkeypatch, tmp_path):
    monkeypatch.setattr(schedule, "found", lambda name: name != "nvdisasm")
    monkeypatch.setattr(schedule.harness, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["schedule", "--check", "--target", "v5e", "H100"])
    with pytest.raises(SystemExit) as stopped:
        schedule.main()
    assert "no nvdisasm" in str(stopped.value) and "pip install -e '.[aot]'" in str(stopped.value)
    assert "schedule.json to compare with" in str(stopped.value)

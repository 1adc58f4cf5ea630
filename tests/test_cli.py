"""The `narrowgauge` command."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

pytest.importorskip("typer", reason="the command needs narrowgauge[cli]")
pytest.importorskip("matplotlib", reason="the command needs narrowgauge[cli]")

from typer.testing import CliRunner

import narrowgauge
from narrowgauge.cli import comparison, files
from narrowgauge.cli.main import application

TINY = ("--batch-size", "2", "--sequence-length", "16", "--dim", "64", "--layers", "1")
PNG = b"\x89PNG"


def run(*arguments: object):
    return CliRunner().invoke(application, [str(argument) for argument in arguments])


def demo(out: Path, *options: object):
    return run("demo", *TINY, "--out", out, *options)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# --- demo ---------------------------------------------------------------------------------------------------


def test_demo_writes_the_comparison(tmp_path):
    shown = demo(tmp_path, "--steps", 24)
    assert shown.exit_code == 0, shown.output
    result = read(tmp_path / "demo.json")
    stock, ours = result["runs"]["PyTorch"], result["runs"]["narrowgauge"]
    assert len(stock["losses"]) == len(ours["losses"]) == 24
    assert stock["losses"][0] == pytest.approx(math.log(256), abs=0.1)
    assert ours["losses"] == pytest.approx(stock["losses"], abs=1e-3)
    assert ours["losses"][-1] < 5.3, "it learns"
    assert len(ours["tokens_per_second"]) == 3, "one number per block of ten steps"
    assert result["comparison"]["agree"] is True
    assert result["partial"] is False
    assert stock["parameter_bytes"] == ours["parameter_bytes"]
    assert result["options"]["steps"] == 24
    assert result["machine"]["cores"] >= 1
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
    assert "losses agree" in shown.output
    assert "tokens per second" in shown.output
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", "demo.png"}


def test_demo_in_narrow_types(tmp_path):
    shown = demo(
        tmp_path, "--steps", 4, "--dtype", "bfloat16", "--state-dtype", "int8", "--linear", "int8-row"
    )
    assert shown.exit_code == 0, shown.output
    result = read(tmp_path / "demo.json")
    stock, ours = result["runs"]["PyTorch"], result["runs"]["narrowgauge"]
    assert ours["parameter_bytes"] == stock["parameter_bytes"]
    assert ours["optimizer_state_bytes"] < 0.6 * stock["optimizer_state_bytes"], "8 bits beside bfloat16"
    assert ours["losses"] == pytest.approx(stock["losses"], abs=0.1)


def test_stopping_a_demo_keeps_what_there_is(tmp_path, monkeypatch):
    whole_block = comparison.Run.train
    blocks = iter(range(100))

    def train(self, batches, steps, on_step):
        if next(blocks) == 3:  # the second block of the one that ended the first round
            steps = interrupted(steps)
        whole_block(self, batches, steps, on_step)

    def interrupted(steps):
        yield from list(steps)[:4]
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.Run, "train", train)
    shown = demo(tmp_path, "--steps", 40)
    assert shown.exit_code == 130
    assert "partial" in shown.output
    result = read(tmp_path / "demo.json")
    assert result["partial"] is True
    assert sorted(len(side["losses"]) for side in result["runs"].values()) == [14, 20]
    assert result["comparison"]["difference"]["validation_loss"] is None
    assert result["comparison"]["agree"] is True, "at the last step that both have done"
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--steps", "0"), "--steps"),
        (("--dtype", "float8"), "--dtype"),
        (("--linear", "int3"), "--linear"),
        (("--device", "abacus"), "--device"),
        (("--dim", "100"), "dim is 100"),
        (("--sequence-length", "99999999"), "sequence_length is 99999999"),
    ],
)
def test_bad_options_are_refused_before_any_work(tmp_path, monkeypatch, options, complaint):
    monkeypatch.setattr(comparison.Run, "train", lambda *_: pytest.fail("it went to work"))
    shown = demo(tmp_path, *options)
    assert shown.exit_code == 2
    assert complaint in " ".join(shown.output.split())
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()
    shown = run("demo", "--out", tmp_path / "file" / "demo")
    assert shown.exit_code == 2
    assert "--out" in shown.output


# --- the other commands -------------------------------------------------------------------------------------


def test_info_names_the_versions():
    shown = run("info")
    assert shown.exit_code == 0
    assert narrowgauge.__version__ in shown.output
    assert "cpu isa" in shown.output
    assert run("--version").output.strip() == narrowgauge.__version__


def test_swap_reports_on_a_model(tmp_path, monkeypatch):
    (tmp_path / "some_model.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))\n"
        "def not_a_model():\n    return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shown = run("swap", "some_model:build")
    assert shown.exit_code == 0, shown.output
    assert (
        shown.output.strip() == str(narrowgauge.swap(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))).strip()
    )
    other = run("swap", "some_model:build", "--norm-by", "rms")
    assert "narrowgauge.RMSNorm" in other.output
    unknown = run("swap", "some_model:build", "--norm-by", "batch")
    assert unknown.exit_code == 2
    assert "--norm-by" in unknown.output
    for target, complaint in (
        ("some_model", "package.module:name"),
        ("some_model:absent", "cannot be imported"),
        ("no_such_module:build", "cannot be imported"),
        ("some_model:not_a_model", "not a torch.nn.Module"),
    ):
        refused = run("swap", target)
        assert refused.exit_code == 2
        assert complaint in " ".join(refused.output.replace("│", " ").split())


def bench_result(speedup: float) -> dict:
    spread = {"median": speedup, "p20": speedup - 0.1, "p80": speedup + 0.1}
    case = {
        "name": "some_norm fwd 4x4 float32",
        "times": {"narrowgauge": {"median": 0.25, "p20": 0.2, "p80": 0.3}},
        "speedups": {"eager": spread},
        "roofline": {"narrowgauge": 0.5},
    }
    machine = {
        "cpu": "Abacus",
        "threads": 2,
        "cpu_isa": "v3",
        "torch": "2.13",
        "date": "2026-01-02T03:04:05+00:00",
    }
    return {"kind": "bench", "partial": False, "device": "cpu", "machine": machine, "cases": [case]}


def test_report_shows_and_compares_results(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    files.write_json(old, bench_result(1.5))
    files.write_json(new, bench_result(3.0))
    shown = run("report", old)
    for part in ("some_norm", "250 ms", "1.50x", "(1.40-1.60)", "50%"):
        assert part in shown.output
    compared = run("report", old, new)
    assert "1.50x → 3.00x" in compared.output
    page = run("report", new, "--markdown").output
    assert "| some_norm fwd 4x4 float32 | 3.00x (2.90-3.10) | 50% |" in page
    assert "Abacus" in page
    assert not re.search(r"\d\s*[num]?s\b", page), "CPU times are not published, only ratios"


def test_report_refuses_what_is_no_result(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("not JSON")
    for name in ("a.json", "b.json", "absent.json"):
        refused = run("report", tmp_path / name)
        assert refused.exit_code == 2
        assert "RESULTS" in refused.output


def test_bench_measures_and_writes(tmp_path):
    out = tmp_path / "result.json"
    shown = run("bench", "rms_norm call no grad", "--seconds", 0, "--no-compile", "--out", out)
    assert shown.exit_code == 0, shown.output
    (case,) = read(out)["cases"]
    assert case["name"] == "rms_norm call fwd 1x64 float32 no grad"
    assert set(case["speedups"]) == {"eager rms_norm", "eager layer_norm"}
    assert read(out)["copy_bytes_per_second"] > 1e8
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
    assert run("bench", "no such case").exit_code == 2


# --- around the commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "command"),
    [("typer", ["info"]), ("rich", ["info"]), ("matplotlib", ["demo", "--steps", "1"])],
)
def test_a_missing_dependency_names_the_extra(missing, command, tmp_path):
    program = f"import sys; sys.modules[{missing!r}] = None; from narrowgauge.cli import app; app()"
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stderr.strip() == f"This command needs {missing}: pip install 'narrowgauge[cli]'"
    assert list(tmp_path.iterdir()) == [], "before any work"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    files.write_json(path, {"kind": "demo"})

    def write_half(temporary: Path) -> None:
        temporary.write_text("{")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, write_half)
    assert read(path) == {"kind": "demo"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]

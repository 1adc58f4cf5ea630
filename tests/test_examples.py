"""The example programs: each runs, and the model and its data are what they say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from narrowgauge import examples
from narrowgauge.examples.byte_llama import ByteLlama, Config, rotary_angles, rotate
from narrowgauge.examples.standard_library_text import Batches, standard_library_text

PROGRAMS = sorted(
    path.stem for path in Path(examples.__file__).parent.glob("*.py") if "__main__" in path.read_text()
)


# What the programs with arguments are given, to be quick.
ARGUMENTS = {
    "five_optimizers": ["--steps", "8", "--layers", "1"],
    "fsdp2_two_processes": ["--steps", "4"],
    "resume": ["--before", "5", "--after", "100"],
}


def exit_code(program):
    try:
        runpy.run_module(f"narrowgauge.examples.{program}", run_name="__main__")
    except SystemExit as end:  # how Typer ends
        return end.code
    return 0


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "program",
    [pytest.param(p, marks=[pytest.mark.distributed] if "process" in p else []) for p in PROGRAMS],
)
def test_program_runs_and_says_something(program, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *ARGUMENTS.get(program, [])])
    assert not exit_code(program)
    said = capsys.readouterr().out
    assert said.strip()
    if program == "five_optimizers":
        assert (tmp_path / "five_optimizers.png").read_bytes().startswith(b"\x89PNG")
    if program == "resume":
        assert "100 of 100 losses after the checkpoint are the same" in said


def test_a_byte_cannot_see_its_future():
    torch.manual_seed(0)
    model = ByteLlama(Config(dim=64, layers=2))
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 7] += 1
    before, after = model(tokens), model(changed % 256)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_rotary_scores_depend_on_distance_only():
    cos, sin = rotary_angles(9, 64, base=10_000.0, device=torch.device("cpu"))
    q, k = torch.randn(2, 64, dtype=torch.float64)
    scores = rotate(q.expand(9, 64), cos, sin) @ rotate(k.expand(9, 64), cos, sin).T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert scores.diagonal(1)[0] != pytest.approx(scores.diagonal(2)[0].item(), abs=1e-3)


def test_an_untrained_model_knows_nothing():
    """The loss of a uniform guess over 256 bytes is ln 256."""
    torch.manual_seed(0)
    tokens = torch.randint(256, (4, 33))
    loss = ByteLlama(Config(dim=64, layers=2)).loss(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() == pytest.approx(5.545, abs=0.1)


def test_width_must_fit_the_heads():
    with pytest.raises(ValueError, match="dim is 100"):
        Config(dim=100)


def library(root: Path, files: int) -> Path:
    for number in range(files):
        (root / f"m{number:02}.py").write_bytes(b"%02d" % number * 10)
    (root / "test").mkdir()
    (root / "test" / "hidden.py").write_bytes(b"hidden")
    return root


def test_text_is_split_by_file_without_the_tests(tmp_path):
    text = standard_library_text(library(tmp_path, 20))
    train, validation = bytes(text.train.tolist()), bytes(text.validation.tolist())
    assert train == b"".join(b"%02d" % number * 10 for number in range(19))
    assert validation == b"19" * 10


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds 3 Python source files"):
        standard_library_text(library(tmp_path, 3))


def test_batches_are_windows_whose_targets_are_one_ahead():
    text = torch.arange(200, dtype=torch.uint8)
    batches = Batches(text, batches=50, batch_size=4, length=9, seed=3)
    again = Batches(text, batches=50, batch_size=4, length=9, seed=3)
    starts = set()
    for index in range(len(batches)):
        inputs, targets = batches[index]
        assert inputs.shape == targets.shape == (4, 9)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, again[index][0])
        starts |= set(inputs[:, 0].tolist())
    assert min(starts) < 20, "windows reach the beginning"
    assert 170 < max(starts) <= 190, "and the end"
    with pytest.raises(ValueError, match="only 200 bytes"):
        Batches(text, 1, 1, length=199, seed=0)

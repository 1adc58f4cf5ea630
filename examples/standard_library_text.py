"""Real text that every machine has: the source files of the running Python's standard library, as bytes.

Run it to see how much there is: `python -m narrowgauge.examples.standard_library_text`.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
VALIDATION_EVERY = 20  # every twentieth file is held out


@dataclass(frozen=True)
class Text:
    """Two byte strings as uint8 tensors, from different files."""

    train: torch.Tensor
    validation: torch.Tensor


def source_files(root: Path) -> list[Path]:
    """The `.py` files of a library, in an order that does not depend on the file system."""
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [path for path in files if NOT_THE_LIBRARY.isdisjoint(path.parts)]
    return [root / path for path in sorted(kept, key=lambda path: path.as_posix())]


def standard_library_text(root: Path | None = None) -> Text:
    """Reads the library and splits it by file; the same files always give the same split."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = source_files(root)
    if len(files) < VALIDATION_EVERY:
        raise FileNotFoundError(f"{root} holds {len(files)} Python source files, too few to learn from")
    train, validation = bytearray(), bytearray()
    for number, path in enumerate(files, start=1):
        (train if number % VALIDATION_EVERY else validation).extend(path.read_bytes())
    return Text(*(torch.frombuffer(part, dtype=torch.uint8) for part in (train, validation)))


class Batches:
    """Random windows of a text: batch `i` of a seed is the same for everyone who asks."""

    def __init__(self, text: torch.Tensor, batches: int, batch_size: int, length: int, seed: int):
        if text.numel() < length + 2:
            raise ValueError(f"sequence_length is {length}, and the text has only {text.numel()} bytes")
        generator = torch.Generator().manual_seed(seed)
        self.text = text
        self.starts = torch.randint(text.numel() - length, (batches, batch_size, 1), generator=generator)
        self.window = torch.arange(length + 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, `[batch_size, length]` each; the targets are one byte ahead."""
        windows = self.text[self.starts[index] + self.window].long()
        return windows[:, :-1], windows[:, 1:]


if __name__ == "__main__":
    text = standard_library_text()
    print(f"training {text.train.numel():,} bytes, validation {text.validation.numel():,} bytes")

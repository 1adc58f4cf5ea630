"""Print the folder, version and CUDA version of the torch a build should use, without importing it.

Under pip's build isolation the environment being installed into is not importable, but its files are still
there, and headers are all that is needed: the stable ABI makes any torch >= 2.10 as good as another.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from pathlib import Path


def find_torch() -> tuple[Path, str, str] | None:
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    for place in places:
        version_file = place / "version.py"
        if version_file.exists() and (place / "include/torch/csrc/stable").is_dir():
            text = version_file.read_text()
            version = re.search(r"^__version__ = '([^']+)'", text, re.M)
            cuda = re.search(r"^cuda[^=]*= '([^']+)'", text, re.M)
            return place, version[1] if version else "unknown", cuda[1] if cuda else ""
    return None


if __name__ == "__main__":
    found = find_torch()
    if found is None:
        raise SystemExit("no torch >= 2.10 is installed beside this Python")
    print(*found, sep=";", end="")

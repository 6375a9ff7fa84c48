"""Settings for every test: the repository on the path, s2r imported before torch (it settles thread waiting), and
Triton's interpreter on before the kernels are imported."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import s2r  # noqa: E402, F401
import interpreter  # noqa: E402, F401

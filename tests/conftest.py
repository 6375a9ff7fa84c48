"""Settings for every test: the repository on the path, s2r imported before torch (it settles thread waiting), and
Triton's interpreter on before the kernels are imported."""

import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import s2r  # noqa: E402, F401
import interpreter  # noqa: E402, F401
from s2r.model import Transformer  # noqa: E402
from tiny_model import tiny_model  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="tests/test_kills.py: random moments per script and ranks")


@pytest.fixture
def kills(request) -> int:
    """At how many random moments to kill a run."""
    return request.config.getoption("--kills")


@pytest.fixture
def handlers():
    """Puts the signal handlers back, whatever a test does to them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random model folder."""
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base) -> Transformer:
    return Transformer.from_pretrained(base)

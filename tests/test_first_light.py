"""The measurements for a GPU run to their end on a CPU, in their small form."""

import json
import os
import subprocess
import sys

from conftest import ROOT
from first_light import PARTS, page, short


def test_all_parts_run_and_the_page_shows_them(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "first_light.py"), "--small", "--out", str(tmp_path), "--parts"]
    # Half of the parts each, side by side: most of their time is that of importing torch on one core.
    halves = [subprocess.Popen([*command, ",".join(list(PARTS)[half])], env=env) for half in (slice(4), slice(4, None))]
    assert [done.wait() for done in halves] == [0, 0]
    text = page(tmp_path)
    for name in PARTS:
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        assert rows and rows[0][0] != "failed", (name, rows, (tmp_path / f"{name}.log").read_text()[-2000:])
        assert f"## {name}: " in text and f"| {rows[0][0]} | {rows[0][1]} |" in text


def test_a_part_that_fails_or_takes_too_long_is_a_row_and_not_the_end(tmp_path, monkeypatch):
    import first_light

    monkeypatch.setattr(first_light, "LIMIT", {"update": 0.1})
    first_light.main(first_light.Config(out=str(tmp_path), parts="update,nonsense", small=True))
    page = (tmp_path / "gpu.md").read_text()
    assert "| failed | time limit" in page and json.loads((tmp_path / "nonsense.json").read_text())[0][0] == "failed"


def test_kernel_names_are_short():
    long = "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<at::native::CUDAFunctor_add<float> > >"
    assert short(long) == "elementwise_kernel CUDAFunctor" and short("_decode_kernel") == "_decode_kernel"

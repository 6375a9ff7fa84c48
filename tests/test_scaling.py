"""Tables on paper: shapes of public models, the documents that quote the tables, and how the formulas behave."""

import sys

import pytest
from conftest import ROOT

from s2r import scaling
from s2r.memory import total
from tiny_model import tiny_model

# Number of parameters that huggingface.co shows for the weights of each model.
PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_public_shapes_have_the_published_size(name):
    assert total(scaling.shape(name)) == PUBLISHED[name]


@pytest.mark.parametrize("file, made", [("README.md", scaling.presets), ("docs/scaling.md", scaling.table)])
def test_documents_quote_what_the_command_prints(file, made):
    assert made() in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("preset", scaling.PRESETS, ids=lambda preset: f"{preset[0]} {preset[1]}")
def test_presets_fit_their_card(preset):
    machine, name, gpus, checkpointing, offload, slots, new, budget = preset
    c, card = scaling.shape(name), int(machine.split()[1])
    settings = {"checkpointing": checkpointing, "offload": offload, "slots": slots, "new": new, "budget": budget}
    for job in scaling.jobs(c, gpus, **settings):
        assert scaling.peak(c, job)[1] < 0.95 * card * scaling.GB


def test_one_gpu_sends_nothing_and_more_gpus_calculate_less():
    c = scaling.shape("Qwen2.5-7B")
    one, eight = (scaling.seconds(c, gpus, True) for gpus in (1, 8))
    assert one["bytes"] == 0 < eight["bytes"]
    assert eight["update"] == pytest.approx(one["update"] / 8)
    assert eight["rollout"] > one["rollout"] / 8  # its weights are read as often


def test_command_reads_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling", "--model", str(tiny_model(tmp_path / "model")), "--checkpointing"])
    scaling.main()
    out = capsys.readouterr().out
    assert "sft: memory, estimated" in out and "rl: memory, estimated" in out

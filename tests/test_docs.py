"""The pages: commands parse, those of docs/paper_runs.md run on a tiny model, links and counts are true."""

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import ROOT
from test_verifications import Server
from torch.distributed.run import get_args_parser

import train_sft
from s2r import metrics
from s2r.data import read_jsonl
from s2r.grammar import VERDICT_SENTENCE
from s2r.run.checkpoint import FREE
from s2r.run.files import write_jsonl
from s2r.run.flags import from_command_line
from tiny_model import sums, tiny_model

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


# --- reading a page ---

def blocks(page: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of every python and torchrun command in the fenced blocks, shell loops unrolled."""
    found = []
    for block in blocks(page):
        block = re.sub(r"\$\([^)]*\)", "SUBSTITUTED", block.replace("\\\n", " "))
        tokens = []
        for line in block.splitlines():
            if re.match(r"\s*(for \w+ in|do|done|[A-Z_]+=\S+ +python|python|torchrun)\b|.*python -m", line):
                lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
                lexer.whitespace_split = True
                tokens += [*lexer, ";"]
        found += unrolled(tokens, {})
    return [words for words in found if words[0] in ("python", "torchrun")]


def unrolled(tokens: list[str], values: dict[str, str]) -> list[list[str]]:
    """Simple commands of a shell script of such lines; `values` are those of the loops' variables."""
    found, words, at = [], [], 0
    while at < len(tokens):
        token = tokens[at]
        if token == "for" and not words:
            do, depth, end = tokens.index("do", at), 1, tokens.index("do", at) + 1
            while depth:
                depth += {"for": 1, "done": -1}.get(tokens[end], 0)
                end += 1
            for value in filter(lambda word: word != ";", tokens[at + 3 : do]):
                found += unrolled([*tokens[do + 1 : end - 1], ";"], values | {tokens[at + 1]: value})
            at = end
        elif set(token) <= set(";&|"):
            found += [words] if words else []
            words, at = [], at + 1
        elif set(token) <= set("<>"):
            at += 2
        else:
            word = re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], match[0]), token)
            assignment = not words and re.match(r"\w+=", word)
            words, at = words if assignment else [*words, word], at + 1
    return found


def target(words: list[str]) -> tuple[str, list[str]]:
    """The script or module that is started, and its arguments. Raises SystemExit for a bad torchrun flag."""
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args([word for word in words[1:] if word != "…"])
        return launch.training_script, launch.training_script_args + ["…"] * words.count("…")
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


def module(name: str):
    """The module of a script or `-m` name of ours; None for one of tests/, kernels/ or another package.

    Raises ValueError if there is no such script or module.
    """
    script = name.endswith(".py")
    package = (ROOT / name).is_file() if script else importlib.util.find_spec(name)
    if not package:
        raise ValueError(f"{name}: no such {'script' if script else 'module'}")
    if script:
        return None if "/" in name else importlib.import_module(name.removesuffix(".py"))
    if name.partition(".")[0] != "s2r":
        return None
    return importlib.import_module(f"{name}.__main__" if package.submodule_search_locations else name)


def filled(argv: list[str], config: type) -> list[str]:
    """Arguments for `from_command_line`: numbers for placeholders like N, and if there is a "…", what is required."""
    types, out = get_type_hints(config), [word for word in argv if word != "…"]
    for i, word in enumerate(out[1:], start=1):
        kind = types.get(out[i - 1].removeprefix("--").replace("-", "_"))
        if out[i - 1].startswith("--") and kind in (int, float) and re.fullmatch(r"\$?[A-Z]+|\$\w+", word):
            out[i] = "1"
    for field in fields(config) if "…" in argv else ():
        if field.default is MISSING:
            flag = "--" + field.name.replace("_", "-")
            out += ["x"] if types[field.name] == list[str] else [] if flag in out else [flag, "x"]
    return out


def fault(words: list[str]) -> str | None:
    """What is wrong with a command, None if nothing is."""
    if words[1] == "-c":
        compile(words[2], "command", "exec")
        return None
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            name, argv = target(words)
            if found := module(name):
                from_command_line(found.Config, filled(argv, found.Config))
        except ValueError as error:
            return str(error)
        except SystemExit:
            return said.getvalue().splitlines()[-1]


def reading_order(readme: str) -> dict[str, int]:
    """Path -> number of lines, from the block whose lines look like "  171  s2r/rl.py   every equation"."""
    found = [re.findall(r"^ *([\d,]+) +(\S+\.\w+)(?= |$)", block, re.MULTILINE) for block in blocks(readme)]
    return {path: int(lines.replace(",", "")) for lines, path in max(found, key=len, default=[])}


# --- what holds of every page ---

@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_of_page_parse(page):
    faults = {shlex.join(words): found for words in commands(page.read_text()) if (found := fault(words))}
    assert not faults, "\n".join(f"{command}\n    {found}" for command, found in faults.items())


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_of_page_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    local = [link.partition("#")[0] for link in links if not re.match(r"\w+:|#", link)]
    assert not [link for link in local if not (page.parent / link).exists()]


def test_reading_order_of_readme_is_true():
    order = reading_order((ROOT / "README.md").read_text())
    assert order and order == {path: len((ROOT / path).read_text().splitlines()) for path in order}


PAGE = r"""
python nowhere.py          # not in a block
```
# python comment.py
python sample.py --model DIR --ask "What is 7 times 6?" --answer 42   # a remark
python -m venv .venv && . .venv/bin/activate && python -m s2r.toy
torchrun --nproc-per-node 8 train_rl.py --model DIR2 …          # and so on
for i in 0 1; do
  CUDA_VISIBLE_DEVICES=$i python sample.py --model DIR --data part-$i.jsonl \
      --n N --out R-$i.jsonl &
done; wait
for M in a b; do for F in x y; do python sample.py --model $M --data $F > $M.txt; done; done
python -m s2r.view.report $(basename $model).json
    12  s2r/rl.py   no command
```
"""


def test_commands_are_read_like_a_shell():
    assert [" ".join(words) for words in commands(PAGE)] == [
        "python sample.py --model DIR --ask What is 7 times 6? --answer 42",
        "python -m venv .venv", "python -m s2r.toy",
        "torchrun --nproc-per-node 8 train_rl.py --model DIR2 …",
        *[f"python sample.py --model DIR --data part-{i}.jsonl --n N --out R-{i}.jsonl" for i in (0, 1)],
        *[f"python sample.py --model {m} --data {f}" for m in "ab" for f in "xy"],
        "python -m s2r.view.report SUBSTITUTED.json"]  # fmt: skip
    assert not any(map(fault, commands(PAGE)))
    assert reading_order(PAGE) == {"s2r/rl.py": 12}


@pytest.mark.parametrize(("command", "says"), [
    ("python -m s2r.nowhere", "no such module"),
    ("python sample.py --model D --date F", "--date"),
    ("python train_sft.py --model D --data F", "missing: --out"),
    ("python train_rl.py --level both …", "invalid choice"),
    ("torchrun --nproc-per-node 8 train_rl.py --lrr 1 …", "--lrr"),
])
def test_fault_of_command_is_found(command, says):
    (words,) = commands(f"```\n{command}\n```")
    assert says in fault(words)


# --- what holds of one page ---

def test_running_names_every_setting_that_may_change():
    page = (ROOT / "docs" / "running.md").read_text()
    flags = {"--" + name.replace("_", "-") for name in FREE - {"command", "commit", "torch"}}
    (listed,) = re.findall(r"settings may change.*?:(.*?)\.\n", page, re.DOTALL)
    assert set(re.findall(r"--[\w-]+", listed)) == flags


def test_logging_explains_every_warning():
    page = (ROOT / "docs" / "logging.md").read_text()
    worst = [{"no_answer": 1, "finished": 0, "say_correct": said, "repeats": 1} for said in (0, 1)]
    sentences = {sentence for step in worst for sentence in metrics.warnings(step, [1, 1])}
    assert len(sentences) == 6 and not [sentence for sentence in sentences if f"| {sentence} |" not in page]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The files that docs/paper_runs.md begins with. The model BASE is right about half the time."""
    folder = tmp_path_factory.mktemp("paper")
    pairs = [(f"{a}+{b}?", str(a + b)) for a, b in sums(16)]
    rows = [{"problem": x, "answer": y, "solution": rf"\boxed{{{y}}}"} for x, y in pairs]
    for name in "math_train math500 aime24 amc23 collegemath olympiadbench gsm8k_test gaokao2023en".split():
        write_jsonl(folder / f"{name}.jsonl", rows)
    files = {"model": str(tiny_model(folder / "tiny")), "data": str(folder / "math_train.jsonl")}
    settings = {"epochs": 10, "batch_size": 8, "lr": 1e-2, "kl": 0.0, "device": "cpu"}
    train_sft.main(train_sft.Config(**files, out=str(folder / "BASE"), **settings))
    return folder


def check(handler, question: str, times: int) -> bool:
    """A reply of the endpoint: whether the answer is that of the addition."""
    problem, answer = (re.search(rf"{name}: (.*)", question)[1] for name in ("Problem", "nswer"))
    a, b = map(int, re.findall(r"\d+", problem))
    verdict = "correct" if answer == str(a + b) else "incorrect"
    handler.say(f"{a}+{b}={a + b}. {VERDICT_SENTENCE[verdict]}")
    return True


SMALL = {
    "sample.py": "--max-new-tokens 24 --device cpu",
    "train_sft.py": "--eval-data math500.jsonl --eval-every 2 --max-new-tokens 8 --device cpu",
    "train_rl.py": "--problems 4 --steps 1 --max-new-tokens 24 --device cpu",
}


def test_commands_of_paper_runs_run_on_a_tiny_model(world, monkeypatch, capsys, handlers):
    """All of them in order, shorter; and docs/logging.md explains every key that they log."""
    monkeypatch.chdir(world)
    with Server(check) as server:
        values = {"KL": "0.1", "LENGTH": "8000", "BETA": "0.05", "https://…/v1": server.base}
        for words in commands((ROOT / "docs" / "paper_runs.md").read_text()):
            name, argv = target([values.get(word, word) for word in words])
            if "--report" in argv and not {"math500.jsonl", "aime24.jsonl"} & set(argv):
                continue  # two of the seven benchmarks
            argv += SMALL.get(name, "").split() + ["--limit", "2"] * ("--report" in argv)
            script = module(name)
            script.main(from_command_line(script.Config, argv))
    assert capsys.readouterr().out.splitlines()[-1].startswith("RL-process-math500")
    reports = {path.name for path in world.glob("*-*.json")}
    assert len(reports) == 6 * 2 and "OFFLINE-process-aime24.json" in reports

    page = (ROOT / "docs" / "logging.md").read_text()
    first_cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    explained = {key for cell in first_cells for key in re.findall(r"`(\w+)`", cell)}
    for log in ("BI/log.jsonl", "BI/eval.jsonl", "RL-process/log.jsonl", "OFFLINE-outcome/log.jsonl"):
        assert set(read_jsonl(world / log)[0]) <= explained
    assert read_jsonl(world / "OFFLINE-outcome" / "log.jsonl")[0]["kl"] == 0

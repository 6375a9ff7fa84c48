"""The toy world: its rule tells the truth, its test set is held out, its base model opens everywhere."""

import random
import re
from importlib import import_module
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

import s2r  # noqa: F401  (before torch)
import torch
from s2r.data import load_problems, read_jsonl
from s2r.generate import generate
from s2r.grade import equivalent
from s2r.grammar import RETRY_OPENING, VERIFY_OPENING, parse_verdict, prompt
from s2r.hf.tokenizer import Tokenizer
from s2r.model import Transformer
from s2r.run import flags
from s2r.run.files import write_jsonl
from s2r.toy import pretrain, world
from s2r.toy.__main__ import PLAN, stages
from s2r.toy.findings import ABLATIONS

BASE = Path(world.__file__).with_name("base")
PROBLEM = "Put plus or minus in the gaps: 62 _ 7 _ 11 _ 5 = 53."  # plus minus minus
RIGHT = "Add up: 62 plus 7 is 69, 69 minus 11 is 58, 58 minus 5 is 53. The target is 53. 53 and 53 are the same."
WRONG = "Add up: 62 plus 7 is 69, 69 plus 11 is 80, 80 minus 5 is 75. The target is 53. 75 and 53 are different."


@pytest.mark.parametrize("answer, text", [
    ("plus minus minus", f"{RIGHT} Therefore, the answer is correct."),
    ("plus plus minus", f"{WRONG} Therefore, the answer is incorrect."),
    ("plus minus", "This is not one sign for each gap. Therefore, the answer is incorrect."),
    ("53", "This is not one sign for each gap. Therefore, the answer is incorrect."),
])
def test_verify_adds_up(answer, text):
    assert world.verify(PROBLEM, answer) == (text, "correct" if answer == "plus minus minus" else "incorrect")


@pytest.mark.parametrize("answer", [
    None, "", "x", "plus  minus minus", "Plus minus minus", "plus minus minus ", "plus,minus,minus", r"\text{plus}", "+--", "53\n"])
def test_verify_takes_any_answer(answer):
    text, verdict = world.verify(PROBLEM, answer)
    assert verdict == parse_verdict(text) == "incorrect"


def test_verify_refuses_a_problem_of_another_world():
    with pytest.raises(ValueError, match="not a problem of the toy world"):
        world.verify("What is 1+1?", "2")


def test_verify_agrees_with_the_gold_answer_and_its_sums_are_true():
    rng = random.Random(0)
    for _ in range(500):
        p = world.puzzle(rng)
        row = rng.choice(world.rows(len(p.row)))
        text, verdict = world.verify(p.text, " ".join(row))
        assert verdict == ("correct" if equivalent(" ".join(row), " ".join(p.row)) else "incorrect") == parse_verdict(text)
        steps = re.findall(r"(\d+) (plus|minus) (\d+) is (\d+)", text)
        assert [sign for _, sign, _, _ in steps] == list(row) and int(steps[0][0]) == p.xs[0]
        for a, sign, x, b in steps:
            assert int(b) == int(a) + (1 if sign == "plus" else -1) * int(x) >= 0
        assert [int(x) for _, _, x, _ in steps] == list(p.xs[1:])
        assert text.count("same") == (verdict == "correct")


def test_write_problems_makes_files_that_load_and_do_not_overlap(tmp_path):
    world.write_problems(tmp_path, train=400, test=200, seed=1)
    train, test = (load_problems(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    assert (len(train), len(test)) == (400, 200)
    assert len({p.problem for p in train + test}) == 600
    assert {p.level for p in test} == {p.level for p in train} == {1, 2, 3, 4}
    for problems, held_out in ((train, False), (test, True)):
        for problem in problems:
            xs, _ = numbers(problem.problem)
            assert world.held_out(xs) is held_out and world.held_out(xs[::-1]) is held_out
            assert len(xs) == problem.level + 2
            found = [row for row in world.rows(len(xs) - 1) if world.verify(problem.problem, " ".join(row))[1] == "correct"]
            assert [" ".join(row) for row in found] == [problem.answer]  # the only solution


@pytest.mark.parametrize("style", ("confirmative", "solving"))
def test_command_checks_the_distinct_answers_to_solved_problems(tmp_path, style):
    other, gold = PROBLEM.replace("53", "63"), "plus minus minus"
    samples = [(PROBLEM, gold, said) for said in (gold, "plus plus plus", "plus plus plus", "plus")]
    samples += [(other, "plus minus plus", said) for said in ("minus minus minus", "plus plus plus")]  # never solved
    write_jsonl(tmp_path / "rollouts.jsonl", [
        {"unique_id": f"toy/{gold}", "problem": problem, "answer": gold, "finished": True,
         "text": rf"The signs are \boxed{{{said}}}."}
        for problem, gold, said in samples])
    files = {"rollouts": str(tmp_path / "rollouts.jsonl"), "out": str(tmp_path / "checks.jsonl")}
    world.main(world.Config(**files, style=style))
    rows = read_jsonl(tmp_path / "checks.jsonl")
    assert [row["answer"] for row in rows] == [gold, "plus plus plus", "plus"]
    for row in rows:
        assert row == {"unique_id": f"toy/{gold}", "problem": PROBLEM, "answer": row["answer"],
                       "verification": world.verify(PROBLEM, row["answer"], style)[0]}


@pytest.mark.parametrize("flags", [{}, {"folder": "f", "rollouts": "r", "out": "o"}, {"rollouts": "r"}, {"out": "o"}])
def test_world_refuses_a_command_that_does_not_say_what_to_write(flags):
    with pytest.raises(ValueError, match="give --folder to write problems, or --rollouts and --out"):
        world.main(world.Config(**flags))


def numbers(text: str) -> tuple[tuple[int, ...], int]:
    """The numbers and the target of the puzzle in a text."""
    found = world.PROBLEM.search(text)
    return tuple(map(int, found[1].split(" _ "))), int(found[2])


def test_write_problems_repeats_with_its_seed(tmp_path):
    for folder in ("one", "two"):
        world.write_problems(tmp_path / folder, train=50, test=50, seed=2)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_documents_hold_no_test_puzzle_and_no_verification():
    """No puzzle's total is compared with its target, and sums of held-out numbers are not practised."""
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(piece for piece, _ in pretrain.document(rng))
        puzzle, compared = world.PROBLEM.search(text), re.search("same|different", text)
        assert bool(puzzle) != bool(compared)
        assert not re.search(r"Wait|recheck|Therefore|correct|try again", text)
        tried = [numbers(text)[0]] if puzzle else []
        for line in re.findall(r"Add up: (.*?)\. The", text):
            steps = re.findall(r"(\d+) (plus|minus) (\d+) is (\d+)", line)
            tried.append((int(steps[0][0]), *(int(x) for _, _, x, _ in steps)))
            assert world.add_up(tried[-1], tuple(sign for _, sign, _, _ in steps)) == line + "."
        assert tried and not any(map(world.held_out, tried))


def test_documents_try_rows_and_end_in_the_right_one():
    rng, chats = random.Random(1), 0
    for _ in range(500):
        pieces = pretrain.document(rng)
        text = "".join(piece for piece, _ in pieces)
        if not world.PROBLEM.search(text):
            continue
        xs, target = numbers(text)
        attempts = [tuple(row.split()) for row in re.findall(r"boxed\{([a-z ]+)\}", text)]
        right = [world.total(xs, row) == target for row in attempts]
        assert right == [False] * (len(right) - 1) + [True] and len(set(attempts)) == len(attempts)
        weights = [weight for piece, weight in pieces if "boxed" in piece]
        assert weights == [0] * (len(right) - 1) + [3]  # wrong rows are never learnt
        assert set(re.findall(r"The target is (\d+)", text)) <= {str(target)}
        chats += (chat := text.startswith("<|im_start|>"))
        assert len(attempts) == 1 or not chat  # a chat has the right answer alone
    assert 150 < chats < 300


def test_random_sums_are_compared_truly_and_only_what_follows_is_learnt():
    rng, same = random.Random(2), 0
    for _ in range(300):
        pieces = pretrain.random_sum(rng)
        text = "".join(piece for piece, _ in pieces)
        end, target, a, b, how = re.search(r" is (\d+)\. The target is (\d+)\. (\d+) and (\d+) are (.*)\.\n$", text).groups()
        assert (end, target) == (a, b) and how == ("the same" if a == b else "different")
        same += a == b
        assert pieces[-2] == (f". {a} and {b} are {how}.\n", 2)
        unknown = "".join(piece for piece, weight in pieces if not weight)
        assert re.fullmatch(r"\d+( (plus|minus) \d+){2,5}\d+", unknown)  # first number, signs with theirs, target
    assert 100 < same < 200


def test_encode_gives_tokens_of_running_text_the_weight_of_their_piece():
    backend = Backend.from_file(str(BASE / "tokenizer.json"))
    pieces = [("Add up: 62", 0), (" is 69.", 1), (" The target is ", 2), ("50", 0), (".\n", 3)]
    ids, weights = pretrain.encode(backend, pieces)
    assert ids == backend.encode("".join(text for text, _ in pieces)).ids
    assert [backend.decode([id]) for id in ids] == ["Add ", "up: ", "62", " is ", "69", ". ", "The ", "target ", "is ", "50", ".", "\n"]
    assert weights == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 3, 3]


def test_tokenizer_gives_numbers_and_words_a_token_each():
    tokenizer = Tokenizer.from_pretrained(BASE)
    texts = {"43 plus 11 is 54": 5, f"{VERIFY_OPENING} 7": 7, f"{RETRY_OPENING} 7": 5, r"\boxed{plus minus}.": 4}
    for text, tokens in texts.items():
        ids = tokenizer.encode(text)
        assert len(ids) == tokens and tokenizer.decode(ids) == text


def test_base_model_opens_in_transformers_with_the_same_prompt_and_logits():
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_pretrained(BASE)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROBLEM}]
    theirs = transformers.AutoTokenizer.from_pretrained(BASE)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat(messages) == expected == prompt(PROBLEM, tokenizer)
    ids = torch.tensor(expected + tokenizer.encode(rf"The signs are \boxed{{plus minus minus}}. {VERIFY_OPENING}"))
    model = Transformer.from_pretrained(BASE)
    other = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        ours = model.logits(model(ids, torch.tensor([0, len(ids)])))
        assert torch.allclose(ours, other(ids[None]).logits[0], atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 4 * 2**20


def greedy(prompts: list[str], stop: str) -> list[str]:
    """What the base model writes after plain texts, up to the token `stop`."""
    tokenizer, model = Tokenizer.from_pretrained(BASE), Transformer.from_pretrained(BASE)
    (end,) = tokenizer.encode(stop)
    asked = [tokenizer.encode(text) for text in prompts]
    rollouts = generate(
        model, asked, n=1, temperature=0.0, max_new_tokens=64, stop_ids={end}, seed=0, progress=False
    )
    return [tokenizer.decode(rollout.ids).removesuffix(stop) for rollout in rollouts]


def test_base_model_has_learnt_the_parts():
    """On held-out numbers: adding up a given row, the target, comparing, 97 of 100 and more each; another row, 95."""
    rng = random.Random(5)
    puzzles = [world.puzzle(rng, test=True) for _ in range(200)]
    rows = [rng.choice([row for row in world.rows(len(p.row)) if row != p.row]) for p in puzzles]
    given = [f"{p.text}\n{world.solve(row)}\n" for p, row in zip(puzzles, rows)]
    sums = [world.add_up(p.xs, row) for p, row in zip(puzzles, rows)]
    written = greedy([f"{text}Add up: " for text in given], "\n")
    assert sum(found.startswith(text) for text, found in zip(sums, written)) >= 194
    assert sum(found.endswith(f" {world.name(p.target)}") for p, found in zip(puzzles, written)) >= 194

    ends = [world.total(p.xs, row) for p, row in zip(puzzles, rows)]
    others = [end if rng.random() < 0.5 else p.target for p, end in zip(puzzles, ends)]
    written = greedy([f"Add up: {steps} {world.name(b)} " for steps, b in zip(sums, others)], "\n")
    assert sum(found == world.compare(a, b) for a, b, found in zip(ends, others, written)) >= 194

    written = greedy([f"{text}The signs are \\boxed{{" for text in given], "\n")
    new = [{" ".join(other) + "}." for other in world.rows(len(p.row)) if other != row} for p, row in zip(puzzles, rows)]
    assert sum(found in named for found, named in zip(written, new)) >= 190


def test_pretrain_makes_a_folder_that_loads_and_repeats(tmp_path):
    for folder in ("one", "two"):
        pretrain.main(pretrain.Config(out=str(tmp_path / folder), steps=2))
    first, second = (Transformer.from_pretrained(tmp_path / folder) for folder in ("one", "two"))
    for p, q in zip(first.parameters(), second.parameters()):
        assert torch.equal(p, q) and p.isfinite().all()
    assert Tokenizer.from_pretrained(tmp_path / "one").stop_ids == {first.config.hf["eos_token_id"]}
    for file in BASE.glob("*.json"):
        assert (tmp_path / "one" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("plan", (PLAN, ABLATIONS), ids=("toy", "findings"))
def test_every_command_of_a_plan_is_one_that_its_script_takes_and_finds_what_it_needs(plan):
    made = set() if plan is PLAN else {stage.makes for stage in stages(PLAN, "f", seed=3)}
    for stage in stages(plan, "f", seed=3):
        assert set(stage.needs) <= made and stage.makes not in made
        made.add(stage.makes)
        assert ("--resume" in stage.command) == stage.command[0].startswith("train_")  # a killed run continues
        name, *argv = stage.command if stage.command[0] != "-m" else stage.command[1:]
        cfg = flags.from_command_line(import_module(name.removesuffix(".py")).Config, argv)
        assert cfg.seed == 3
        if name == "train_sft.py":  # the settings of the toy: the scripts default to the paper's
            assert (cfg.kl, cfg.lr, cfg.batch_size, cfg.warmup, cfg.max_length) == (0.01, 5e-4, 32, 5, 1024)
        if name == "train_rl.py":
            assert (cfg.problems, cfg.rollouts, cfg.updates, cfg.steps, cfg.warmup) == (64, 4, 1, 20, 5)
            assert (cfg.temperature, cfg.beta, cfg.epsilon, cfg.lr, cfg.max_new_tokens) == (0.7, 0.01, 0.2, 1e-4, 480)

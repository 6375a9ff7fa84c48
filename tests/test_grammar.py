"""Grammar: hand cases of what a model may write, and properties over anything it may write."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from s2r.grammar import (RETRY_OPENING, SYSTEM_PROMPT, VERDICT_SENTENCE, VERIFY_OPENING, encode, judge, parse,
                         parse_verdict, prompt, render, sft_targets)
from s2r.hf.tokenizer import Tokenizer
from tiny import tiny_tokenizer

V, R = VERIFY_OPENING, RETRY_OPENING
RIGHT, WRONG, UNSURE = VERDICT_SENTENCE["correct"], VERDICT_SENTENCE["incorrect"], VERDICT_SENTENCE["unverified"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tiny")))


def summary(text: str, tokenizer: Tokenizer) -> list[tuple]:
    """(kind, text, answer or verdict) of each action of a response that ended in the stop token."""
    actions = parse([*tokenizer.encode(text), tokenizer.end_id], tokenizer)
    return [(a.kind, a.text, a.answer if a.kind == "solve" else a.verdict) for a in actions]


# --- hand cases ---

CASES = {
    "solve only": (r"So \boxed{8}.", [("solve", r"So \boxed{8}.", "8")]),
    "solve, verify": (
        f"\\boxed{{8}}\n\n{V} 4+4=8. {RIGHT}",
        [("solve", "\\boxed{8}\n\n", "8"), ("verify", f"{V} 4+4=8. {RIGHT}", "correct")]),
    "wrong, verify, retry, verify": (
        f"\\boxed{{9}}\n\n{V} No. {WRONG}\n\n{R} \\boxed{{8}}\n\n{V} {RIGHT}",
        [("solve", "\\boxed{9}\n\n", "9"), ("verify", f"{V} No. {WRONG}\n\n", "incorrect"),
         ("solve", f"{R} \\boxed{{8}}\n\n", "8"), ("verify", f"{V} {RIGHT}", "correct")]),
    "goes on after a right verdict": (
        f"\\boxed{{9}}\n\n{V} {RIGHT}\n\n{R} \\boxed{{8}}",
        [("solve", "\\boxed{9}\n\n", "9"), ("verify", f"{V} {RIGHT}\n\n", "correct"),
         ("solve", f"{R} \\boxed{{8}}", "8")]),
    "talk after the verdict makes it unreadable": (
        f"\\boxed{{9}}\n\n{V} {RIGHT} But let me think.",
        [("solve", "\\boxed{9}\n\n", "9"), ("verify", f"{V} {RIGHT} But let me think.", None)]),
    "cut off inside a marker": (
        "\\boxed{9}\n\nWait, let me rech", [("solve", "\\boxed{9}\n\nWait, let me rech", "9")]),
    "two verifies in a row": (
        f"x\n\n{V} {WRONG}\n\n{V} {RIGHT}",
        [("solve", "x\n\n", None), ("verify", f"{V} {WRONG}\n\n", "incorrect"), ("verify", f"{V} {RIGHT}", "correct")]),
    "two solves in a row": (
        f"\\boxed{{1}}\n{R} \\boxed{{2}}\n{R}",
        [("solve", "\\boxed{1}\n", "1"), ("solve", f"{R} \\boxed{{2}}\n", "2"), ("solve", R, None)]),
    "verify first": (f"{V} {WRONG}", [("verify", f"{V} {WRONG}", "incorrect")]),
    "verify first after blank lines": (f"\n \n{V} {WRONG}", [("verify", f"\n \n{V} {WRONG}", "incorrect")]),
    "a no-break space is no solve": (f"\xa0\n\n{R} \\boxed{{2}}", [("solve", f"\xa0\n\n{R} \\boxed{{2}}", "2")]),
    "retry first": (rf"{R} \boxed{{2}}", [("solve", rf"{R} \boxed{{2}}", "2")]),
    "no boxed answer": ("The answer is 8.", [("solve", "The answer is 8.", None)]),
    "last boxed counts": (r"\boxed{1} no, \boxed{2}", [("solve", r"\boxed{1} no, \boxed{2}", "2")]),
    "boxed in a verify is no answer": (
        f"x\n\n{V} \\boxed{{3}}. {RIGHT}",
        [("solve", "x\n\n", None), ("verify", f"{V} \\boxed{{3}}. {RIGHT}", "correct")]),
    "unreadable verdict": (f"x\n\n{V} Looks fine.", [("solve", "x\n\n", None), ("verify", f"{V} Looks fine.", None)]),
    "cannot be verified": (f"x\n\n{V} {UNSURE}", [("solve", "x\n\n", None), ("verify", f"{V} {UNSURE}", None)]),
    "marker in mid-sentence": (f'I wrote "{V}" and {R} once', [("solve", f'I wrote "{V}" and {R} once', None)]),
    "marker in other case": (f"x\n\n{V.lower()}", [("solve", f"x\n\n{V.lower()}", None)]),
    "indented marker": (f"x\n {V}", [("solve", f"x\n {V}", None)]),
    "marker after one newline": (f"x\n{V}", [("solve", "x\n", None), ("verify", V, None)]),
    "characters of many bytes at the borders": (
        f"数学🙂é\n\n{V}é数。 {WRONG}\n\n{R}🙂",
        [("solve", "数学🙂é\n\n", None), ("verify", f"{V}é数。 {WRONG}\n\n", "incorrect"), ("solve", f"{R}🙂", None)]),
    "stop token only": ("", [("solve", "", None)]),
    "blank lines only": ("\n\n", [("solve", "\n\n", None)]),
}


@pytest.mark.parametrize("name", CASES)
def test_parse_hand_cases(tokenizer, name):
    text, expected = CASES[name]
    assert summary(text, tokenizer) == expected


def test_parse_of_nothing_is_nothing(tokenizer):
    assert parse([], tokenizer) == []


def test_parse_spans_by_hand(tokenizer):
    first, second = tokenizer.encode("a\n\n"), tokenizer.encode(f"{V} {RIGHT}")
    solve, verify = parse([*first, *second, tokenizer.end_id], tokenizer)
    assert (solve.start, solve.end) == (0, len(first))
    assert (verify.start, verify.end) == (len(first), len(first) + len(second) + 1)  # the stop token goes to the last


def test_parse_of_text_cut_inside_a_character(tokenizer):
    ids = tokenizer.encode("🙂")[:-1]
    (action,) = parse(ids, tokenizer)
    assert (action.start, action.end, action.text) == (0, len(ids), "\ufffd")


def test_parse_token_that_holds_the_border():
    """An action begins at the token with the first byte of its marker, even when that token begins before it."""
    class Words:
        stop_ids = frozenset({9})
        words = [b"a", b"b\n\nWait,", b" let me recheck my solution.", f"\n{V}\n{R}\n".encode(), b"\xf0\x9f"]

        def token_bytes(self, id):
            return self.words[id]

    spans = [(a.kind, a.start, a.end) for a in parse([0, 1, 2, 9], Words())]
    assert spans == [("solve", 0, 1), ("verify", 1, 4)]
    assert [(a.kind, a.start, a.end) for a in parse([1, 2], Words())] == [("solve", 0, 2)]
    # Two markers in one token are one action; a stop token in the middle is passed over.
    assert [(a.kind, a.start, a.end) for a in parse([0, 9, 3, 3], Words())] == [
        ("solve", 0, 2), ("verify", 2, 3), ("verify", 3, 4)]


@pytest.mark.parametrize("text, verdict", [
    (RIGHT, "correct"),
    (WRONG, "incorrect"),
    (UNSURE, None),
    ("", None),
    (f"So 4 = 4. {RIGHT}", "correct"),
    (f"So $x=4$\n{WRONG} \n\n", "incorrect"),
    (f"So $x=4$ {WRONG}", "incorrect"),
    (f"\\[x\\]{RIGHT}", None),
    (f"{WRONG} {RIGHT}", "correct"),  # the last sentence is what it says
    (f"{RIGHT} {WRONG}", "incorrect"),
    (f"{RIGHT} {UNSURE}", None),
    (f"{RIGHT} I think.", None),
    (f"If I am right, {RIGHT}", None),
    (f"It is not true that {RIGHT}", None),
    (f'"{RIGHT}"', None),
    (f"**{RIGHT}**", None),
    (RIGHT.lower(), None),
    (RIGHT[:-1], None),
    (RIGHT + ".", None),
    ("Therefore, the answer is not correct.", None),
    ("Therefore, the answer is  correct.", None),
    ("The answer is correct.", None),
])
def test_parse_verdict_table(text, verdict):
    assert parse_verdict(text) == verdict


def test_judge_says_of_solves_whether_they_are_right_and_of_verifies_what_is_true(tokenizer):
    text = f"{V} x {RIGHT}\n\n{R} \\boxed{{\\frac{{1}}{{2}}}}\n\n{V} {WRONG}\n\n{V} {RIGHT}\n\n{R} \\boxed{{3}}\n\n{R}\n\n{V} ?"
    actions = judge(parse(tokenizer.encode(text), tokenizer), "0.5")
    assert [action.kind[0] for action in actions] == list("vsvvssv")
    assert [action.correct for action in actions] == [None, True, None, None, False, False, None]
    assert [action.truth for action in actions] == [None, None, "correct", "correct", None, None, "incorrect"]


def test_render_adds_what_is_missing():
    steps = [{"kind": "solve", "text": " a\n"}, {"kind": "verify", "text": f"b {WRONG}"},
             {"kind": "solve", "text": "c"}, {"kind": "verify", "text": f"{V} d {RIGHT}"}]
    assert render(steps) == ["a\n\n", f"{V} b {WRONG}\n\n", f"{R} c\n\n", f"{V} d {RIGHT}"]
    assert render([{"kind": "solve", "text": "a"}, {"kind": "solve", "text": f"{R} b"}]) == ["a\n\n", f"{R} b"]
    assert render([]) == []


@pytest.mark.parametrize("texts", [[""], ["a", "b", f"c\n{V}"], [f"a\n\n{R} b"], [f"{V} a"]])
def test_render_refuses_what_would_not_read_back(texts):
    steps = [{"kind": ("solve", "verify")[i % 2], "text": text} for i, text in enumerate(texts)]
    with pytest.raises(ValueError, match=f"step {len(texts)} .solve. is empty or holds"):
        render(steps)


def test_prompt_is_the_chat(tokenizer):
    assert tokenizer.decode(prompt("2+2?", tokenizer)) == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n")


# --- properties ---

FRAGMENTS = [V, R, RIGHT, WRONG, UNSURE, "\n", "\n\n", " ", "\r\n", r"\boxed{1}", r"\boxed{", "}", "é", "🙂", "x",
             "Wait,", "<|im_end|>"]
loose_text = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12).map("".join)
plain_text = st.text(alphabet="ab1. ,\n$é数🙂", min_size=1).filter(str.strip)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_parse_tiles_any_ids(tokenizer, data):
    ids = tokenizer.encode(data.draw(loose_text))
    ids += data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8))  # bytes in any order, stop tokens
    ids += tokenizer.encode(data.draw(loose_text))
    actions = parse(ids, tokenizer)
    assert [id for action in actions for id in ids[action.start:action.end]] == ids
    assert all(action.start < action.end for action in actions)
    assert [action.start for action in actions[1:]] == [action.end for action in actions[:-1]]
    for action in actions:
        assert action.kind in ("solve", "verify")
        assert action.verdict is None or action.kind == "verify"
        assert action.answer is None or action.kind == "solve"


@settings(max_examples=300, deadline=None)
@given(text=loose_text)
def test_parse_keeps_the_text(tokenizer, text):
    actions = parse([*tokenizer.encode(text), tokenizer.end_id], tokenizer)
    assert "".join(action.text for action in actions) == text
    for action in actions[1:]:
        assert action.text.startswith(V if action.kind == "verify" else R)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_parse_reads_what_encode_wrote(tokenizer, data):
    kinds = data.draw(st.lists(st.sampled_from(["solve", "verify"]), min_size=1, max_size=7))
    steps, said = [], []
    for kind in kinds:
        text = data.draw(plain_text).strip()
        claims = ["correct", "incorrect", "unverified"] if kind == "verify" else ["7", "", None]
        claim = data.draw(st.sampled_from(claims))
        if kind == "verify":
            text += f"\n{VERDICT_SENTENCE[claim]}"
            claim = claim if claim != "unverified" else None
        elif claim is not None:
            text += rf" \boxed{{{claim}}}"
        steps.append({"kind": kind, "text": text})
        said.append(claim or None)
    ids, actions = encode(steps, tokenizer)
    assert actions == parse(ids, tokenizer)
    assert [action.kind for action in actions] == kinds
    assert [action.verdict or action.answer for action in actions] == said
    assert [action.text for action in actions] == render(steps)
    assert ids[-1] == tokenizer.end_id and tokenizer.end_id not in ids[:-1]
    assert tokenizer.decode(ids[:-1]) == "".join(render(steps))
    spans = [tokenizer.decode(ids[action.start:action.end]) for action in actions]
    assert spans == [*render(steps)[:-1], render(steps)[-1] + "<|im_end|>"]


# --- equation (1): δ ---

CODES = {"one token a letter": False, "full stop and blank line fused": True}


@pytest.fixture(scope="module", params=CODES.values(), ids=CODES)
def fused(request, tmp_path_factory) -> Tokenizer:
    """The tiny tokenizer, and one that, like those of Qwen and Llama, has a token for a full stop with a blank line."""
    folder = tiny_tokenizer(tmp_path_factory.mktemp("fused"))
    if request.param:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        backend.add_tokens([AddedToken(".\n\n", normalized=False)])
        backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_pretrained(folder)


def wrong(text: str) -> dict:
    return {"kind": "solve", "text": text, "correct": False}


SOLVED = {"kind": "solve", "text": r"3+4=\boxed{7}.", "correct": True}
NO = {"kind": "verify", "text": f"8-4=4. {VERDICT_SENTENCE['incorrect']}", "verdict": "incorrect"}
YES = {"kind": "verify", "text": f"7-4=3. {VERDICT_SENTENCE['correct']}", "verdict": "correct"}


@pytest.mark.parametrize(("trajectory", "context"), [
    ([SOLVED], []),
    ([SOLVED, YES], []),
    ([wrong(r"3+4=\boxed{8}."), NO, SOLVED, YES], [r"3+4=\boxed{8}."]),
    ([wrong(r"3+4=\boxed{8}."), NO, wrong(r"\boxed{9}"), NO, SOLVED, YES], [r"3+4=\boxed{8}.", r" \boxed{9}"]),
])
def test_sft_targets_are_all_but_the_bodies_of_wrong_solves(trajectory, context, fused):
    """Read back: the text without loss is the body of each wrong solve; its opening and the blank line after it are
    targets, and so is a full stop that is one token with the blank line, because it competes with `.<end>`."""
    ids, actions = encode(trajectory, fused)
    targets = sft_targets(ids, actions, fused)
    assert targets == sorted(set(targets)) and ids[targets[-1]] == fused.end_id
    left = [[fused.decode([ids[t]]) for t in range(a.start, a.end) if t not in targets] for a in actions]
    found = ["".join(pieces) for pieces in left if pieces]
    is_fused = fused.encode("x.\n\n")[-1] == len(fused._backend.get_vocab()) - 1
    assert found == [text.removesuffix(".") if is_fused else text for text in context]
    # Every blank line and every opening is learnt.
    blank = [t for t, id in enumerate(ids) if fused.decode([id]).endswith("\n")]
    assert len(blank) >= len(trajectory) - 1 and set(blank) <= set(targets)


def test_sft_targets_of_an_unchecked_last_solve(fused):
    ids, actions = encode([wrong("8"), NO, SOLVED], fused)
    targets = sft_targets(ids, actions, fused)
    assert fused.decode([ids[t] for t in range(len(ids)) if t not in targets]) == "8"

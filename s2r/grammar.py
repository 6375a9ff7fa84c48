r"""The grammar of a response: a sequence of solve and verify actions (paper §2.1).

    response   = solve, verify, { solve, verify }, <end>              what the policy is to learn
    solve      = [ "Let me try again. " ], attempt with \boxed{…}     the opening on every solve but the first
    verify     = "Wait, let me recheck my solution. ", check, " ", verdict
    verdict    = "Therefore, the answer is correct."     -> <end> follows
               | "Therefore, the answer is incorrect."   -> a solve follows
               | "Therefore, the answer cannot be verified."   only in what stage 0 gathers: never trained

    So 3+4=\boxed{8}.⏎⏎|Wait, let me recheck … is incorrect.⏎⏎|Let me try again. \boxed{7}.⏎⏎|Wait, … is correct.<end>
    └───── solve ─────┘└────────────── verify ────────────────┘└────────── solve ───────────┘└────── verify ───────┘

`render` and `encode` write training data in this grammar. `parse` reads actions back from the ids of a rollout. A
model may write anything, so `parse` takes any ids and never raises: it cuts at each marker that opens a line, and every
id belongs to exactly one action.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate

from s2r.grade import equivalent, extract_answer
from s2r.hf.tokenizer import Tokenizer

SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."
VERIFY_OPENING = "Wait, let me recheck my solution."
RETRY_OPENING = "Let me try again."
VERDICT_SENTENCE = {
    "correct": "Therefore, the answer is correct.",
    "incorrect": "Therefore, the answer is incorrect.",
    "unverified": "Therefore, the answer cannot be verified.",
}

# In bytes, because a token may hold half a character. With MULTILINE, ^ matches at the start and after each newline.
_MARKER = re.compile(
    rb"^(?:(%b)|%b)" % (re.escape(VERIFY_OPENING).encode(), re.escape(RETRY_OPENING).encode()), re.MULTILINE
)


@dataclass(frozen=True)
class Action:
    """One attempt or check of a response, with its half-open span `[start, end)` of the rollout's ids."""

    kind: str  # "solve" | "verify"
    start: int
    end: int
    text: str  # of the span, opening and trailing blank line included, stop token left out
    answer: str | None = None  # solve: content of the last \boxed, None when there is none
    verdict: str | None = None  # verify: Parser(v), "correct" | "incorrect", None when unreadable or unverified
    correct: bool | None = None  # solve: is the answer right (V_golden)? None until judged
    truth: str | None = None  # verify: the verdict it should give; None until judged, or without a solve before it
    sound: bool | None = None  # verify: is its reasoning right? None until an audit has read it

    @property
    def right(self) -> bool:
        """Is a judged solve right, a verdict true? No verdict is not true, nor is one without a solve before it."""
        return bool(self.correct) if self.kind == "solve" else self.truth is not None and self.verdict == self.truth


def cut(text: bytes) -> list[tuple[int, str]]:
    """First byte and kind of each action of a response; the first action begins at byte 0.

    Text before the first marker is a solve; if it is only white space, it belongs to the action of that marker.
    """
    cuts = [(match.start(), "verify" if match[1] else "solve") for match in _MARKER.finditer(text)]
    if not cuts or text[: cuts[0][0]].decode("utf-8", "replace").strip():
        return [(0, "solve"), *cuts]
    return [(0, cuts[0][1]), *cuts[1:]]


def parse(ids: list[int], tokenizer: Tokenizer) -> list[Action]:
    """Actions of a response, in order; their spans are disjoint, not empty, and cover every id. No ids, no actions.

    An action begins at the token that holds the first byte of its marker, so the blank line before a marker belongs to
    the action before it. A stop token has no text.
    """
    if not ids:
        return []
    pieces = [b"" if id in tokenizer.stop_ids else tokenizer.token_bytes(id) for id in ids]
    offsets = list(accumulate(map(len, pieces[:-1]), initial=0))  # first byte of each token
    kinds: dict[int, str] = {}  # first token of an action -> its kind
    for byte, kind in cut(b"".join(pieces)):
        token = bisect_right(offsets, byte) - 1 if byte else 0
        kinds.setdefault(token, kind)  # at most one action begins in a token

    starts, actions = list(kinds), []
    for start, end in zip(starts, [*starts[1:], len(ids)]):  # each ends where the next one starts
        text = b"".join(pieces[start:end]).decode("utf-8", errors="replace")
        if kinds[start] == "solve":
            actions.append(Action("solve", start, end, text, answer=extract_answer(text)))
        else:
            actions.append(Action("verify", start, end, text, verdict=parse_verdict(text)))
    return actions


def parse_verdict(text: str) -> str | None:
    """Parser(v) of the paper: what the last sentence of a verification says, None unless it is exactly a verdict.

    Only the last sentence counts, whatever came before it. "Cannot be verified" is None too: it says neither.
    """
    for verdict in ("correct", "incorrect"):
        head, sentence, rest = text.rpartition(VERDICT_SENTENCE[verdict])
        if sentence and not rest.strip():
            before = head.rstrip()
            gap = head[len(before) :]
            # The verdict has to open a line, or follow white space after anything but a letter, a digit, "," or ";":
            # in "If I am right, Therefore, the …" it is part of another sentence.
            opens = not before or "\n" in gap or (gap and not before[-1].isalnum() and before[-1] not in ",;")
            return verdict if opens else None
    return None


def judge(actions: list[Action], gold: str) -> list[Action]:
    """The same actions with `correct` of each solve, by the answer `gold`, and `truth` of each verify filled in."""
    judged, truth = [], None
    for action in actions:
        if action.kind == "solve":
            action = replace(action, correct=equivalent(action.answer, gold))
            truth = "correct" if action.correct else "incorrect"
        else:
            action = replace(action, truth=truth)
        judged.append(action)
    return judged


def render(steps: list[dict]) -> list[str]:
    """Text of each step `{"kind", "text", …}`; joined, they are the response without its stop token.

    A text without its opening gets one, but for the first solve; every text but the last ends in a blank line. Raises
    ValueError for a text that `parse` would not read back as that one action.
    """
    texts = []
    for i, step in enumerate(steps):
        text = step["text"].strip()
        opening = VERIFY_OPENING if step["kind"] == "verify" else RETRY_OPENING if i > 0 else ""
        if not text.startswith(opening):
            text = f"{opening} {text}".strip()
        if not text or cut(text.encode()) != [(0, step["kind"])]:
            raise ValueError(
                f"step {i + 1} ({step['kind']}) is empty or holds a line that opens another action with "
                f"{VERIFY_OPENING!r} or {RETRY_OPENING!r}; reword it or drop the trajectory"
            )
        texts.append(text + "\n\n" if i < len(steps) - 1 else text)
    return texts


def encode(steps: list[dict], tokenizer: Tokenizer) -> tuple[list[int], list[Action]]:
    """Ids of the rendered steps with the end-of-turn id after the last, and the actions that `parse` finds in them.

    The steps are encoded as one text, so that the tokens are those of running text. Raises ValueError as `render` does.
    """
    ids = [*tokenizer.encode("".join(render(steps))), tokenizer.end_id]
    return ids, parse(ids, tokenizer)


def sft_targets(ids: list[int], actions: list[Action], tokenizer: Tokenizer) -> list[int]:
    """Positions in the response that equation (1) trains, ascending: all but the body of every wrong solve.

    The solves before the last are wrong: the model sees them as context and is never taught to write them. It learns
    how they open, "Let me try again.", and that a blank line ends them: there it decides between a check and <end>.
    Many tokenizers fuse the blank line with the full stop before it, which then is a target too.
    """
    last_solve = max(i for i, action in enumerate(actions) if action.kind == "solve")
    targets = []
    for i, action in enumerate(actions):
        if action.kind == "verify" or i == last_solve:
            targets += range(action.start, action.end)
            continue
        pieces = [tokenizer.token_bytes(id) for id in ids[action.start : action.end]]
        text, opening = b"".join(pieces), RETRY_OPENING.encode()
        body_start = len(opening) if text.startswith(opening) else 0  # in bytes
        body_end = len(text.rstrip())
        ends = accumulate(map(len, pieces))  # byte after each token
        for t, piece, end in zip(range(action.start, action.end), pieces, ends):
            if end - len(piece) < body_start or end > body_end:  # some of the token lies outside of the body
                targets.append(t)
    return targets


def prompt(problem: str, tokenizer: Tokenizer) -> list[int]:
    """Prompt ids of one problem: SYSTEM_PROMPT and the problem in the model's own chat template."""
    return tokenizer.chat([{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": problem}])

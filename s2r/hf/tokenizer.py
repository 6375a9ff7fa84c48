"""Text ↔ token ids for a Hugging Face folder, without `transformers`.

    messages --chat template (jinja2)--> text --tokenizer.json--> prompt ids        Tokenizer.chat
    text of an action ---------------------------------------> ids                  Tokenizer.encode
    ids --token_bytes--> bytes --utf-8--> text                                      Tokenizer.decode

`chat` and `encode` differ in one point. `chat` renders the template and, like `transformers`, turns every
special-token string of the rendered text into that token: the template's own `<|im_start|>`, and one that a user
typed. `encode` takes model text that becomes a training target. A `<|im_end|>` spelled out in it stays letters, so
that no text can smuggle in a stop token. Added tokens that are not special (Qwen's `<tool_call>`) are tokens in both.

Called by `s2r/grammar.py`, and by all that turns ids into text.
"""

import json
from datetime import datetime
from functools import cache, partial
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from s2r.hf.config import read_json


class _Generation(jinja2.ext.Extension):
    """Reads `{% generation %} … {% endgeneration %}`, which some templates put around assistant text, as its body."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(folder: Path, config: dict) -> jinja2.Template:
    """The folder's chat template, compiled as `transformers` does in its utils/chat_template_utils.py.

    Templates come with downloaded weights, hence the sandbox. Raises ValueError if there is none or it has an error.
    """
    template = config.get("chat_template")
    if isinstance(template, list):  # named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").exists():  # wins, as in transformers
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not template:
        raise ValueError(
            f"{folder}: no chat template in tokenizer_config.json or chat_template.jinja; "
            "use an instruct model, or add the template of its family"
        )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    extensions = [_Generation, jinja2.ext.loopcontrols]
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja's own escapes for HTML
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = datetime(2024, 7, 26).strftime  # else prompts would change at midnight
    try:
        return env.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"{folder}: chat template does not compile ({error}); fix or replace it") from error


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted; source: openai/gpt-2 encoder.py, bytes_to_unicode."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    hidden = [byte for byte in range(256) if chr(byte) not in alphabet]  # stand-ins: the characters from 256 on
    return {char: ord(char) if ord(char) < 256 else hidden[ord(char) - 256] for char in alphabet}


class Tokenizer:
    """The tokenizer and chat template of a Hugging Face folder.

    Attributes: `folder`; `vocab_size`, highest id + 1; `stop_ids`, every id that ends a response; `end_id`, the one
    that the template puts after an assistant message. Raises FileNotFoundError without tokenizer.json, and ValueError
    when a file cannot be read, an eos_token_id is no token, or there is no template.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(f"{path}: not found; --model wants a local folder (hf download NAME --local-dir DIR)")
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer.json ({error}); download the file again") from error
        self._backend.no_truncation()  # tokenizer.json may ask for either
        self._backend.no_padding()
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self._added = {id: token.content for id, token in self._backend.get_added_tokens_decoder().items()}
        self._byte_of_char = _byte_of_char() if "ByteLevel" in repr(self._backend.decoder) else {}

        names = ("special_tokens_map.json", "tokenizer_config.json", "generation_config.json", "config.json")
        files = {name: read_json(self.folder / name) for name in names if (self.folder / name).exists()}
        config = files.pop("special_tokens_map.json", {}) | files.pop("tokenizer_config.json", {})
        self._template = _compile(self.folder, config)
        tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in config.items()}
        # The template's variables: bos_token, eos_token, …
        self._special = {name: x for name, x in tokens.items() if name.endswith("_token") and isinstance(x, str)}
        eos_id, turn_id = self._backend.token_to_id(self._special.get("eos_token", "")), self._end_of_turn()
        self.stop_ids = frozenset(self._eos_ids(files) | ({eos_id, turn_id} - {None}))
        if not self.stop_ids:
            raise ValueError(f"{folder}: no end-of-turn token; name an eos_token in tokenizer_config.json")
        self.end_id = next(id for id in (turn_id, eos_id, min(self.stop_ids)) if id is not None)
        # `encode` spells out special tokens only, and a folder may list its end of turn as a plain added token.
        self._backend.add_special_tokens([self._added[id] for id in self.stop_ids if id in self._added])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a folder, under the name that `transformers` gives it."""
        return cls(folder)

    def encode(self, text: str) -> list[int]:
        """Ids of a response: no token is added, and special-token strings stay text (module docstring).

        SentencePiece vocabularies put a space before the first word, as Mistral's template does before a reply.
        """
        return self._ids(text, special=False)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Prompt ids of `[{"role", "content"}, …]`, ending where the assistant starts to speak.

        Equal to `transformers`' apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False), but a
        template that asks for the date (Llama 3.2's does) always gets the same. Qwen3 begins to think unless it is told
        not to. Raises ValueError when the template refuses the messages (some know no system role).
        """
        try:
            return self._ids(self._render(messages, add_generation_prompt=True))
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"{self.folder}: the chat template refuses messages of roles {roles} ({error}); "
                "use a model whose template takes them, or edit the template"
            ) from error

    @cache
    def token_bytes(self, id: int) -> bytes:
        """The bytes that one id stands for (b"" for an id that no token has); they concatenate to the text."""
        if id in self._added:
            return self._added[id].encode()
        token = self._backend.id_to_token(id) or ""
        if self._byte_of_char.keys() >= set(token):
            return bytes(self._byte_of_char[char] for char in token)
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def _ids(self, text: str, special: bool = True) -> list[int]:
        self._backend.encode_special_tokens = not special
        return self._backend.encode(text, add_special_tokens=False).ids  # the template writes bos itself

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self._template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
            enable_thinking=False, **self._special,
        )  # fmt: skip

    def _end_of_turn(self) -> int | None:
        """The added token that the template puts right after an assistant message, None when it puts none there."""
        said = "S2R-reply"
        try:
            text = self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": said}], False)
        except jinja2.TemplateError:
            return None
        after = self._ids(text.rpartition(said)[2].lstrip())
        return after[0] if after and after[0] in self._added else None

    def _eos_ids(self, configs: dict[str, dict]) -> set[int]:
        """The stop ids that the configs name, file → content. Raises ValueError for one that is no token."""
        ids = set()
        for name, config in configs.items():
            found = config.get("eos_token_id")
            for id in found if isinstance(found, list) else [] if found is None else [found]:
                if type(id) is not int or not 0 <= id < self.vocab_size:
                    raise ValueError(
                        f"{self.folder / name}: eos_token_id {json.dumps(id)} is no id of tokenizer.json (0 to "
                        f"{self.vocab_size - 1}); fetch both files again, or name the token that ends a response"
                    )
                ids.add(id)
        return ids

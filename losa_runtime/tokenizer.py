"""Text to token ids and back, for byte-level BPE checkpoints. Loads no torch; knows no model and no request.

Special tokens in plain text are parsed, because clients render chat templates on their side. The one exception is the
mask: its text is ordinary text, or a prompt that merely mentions it would open a position to be filled. The mask is
known by its id; its spelling differs between checkpoints.
"""

from __future__ import annotations

import codecs
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from losa_runtime.chat_template import ChatTemplate
from losa_runtime.core.config_file import CONFIG_FILE, SETTINGS_FILE, TOKENIZER_FILE, read_json
from losa_runtime.core.errors import CheckpointError, InvalidRequest
from losa_runtime.core.model_config import declared_mask


def byte_alphabet() -> tuple[str, ...]:
    """The printable character that stands for each byte in byte-level BPE vocabularies (GPT-2), index = byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    rest = (byte for byte in range(256) if byte not in symbols)
    symbols |= {byte: chr(256 + index) for index, byte in enumerate(rest)}
    return tuple(symbols[byte] for byte in range(256))


_BYTE_OF = {symbol: byte for byte, symbol in enumerate(byte_alphabet())}


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    mask_token_id: None reads it from the folder's config.json (or the family's default). Raises CheckpointError when
    the folder holds no byte-level tokenizer.json.
    vocab_size: number of ids that stand for text, largest id + 1; ids above it only pad the model's embedding.
    eos_token_id: id of tokenizer_config.json's eos_token, if any.
    chat_template: its source, if the checkpoint brings one; named_specials: what a template may call by name.
    special_texts: spellings of the special tokens, which are not text when `encode` meets them; without the mask's.
    """

    def __init__(self, folder: str | Path, mask_token_id: int | None = None) -> None:
        folder = Path(folder)
        path = folder / TOKENIZER_FILE
        data = read_json(path)
        _require_byte_level(path, data.get("decoder"))
        added: list[dict[str, Any]] = data.get("added_tokens") or []
        self.mask_token_id = _mask_id(folder) if mask_token_id is None else mask_token_id
        self._added = {int(t["id"]): str(t["content"]) for t in added}
        self._special = frozenset(int(t["id"]) for t in added if t.get("special"))
        self.special_texts = tuple(self._added[i] for i in sorted(self._special) if i != self.mask_token_id)
        self._fast = _without_mask(path, data, self.mask_token_id, self._added)
        self._fast.no_truncation()
        self._fast.no_padding()
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        self.vocab_size = max(max(vocabulary.values(), default=-1), max(self._added, default=-1)) + 1
        self._bytes: dict[int, bytes] = {i: text.encode() for i, text in self._added.items()}

        settings = read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
        self.named_specials = _named_specials(settings)
        self.chat_template = _template_source(folder, settings)
        ids = {text: i for i, text in self._added.items()}
        self.eos_token_id: int | None = ids.get(self.named_specials.get("eos_token", ""))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no token is put before or after it. Raises InvalidRequest for lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("text", text, "valid Unicode without lone surrogates") from None
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without text become nothing."""
        return b"".join(self.pieces(ids, skip_special_tokens)).decode("utf-8", errors="replace")

    def pieces(self, ids: Iterable[int], skip_special_tokens: bool = True) -> list[bytes]:
        """The bytes that each id stands for."""
        skipped = self._special if skip_special_tokens else frozenset()
        return [b"" if i in skipped else self._piece(i) for i in ids]

    def token_text(self, token_id: int) -> str:
        """One id decoded alone, special tokens included; part of a character shows as U+FFFD."""
        return self.decode((token_id,), skip_special_tokens=False)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """Render the checkpoint's own chat template; kwargs (e.g. `tools`, `enable_thinking`) are handed to it.

        Raises InvalidRequest when there is no template or the template cannot render these messages.
        """
        if self.chat_template is None:
            raise InvalidRequest(
                "messages", "a conversation", "plain text, because the checkpoint has no chat template"
            )
        return self._template.render(messages, add_generation_prompt, **kwargs)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.chat_template or "", self.named_specials)

    def _piece(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            token = self._fast.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            known = bytes(_BYTE_OF[c] for c in token) if token and all(c in _BYTE_OF for c in token) else b""
            self._bytes[token_id] = known
        return known


class Detokenizer:
    """Turns a growing list of ids into text that never changes once it is given out.

    All pushes and the flush together equal `Tokenizer.decode` of all ids; a push costs the new tokens only.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that has become final; the bytes of an unfinished character are held back."""
        return self._decoder.decode(b"".join(self._tokenizer.pieces(ids, self._skip)))

    def flush(self) -> str:
        """What was held back, as U+FFFD; afterwards the detokenizer starts afresh."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _require_byte_level(path: Path, decoder: Any) -> None:
    kind = decoder.get("type") if isinstance(decoder, dict) else None
    members = decoder.get("decoders", []) if kind == "Sequence" else [decoder]
    if [m.get("type") for m in members if isinstance(m, dict)] != ["ByteLevel"]:
        raise CheckpointError(f"{path}: decoder: found {kind}, allowed: ByteLevel")


def _mask_id(folder: Path) -> int | None:
    if not (folder / CONFIG_FILE).is_file():
        return None
    given = declared_mask(folder, read_json(folder / CONFIG_FILE))
    return given if type(given) is int else None


def _without_mask(path: Path, data: dict[str, Any], mask_id: int | None, added: Mapping[int, str]) -> FastTokenizer:
    """The library's tokenizer with the mask's text out of reach, so that the text is split like any other.

    The token is renamed, not removed: the library numbers added tokens by counting, so a gap would move later ids.
    The new name is random, so that no prompt can contain it.
    """
    vocabulary = data.get("model", {}).get("vocab")
    unreachable = f"<{secrets.token_hex(16)}>"
    if mask_id is not None and mask_id in added:
        if isinstance(vocabulary, dict) and vocabulary.get(added[mask_id]) == mask_id:
            vocabulary[unreachable] = vocabulary.pop(added[mask_id])
        data["added_tokens"] = [t | {"content": unreachable} if t["id"] == mask_id else t for t in data["added_tokens"]]
    elif mask_id is not None and isinstance(vocabulary, dict) and mask_id in vocabulary.values():
        raise CheckpointError(f"{path}: the mask id {mask_id} is an ordinary piece of text, allowed: an added token")
    try:
        fast = FastTokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: cannot be loaded: {error}") from None
    for token_id, text in added.items():
        found = fast.token_to_id(unreachable if token_id == mask_id else text)
        if found != token_id:
            raise CheckpointError(f"{path}: added_tokens: {text!r} has id {token_id}, but is loaded as {found}")
    if mask_id is not None and mask_id not in added:
        size = fast.get_vocab_size(with_added_tokens=True)
        raise CheckpointError(
            f"{path}: found {size} tokens, and none has the mask's id {mask_id}; allowed: a tokenizer with the mask "
            "among its added tokens, or another mask_token_id (as an option, or in config.json)"
        )
    return fast


def _named_specials(settings: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[name] = text
    return named


def _template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None

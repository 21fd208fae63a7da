"""A folder's chat template and special tokens, read without transformers, which takes seconds to import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.errors import ModelError
from hynb.files import read_json

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
# Of Hunyuan-Large's tokenizer where its config names none (hynb.hunyuan_large.tokenization).
_TIKTOKEN_NAMES = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}


@dataclass(kw_only=True, frozen=True)
class AddedToken:
    """A token beside the vocabulary."""

    content: str
    special: bool


@dataclass(kw_only=True, frozen=True)
class TokenizerFiles:
    """What a chat template takes of a tokenizer; attributes as transformers names them.

    Args:
        template: for conversations without tools.
        tools_template: for conversations with tools; mostly the same.
    """

    template: str
    tools_template: str
    special_tokens_map: Mapping[str, Any]
    added_tokens_decoder: Mapping[int, AddedToken]

    @property
    def all_special_tokens(self) -> list[str]:
        """Texts of the special tokens that have names."""
        return [str(token) for token in self.special_tokens_map.values()]


def read_tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """The tokenizer of a folder; None if there is none, or if it has no chat template.

    Raises:
        RunError: tokenizer_config.json is not JSON.
        ModelError: another file is not, or a file has a value of another kind than a tokenizer's.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    if config is None:
        return None
    templates = _templates(folder, config)
    if not templates:
        return None
    default = templates.get("default") or next(iter(templates.values()))
    map_path = folder / "special_tokens_map.json"
    special = {name: (path, value) for name, value in config.items()}
    special = {name: (map_path, value) for name, value in (read_json(map_path) or {}).items()} | special
    names = {name: _text(name, *special[name]) for name in _NAMED if name in special and special[name][1]}
    if (folder / "hy.tiktoken").is_file():
        names = _TIKTOKEN_NAMES | names
    return TokenizerFiles(
        template=default,
        tools_template=templates.get("tool_use", default),
        special_tokens_map=names,
        added_tokens_decoder=dict(enumerate(_added(folder, config))),
    )


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {"default": _read_text(file)}
    found = config.get("chat_template")
    if not found:
        return {}
    if isinstance(found, str):
        return {"default": found}
    named = {}
    for item in found if isinstance(found, list) else [None]:
        name, template = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            what = "must be a template's text, or a list of objects with name and template"
            raise _wrong(folder / "tokenizer_config.json", "chat_template", what)
        named[name] = template
    return named


def _added(folder: Path, config: dict[str, Any]) -> list[AddedToken]:
    path = folder / "tokenizer_config.json"
    given = config.get("added_tokens_decoder") or {}
    if not isinstance(given, dict):
        raise _wrong(path, "added_tokens_decoder", "must be an object with a token for each id")
    items, key = list(given.values()), "added_tokens_decoder"
    if not items and (folder / "tokenizer.json").is_file():
        path, key = folder / "tokenizer.json", "added_tokens"
        try:
            items = json.loads(_read_text(path)).get("added_tokens") or []
        except (ValueError, AttributeError, RecursionError):
            raise ModelError(f"{path}: is not a tokenizer. Download or copy the file again") from None
        if not isinstance(items, list):
            raise _wrong(path, key, "must be a list of tokens")
    found = [AddedToken(content=_text(key, path, item), special=_is_special(item)) for item in items]
    if not found and (folder / "hy.tiktoken").is_file():
        # The file has no special tokens; all that the Hunyuan tokenizers add have this form.
        named = ("endoftext", "startoftext", "bos", "eos", "pad", *(f"extra_{number}" for number in range(205)))
        found = [AddedToken(content=f"<|{name}|>", special=True) for name in named]
    return found


def _is_special(token: Any) -> bool:
    return isinstance(token, dict) and bool(token.get("special"))


def _text(name: str, path: Path, token: Any) -> str:
    """The text of a token, which files give by itself or as an object with more about it.

    Raises:
        ModelError: it has none.
    """
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise _wrong(
            path, name, f"has {json.dumps(token)[:80]} for a token; it must be a text, or an object with content"
        )
    return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read as UTF-8 text ({error}). Download or copy the file again") from None


def _wrong(path: Path, key: str, what: str) -> ModelError:
    return ModelError(f"{path}: {key}: {what}. Download or copy the file again")

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
        ModelError: another file is not.
    """
    config = read_json(folder / "tokenizer_config.json")
    if config is None:
        return None
    templates = _templates(folder, config)
    if not templates:
        return None
    default = templates.get("default") or next(iter(templates.values()))
    special = (read_json(folder / "special_tokens_map.json") or {}) | config
    names = {name: _text(special[name]) for name in _NAMED if special.get(name)}
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
        return {"default": file.read_text(encoding="utf-8")}
    found = config.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        return {item["name"]: item["template"] for item in found if isinstance(item, dict)}
    return {}


def _added(folder: Path, config: dict[str, Any]) -> list[AddedToken]:
    items = list((config.get("added_tokens_decoder") or {}).values())
    path = folder / "tokenizer.json"
    if not items and path.is_file():
        try:
            items = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or []
        except (ValueError, AttributeError):
            raise ModelError(f"{path}: is not a tokenizer. Download or copy the file again") from None
    found = [AddedToken(content=item["content"], special=bool(item.get("special"))) for item in items]
    if not found and (folder / "hy.tiktoken").is_file():
        # The file has no special tokens; all that the Hunyuan tokenizers add have this form.
        named = ("endoftext", "startoftext", "bos", "eos", "pad", *(f"extra_{number}" for number in range(205)))
        found = [AddedToken(content=f"<|{name}|>", special=True) for name in named]
    return found


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)

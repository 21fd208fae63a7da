"""The `hynb models` command."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from hynb.errors import ConfigError
from hynb.files import size_text
from hynb.models.description import Description, Fit, describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hynb models`."""
    parser.description = (
        "Show what a model folder is: family, parameters, precision, context length, what its chat template renders, "
        "what can be trained, and which preset fits this machine."
    )
    parser.add_argument("folder", metavar="FOLDER", help="a model, a checkpoint or a LoRA adapter")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--max_seq_length", type=int, default=2048, help="of the memory estimate, in tokens [2048]")
    parser.add_argument("--lora_rank", type=int, default=64, help="of the memory estimate [64]")


def run(args: argparse.Namespace) -> int:
    """Prints the description.

    Raises:
        ModelError: the folder is not that of a supported model.
    """
    for name in ("max_seq_length", "lora_rank"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    found = describe(args.folder, max_seq_length=args.max_seq_length, lora_rank=args.lora_rank)
    if args.json:
        print(json.dumps(asdict(found), indent=1, ensure_ascii=False))
    else:
        rows = _rows(found)
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:{width}}  {text}" for name, text in rows))
    return 0


def _rows(found: Description) -> list[tuple[str, str]]:
    rows = [("folder", found.folder)]
    if found.adapter:
        targets = ", ".join(found.adapter["targets"])
        rows.append(("adapter", f"LoRA of rank {found.adapter['rank']} on {targets}, for the base {found.base}"))
    rows += [
        ("family", f"{found.family} ({', '.join(found.architectures) or 'no architectures in config.json'})"),
        ("parameters", _parameters(found)),
        ("precision", _precision(found)),
        ("context", f"{found.context_tokens:,} tokens" if found.context_tokens else "not in config.json"),
    ]
    rows += [("tokenizer", found.tokenizer_problem)] if found.tokenizer_problem else []
    rows += _template_rows(found)
    rows += _training_rows(found)
    return rows


def _parameters(found: Description) -> str:
    text = f"{_count(found.total)} in {found.layers} layers"
    if found.experts:
        text += f", {_count(found.active)} active per token; {found.experts} experts per layer"
    if found.mtp_layers:
        text += f"; and {found.mtp_layers} layer(s) for multi-token prediction"
    return text


def _precision(found: Description) -> str:
    weights = found.weights
    if weights.kind == "none":
        return "no weights in this folder"
    if weights.kind == "pickled":
        return f"pickled files, whose dtype is not read; {weights.size_bytes / 1e9:.1f} GB"
    total = sum(weights.parameters.values()) or 1
    shares = ", ".join(f"{name} {100 * number / total:.4g}%" for name, number in _shares(weights.parameters))
    text = f"{shares} of the parameters; {weights.files} file(s), {weights.size_bytes / 1e9:.2f} GB"
    return text + (f"; MISSING: {', '.join(weights.missing)}" if weights.missing else "")


def _shares(parameters: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(parameters.items(), key=lambda item: -item[1])


def _template_rows(found: Description) -> list[tuple[str, str]]:
    template = found.template
    if template is None:
        return [("chat template", found.template_problem)]
    names = {
        "system messages": template.system,
        "thoughts in fields": template.thoughts,
        "tools": template.tools,
        "tool calls": template.tool_calls,
        "tool results": template.tool_results,
    }
    rendered = [name for name, is_rendered in names.items() if is_rendered]
    ignored = [name for name, is_rendered in names.items() if not is_rendered]
    text = f"renders {', '.join(rendered) or 'contents alone'}"
    rows = [("chat template", text + (f"; not {', '.join(ignored)}" if ignored else ""))]
    if template.arguments:
        rows.append(("its arguments", ", ".join(template.arguments)))
    rows.append(("end tokens", found.template_problem or ", ".join(template.end_tokens)))
    return rows


def _training_rows(found: Description) -> list[tuple[str, str]]:
    kinds = ["all parameters", "attention alone", f"LoRA on {', '.join(found.lora_targets)}"]
    kinds += ["LoRA on experts"] if found.experts else []
    rows = [("can be trained", "; ".join(kinds))]
    return rows + [(f"{fit.method} here", _fit(fit, found)) for fit in found.fits]


def _fit(fit: Fit, found: Description) -> str:
    if found.gpus:
        here = f"{found.gpus} GPU(s) of {_size(found.gpu_bytes)}, {_size(found.host_bytes)} of host memory"
        needs = f"{_size(fit.gpu_bytes)} per GPU and {_size(fit.host_bytes)} of host memory"
    else:
        here = f"no GPU, {_size(found.host_bytes)} of memory"
        needs = f"{_size(fit.gpu_bytes + fit.host_bytes)} of memory"
    trained = f"{_count(fit.trained)} trained"
    if fit.preset is None:
        return f"does not fit ({here}): needs {needs}; {trained}"
    return f"{fit.preset} fits ({here}): {needs}; {trained}"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _size(size_bytes: int) -> str:
    return size_text(size_bytes)

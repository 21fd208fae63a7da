"""Router statistics compared with a plain count, and the balancing loss with and without checkpointing."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import OF_FAMILY, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from hynb.errors import ModelError
from hynb.families import FAMILIES
from hynb.train import RouterWatch
from hynb.train.router_statistics import routers

MOE_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.router)


def model_of(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=90, pad_token_id=0, initializer_range=0.4, **(SIZES | OF_FAMILY[family])
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 90, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def plain_count(model: torch.nn.Module, family: str, mask: torch.Tensor) -> list[tuple[list[int], float]]:
    """Tokens of each expert and mean entropy of each layer, counted token by token."""
    found, keep = [], mask.reshape(-1).bool()

    def hook(module, inputs, output):
        logits = output[0].detach()
        chosen = next(item for item in output if not item.is_floating_point())
        scores = torch.sigmoid(logits) if family == "hy_v3" else logits.softmax(-1)
        scores = scores / scores.sum(-1, keepdim=True)
        counts, entropy = [0] * logits.shape[-1], 0.0
        for token in range(len(logits)):
            if keep[token]:
                for expert in chosen[token].tolist():
                    counts[expert] += 1
                entropy -= sum(p * math.log(p) for p in scores[token].tolist() if p > 0)
        found.append((counts, entropy / int(keep.sum())))

    hooks = [router.register_forward_hook(hook) for _, router in routers(model, family)]
    with torch.no_grad():
        model(**batch())
    for item in hooks:
        item.remove()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_counts_are_those_of_a_plain_count(family, checkpointing):
    model = model_of(family)
    mask = batch()["attention_mask"]
    expected = plain_count(model, family, mask)
    watch = RouterWatch(model, family)
    watch.mask = mask
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        model(**batch()).loss.backward()
    found = watch.summary(watch.counts())
    tokens = int(mask.sum())
    assert len(found["layer"]) == len(expected) >= 3
    for place, (counts, entropy) in enumerate(expected):
        assert found["max_share"][place] == pytest.approx(max(counts) / tokens, abs=1e-4)
        assert found["min_share"][place] == pytest.approx(min(counts) / tokens, abs=1e-4)
        assert found["dead"][place] == counts.count(0)
        assert found["entropy"][place] == pytest.approx(entropy / math.log(len(counts)), abs=1e-3)
    assert watch.counts() is None, "each log step counts from zero"
    assert watch.take_loss() is None


def test_a_dense_model_has_no_statistics():
    model = model_of("hunyuan_v1_dense")
    watch = RouterWatch(model, "hunyuan_v1_dense", 0.1)
    model(**batch())
    assert watch.counts() is None and watch.take_loss() is None


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_the_balancing_losss_gradient_survives_checkpointing(family):
    gradients = []
    for checkpointing in (False, True):
        model = model_of(family)
        watch = RouterWatch(model, family, 0.5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        loss = model(**batch()).loss
        balancing = watch.take_loss()
        assert 0.3 < balancing.item() < 0.5 * 4, "1 for uniform routing, times the coefficient"
        (loss + balancing).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_an_even_router_has_a_balancing_loss_of_one():
    model = model_of("hunyuan")
    with torch.no_grad():
        for _, router in routers(model, "hunyuan"):
            router.wg.weight.zero_()
    watch = RouterWatch(model, "hunyuan", 1.0)
    model(**batch())
    # All probabilities are 1/4, so the sum is 4 · Σ fraction · 1/4 for any fractions.
    assert watch.take_loss().item() == pytest.approx(1.0, abs=1e-6)


def test_the_balancing_loss_spreads_tokens():
    spread = {}
    for coefficient in (0.0, 1.0):
        model = model_of("hunyuan")
        watch = RouterWatch(model, "hunyuan", coefficient)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(40):
            watch.reset()
            loss = model(**batch()).loss
            balancing = watch.take_loss()
            (loss if balancing is None else loss + balancing).backward()
            optimizer.step()
            optimizer.zero_grad()
        spread[coefficient] = sum(watch.summary(watch.counts())["max_share"])
    assert spread[1.0] < 0.8 * spread[0.0]


def test_reentrant_checkpointing_is_refused_for_the_balancing_loss():
    model = model_of("hunyuan")
    watch = RouterWatch(model, "hunyuan", 0.1)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model(**batch())
    with pytest.raises(ModelError, match="Reentrant checkpointing"):
        watch.take_loss()

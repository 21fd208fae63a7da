"""The loss in pieces in transformers' own Hunyuan classes equals that of the whole logits, gradients included."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from hynb.train import save_loss_memory

FAMILIES = ("hunyuan", "hunyuan_v1_moe", "hunyuan_v1_dense", "hy_v3")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("loss"), request.param)


def loss_and_gradients(model, **counted):
    ids = torch.randint(1, 64, (3, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5, -100)
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **counted)
    output.loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return output, found


@pytest.mark.parametrize("counted", [{}, {"num_items_in_batch": 37}])
@pytest.mark.parametrize("targets", [None, "q_proj", "lm_head"])
def test_pieces_equal_the_whole(folder, counted, targets):
    def model(in_pieces: bool):
        made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        if in_pieces:
            save_loss_memory(made, piece_tokens=7)
        if targets:
            torch.manual_seed(0)
            made = get_peft_model(made, LoraConfig(r=2, target_modules=[targets], init_lora_weights=False))
        return made

    whole, expected = loss_and_gradients(model(False), **counted)
    pieces, found = loss_and_gradients(model(True), **counted)
    assert whole.logits is not None
    assert (pieces.logits is None) is (targets != "lm_head")
    torch.testing.assert_close(pieces.loss, whole.loss, rtol=1e-6, atol=1e-6)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_without_labels_there_are_logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(1, 64, (1, 5))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        save_loss_memory(model)
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)
    assert model.generate(ids, max_new_tokens=3, eos_token_id=None, do_sample=False).shape == (1, 8)


@pytest.mark.parametrize("counted", [{}, {"num_items_in_batch": 37}])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_shifted_labels_count_instead_of_labels(folder, in_pieces, counted):
    """As transformers calls a model under sequence parallelism: the shifted labels as both arguments."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    expected, gradients = loss_and_gradients(model, **counted)
    if in_pieces:
        save_loss_memory(model, piece_tokens=7)
    plain = model.forward

    def shifted(*, labels, **kwargs):
        labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        return plain(labels=labels, shift_labels=labels, **kwargs)

    model.forward = shifted
    found, found_gradients = loss_and_gradients(model, **counted)
    assert (found.logits is None) is in_pieces
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)

"""Packing changes only the speed: each conversation has the same loss, each sample comes once, in the same order."""

from __future__ import annotations

import itertools
import random
import shutil
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import OF_FAMILY, tiny_data, tiny_model
from torch.utils.data import BatchSampler, DataLoader
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

import hynb.hunyuan_large.attention as packed_attention
from hynb.data import IGNORED, ChatDataset, Collator, LabelOptions, PackedDataset, SeededSampler, best_fit, check_data
from hynb.hunyuan_large import PACKED_SDPA

LIMIT = 500


def slow_best_fit(lengths, limit):
    """Free tokens of each pack, where each sample goes into the fullest of all packs that it fits into."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [tokens for tokens in free if tokens >= length]
        if fitting:
            free[free.index(min(fitting))] -= length
        else:
            free.append(limit - length)
    return sorted(free)


@given(lengths=st.lists(st.integers(1, 50), max_size=80), seed=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_packs_equal_those_of_a_slow_reference(lengths, seed):
    packs = best_fit(lengths, 50, seed=seed)
    assert Counter(index for pack in packs for index in pack) == Counter(range(len(lengths)))
    assert sorted(50 - sum(lengths[index] for index in pack) for pack in packs) == slow_best_fit(lengths, 50)
    assert packs == best_fit(lengths, 50, seed=seed)


def test_a_sample_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match="sample 1 has 51 tokens"):
        best_fit([3, 51], 50)


def token_losses(model, batch):
    """The loss of every label, 0 where there is none: samples × (longest - 1)."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    targets = batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory):
    return {name: tiny_model(tmp_path_factory.mktemp(name), name) for name in OF_FAMILY}


@pytest.mark.parametrize("model_type", OF_FAMILY)
@pytest.mark.parametrize("attention", [PACKED_SDPA, "sdpa", "eager"])
@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_the_loss_of_a_conversation_in_a_pack_is_its_loss_alone(
    model_folders, tmp_path, model_type, attention, train_on_prompt, flatten
):
    folder = model_folders[model_type]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    # As in training: with a cache, transformers does not separate the conversations of a pack.
    model.config.use_cache = False
    options = LabelOptions(train_on_prompt=train_on_prompt)
    dataset = ChatDataset(tiny_data(tmp_path / "a.jsonl", 10), tokenizer, LIMIT, options=options)
    packs = best_fit([len(sample["input_ids"]) for sample in dataset], LIMIT)
    assert len(packs) < len(dataset) and max(map(len, packs)) > 1
    packed = PackedDataset(dataset, packs)
    with torch.no_grad():
        batch = Collator(pad_token_id=tokenizer.pad_token_id, flatten=flatten)([packed[n] for n in range(len(packs))])
        assert batch["input_ids"].shape[0] == (1 if flatten else len(packs))
        rows = token_losses(model, batch)
        for number, pack in enumerate(packs):
            start = sum(len(packed[n]["input_ids"]) for n in range(number)) if flatten else 0
            for index in pack:
                alone = Collator(pad_token_id=tokenizer.pad_token_id)([dataset[index]])
                expected = token_losses(model, alone)[0]
                row = rows[0] if flatten else rows[number]
                found = row[start : start + len(expected)]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
                assert expected.sum() > 0
                start += len(expected) + 1
        # Nothing else has a loss: neither the first token of a conversation nor the padding.
        alone = sum(
            float(token_losses(model, Collator(pad_token_id=0)([dataset[index]])).sum())
            for index in range(len(dataset))
        )
        assert float(rows.sum()) == pytest.approx(alone, rel=1e-5)


def test_flash_attention_gets_the_conversations_from_the_positions(model_folders, tmp_path):
    """The batch has what transformers would compute on the GPU, in every layer, for its flash attention kernels."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

    tokenizer = AutoTokenizer.from_pretrained(model_folders["hunyuan"])
    dataset = ChatDataset(tiny_data(tmp_path / "a.jsonl", 10), tokenizer, LIMIT)
    lengths = [len(sample["input_ids"]) for sample in dataset]
    packs = best_fit(lengths, LIMIT)
    packed = PackedDataset(dataset, packs)
    batch = Collator(pad_token_id=0, flatten=True)([packed[n] for n in range(len(packs))])
    assert "attention_mask" not in batch and _is_packed_sequence(batch["position_ids"], 1)
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    in_order = [lengths[index] for pack in packs for index in pack]
    assert starts.diff().tolist() == in_order
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert torch.equal(batch[name], starts) and batch[name].dtype == starts.dtype
    # transformers' kernels take them as plain numbers.
    assert batch["max_length_q"] == batch["max_length_k"] == int(longest)
    assert isinstance(batch["max_length_q"], int)


def packed_batch(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dataset = ChatDataset(tiny_data(tmp_path / "a.jsonl", 10), tokenizer, LIMIT)
    packs = best_fit([len(sample["input_ids"]) for sample in dataset], LIMIT)
    packed = PackedDataset(dataset, packs)
    return Collator(pad_token_id=0, flatten=True)([packed[n] for n in range(len(packs))])


@pytest.mark.parametrize("model_type", OF_FAMILY)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("given", ["cu_seq_lens", "positions"])
def test_a_packed_row_needs_no_mask(model_folders, tmp_path, monkeypatch, model_type, checkpointing, given):
    """Loss and all gradients as with transformers' dense mask, though no kernel gets a mask or a whole row."""
    batch = packed_batch(model_folders[model_type], tmp_path)
    if given == "positions":
        batch = {name: value for name, value in batch.items() if "cu_seq" not in name and "max_len" not in name}
    row, calls = batch["input_ids"].shape[1], []
    plain = packed_attention.sdpa_attention_forward

    def watched(module, query, key, value, attention_mask, **kwargs):
        calls.append((attention_mask, query.shape[2]))
        return plain(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(packed_attention, "sdpa_attention_forward", watched)

    def loss_and_gradients(attention):
        model = AutoModelForCausalLM.from_pretrained(
            model_folders[model_type], attn_implementation=attention, dtype=torch.float32
        )
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.item(), {name: weight.grad for name, weight in model.named_parameters()}

    expected, gradients = loss_and_gradients("sdpa")
    assert not calls
    loss, found = loss_and_gradients(PACKED_SDPA)
    assert calls and all(mask is None and length <= LIMIT < row for mask, length in calls)
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("model_type", OF_FAMILY)
def test_flash_attention_is_given_the_conversations_of_the_batch(model_folders, tmp_path, monkeypatch, model_type):
    """transformers' path to the kernel in each layer, with a kernel in PyTorch: the real one needs a GPU."""
    from transformers import modeling_flash_attention_utils as flash

    given = []

    def kernel(query, key, value, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, **_):
        given.append((cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
        starts, outputs = cu_seqlens_q.tolist(), []
        for start, end in itertools.pairwise(starts):
            # tokens × heads × head size
            parts = [states[start:end].transpose(0, 1)[None] for states in (query, key, value)]
            options = {"is_causal": True, "enable_gqa": True, "scale": softmax_scale}
            outputs.append(torch.nn.functional.scaled_dot_product_attention(*parts, **options)[0].transpose(0, 1))
        return torch.cat(outputs)

    def refuse(*args):
        raise AssertionError("the positions are read on the device, in each layer")

    batch = packed_batch(model_folders[model_type], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        model_folders[model_type], attn_implementation="sdpa", dtype=torch.float32
    )
    with torch.no_grad():
        expected = model(**batch, use_cache=False).loss.item()
        functions = ((refuse, kernel, refuse, refuse, refuse), (lambda **options: options, refuse))
        monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda implementation: functions)
        monkeypatch.setattr(flash, "_is_packed_sequence", refuse)
        # Not by `set_attn_implementation`, which looks for the package.
        model.config._attn_implementation_internal = "flash_attention_2"
        found = model(**batch, use_cache=False).loss.item()
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(given) == 4, "one per layer"
    for starts_q, starts_k, longest_q, longest_k in given:
        assert starts_q is batch["cu_seq_lens_q"] and starts_k is batch["cu_seq_lens_k"]
        assert longest_q == longest_k == batch["max_length_q"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles flex attention with g++")
@pytest.mark.parametrize("model_type", OF_FAMILY)
def test_flex_attention_separates_the_conversations(model_folders, tmp_path, model_type):
    """The loss alone: on a CPU PyTorch's flex attention has no backward pass."""
    batch, losses = packed_batch(model_folders[model_type], tmp_path), []
    for attention in ("sdpa", "flex_attention"):
        model = AutoModelForCausalLM.from_pretrained(
            model_folders[model_type], attn_implementation=attention, dtype=torch.float32
        )
        with torch.no_grad():
            losses.append(model(**batch, use_cache=False).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_documents_of_equal_length_are_computed_at_once_and_read_once_per_step():
    torch.manual_seed(0)
    lengths = [7, 7, 7, 4, 1, 4]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    states = [torch.randn(1, 2, sum(lengths), 8) for _ in range(3)]
    module = torch.nn.Module()
    module.is_causal = True
    attend = AttentionInterface()[PACKED_SDPA]
    output, _ = attend(module, *states, None, cu_seq_lens_q=starts)
    assert torch.equal(output, attend(module, *states, None, position_ids=positions)[0])
    begin = 0
    for length in lengths:
        part = [one[:, :, begin : begin + length] for one in states]
        expected = torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True).transpose(1, 2)
        torch.testing.assert_close(output[:, begin : begin + length], expected, atol=1e-6, rtol=1e-5)
        begin += length
    # A second layer gets the same tensor and does not read it again, which would wait for the GPU.
    starts.zero_()
    assert torch.equal(attend(module, *states, None, cu_seq_lens_q=starts)[0], output)


def test_several_packed_rows_keep_their_mask(model_folders, tmp_path):
    """Rows that are not concatenated have a dense mask, as under transformers' sdpa."""
    tokenizer = AutoTokenizer.from_pretrained(model_folders["hunyuan"])
    dataset = ChatDataset(tiny_data(tmp_path / "a.jsonl", 10), tokenizer, LIMIT)
    packed = PackedDataset(dataset, best_fit([len(sample["input_ids"]) for sample in dataset], LIMIT))
    batch = Collator(pad_token_id=0)([packed[0], packed[1]])
    losses = []
    for attention in ("sdpa", PACKED_SDPA):
        model = AutoModelForCausalLM.from_pretrained(
            model_folders["hunyuan"], attn_implementation=attention, dtype=torch.float32
        )
        losses.append(model(**batch, use_cache=False).loss.item())
    assert losses[0] == losses[1]


def test_lengths_for_packing_come_from_the_check(model_folders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folders["hunyuan"])
    path = tiny_data(tmp_path / "a.jsonl", 30)
    path.write_text("broken\n" + path.read_text())
    report = check_data(path, tokenizer, 70, on_bad_sample="skip", max_cut_share=1, cache=False)
    dataset = ChatDataset(path, tokenizer, 70, rejected=report.rejected_locations)
    assert report.kept.tolist() == [len(sample["input_ids"]) for sample in dataset]


@pytest.mark.parametrize("lengths", [None, [random.Random(1).randint(1, 99) for _ in range(103)]])
def test_the_sampling_order_depends_only_on_seed_and_epoch(lengths):
    def order(seed, epoch):
        sampler = SeededSampler(103, seed, lengths=lengths, group=8)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(1, 0)) == list(range(103))
    torch.manual_seed(random.randrange(1000))
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_grouped_steps_have_samples_of_similar_length():
    rng = random.Random(2)
    lengths = [int(rng.lognormvariate(4, 1)) + 1 for _ in range(1000)]

    def padded_tokens(order, size):
        return sum(max(lengths[i] for i in order[s : s + size]) * size for s in range(0, len(order), size))

    grouped = list(SeededSampler(1000, 0, lengths=lengths, group=8))
    assert padded_tokens(grouped, 8) < 1.2 * sum(lengths)
    assert padded_tokens(grouped, 8) < 0.6 * padded_tokens(list(SeededSampler(1000, 0)), 8)
    # The step that needs the most memory comes first.
    assert max(lengths) in [lengths[index] for index in grouped[:8]]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("done", [1, 3, 7])
def test_a_resumed_run_continues_with_the_next_batch(model_folders, tmp_path, ranks, done):
    """accelerate skips the batches that were trained on; the rest equal those of an uninterrupted run."""
    from accelerate import skip_first_batches
    from accelerate.data_loader import prepare_data_loader

    tokenizer = AutoTokenizer.from_pretrained(model_folders["hunyuan"])
    dataset = ChatDataset(tiny_data(tmp_path / "a.jsonl", 60), tokenizer, LIMIT)
    packed = PackedDataset(dataset, best_fit([len(sample["input_ids"]) for sample in dataset], LIMIT))

    def loader(rank):
        sampler = SeededSampler(len(packed), 5)
        batches = BatchSampler(sampler, 2, drop_last=False)
        made = DataLoader(packed, batch_sampler=batches, collate_fn=Collator(pad_token_id=0))
        return prepare_data_loader(made, num_processes=ranks, process_index=rank, put_on_device=False)

    def rows(batches):
        return [batch["input_ids"].tolist() for batch in batches]

    seen = []
    for rank in range(ranks):
        expected = rows(loader(rank))
        assert rows(skip_first_batches(loader(rank), done)) == expected[done:]
        seen.append(expected)
    assert ranks == 1 or seen[0] != seen[1]


class OneWeight(torch.nn.Module):
    """A model that records its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.batches = []

    def forward(self, input_ids, labels, position_ids):
        self.batches.append(input_ids.tolist())
        return {"loss": self.weight.sum()}


@pytest.mark.parametrize("stopped_at", [3, 8, 13])
def test_the_trainer_resumes_in_the_middle_of_an_epoch_of_packs(model_folders, tmp_path, stopped_at):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(model_folders["hunyuan"])
    dataset = ChatDataset(tiny_data(tmp_path / "a.jsonl", 40), tokenizer, LIMIT)
    packed = PackedDataset(dataset, best_fit([len(sample["input_ids"]) for sample in dataset], LIMIT))

    class Ordered(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return SeededSampler(len(packed), 5)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == stopped_at

    def batches(folder, callbacks, resume=None):
        model = OneWeight()
        args = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=16,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            save_strategy="no",
        )
        collate = Collator(pad_token_id=0)
        trainer = Ordered(model=model, args=args, train_dataset=packed, data_collator=collate, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return model.batches

    assert 16 > -(-len(packed) // 2) > 3
    whole = batches("whole", [])
    first = batches("cut", [Stop()])
    rest = batches("cut", [], str(tmp_path / "cut" / f"checkpoint-{stopped_at}"))
    assert len(first) == stopped_at and first + rest == whole

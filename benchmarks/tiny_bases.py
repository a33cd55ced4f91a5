"""Tiny base models that benchmarks pretrain themselves, with tokenizers of their own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.data.batching import Padding
from training.data.encoding import encode

RATE = 3e-3


def byte_pairs(texts: Sequence[str], size: int) -> Any:
    """A tokenizer of `size` byte pairs, with <pad> as 0 and <end> as 1."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, pad_token="<pad>", eos_token="<end>")


def llama(vocabulary: int, *, layers: int, intermediate: int) -> LlamaForCausalLM:
    """A Llama of width 64, for a tokenizer of `byte_pairs`."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def pretrain(
    folder: Path,
    build: Callable[[int], Any],
    texts: Sequence[str],
    *,
    vocabulary: int,
    steps: int,
    batch: int,
    longest: int,
    seed: int,
) -> None:
    """Write a model that has read the texts, one thread or two, always the same.

    Args:
        folder: where model and tokenizer are written.
        build: a fresh model for a vocabulary of that size.
        texts: what it reads, each from its beginning to its end.
        vocabulary: byte pairs.
        steps: optimiser updates.
        batch: texts of each.
        longest: tokens of the longest text that is used.
        seed: of weights and order.
    """
    tokenizer = byte_pairs(texts, vocabulary)
    read = (("", text) for text in texts)
    examples = [
        example
        for example in encode(read, tokenizer, max_length=2**30, loss_on="everything")
        if len(example.input_ids) <= longest
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator, padding = torch.Generator().manual_seed(seed), Padding(0)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(examples), (batch,), generator=generator).tolist()
        loss = model(**padding([examples[index] for index in chosen])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 500 == 499:
            print(f"  {folder.name}, step {step + 1}: loss {loss.item():.3f}", flush=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)

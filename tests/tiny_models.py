"""Tiny randomly initialised models of the real architectures, and a small real tokenizer, made in the test itself.

Every function gives the same weights for the same seed and leaves the global random state as it was.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

Model = TypeVar("Model", bound=nn.Module)

PAD, BOS, EOS = 0, 1, 2
SPREAD = 0.1  # wider than the 0.02 of real models, so that outputs of such small ones differ visibly
VOCABULARY = 259  # three special tokens and 256 bytes


def tiny_llama(vocab_size: int = VOCABULARY, seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """Decoder with grouped-query attention (4 query heads, 2 key-value heads), hidden size 32."""
    config = LlamaConfig(
        initializer_range=SPREAD,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _seeded(seed, lambda: LlamaForCausalLM(config))


def tiny_gpt2(vocab_size: int = VOCABULARY, seed: int = 0) -> GPT2LMHeadModel:
    """Decoder whose linear layers are `Conv1D` (weights stored transposed, one fused query-key-value), tied head."""
    config = GPT2Config(
        initializer_range=SPREAD,
        vocab_size=vocab_size,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _seeded(seed, lambda: GPT2LMHeadModel(config))


def tiny_gemma3(vocab_size: int = VOCABULARY, seed: int = 0) -> Gemma3ForCausalLM:
    """Decoder with a head size of its own, one sliding and one full attention layer, tied head."""
    config = Gemma3TextConfig(
        initializer_range=SPREAD,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _seeded(seed, lambda: Gemma3ForCausalLM(config))


def tiny_bert(vocab_size: int = VOCABULARY, seed: int = 0, labels: int = 3) -> BertForSequenceClassification:
    """Encoder with a classification head."""
    config = BertConfig(
        initializer_range=SPREAD,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=labels,
        pad_token_id=PAD,
    )
    return _seeded(seed, lambda: BertForSequenceClassification(config))


def tiny_t5(vocab_size: int = VOCABULARY, seed: int = 0) -> T5ForConditionalGeneration:
    """Encoder and decoder, gated feed-forward, heads × head size (4 × 6) other than the hidden size (32)."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    return _seeded(seed, lambda: T5ForConditionalGeneration(config))


def tiny_vit(seed: int = 0, labels: int = 3) -> ViTForImageClassification:
    """Vision transformer on 16 × 16 images of three channels, four patches."""
    config = ViTConfig(
        initializer_range=SPREAD,
        image_size=16,
        patch_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=labels,
    )
    return _seeded(seed, lambda: ViTForImageClassification(config))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: `<pad>` 0, `<s>` 1, `</s>` 2, then the 256 bytes; decodes exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_tiny_llama(directory: Path, seed: int = 0, layers: int = 2) -> Path:
    """Write a tiny Llama and its tokenizer so that `path:DIRECTORY` is a base model; returns `directory`."""
    tiny_llama(seed=seed, layers=layers).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def save_tiny_gemma(directory: Path, seed: int = 0) -> Path:
    """Write a tiny Gemma 3 and its tokenizer as a base model; returns `directory`."""
    tiny_gemma3(seed=seed).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def save_tiny_masked(directory: Path, seed: int = 0) -> Path:
    """Write a tiny BERT that fills masked tokens in, and its tokenizer, as a base model; returns `directory`."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    config = BertConfig(**{**tiny_bert(len(tokenizer)).config.to_dict(), "tie_word_embeddings": True})
    _seeded(seed, lambda: BertForMaskedLM(config)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def own_seed(module: str) -> int:
    """A seed for the base models of one test module (`__name__`) alone.

    Modules that run in one process share a Regraft home, where a base model is what it contains: two modules with
    equal weights would name one base twice.
    """
    return zlib.crc32(module.encode())


def _seeded(seed: int, build: Callable[[], Model]) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval()
        with torch.no_grad():  # transformers starts biases at zero and norms at one, which a wrong merge leaves right
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(SPREAD * torch.randn_like(parameter))
        return model

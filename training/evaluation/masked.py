"""How well a masked language model fills in what is hidden of a text."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from kernels.cross_entropy import IGNORE
from training.data.batching import Padding
from training.data.encoding import encode_masked
from training.evaluation.prompt_cache import in_batches, judging
from training.objectives.labelled_positions import labelled_losses


def masked_losses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[float], list[int]]:
    """−Σ log p of each text's hidden tokens, in nats, and how many there are. The same tokens are hidden every time.

    Args:
        model: a masked language model, bare or adapted.
        tokenizer: of the base model.
        texts: what tokens are hidden of, as in training.
        batch_tokens: rows × length of a batch; memory grows with it.
        on_progress: told (texts done, texts wanted).

    Raises:
        InvalidInput: a text without a token, or a tokenizer without a mask.
    """
    encoded = encode_masked(texts, tokenizer, max_length=int(1e9), generator=torch.Generator().manual_seed(0))
    padding, device = Padding(tokenizer.pad_token_id or 0), next(model.parameters()).device
    losses = [0.0] * len(encoded)
    done = 0
    with judging(model):
        for places in in_batches([len(example.input_ids) for example in encoded], batch_tokens):
            batch = {name: tensor.to(device) for name, tensor in padding([encoded[p] for p in places]).items()}
            labels = batch.pop("labels")
            found = labelled_losses(model, batch, labels, shift=0)
            of_text = found.losses.new_zeros(len(places)).index_add(0, found.rows, found.losses)
            for place, loss in zip(places, of_text.tolist(), strict=True):
                losses[place] = loss
            done += len(places)
            if on_progress:
                on_progress(done, len(encoded))
    return losses, [sum(label != IGNORE for label in example.labels) for example in encoded]

"""What the teacher thinks of every token of its answers: for students that share its vocabulary."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from infra.errors import InvalidInput
from training.data.batching import Padding
from training.data.encoding import encode
from training.data.example import Example
from training.data.prompting import PromptFormat
from training.evaluation.prompt_cache import in_batches, judging
from training.objectives.distillation import SoftLabels
from training.objectives.labelled_positions import labelled_logits


def require_shared_vocabulary(teacher: Any, student: Any) -> None:
    """Raise `InvalidInput` unless both tokenizers number the same tokens alike."""
    if teacher.get_vocab() != student.get_vocab():
        raise InvalidInput(
            "The two base models have different vocabularies, so the new one cannot learn the old one's logits.",
            "Learn its answers: distillation.of: text.",
        )


def soft_labels(
    teacher: nn.Module,
    form: PromptFormat,
    examples: Sequence[Example],
    top_k: int,
    *,
    kept_in: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    batch_tokens: int = 4096,
) -> SoftLabels:
    """The teacher's `top_k` most probable tokens at every token of the answers, end mark included: [T, K] twice.

    Args:
        teacher: the source base with its adapter in force.
        form: how the adapter was asked in training, with the source base's tokenizer.
        examples: inputs with the teacher's answers.
        top_k: K.
        kept_in: a safetensors file; where it is there, it is read instead.
        on_progress: told (examples done, examples wanted).
        batch_tokens: of one batch.

    Returns:
        token ids, and their logits in float32, on the CPU.
    """
    if kept_in is not None and kept_in.is_file():
        stored = load_file(kept_in)
        sizes = stored["sizes"].tolist()
        return list(zip(stored["tokens"].split(sizes), stored["logits"].split(sizes), strict=True))
    tokenizer: Any = form.tokenizer
    device = next(teacher.parameters()).device
    encoded = encode(map(form.training_text, examples), tokenizer, max_length=2**30)
    padding = Padding(tokenizer.pad_token_id or 0)
    found: list[Any] = [None] * len(encoded)
    done = 0
    with judging(teacher):
        for places in in_batches([len(example.input_ids) for example in encoded], batch_tokens):
            batch = {name: tensor.to(device) for name, tensor in padding([encoded[each] for each in places]).items()}
            labels = batch.pop("labels")
            of_teacher = labelled_logits(teacher, batch, labels, shift=1)
            logits, tokens = of_teacher.logits.float().topk(min(top_k, of_teacher.logits.shape[-1]), dim=-1)
            for row, place in enumerate(places):
                mine = of_teacher.rows == row
                found[place] = tokens[mine].cpu(), logits[mine].cpu()
            done += len(places)
            if on_progress:
                on_progress(done, len(encoded))
    if kept_in is not None:
        kept_in.parent.mkdir(parents=True, exist_ok=True)
        partial = kept_in.with_name(f".{kept_in.name}.partial")
        sizes = torch.tensor([len(tokens) for tokens, _ in found])
        content = {"tokens": torch.cat([each[0] for each in found]), "logits": torch.cat([each[1] for each in found])}
        save_file({**content, "sizes": sizes}, partial)
        partial.replace(kept_in)
    return found

"""Which objective a language model is trained by: the one that its head was made for."""

from torch import nn

from infra.errors import InvalidInput
from training.evaluation.prompt_cache import plain_model
from training.objectives.causal_lm import CausalLM
from training.objectives.masked_lm import MaskedLM
from training.objectives.objective import Objective


def is_masked_lm(model: nn.Module) -> bool:
    """Whether a model, bare or adapted, fills masked tokens in (BERT and its relatives) instead of writing on."""
    return type(plain_model(model)).__name__.endswith("ForMaskedLM")


def objective_of(model: nn.Module) -> Objective:
    """What recipes train `model`, bare or adapted, by.

    Raises:
        InvalidInput: it neither writes text from left to right nor fills masked tokens in.
    """
    if is_masked_lm(model):
        return MaskedLM()
    bare = plain_model(model)
    config, writes = getattr(bare, "config", None), getattr(bare, "can_generate", lambda: True)
    if getattr(config, "is_encoder_decoder", False) or not writes():
        raise InvalidInput(
            f"Recipes and suites are for causal and masked language models; {type(bare).__name__} is neither.",
            "Train it from Python: training.trainer.train, with an objective of training.objectives.",
        )
    return CausalLM()

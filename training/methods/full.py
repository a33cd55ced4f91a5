"""Full fine-tuning: every parameter of the base trains. The yardstick of every other method; see base_training.py."""

from training.methods.base_training import BaseTraining
from training.methods.contract import MethodCard, MethodConfig


class FullConfig(MethodConfig):
    """Full fine-tuning has no hyper-parameters of its own."""


class Full(BaseTraining[FullConfig]):
    """All parameters."""

    name = "full"
    peft_type = "REGRAFT_FULL"
    config_type = FullConfig
    card = MethodCard(
        title="Every parameter of the base",
        family="full fine-tuning",
        paper="none: the yardstick",
        parameters="|θ|",
        backbones=("llama", "gpt2", "gemma3_text", "bert", "t5", "vit"),
        modality=("language", "vision"),
        changes_base=True,
        sharding=False,
    )


METHOD = Full()

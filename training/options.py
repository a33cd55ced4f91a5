"""What can be said of a method and of a training, by a recipe and by whatever else trains an adapter."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from infra.documents import Section

Positive = Annotated[int, Field(ge=1, le=10**12)]


class MethodChoice(BaseModel):
    """A method's name and its options. `method: lora` is short for `method: {name: lora}`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "lora"

    @property
    def options(self) -> dict[str, Any]:
        """The method's own hyper-parameters, as written."""
        return dict(self.__pydantic_extra__ or {})


class TrainingOptions(Section):
    """How the adapter is trained.

    One *step* is one optimiser update, on `batch_size` × `gradient_accumulation` examples per process.
    """

    steps: Positive | None = Field(None, description="Optimiser updates. Exactly one of steps and epochs.")
    epochs: float | None = Field(None, gt=0, description="Passes over the data; 3 where neither is given.")
    batch_size: Positive = 8
    gradient_accumulation: Positive = 1
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    loss_on: Literal["completion", "everything"] = "completion"
    max_length: Positive = Field(1024, description="Tokens of prompt and completion together; longer is an error.")
    packing: bool = Field(False, description="Several examples in a row, kept apart by position ids.")
    gradient_checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on GPU, else float32."
    )
    kernels: Literal["auto", "on", "off"] = Field(
        "auto", description="Layers of LoRA's kind by Regraft's kernels; auto: where they are faster."
    )
    adapter_bits: Literal[1, 2, 4, 8] | None = Field(
        None, description="Train the adapter's matrices as a codebook file of so many bits stores them."
    )
    validate_every: Positive | None = Field(None, description="Steps between validation losses.")
    early_stopping: Positive | None = Field(None, description="Stop after so many validations without improvement.")
    checkpoint_every: Positive = Field(50, description="Steps between checkpoints from which a killed run resumes.")
    processes: Positive = Field(1, description="Data-parallel processes (accelerate: DDP; gloo on CPU, NCCL on GPU).")
    shard_base: bool = Field(
        False, description="Split the base's weights over the processes (FSDP2) instead of copying them to each."
    )

    @field_validator("kernels", mode="before")
    @classmethod
    def _said_in_yaml(cls, value: Any) -> Any:
        """YAML takes a bare `on` or `off` for a truth value."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingOptions":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.early_stopping and not self.validate_every:
            raise ValueError("early_stopping needs validate_every")
        if self.shard_base and self.processes == 1:
            raise ValueError("shard_base needs more than one of processes")
        return self

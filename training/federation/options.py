"""What a federation can be told."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.documents import Section


class FederationOptions(Section):
    """How many train, how long, how alike their data are, and what the server makes of it.

    Defaults are those of FLoRA's heterogeneous experiment (arXiv 2409.05976, section 4).
    """

    clients: int = Field(10, ge=2, description="How many the training data are parted among.")
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 32, 16, 16, 8, 8, 4, 4, 4, 4), min_length=1, description="Of their LoRAs, in turn; α is twice the rank."
    )
    rounds: int = Field(3, ge=1, description="How often clients train and the server gathers.")
    skew: float = Field(
        0.5,
        gt=0,
        allow_inf_nan=False,
        description="Concentration of the Dirichlet distribution that parts each answer's examples: small "
        "for clients that are unlike, large for alike ones.",
    )
    aggregation: Literal["stack", "average"] = Field(
        "stack",
        description="stack: the exact mean of the updates (FLoRA); average: of the factors, padded with zeros "
        "(FedAvg), to compare with.",
    )
    rank: int | None = Field(None, ge=1, description="Cut the global adapter to this rank after each round.")
    least: int = Field(1, ge=1, description="Clients that must have come through for a round to count.")
    runner: Literal["process", "flower"] = Field(
        "process",
        description="Where clients train. process: here, one after the other; flower: as nodes of Flower's simulation, "
        "each in a process of its own.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "FederationOptions":
        if "ranks" in self.model_fields_set and len(self.ranks) > self.clients:
            raise ValueError(f"{len(self.ranks)} ranks are given for {self.clients} clients: give one for each at most")
        if self.least > self.clients:
            raise ValueError(f"least is {self.least}, but there are {self.clients} clients")
        return self

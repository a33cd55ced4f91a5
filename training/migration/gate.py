"""May a migrated adapter take the old one's place? Held against the better of the old one and the bare target."""

from dataclasses import dataclass

LOWER_IS_BETTER = ("perplexity",)


@dataclass(frozen=True, slots=True)
class Standing:
    """The same held-out items, answered by three models.

    Attributes:
        suite: what they are filed under.
        metric: accuracy (`exact_match`, `multiple_choice`), or `perplexity`, of which less is better.
        teacher: the source base with its adapter.
        bare: the target base, the better of none and some solved examples in front.
        student: the target base with the new adapter.
    """

    suite: str
    metric: str
    teacher: float
    bare: float
    student: float

    @property
    def to_beat(self) -> float:
        """The better of teacher and bare target."""
        return min(self.teacher, self.bare) if self.metric in LOWER_IS_BETTER else max(self.teacher, self.bare)

    def passes(self, allowed_loss: float) -> bool:
        """Whether the student is as good, less `allowed_loss` points; of perplexity, more that share of it."""
        if self.metric in LOWER_IS_BETTER:
            return self.student <= self.to_beat * (1 + allowed_loss)
        return self.student >= self.to_beat - allowed_loss - 1e-9

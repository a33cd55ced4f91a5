"""What compression costs on a task: the claims of the two papers, on adapters of a small network."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from training.compression import compress, decompress
from training.compression.straight_through import FakeQuantised, fake_quantised

GRID = (0.5, 1, 2, 3, 4, 5, 6, 8, 10)  # of α, the paper's


def data(teacher: Callable[[Tensor], Tensor], number: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(number, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, teacher(x).argmax(dim=1)


class Layers:
    """A frozen network whose two matrices a LoRA changes."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shapes = {"one": (64, 32), "two": (6, 64)}
        self.base = {name: torch.randn(m, n, generator=generator) / n**0.5 for name, (m, n) in self.shapes.items()}

    def lora(self, seed: int, size: float) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            f"{name}.lora_{side}.weight": torch.randn(shape, generator=generator) * (size if side == "B" else n**-0.5)
            for name, (m, n) in self.shapes.items()
            for side, shape in (("A", (8, n)), ("B", (m, 8)))
        }

    def __call__(self, x: Tensor, lora: dict[str, Tensor]) -> Tensor:
        w = {n: b + lora[f"{n}.lora_B.weight"] @ lora[f"{n}.lora_A.weight"] for n, b in self.base.items()}
        return torch.relu(x @ w["one"].T) @ w["two"].T

    def right(self, lora: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return 100 * float((self(x, lora).argmax(dim=1) == y).float().mean())


def pruned(lora: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """The largest entries at full magnitude."""
    magnitudes = torch.cat([tensor.flatten() for tensor in lora.values()]).abs()
    least = magnitudes.sort(descending=True).values[int(density * len(magnitudes)) - 1]
    return {name: torch.where(tensor.abs() >= least, tensor, 0) for name, tensor in lora.items()}


def outcome(seed: int) -> dict[str, float]:
    """Accuracies on the test split of a LoRA and of what is left of it, α chosen on the validation split."""
    layers = Layers(seed)
    wanted = layers.lora(seed + 1, 0.3)
    splits = [data(lambda x: layers(x, wanted), number, seed + 2 + n) for n, number in enumerate((4000, 2000, 4000))]
    (x, y), validation, test = splits
    lora = {name: tensor.requires_grad_() for name, tensor in layers.lora(seed + 5, 0.0).items()}
    optimizer = torch.optim.AdamW(lora.values(), lr=5e-3)
    for step in range(400):
        optimizer.zero_grad()
        batch = slice(step * 100 % 4000, step * 100 % 4000 + 100)
        cross_entropy(layers(x[batch], lora), y[batch]).backward()
        optimizer.step()
    trained = {name: tensor.detach() for name, tensor in lora.items()}
    kept = pruned(trained, 0.2)
    signed_mean = torch.cat([tensor[tensor != 0] for tensor in kept.values()]).mean()
    candidates = [decompress(compress(trained, f"compeft:density=0.2,alpha={alpha}")) for alpha in GRID]
    return {
        "lora": layers.right(trained, *test),
        "compeft": layers.right(max(candidates, key=lambda each: layers.right(each, *validation)), *test),
        "pruned": layers.right(pruned(trained, 0.044), *test),
        "released STC": layers.right({name: t.sign() * signed_mean for name, t in kept.items()}, *test),
    }


def test_signs_of_a_fifth_beat_pruning_to_as_many_bytes_and_the_released_stc() -> None:
    """At 20 % a ternary entry takes 0.94 bits; of 16-bit values with their places 4.4 % fit into those.

    What the paper finds for large models, that hardly anything is lost, is not so here and not asserted: of about 82 %
    some 62 % are left.
    """
    seeds = [outcome(seed) for seed in (0, 10, 20)]
    mean = {name: sum(found[name] for found in seeds) / len(seeds) for name in seeds[0]}
    assert mean["compeft"] > mean["pruned"] + 3
    assert mean["compeft"] > mean["released STC"] + 3


class Adapter(nn.Module):
    def __init__(self, width: int, bits: int | None) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(32, width, bias=False), nn.Linear(width, 6, bias=False)
        if bits:
            nn.init.trunc_normal_(self.up.weight, std=1e-3, a=-2e-3, b=2e-3)
            for layer in (self.down, self.up):
                parametrize.register_parametrization(layer, "weight", FakeQuantised(bits))
        else:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)))


def accuracy(width: int, bits: int | None, seed: int, after: int | None = None) -> float:
    """Of an adapter beside a frozen linear layer, trained with so many bits, and cut down to some afterwards."""
    torch.manual_seed(seed)
    base, hidden = torch.randn(6, 32) / 6, (torch.randn(24, 32) / 6, torch.randn(6, 24) / 2)

    def teacher(x: Tensor) -> Tensor:
        return x @ base.T + torch.relu(x @ hidden[0].T) @ hidden[1].T

    x, y = data(teacher, 3000, 100 + seed)
    adapter = Adapter(width, bits)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for step in range(400):
        optimizer.zero_grad()
        batch = slice(step * 100 % 3000, step * 100 % 3000 + 100)
        cross_entropy(x[batch] @ base.T + 5 * adapter(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    x, y = data(teacher, 4000, 200 + seed)
    with torch.no_grad():
        down, up = (w if after is None else fake_quantised(w, after) for w in (adapter.down.weight, adapter.up.weight))
        found = x @ base.T + 5 * torch.relu(x @ down.T) @ up.T
    return 100 * float((found.argmax(dim=1) == y).float().mean())


def mean(width: int, bits: int | None, after: int | None = None) -> float:
    return sum(accuracy(width, bits, seed, after) for seed in range(3)) / 3


@pytest.fixture(scope="module")
def wide_one_bit() -> float:
    return mean(32, 1)


def test_wide_and_of_one_bit_beats_narrow_and_exact_at_equal_bytes(wide_one_bit: float) -> None:
    assert wide_one_bit > mean(1, None) + 5


def test_training_for_one_bit_beats_one_bit_afterwards(wide_one_bit: float) -> None:
    """The paper's 1 or 2 points below float32 at equal width are 5 here (74 % and 79 %), and not asserted."""
    assert wide_one_bit > mean(32, None, after=1) + 5

"""GaLore and Natural GaLore against their equations, written out in NumPy."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from infra.errors import InvalidInput, RegraftError
from infra.settings import get_settings
from tests.tiny_models import save_tiny_llama, tiny_gpt2, tiny_llama, tiny_t5
from tests.training.methods.backbones import BACKBONES, logits, loss
from tests.training.tiny_training import OPTIONS, run, same_bits
from training.base_models import load_base
from training.data.example import Example
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.galore import GaloreAdapted
from training.methods.natural_galore import NaturalProjectedAdamW, natural
from training.methods.projected_adamw import ProjectedAdamW
from training.options import TrainingOptions
from training.progress import TrainingEvent
from training.recipe import Recipe
from training.trainer import train_recipe

BATCH = BACKBONES["llama"].batch()
BOTH = pytest.mark.parametrize("method", ["galore", "natural-galore"])


def attach(method: str, model: nn.Module | None = None, **options: Any) -> GaloreAdapted:
    chosen = get_method(method)
    return chosen.attach(model or tiny_llama(), chosen.config_type(**{"rank": 4, **options}), AttachContext())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def optimizer(weight: nn.Parameter, natural_options: dict[str, Any] | None = None, **options: Any) -> ProjectedAdamW:
    chosen = {"rank": 3, "interval": 4, "scale": 0.25, "projection": "std", "weight_decay": 0.0, **options}
    lr, decay = chosen.pop("lr", 0.01), chosen.pop("weight_decay")
    if natural_options is None:
        return ProjectedAdamW([weight], [], lr, decay, **chosen)
    return NaturalProjectedAdamW([weight], [], lr, decay, **natural_options, **chosen)


def trajectory(optimiser: ProjectedAdamW, weight: nn.Parameter, gradients: list[Tensor]) -> list[Tensor]:
    return [shown for shown, _ in steps(optimiser, weight, gradients)]


def steps(
    optimiser: ProjectedAdamW, weight: nn.Parameter, gradients: list[Tensor]
) -> list[tuple[Tensor, dict[str, np.ndarray]]]:
    """The weight after every update, and the projectors that made it."""
    shown = []
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimiser.step()
        state = optimiser.state[weight]
        sides = {side: state[side].double().numpy() for side in ("left", "right") if side in state}
        shown.append((weight.detach().clone(), sides))
    return shown


def by_hand(
    W: np.ndarray,
    gradients: list[np.ndarray],
    signs: list[dict[str, np.ndarray]],
    *,
    rank: int,
    T: int,
    alpha: float,
    lr: float,
    decay: float,
    sides: str,
    s: int | None = None,
    lam: float = 0.0,
) -> list[np.ndarray]:
    """The pseudo-code of the paper and its released optimiser, in float64; `sides` is "L", "R" or "LR".

    A singular vector may as well be its negative, and the moments outlive the vectors: each takes the sign that it has
    in `signs`.
    """
    W, shown, past = W.copy(), [], []
    M = V = np.zeros(())
    P, Q = np.eye(W.shape[0]), np.eye(W.shape[1])
    for t, G in enumerate(gradients, start=1):
        if (t - 1) % T == 0:
            U, _, Vh = np.linalg.svd(G, full_matrices=False)
            if "L" in sides:
                P = U[:, :rank] * np.sign((U[:, :rank] * signs[t - 1]["left"]).sum(axis=0))
            if "R" in sides:
                Q = Vh[:rank] * np.sign((Vh[:rank] * signs[t - 1]["right"]).sum(axis=1, keepdims=True))
        R = P.T @ G @ Q.T
        if s is not None:
            past = [*past, R.ravel()][-s:]
            history = np.stack(past, axis=1)
            R = np.linalg.solve(lam * np.eye(R.size) + history @ history.T, R.ravel()).reshape(R.shape)
        M = 0.9 * M + 0.1 * R
        V = 0.999 * V + 0.001 * R**2
        rate = lr * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        W = W - rate * alpha * (P @ (M / (np.sqrt(V) + 1e-6)) @ Q)
        W = W - lr * decay * W
        shown.append(W)
    return shown


SIDES = [
    ((7, 5), "std", "R"),
    ((5, 7), "std", "L"),
    ((6, 6), "std", "R"),
    ((7, 5), "reverse_std", "L"),
    ((5, 7), "reverse_std", "R"),
    ((7, 5), "left", "L"),
    ((5, 7), "right", "R"),
    ((7, 5), "full", "LR"),
]


@pytest.mark.parametrize(("size", "projection", "sides"), SIDES)
@pytest.mark.parametrize("with_history", [False, True])
def test_every_step_is_the_papers(size: tuple[int, int], projection: str, sides: str, with_history: bool) -> None:
    """Over two changes of the subspace, and more updates than the history holds."""
    W, gradients = numbers(*size), [numbers(*size, seed=seed) for seed in range(1, 11)]
    weight = nn.Parameter(W.clone())
    extra = {"history": 4, "damping": 0.5} if with_history else None
    optimiser = optimizer(weight, extra, projection=projection, weight_decay=0.1)
    shown, signs = zip(*steps(optimiser, weight, gradients), strict=True)
    assert signs[0].keys() == {"L": {"left"}, "R": {"right"}, "LR": {"left", "right"}}[sides]
    expected = by_hand(
        W.double().numpy(),
        [gradient.double().numpy() for gradient in gradients],
        list(signs),
        rank=3,
        T=4,
        alpha=0.25,
        lr=0.01,
        decay=0.1,
        sides=sides,
        s=4 if with_history else None,
        lam=0.5,
    )
    for mine, other in zip(shown, expected, strict=True):
        assert_close(mine.double(), torch.from_numpy(other), atol=1e-4, rtol=1e-5)  # Adam enlarges rounding near 0/0
    assert (shown[-1] - W).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(12, 8), (8, 12)])
def test_an_update_has_the_rank_of_the_subspace_and_their_sum_a_higher_one(size: tuple[int, int]) -> None:
    start = numbers(*size)
    weight = nn.Parameter(start.clone().double())
    gradients = [numbers(*size, seed=seed).double() for seed in range(1, 7)]
    optimiser = optimizer(weight, rank=2, interval=2, lr=1.0)
    shown = [start.double(), *trajectory(optimiser, weight, gradients)]

    def rank(matrix: Tensor) -> int:
        return int(torch.linalg.matrix_rank(matrix, rtol=1e-5))

    assert [rank(after - before) for before, after in pairwise(shown)] == [2] * 6
    assert [rank(shown[2 * changes] - shown[0]) for changes in (1, 2, 3)] == [2, 4, 6]


def test_what_is_not_projected_trains_by_adamw() -> None:
    """As torch's, but for the place of ε and of the decay, which are too small to see here."""
    mine, other = nn.Parameter(numbers(6)), nn.Parameter(numbers(6))
    optimiser = ProjectedAdamW([], [mine], 0.01, 0.0, rank=1, interval=1, scale=1.0, projection="std", eps=1e-12)
    plain = torch.optim.AdamW([other], lr=0.01, weight_decay=0.0, eps=1e-12)
    for seed in range(5):
        mine.grad, other.grad = numbers(6, seed=seed), numbers(6, seed=seed)
        optimiser.step()
        plain.step()
    assert_close(mine, other, atol=1e-6, rtol=1e-6)


def test_at_full_rank_the_subspace_is_a_rotation() -> None:
    """W Vᵀ, trained by Adam itself on the gradient in that basis, turned back."""
    weight = nn.Parameter(numbers(7, 5))
    gradients = [numbers(7, 5, seed=seed) for seed in range(1, 6)]
    Q = torch.from_numpy(np.linalg.svd(gradients[0].double().numpy(), full_matrices=False)[2])
    turned = nn.Parameter(weight.detach().double() @ Q.T)
    plain = torch.optim.Adam([turned], lr=0.01, eps=1e-12)
    optimiser = optimizer(weight, rank=5, interval=1000, scale=1.0, eps=1e-12)
    for gradient in gradients:
        turned.grad = gradient.double() @ Q.T
        plain.step()
    shown = trajectory(optimiser, weight, gradients)
    assert_close(shown[-1].double(), turned.detach() @ Q, atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_as_large_as_the_formula_says(method: str, dtype: torch.dtype) -> None:
    adapted = attach(method, tiny_llama().to(dtype))
    optimiser = adapted.optimizer(1e-3, 0.0)
    loss(adapted.model, BATCH).backward()
    optimiser.step()
    r, s = 4, 20
    matrices = 0
    for name, parameter in adapted.model.named_parameters():
        state = {key: value for key, value in optimiser.state[parameter].items() if isinstance(value, Tensor)}
        assert all(value.dtype == torch.float32 for value in state.values())
        elements = sum(value.numel() for value in state.values())
        if parameter.ndim == 2 and ".layers." in name:
            matrices += 1
            (m, n) = sorted(parameter.shape)
            assert elements == (m * r + 2 * n * r if method == "galore" else (m + n) * r + (2 + s) * r * r), name
        else:
            assert elements == 2 * parameter.numel()
    assert matrices == 2 * 7


# -- the natural gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("newest", [0, 4])
def test_the_natural_gradient_solves_the_fisher_system(size: float, newest: int) -> None:
    history = size * numbers(6, 40).double()
    history[5] = 0  # not yet filled
    damping = 1e-3
    found = natural(history, newest, damping)
    F = damping * torch.eye(40, dtype=torch.float64) + history.T @ history
    assert_close(F @ found, history[newest], atol=1e-8 * size, rtol=1e-7)
    if size < 1e3:  # where the released code's difference of large terms still has digits
        y = history @ history[newest]
        z = torch.linalg.solve(torch.eye(6, dtype=torch.float64) + history @ history.T / damping, y)
        assert_close(found, history[newest] / damping - history.T @ z / damping**2, atol=0, rtol=1e-5)


def test_one_gradient_alone_is_divided_by_its_norm() -> None:
    g = numbers(30).double()
    assert_close(natural(g[None], 0, 0.1), g / (0.1 + g @ g), atol=1e-12, rtol=1e-12)


def test_small_gradients_make_plain_galore_of_it() -> None:
    gradients = [1e-3 * numbers(7, 5, seed=seed) for seed in range(1, 9)]
    plain, other = nn.Parameter(numbers(7, 5)), nn.Parameter(numbers(7, 5))
    expected = trajectory(optimizer(plain, eps=1e-12), plain, gradients)
    found = trajectory(optimizer(other, {"history": 5, "damping": 1.0}, eps=1e-12), other, gradients)
    assert_close(found[-1], expected[-1], atol=1e-5, rtol=1e-5)
    far = nn.Parameter(numbers(7, 5))
    shown = trajectory(optimizer(far, {"history": 5, "damping": 1e-8}, eps=1e-12), far, gradients)
    assert (shown[-1] - expected[-1]).abs().max() > 1e-3  # where they are not small, it is another method


# -- in a training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (tiny_llama, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (tiny_gpt2, {"c_attn", "c_proj", "c_fc"}),
        (tiny_t5, {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}),
    ],
)
def test_attention_and_feed_forward_weights_are_projected_and_nothing_else(build: Any, parts: set[str]) -> None:
    adapted = attach("galore", build())
    projected, others = (group["params"] for group in adapted.optimizer(1e-3, 0.0).param_groups)
    names = {id(parameter): name for name, parameter in adapted.model.named_parameters()}
    assert {names[id(parameter)].split(".")[-2] for parameter in projected} == parts
    assert all(parameter.ndim == 2 for parameter in projected)
    assert {id(parameter) for parameter in [*projected, *others]} == set(names)
    assert len(projected) + len(others) == len(names)
    assert all(not set(names[id(parameter)].split(".")) & parts for parameter in others if parameter.ndim == 2)


def test_targets_choose_the_projected_layers() -> None:
    adapted = attach("galore", targets=("q_proj", "down_proj"), exclude=("layers.0.self_attn.q_proj",))
    projected = adapted.optimizer(1e-3, 0.0).param_groups[0]["params"]
    layers = adapted.model.model.layers
    expected = [layers[0].mlp.down_proj, layers[1].self_attn.q_proj, layers[1].mlp.down_proj]
    assert {id(parameter) for parameter in projected} == {id(layer.weight) for layer in expected}


@BOTH
@pytest.mark.parametrize("crash", [4, 7])
def test_a_training_resumes_to_the_same_bits(tmp_path: Path, method: str, crash: int) -> None:
    """From within an interval, with a history that is not full; from later, with one that is."""
    extra = {"history": 4} if method == "natural-galore" else {}
    chosen = TrainingOptions.model_validate({**OPTIONS.model_dump(), "steps": 8, "checkpoint_every": 3})

    def fresh() -> GaloreAdapted:
        return attach(method, interval=5, **extra)

    def stop(event: TrainingEvent) -> None:
        if event.step == crash:
            raise RuntimeError("the power is gone")

    whole, expected = run(tmp_path / "whole", chosen, fresh())
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "crashed", chosen, fresh(), on_event=stop)
    resumed, outcome = run(tmp_path / "crashed", chosen, fresh())
    assert outcome.resumed_from == crash // 3 * 3
    assert outcome.losses == expected.losses
    assert same_bits(resumed.tensors(), whole.tensors())


@BOTH
def test_the_state_of_bfloat16_weights_comes_back_unrounded(method: str) -> None:
    adapted = attach(method, tiny_llama().to(torch.bfloat16))
    first, second = adapted.optimizer(1e-3, 0.0), adapted.optimizer(1e-3, 0.0)
    loss(adapted.model, BATCH).backward()
    first.step()
    second.load_state_dict(first.state_dict())
    for parameter, state in first.state.items():
        for key, value in state.items():
            found = second.state[parameter][key]
            assert torch.equal(found, value) and found is not value if isinstance(value, Tensor) else found == value
            assert not isinstance(value, Tensor) or found.dtype == value.dtype


def test_a_random_model_learns_as_by_adam_and_not_as_by_lora(tmp_path: Path) -> None:
    """At rank d/4, in perplexity, over the last passes of 27 over the data."""
    chosen = TrainingOptions.model_validate({**OPTIONS.model_dump(), "steps": 80, "checkpoint_every": 100})

    def perplexity(method: str, **options: Any) -> float:
        adapted = get_method(method).attach(tiny_llama(), get_method(method).config_type(**options), AttachContext())
        _, outcome = run(tmp_path / method, chosen, adapted)
        return float(np.exp(np.mean([value for _, value in outcome.losses[-8:]])))

    adam, lora = perplexity("full"), perplexity("lora", rank=8)
    for method in ("galore", "natural-galore"):
        found = perplexity(method, rank=8, scale=1.0, interval=20)
        assert found < 1.1 * adam
        assert found < 0.2 * lora


def test_two_processes_share_one_subspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which they leave with the tensors of one process with the double batch."""
    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    torch.set_num_threads(1)
    save_tiny_llama(tmp_path / "base")
    found = []
    for number, training in enumerate(({"batch_size": 8}, {"batch_size": 4, "processes": 2})):
        base = load_base(f"path:{tmp_path / 'base'}", cache=tmp_path / "home" / "base_models")
        recipe = Recipe.model_validate(
            {
                "adapter": "sums",
                "base": "path:base",
                "method": {"name": "natural-galore", "rank": 4, "interval": 5, "scale": 1.0},
                "data": {"file": "sums.jsonl"},
                "training": {"steps": 12, "learning_rate": 1e-3, **training},
            }
        )
        examples = [Example(f"{first}+{second}", str(first + second)) for first in range(4) for second in range(4)]
        adapted, _ = train_recipe(
            recipe, base, examples, [], workdir=tmp_path / str(number), on_event=lambda event: None
        )
        found.append(adapted.tensors())
    get_settings.cache_clear()
    before = tiny_llama().state_dict()
    for name, tensor in found[0].items():
        moved = tensor - before[name]  # of entries with hardly a gradient, rounding decides the sign
        assert (found[1][name] - tensor).norm() < 0.3 * moved.norm(), name
        assert moved.abs().max() > 5e-4


@BOTH
def test_a_loss_that_is_no_number_is_told_as_in_any_training(tmp_path: Path, method: str) -> None:
    adapted = attach(method)
    adapted.model.model.layers[0].mlp.down_proj.weight.data[0] = float("nan")
    with pytest.raises(RegraftError, match="of step 1 is nan"):
        run(tmp_path, adapted=adapted)


@BOTH
def test_a_smaller_layer_keeps_all_of_its_directions(method: str) -> None:
    """k_proj and v_proj have 16 outputs."""
    adapted = attach(method, rank=20)
    optimiser = adapted.optimizer(1e-2, 0.0)
    before = logits(adapted.model, BATCH)
    loss(adapted.model, BATCH).backward()
    optimiser.step()
    keys = adapted.model.model.layers[0].self_attn.k_proj.weight
    assert len(optimiser.state[keys]["left"].T) == 16
    assert (logits(adapted.model, BATCH) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (tiny_llama, {"rank": 33}, "rank 33 is above the size of every projected layer: the largest is 32"),
        (tiny_llama, {"targets": ("query",)}, r"targets: \['query'\] matches no module of LlamaForCausalLM"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), {}, "Sequential has no blocks with linear layers"),
    ],
    ids=["rank", "targets", "no blocks"],
)
@BOTH
def test_what_it_cannot_train_is_refused(method: str, build: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        attach(method, build(), **options)

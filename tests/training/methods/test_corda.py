"""CorDA against its equations, written out by hand, and against stock peft."""

from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig as StockCorda
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn
from torch.testing import assert_close

from infra.errors import InvalidInput
from tests.tiny_models import tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits
from tests.training.methods.regression import Regression
from training.methods import corda
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.corda import METHOD, CordaConfig, add_gram, components, mirrored
from training.methods.injected import InjectedAdapted, matrix

BATCH = BACKBONES["llama"].batch()


def attach(model: nn.Module, *batches: dict[str, Tensor], **options: Any) -> InjectedAdapted:
    return METHOD.attach(model, CordaConfig(**options), AttachContext(calibration=lambda: iter(batches)))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def damped(inputs: Tensor) -> Tensor:
    """C̃ [n, n] of sequences [B, L, n], in float64, sequence by sequence."""
    total = torch.zeros(inputs.shape[-1], inputs.shape[-1], dtype=torch.float64)
    for X in inputs.double():
        X = X / X.max().abs()
        total += X.T @ X / len(inputs)
    return total + 0.01 * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)


def start(adapted: InjectedAdapted) -> tuple[Tensor, Tensor, float]:
    (slot,) = adapted.slots().values()
    return slot.A0, slot.B0, slot.scale


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("alpha", [4, 8])
def test_a_fresh_adapter_is_the_base_at_any_scale(mode: str, alpha: int) -> None:
    adapted = attach(tiny_llama(), *BACKBONES["llama"].calibration(), rank=4, alpha=alpha, mode=mode)
    assert_close(logits(adapted.model, BATCH), logits(tiny_llama(), BATCH), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 12), (12, 7)])
def test_the_start_is_the_papers_equation(mode: str, outputs: int, inputs: int) -> None:
    model, x = Regression(outputs, inputs), drawn(5, 9, inputs) * torch.arange(1.0, inputs + 1)
    adapted = attach(model, {"inputs": x[:2]}, {"inputs": x[2:]}, rank=3, alpha=6, mode=mode)
    C, W = damped(x), model.layer.base_layer.weight.detach().double()
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    part = slice(3) if mode == "ipm" else slice(4, 7)
    A0, B0, scale = start(adapted)
    assert scale == 2
    assert_close(2 * (B0 @ A0).double(), U[:, part] * S[part] @ Vh[part] @ torch.linalg.inv(C), atol=1e-4, rtol=1e-3)
    assert_close((B0.T @ B0).double(), torch.diag(S[part] / 2), atol=1e-3, rtol=1e-3)  # the root of S is on either side


def test_at_full_rank_all_of_the_weight_trains_and_v_is_not_orthonormal() -> None:
    model, x = Regression(6, 9), drawn(4, 20, 9) * torch.arange(1.0, 10)
    A0, B0, scale = start(attach(model, {"inputs": x}, rank=6))
    W = model.layer.base_layer.weight
    assert_close(scale * B0 @ A0, W, atol=1e-4 * float(W.abs().max()), rtol=1e-4)
    U, V = nn.functional.normalize(B0, dim=0), nn.functional.normalize(A0, dim=1)
    assert_close(U.T @ U, torch.eye(6), atol=1e-4, rtol=0)
    assert (V @ V.T - torch.eye(6)).abs().max() > 0.1


def test_where_no_direction_of_the_inputs_is_before_another_it_is_pissa() -> None:
    model = Regression(6, 9)
    A0, B0, _ = start(attach(model, {"inputs": torch.eye(9)[None]}, rank=4))  # C is a multiple of I
    pissa = get_method("pissa")
    (slot,) = pissa.attach(Regression(6, 9), pissa.config_type(rank=4), AttachContext()).slots().values()
    assert_close(B0 @ A0, slot.B0 @ slot.A0, atol=1e-5, rtol=1e-4)


def test_the_leading_components_are_the_best_of_their_number_in_the_context() -> None:
    x = drawn(4, 20, 9) * torch.arange(1.0, 10)
    C = damped(x)
    W = Regression(6, 9).layer.weight.detach().double()
    S = torch.linalg.svdvals(W @ C)
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    for k in range(1, 6):
        A0, B0, _ = start(attach(Regression(6, 9), {"inputs": x}, rank=k))
        mine = ((W - (B0 @ A0).double()) @ C).norm()
        plain = ((W - u[:, :k] * s[:k] @ vh[:k]) @ C).norm()
        assert mine < plain
        assert_close(mine, S[k:].square().sum().sqrt(), atol=1e-4, rtol=1e-3)


def moved(method: str, model: Regression, context: AttachContext, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """ΔW after a training on (x, y) that brings its loss well down."""
    chosen = get_method(method)
    adapted = chosen.attach(model, chosen.config_type(**options), context)
    W = model.layer.base_layer.weight.detach()
    optimiser = torch.optim.Adam(adapted.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(100):
        optimiser.zero_grad()
        loss = adapted.model(x, y).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    return matrix(adapted.merge().layer) - W


def test_what_is_to_be_kept_is_hardly_moved_by_training_on_something_else() -> None:
    n, k = 12, 4
    context_of, x = torch.zeros(8, 30, n), torch.zeros(4, 30, n)
    context_of[..., :k] = drawn(8, 30, k, seed=1)  # knowledge lives in a subspace of k dimensions
    x[..., k:] = drawn(4, 30, n - k, seed=2)  # and the training beside it
    W = Regression(n, n).layer.weight.detach()
    y = x @ (W + drawn(n, n, seed=3) / n**0.5).T
    data = AttachContext(calibration=lambda: iter([{"inputs": context_of}]))
    away = {
        name: moved(method, Regression(n, n), data, x, y, rank=4, **options)[:, :k].norm().item()
        for name, method, options in [
            ("kpm", "corda", {"mode": "kpm"}),
            ("ipm", "corda", {"mode": "ipm"}),
            ("pissa", "pissa", {}),
        ]
    }
    assert away["kpm"] < 0.1 * away["pissa"] and away["kpm"] < 0.1 * away["ipm"], away


def test_the_size_of_c_shifts_between_the_factors_and_not_their_product() -> None:
    x = drawn(3, 20, 9)
    once = start(attach(Regression(6, 9), {"inputs": x}, rank=4))
    four = start(attach(Regression(6, 9), {"inputs": x.repeat(1, 4, 1)}, rank=4))  # XᵀX is four times as large
    assert_close(four[1] @ four[0], once[1] @ once[0], atol=1e-5, rtol=1e-4)
    assert_close(four[1].abs(), 2 * once[1].abs(), atol=1e-4, rtol=1e-3)
    assert_close(four[0].abs(), once[0].abs() / 2, atol=1e-4, rtol=1e-3)
    scaled = start(attach(Regression(6, 9), {"inputs": 100 * x}, rank=4))  # and the size of the inputs is divided out
    assert_close(scaled[1].abs(), once[1].abs(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("largest", [True, False])
def test_components_are_those_of_a_decomposition_in_float64(shape: tuple[int, int], largest: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(n, 24, generator=generator).double())[0] for n in shape)
    values = torch.logspace(0, -5, 24, dtype=torch.float64)
    X = (left * values @ right.T).float()
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    chosen = slice(5) if largest else slice(19, 24)
    found = components(X, 5, largest)
    assert_close(found[1].double(), S[chosen], rtol=1e-5, atol=0)
    for one, expected in ((found[0], U[:, chosen]), (found[2].T, Vh[chosen].T)):
        assert_close((one.double().T @ expected).abs(), torch.eye(5, dtype=torch.float64), atol=1e-4, rtol=0)


def test_components_of_what_has_lower_rank_are_numbers_and_bring_it_back() -> None:
    X = torch.randn(9, 2) @ torch.randn(2, 6)
    U, S, Vh = components(X, 6, True)
    assert_close(U * S @ Vh, X, atol=1e-4, rtol=1e-4)
    smallest = components(X, 2, False)
    assert all(part.isfinite().all() for part in smallest)
    assert_close(smallest[0] * smallest[1] @ smallest[2], torch.zeros(9, 6), atol=1e-4, rtol=0)


def test_a_gram_matrix_is_added_up_in_three_quarters() -> None:
    X = torch.randn(11, 7)
    total = torch.zeros(7, 7)
    add_gram(total, X[:4])
    add_gram(total, X[4:])
    assert_close(mirrored(total), X.T @ X, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize(
    ("build", "targets"),
    [(tiny_llama, ["q_proj", "k_proj", "down_proj"]), (tiny_gpt2, ["c_attn", "mlp.c_proj"])],
)
def test_peft_comes_to_the_same_product_and_residual(build: type, targets: list[str], mode: str) -> None:
    sequences = torch.randint(3, 259, (12, 24), generator=torch.Generator().manual_seed(0))
    adapted = attach(build(), {"input_ids": sequences}, rank=4, alpha=8, mode=mode, targets=tuple(targets))
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        init_lora_weights="corda",
        corda_config=StockCorda(corda_method=mode),
        fan_in_fan_out=build is tiny_gpt2,
    )
    model = build()
    preprocess_corda(model, config, run_model=lambda: [model(input_ids=row[None]) for row in sequences])
    stock, bare = peft.get_peft_model(model, config), build()
    for name, slot in adapted.slots().items():
        layer = stock.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        # peft decomposes in float32, and C⁻¹ magnifies what that rounds
        assert_close(slot.B0 @ slot.A0, B @ A, atol=5e-4, rtol=1e-3)
        residual = matrix(bare.get_submodule(name)) - slot.scale * slot.B0 @ slot.A0
        assert_close(residual, matrix(layer.base_layer), atol=5e-4, rtol=1e-3)
        assert_close(slot.B0.norm(dim=0), B.norm(dim=0), atol=1e-4, rtol=1e-3)  # C has the same size, too


def test_covariances_in_several_passes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = BACKBONES["llama"].calibration()
    whole = attach(tiny_llama(), *batches, rank=2).tensors()
    monkeypatch.setattr(corda, "PASS_BYTES", 2 * 4 * 32 * 32)
    names = {"a": 32, "b": 32, "c": 48, "d": 8, "e": 8}
    assert list(corda.passes(names)) == [["a", "b"], ["c"], ["d", "e"]]
    parts = attach(tiny_llama(), *batches, rank=2).tensors()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_only_so_many_sequences_are_read() -> None:
    x = drawn(6, 20, 9)
    few = start(attach(Regression(6, 9), {"inputs": x}, rank=4, samples=4))
    assert torch.equal(few[0], start(attach(Regression(6, 9), {"inputs": x[:4]}, rank=4))[0])
    assert not torch.equal(few[0], start(attach(Regression(6, 9), {"inputs": x}, rank=4))[0])


def test_inputs_without_a_positive_value_or_without_any_still_give_a_start() -> None:
    x = -drawn(3, 20, 9).abs()
    x[:, 0, 0] = 0  # the signed maximum
    A0, B0, _ = start(attach(Regression(6, 9), {"inputs": x}, rank=4))
    assert A0.isfinite().all() and B0.isfinite().all()
    A0, B0, _ = start(attach(Regression(6, 9), {"inputs": torch.zeros(3, 20, 9)}, rank=6))
    assert_close(B0 @ A0, Regression(6, 9).layer.weight, atol=1e-5, rtol=1e-4)


def test_a_covariance_that_cannot_be_inverted_is_damped_until_it_can() -> None:
    row = drawn(1, 9)
    singular = (row.T @ row) * 1e6
    damped_, inverse = corda.invertible(singular)
    assert torch.dist(damped_ @ inverse, torch.eye(9)) < 0.05


def test_inputs_that_are_no_numbers_and_ranks_above_the_size_are_refused() -> None:
    with pytest.raises(InvalidInput, match="inputs of layer are not finite"):
        attach(Regression(6, 9), {"inputs": torch.full((2, 4, 9), torch.inf)}, rank=2)
    with pytest.raises(InvalidInput, match="rank 7 needs layers of 7"):
        attach(Regression(6, 9), {"inputs": drawn(2, 4, 9)}, rank=7)


def test_fewer_tokens_than_components_are_refused() -> None:
    with pytest.raises(InvalidInput, match="hold 3 tokens for layer, fewer than rank 4"):
        attach(Regression(6, 9), {"inputs": drawn(1, 3, 9)}, rank=4)
    attach(Regression(6, 9), {"inputs": drawn(2, 2, 9)}, rank=4)

"""The methods taken from peft against their papers' equations, written out by hand from the stored tensors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from infra.errors import InvalidInput
from tests.tiny_models import tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, logits, train
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.from_peft import FromPeft, split
from training.methods.peft_method import PeftAdapted

BATCH = BACKBONES["llama"].batch()
State = Callable[[str], Tensor]


def trained(method: str, model: nn.Module | None = None, **options: object) -> PeftAdapted:
    chosen = get_method(method)
    adapted = chosen.attach(model or tiny_llama(), chosen.config_type(**options), AttachContext(seed=3))
    train(adapted, BATCH, steps=3)
    return adapted


def skew(vector: Tensor, size: int) -> Tensor:
    Q = torch.zeros(size, size, dtype=vector.dtype)
    rows, columns = torch.triu_indices(size, size, 1)
    Q[rows, columns] = vector
    return Q - Q.T


def vera(W: Tensor, own: State, shared: State) -> Tensor:
    m, n = W.shape
    A, B = shared("vera_A")[:, :n], shared("vera_B")[:m]
    return W + own("vera_lambda_b").diag() @ B @ own("vera_lambda_d").diag() @ A


def loha(W: Tensor, own: State, shared: State) -> Tensor:
    return W + 3 / 2 * (own("hada_w1_a") @ own("hada_w1_b")) * (own("hada_w2_a") @ own("hada_w2_b"))


def lokr(W: Tensor, own: State, shared: State) -> Tensor:
    C, D = own("lokr_w1"), own("lokr_w2_a") @ own("lokr_w2_b")
    a = len(D)
    return W + 3 / 2 * torch.cat([torch.cat([c * D for c in row], dim=1) for row in C]).reshape(len(C) * a, -1)


def hira(W: Tensor, own: State, shared: State) -> Tensor:
    return W * (1 + own("hira_B") @ own("hira_A"))


def fourierft(W: Tensor, own: State, shared: State) -> Tensor:
    m, n = W.shape
    F = torch.zeros(m * n, dtype=torch.complex128)
    F[torch.randperm(m * n, generator=torch.Generator().manual_seed(777))[:12]] = own("fourierft_spectrum").cdouble()
    F = F.view(m, n)
    rows, columns = torch.arange(m).double(), torch.arange(n).double()
    left = torch.polar(torch.tensor(1.0).double(), 2 * torch.pi * rows[:, None] * rows / m)  # inverse DFT by its sum
    right = torch.polar(torch.tensor(1.0).double(), 2 * torch.pi * columns[:, None] * columns / n)
    return W + 20 * (left @ F @ right).real / (m * n)


def oft(W: Tensor, own: State, shared: State) -> Tensor:
    eye = torch.eye(8, dtype=W.dtype)
    blocks = [(eye - Q) @ torch.linalg.inv(eye + Q) for Q in (skew(v, 8) for v in own("oft_R.weight"))]
    return W @ torch.block_diag(*blocks).T


def boft(W: Tensor, own: State, shared: State) -> Tensor:
    eye = torch.eye(4, dtype=W.dtype)
    blocks = [(eye - Q) @ torch.linalg.inv(eye + Q) for Q in ((P - P.T) / 2 for P in own("boft_R")[0])]
    return own("boft_s") * (W @ torch.block_diag(*blocks).T)


def hra(W: Tensor, own: State, shared: State) -> Tensor:
    for u in own("hra_u").T:
        W = W - 2 * torch.outer(W @ u, u) / u.dot(u)
    return W


def miss(W: Tensor, own: State, shared: State) -> Tensor:
    block = own("miss_block")  # [r, m]: input j reads row j mod r
    return W + torch.stack([block[j % len(block)] for j in range(W.shape[1])], dim=1)


def c3a(W: Tensor, own: State, shared: State) -> Tensor:
    W = W.clone()
    kernel = own("c3a_kernel")  # [m/b, n/b, b]
    for i, row in enumerate(kernel):
        for j, c in enumerate(row):
            for p in range(8):
                for q in range(8):
                    W[i * 8 + p, j * 8 + q] += c[(q - p) % 8] / W.shape[1]
    return W


def road(W: Tensor, own: State, shared: State) -> Tensor:
    theta, alpha, out = own("road_theta"), own("road_alpha"), W.clone()
    for group in range(len(W) // 8):
        for i in range(4):
            a, s = theta[group * 4 + i], alpha[group * 4 + i]
            x, y = W[group * 8 + i], W[group * 8 + 4 + i]
            out[group * 8 + i] = s * (x * a.cos() - y * a.sin())
            out[group * 8 + 4 + i] = s * (x * a.sin() + y * a.cos())
    return out


EQUATIONS: list[tuple[str, dict[str, object], Callable[[Tensor, State, State], Tensor]]] = [
    ("vera", {"rank": 5}, vera),
    ("loha", {"rank": 2, "alpha": 3}, loha),
    ("lokr", {"rank": 2, "alpha": 3}, lokr),
    ("hira", {"rank": 3}, hira),
    ("fourierft", {"frequencies": 12, "scaling": 20.0}, fourierft),
    ("oft", {"block_size": 8, "neumann": False}, oft),
    ("boft", {"block_size": 4}, boft),
    ("hra", {"rank": 4}, hra),
    ("miss", {"rank": 4}, miss),
    ("c3a", {"block_size": 8}, c3a),
    ("road", {"group_size": 8}, road),
]


@pytest.mark.parametrize(("method", "options", "equation"), EQUATIONS, ids=[row[0] for row in EQUATIONS])
def test_the_forward_pass_is_the_papers_equation(method, options, equation) -> None:
    adapted = trained(method, targets=("q_proj", "down_proj"), **options)
    state = {name.removeprefix("base_model."): t.double() for name, t in adapted.tensors().items()}
    bare = tiny_llama()
    before = logits(bare, BATCH)
    places = [name for name, _ in bare.named_modules() if name.endswith(("q_proj", "down_proj"))]
    for place in places:
        weight = bare.get_submodule(place).weight
        changed = equation(weight.detach().double(), lambda key, p=place: state[f"model.{p}.{key}"], state.__getitem__)
        with torch.no_grad():
            weight.copy_(changed)
    assert len(places) == 4
    assert (logits(bare, BATCH) - before).abs().max() > 1e-2
    assert_close(logits(adapted.model, BATCH), logits(bare, BATCH), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 7, 30, 32, 48, 127, 128, 576, 4096, 11008])
@pytest.mark.parametrize("factor", [-1, 1, 4, 5, 8, 64])
def test_kronecker_factors_are_peft_s(size: int, factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    assert split(size, factor) == factorization(size, factor)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("oft", {"block_size": 7}, "block_size 7 does not divide its size 32"),
        ("boft", {"block_size": 5}, r"does not divide"),
        ("boft", {"block_size": 4, "factors": 2}, "CUDA"),
        ("c3a", {"block_size": 9}, "block_size 9 does not divide"),
        ("vb-lora", {"vector_length": 9}, "vector_length 9 does not divide"),
        ("road", {"group_size": 14}, "group_size 14 does not divide"),
        ("gralora", {"rank": 5}, "rank 5 is no multiple of blocks 2"),
        ("miss", {"rank": 40}, "rank 40 is above its 32 inputs"),
        ("fourierft", {"frequencies": 5000}, "has only 1024 entries"),
        ("shira", {"rank": 32}, "fewer than r"),
        ("vera", {"targets": ["nowhere"]}, "matches no module"),
        ("vera", {}, "rank 256 is above that of every layer: the largest has 32"),
        ("hra", {"rank": 40}, "rank 40 is above that of every layer: the largest has 32"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_left_as_it_was(method, options, message) -> None:
    model = tiny_llama()
    if torch.cuda.is_available() and message == "CUDA":
        pytest.skip("peft's extension may be there")
    with pytest.raises(InvalidInput, match=message):
        get_method(method).attach(model, get_method(method).config_type(**options), AttachContext())
    assert not hasattr(model, "peft_config")


def test_a_factor_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="no matrix has 0 rows"):
        get_method("lokr").config_type(factor=0)


@pytest.mark.parametrize("method", ["loha", "lokr", "oft", "boft", "hra", "miss", "c3a", "road", "delora", "shira"])
def test_a_conv1d_is_refused_where_peft_has_none(method: str) -> None:
    chosen = get_method(method)
    assert isinstance(chosen, FromPeft) and "gpt2" not in chosen.card.backbones
    with pytest.raises(InvalidInput, match=r"cannot adapt transformer\.h\.0\.attn\.c_attn .*Conv1D"):
        chosen.attach(tiny_gpt2(), chosen.config_type(), AttachContext())


@pytest.mark.parametrize(
    ("method", "first", "second"), [("vera", {"rank": 4}, {"rank": 3}), ("randlora", {}, {"projection_seed": 1})]
)
def test_adapters_on_one_model_must_agree_on_the_frozen_part(method, first, second) -> None:
    chosen = get_method(method)
    adapted = chosen.attach(tiny_llama(), chosen.config_type(**first), AttachContext())
    before = logits(adapted.model, BATCH)
    with pytest.raises(InvalidInput, match="share their frozen part"):
        chosen.attach(adapted.model, chosen.config_type(**second), AttachContext(), "second")
    assert torch.equal(logits(adapted.model, BATCH), before)


def test_hra_takes_pairs_of_reflections_only() -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        get_method("hra").config_type(rank=3)

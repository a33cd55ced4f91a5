"""SpIEL: the sparse layer against a dense one, optimisers against dense ones, drop and growth against brute force."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from infra.errors import CorruptArtifact, InvalidInput
from tests.tiny_models import tiny_gpt2, tiny_llama
from tests.training.methods.backbones import BACKBONES, loss
from tests.training.tiny_training import run, same_bits
from training.methods.contract import AttachContext
from training.methods.scaling_sft import METHOD, ScalingSftAdapted, ScalingSftConfig, best_products
from training.methods.sparse_delta import check_indices, shares
from training.options import TrainingOptions

BATCH = BACKBONES["llama"].batch()
GROWTHS = ["accumulated-gradient", "momentum"]


class Layer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, rows: int = 8, columns: int = 10, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layer = Conv1D(rows, columns) if transposed else nn.Linear(columns, rows)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(self.layer.weight.shape, generator=generator))
            self.layer.bias.copy_(torch.randn(rows, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def attach(model: nn.Module, total: int = 100, **options: Any) -> ScalingSftAdapted:
    return METHOD.attach(model, ScalingSftConfig(**options), AttachContext(seed=0, total_steps=total))


def only(adapted: ScalingSftAdapted) -> Any:
    (slot,) = adapted.slots().values()
    return slot


def inputs(step: int, columns: int = 10) -> Tensor:
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(step))


def dense(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    flat = torch.zeros(weight.numel())
    flat[indices.long()] = values.detach()
    return flat.view(weight.shape)


# -- the layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_dense_sum(transposed: bool, dtype: torch.dtype) -> None:
    adapted = attach(Layer(transposed=transposed).to(dtype), entries=17)
    slot, base = only(adapted), next(iter(adapted.layers().values())).base_layer
    slot.delta.values.data.normal_()
    x = inputs(0).to(dtype).requires_grad_()
    output = adapted.model(x)
    output.square().sum().backward()

    weight = (base.weight.float() + dense(base.weight, slot.delta.indices, slot.delta.values)).to(dtype)
    weight = weight.detach().requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected = functional.linear(y, weight.T if transposed else weight, base.bias)
    expected.square().sum().backward()
    assert_close(output, expected)
    assert_close(x.grad, y.grad)
    assert_close(slot.delta.values.grad, weight.grad.view(-1)[slot.delta.indices.long()].float())


def test_under_autocast_it_computes_what_the_dense_sum_does() -> None:
    adapted = attach(Layer(), entries=17)
    slot, base = only(adapted), adapted.layers()["layer"].base_layer
    slot.delta.values.data.normal_()
    weight = (base.weight + dense(base.weight, slot.delta.indices, slot.delta.values)).detach().requires_grad_()
    x, y = inputs(0).requires_grad_(), inputs(0).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = adapted.model(x), functional.linear(y, weight, base.bias)
        output.float().square().sum().backward()
        expected.float().square().sum().backward()
    assert output.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    assert_close(x.grad, y.grad)
    assert_close(slot.delta.values.grad, weight.grad.view(-1)[slot.delta.indices.long()])


def test_nothing_dense_outlives_the_forward_pass() -> None:
    adapted = attach(tiny_llama(), density=0.01)
    weights = {layer.base_layer.weight.data_ptr() for layer in adapted.layers().values()}
    sizes = {layer.base_layer.weight.shape for layer in adapted.layers().values()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss(adapted.model, BATCH)
    of_that_size = [tensor for tensor in kept if tensor.shape in sizes]
    assert of_that_size
    assert all(tensor.data_ptr() in weights for tensor in of_that_size)


class Products(TorchDispatchMode):
    """The shapes of all products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_the_weight_is_made_only_where_candidates_are_chosen(transposed: bool) -> None:
    adapted = attach(Layer(40, 30, transposed), total=40, entries=50, reselect_every=10, accumulate=3)
    optimizer, held = adapted.optimizer(0.05, 0.0), adapted.layers()["layer"].base_layer.weight.shape
    dense = []
    for step in range(25):
        x = inputs(step, 30).requires_grad_()  # of 5 tokens: no other product has the weight's shape
        with Products() as seen:
            adapted.model(x).square().mean().backward()
        if tuple(held) in seen.shapes:
            dense.append(step)
        optimizer.step()
        optimizer.zero_grad()
    assert dense == [0, 10, 20]


@pytest.mark.parametrize("growth", GROWTHS)
def test_the_optimisers_state_is_as_sparse_as_the_adapter(growth: str) -> None:
    adapted = attach(tiny_llama(), density=0.01, growth=growth)
    optimizer = adapted.optimizer(1e-2, 0.0)
    for _ in range(3):
        loss(adapted.model, BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    held = [*state["state"].values(), *filter(None, state["candidates"])]
    assert len(held) == len(adapted.slots()) * (2 if growth == "accumulated-gradient" else 1)
    stored = sum(tensor.numel() for part in held for tensor in part.values() if isinstance(tensor, Tensor))
    entries = METHOD.count(tiny_llama(), adapted.config)
    sides = sum(sum(slot.shape) for slot in adapted.slots().values())
    assert stored == (6 * entries if growth == "accumulated-gradient" else sides)


def test_entries_are_shared_out_by_size() -> None:
    adapted = attach(tiny_llama(), entries=1000)
    sizes = {name: layer.base_layer.weight.numel() for name, layer in adapted.layers().items()}
    counts = {name: len(slot.delta.values) for name, slot in adapted.slots().items()}
    assert sum(counts.values()) == 1000
    assert all(abs(counts[name] - 1000 * sizes[name] / sum(sizes.values())) < 1 for name in sizes)
    assert shares(5, [3, 0, 2]) == [3, 0, 2]
    model = tiny_gpt2()
    held = METHOD.count(model, ScalingSftConfig())
    assert held == int(0.01 * sum(parameter.numel() for parameter in model.parameters()))
    attach(model)
    assert METHOD.count(model, ScalingSftConfig()) == held


# -- optimisers --------------------------------------------------------------------------------------------------------


def test_with_fixed_indices_it_is_adamw_on_a_masked_dense_change() -> None:
    adapted = attach(Layer(), entries=17)
    adapted.total_steps = None
    slot, base = only(adapted), next(iter(adapted.layers().values())).base_layer
    optimizer = adapted.optimizer(0.05, 0.3)
    change = nn.Parameter(torch.zeros_like(base.weight))
    mask = dense(base.weight, slot.delta.indices, torch.ones(17))
    reference = torch.optim.AdamW([change], lr=0.05, weight_decay=0.3)
    for step in range(12):
        x = inputs(step)
        adapted.model(x).square().mean().backward()
        functional.linear(x, base.weight + change, base.bias).square().mean().backward()
        change.grad *= mask
        for one in (optimizer, reference):
            one.step()
            one.zero_grad()
    assert_close(slot.delta.values.data, change.data.view(-1)[slot.delta.indices.long()])
    assert slot.delta.values.abs().min() > 1e-3


def test_sm3_is_the_dense_one_with_gradients_zeroed_elsewhere() -> None:
    adapted = attach(Layer(), entries=17, growth="momentum")
    adapted.total_steps = None
    slot, base = only(adapted), next(iter(adapted.layers().values())).base_layer
    optimizer = adapted.optimizer(0.05, 0.0)
    mask = dense(base.weight, slot.delta.indices, torch.ones(17))
    change, rows, columns = torch.zeros(8, 10), torch.zeros(8, 1), torch.zeros(1, 10)
    for step in range(6):
        x = inputs(step)
        weight = (base.weight + change).detach().requires_grad_()
        functional.linear(x, weight, base.bias).square().mean().backward()
        gradient = weight.grad * mask
        bound = torch.minimum(rows, columns) + gradient**2
        change -= 0.05 * gradient / (bound + 1e-8).sqrt()
        rows, columns = bound.amax(1, keepdim=True), bound.amax(0, keepdim=True)
        adapted.model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(dense(base.weight, slot.delta.indices, slot.delta.values), change)
    state = optimizer.state[slot.delta.values]
    assert_close(state["rows"], rows[:, 0])
    assert_close(state["columns"], columns[0])


@pytest.mark.parametrize("most", [1, 25, 2**22])
def test_the_best_products_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("training.methods.scaling_sft.MOST_SCORES", most)
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.rand(7, generator=generator), torch.rand(9, generator=generator)
    active = torch.randperm(63, generator=generator)[:20].int()
    scores = torch.outer(rows, columns).view(-1)
    scores[active.long()] = -1
    expected = scores.argsort(descending=True)[:15]
    assert best_products(rows, columns, active, 15).tolist() == expected.tolist()
    assert len(best_products(rows, columns, active, 60)) == 43  # no more are inactive


# -- dropping and growing ----------------------------------------------------------------------------------------------


def test_the_share_that_is_replaced() -> None:
    linear = ScalingSftConfig()
    found = {step: linear.share(step, 100) for step in range(1, 200) if linear.share(step, 100)}
    assert found == {5: 1.0, **{t: pytest.approx(0.2 * (1 - t / 100)) for t in (25, 45, 65, 85)}}
    cosine = ScalingSftConfig(schedule="cosine", reselect_every=10, accumulate=3, replace=0.4)
    assert cosine.share(3, 20) == pytest.approx(0.2 * (1 + math.cos(math.pi * 0.15)))
    assert [step for step in range(40) if cosine.share(step, 20)] == [3, 13]
    assert [step for step in range(40) if cosine.gathers(step, 20)] == [0, 10]
    assert not any(ScalingSftConfig(growth="momentum").gathers(step, 100) for step in range(100))


class Driven:
    """A training of one layer, with the dense gradients of its backward passes and what each reselection found."""

    def __init__(self, adapted: ScalingSftAdapted, rate: float = 0.05) -> None:
        self.adapted, self.slot = adapted, only(adapted)
        self.base = next(iter(adapted.layers().values())).base_layer
        self.held = self.base.weight.detach().clone()
        self.optimizer: Any = adapted.optimizer(rate, 0.0)
        self.found: dict[str, Tensor] | None = None
        regrow = self.optimizer.regrow

        def watched(slot: Any, count: int) -> None:
            state = {name: tensor.clone() for name, tensor in self.optimizer.state[slot.delta.values].items()}
            self.found = {"values": slot.delta.values.detach().clone(), "indices": slot.delta.indices.clone(), **state}
            regrow(slot, count)

        self.optimizer.regrow = watched

    def step(self, number: int, micro_batches: int = 2) -> list[Tensor]:
        """One update; the flat G of each of its backward passes."""
        self.found = None
        gradients = []
        for micro in range(micro_batches):
            x = inputs(number * 10 + micro)
            change = dense(self.base.weight, self.slot.delta.indices, self.slot.delta.values)
            weight = (self.base.weight + change).detach().requires_grad_()
            (functional.linear(x, weight, self.base.bias).square().mean() / micro_batches).backward()
            gradients.append(weight.grad.view(-1))
            (self.adapted.model(x).square().mean() / micro_batches).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        indices = self.slot.delta.indices.tolist()
        assert len(set(indices)) == len(indices)
        assert all(0 <= index < self.base.weight.numel() for index in indices)
        assert torch.equal(self.base.weight, self.held)
        return gradients

    def check_survivors(self, gone: list[int], fresh: list[int]) -> None:
        """Every entry but those of `gone` is where it was, with all of its state; in their places are `fresh`, at 0."""
        before = self.found["indices"].tolist()
        for place, index in enumerate(self.slot.delta.indices.tolist()):
            assert (index == before[place]) is (before[place] not in gone)
            if index in fresh:
                assert self.slot.delta.values[place] == 0
            else:
                assert self.slot.delta.values[place] == self.found["values"][place]
                for name in ("age", "first", "second"):
                    if name in self.found:
                        assert self.optimizer.state[self.slot.delta.values][name][place] == self.found[name][place]
        assert set(self.slot.delta.indices.tolist()) == (set(before) - set(gone)) | set(fresh)


def smallest(found: dict[str, Tensor], count: int) -> list[int]:
    sizes = dict(zip(found["indices"].tolist(), found["values"].abs().tolist(), strict=True))
    return sorted(sizes, key=lambda index: sizes[index])[:count]


def test_growth_by_gradient_is_that_of_brute_force() -> None:
    driven = Driven(attach(Layer(), total=17, entries=20, reselect_every=5, accumulate=3, replace=0.6))
    replaced, phase = [], []
    for step in range(1, 18):
        gradients = driven.step(step)
        phase = [gradients] if step % 5 == 1 else [*phase, gradients]
        share = 1.0 if step == 3 else 0.6 * (1 - step / 17) if step in (8, 13) else 0
        assert (driven.found is not None) is (share > 0)
        if not share:
            continue
        candidates = phase[0][0].abs().topk(20).indices.tolist()
        total = sum(sum(update) for update in phase)
        squares = sum(sum(update) ** 2 for update in phase)
        dropped = smallest(driven.found, int(share * 20))
        remaining = set(driven.found["indices"].tolist()) - set(dropped)
        grown = sorted(set(candidates) - remaining, key=lambda index: -abs(total[index]))[: len(dropped)]
        fresh = [index for index in grown if index not in dropped]
        gone = [index for index in dropped if index not in grown][: len(fresh)]
        driven.check_survivors(gone, fresh)
        replaced.append((len(fresh), len(dropped)))
        state = driven.optimizer.state[driven.slot.delta.values]
        for place, index in enumerate(driven.slot.delta.indices.tolist()):
            if index in fresh:
                assert state["age"][place] == 3
                assert_close(state["first"][place], total[index] / 3 * (1 - 0.9**3), rtol=1e-4, atol=1e-7)
                assert_close(state["second"][place], squares[index] / 3 * (1 - 0.999**3), rtol=1e-4, atol=1e-9)
    assert len(replaced) == 3
    assert all(0 < fresh <= dropped for fresh, dropped in replaced)
    assert any(fresh < dropped for fresh, dropped in replaced)  # some were grown again, or candidates were too few


def test_growth_by_moments_is_that_of_brute_force() -> None:
    options = {"growth": "momentum", "reselect_every": 5, "accumulate": 3, "replace": 0.6}
    driven = Driven(attach(Layer(), total=17, entries=20, **options))
    reselections = 0
    for step in range(1, 18):
        driven.step(step)
        share = 1.0 if step == 3 else 0.6 * (1 - step / 17) if step in (8, 13) else 0
        assert (driven.found is not None) is (share > 0)
        if share:
            reselections += 1
            scores = torch.outer(driven.found["rows"], driven.found["columns"]).view(-1)
            scores[driven.found["indices"].long()] = -1
            count = int(share * 20)
            fresh = sorted(set(driven.slot.delta.indices.tolist()) - set(driven.found["indices"].tolist()))
            assert torch.equal(scores[fresh].sort().values, scores.sort().values[-count:])  # many products are equal
            driven.check_survivors(smallest(driven.found, count), fresh)
    assert reselections == 3


def test_equal_entries_and_a_layer_without_gradient() -> None:
    driven = Driven(attach(Layer(), total=17, entries=20, reselect_every=5, accumulate=3), rate=0.0)
    for step in range(1, 4):  # at a rate of zero every |δ| is zero
        driven.step(step)
    assert driven.found is not None
    assert (driven.slot.delta.values == 0).all()
    idle = attach(Layer(), total=17, entries=20, reselect_every=5, accumulate=3)
    optimizer, before = idle.optimizer(0.05, 0.0), only(idle).delta.indices.clone()
    for _ in range(6):
        optimizer.step()
    assert torch.equal(only(idle).delta.indices, before)


@pytest.mark.parametrize("growth", GROWTHS)
def test_it_finds_the_entries_that_differ_and_beats_a_fixed_random_mask(growth: str) -> None:
    """The teacher is the base with 12 of its 144 weights changed, in three rows and four columns."""
    teacher = Layer(12, 12)
    secret = [row * 12 + column for row in (1, 6, 8) for column in (0, 5, 7, 9)]
    with torch.no_grad():
        teacher.layer.weight.view(-1)[secret] += 3.0

    def train(total: int | None) -> tuple[list[int], float]:
        adapted = attach(Layer(12, 12), total=200, entries=40, growth=growth)
        adapted.total_steps = total
        optimizer = adapted.optimizer(0.05 if growth == "accumulated-gradient" else 0.3, 0.0)
        overlaps = []
        for step in range(200):
            x = torch.randn(32, 12, generator=torch.Generator().manual_seed(step))
            difference = functional.mse_loss(adapted.model(x), teacher(x).detach())
            difference.backward()
            optimizer.step()
            optimizer.zero_grad()
            overlaps.append(len(set(secret) & set(only(adapted).delta.indices.tolist())))
        return overlaps, difference.item()

    overlaps, moving = train(200)
    still, fixed = train(None)
    assert len(set(still)) == 1
    assert overlaps[0] == still[0] <= 4
    assert overlaps[-1] == 12
    assert moving < 0.2 * fixed


# -- resuming, and errors ----------------------------------------------------------------------------------------------


def fresh_llama(growth: str) -> ScalingSftAdapted:
    options = {"density": 0.02, "growth": growth, "reselect_every": 6, "accumulate": 4}
    return attach(tiny_llama(), total=14, **options)


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("crash", [4, 9])  # the checkpoint before it: within a phase, and within the second one
def test_a_crashed_training_resumes_to_the_same_bits(tmp_path: Path, growth: str, crash: int) -> None:
    options = TrainingOptions(
        steps=14, batch_size=4, gradient_accumulation=2, learning_rate=1e-2, weight_decay=0.1, checkpoint_every=2
    )

    def stop(event: Any) -> None:
        if event.step == crash:
            raise RuntimeError("the power is gone")

    whole, _ = run(tmp_path / "whole", options, fresh_llama(growth))
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "crashed", options, fresh_llama(growth), on_event=stop)
    resumed, outcome = run(tmp_path / "crashed", options, fresh_llama(growth))
    assert outcome.resumed_from == (crash - 1) // 2 * 2
    assert same_bits(resumed.tensors(), whole.tensors())
    started = fresh_llama(growth).tensors()
    moved = [not torch.equal(t, started[name]) for name, t in whole.tensors().items() if name.endswith("indices")]
    assert all(moved)


def test_two_processes_grow_the_same_entries_from_different_data(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path / "meeting"),), nprocs=2)


def _one_of_two(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    adapted = attach(Layer(), total=17, entries=20, reselect_every=5, accumulate=3)
    parallel, optimizer, slot = DistributedDataParallel(adapted.model), adapted.optimizer(0.05, 0.0), only(adapted)
    started = slot.delta.indices.clone()
    for step in range(10):
        parallel(inputs(step * 2 + rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for tensor in (slot.delta.indices, slot.delta.values.data, *optimizer.state[slot.delta.values].values()):
            other = tensor.clone()
            dist.broadcast(other, 0)
            assert torch.equal(other, tensor)
    assert not torch.equal(slot.delta.indices, started)
    dist.barrier()
    os._exit(0)  # see training/launch.py


def test_a_loaded_adapter_keeps_its_places(tmp_path: Path) -> None:
    adapted = attach(Layer(), entries=20)
    adapted.save(tmp_path)
    driven = Driven(METHOD.load(Layer(), tmp_path))
    for step in range(8):
        driven.step(step)
    assert torch.equal(driven.slot.delta.indices, only(adapted).delta.indices)
    assert driven.slot.delta.values.abs().min() > 0


def test_what_does_not_go_is_said() -> None:
    with pytest.raises(InvalidInput, match="needs the number of training steps"):
        METHOD.attach(Layer(), ScalingSftConfig(), AttachContext())
    with pytest.raises(InvalidInput, match="In 5 training steps there is no selection after step 5"):
        attach(Layer(), total=5)
    with pytest.raises(InvalidInput, match="81 entries are to train, but the adapted layers have 80"):
        attach(Layer(), entries=81)
    with pytest.raises(InvalidInput, match="matches no module"):
        attach(Layer(), targets=("q_proj",))
    with pytest.raises(ValueError, match="accumulate must be below reselect_every, 20; it is 20"):
        ScalingSftConfig(accumulate=20)


@pytest.mark.parametrize(
    ("indices", "message"),
    [([0, 80], "outside the tensor"), ([-1, 3], "outside the tensor"), ([3, 3], "twice"), ([[1], [2]], "no indices")],
)
def test_indices_that_are_none_are_refused(tmp_path: Path, indices: list[Any], message: str) -> None:
    adapted = attach(Layer(), entries=2)
    only(adapted).delta.indices = torch.tensor(indices, dtype=torch.int32)
    adapted.save(tmp_path)
    with pytest.raises(CorruptArtifact, match=message):
        METHOD.load(Layer(), tmp_path)
    with pytest.raises(CorruptArtifact, match="no indices"):
        check_indices(torch.zeros(2), torch.zeros(2), 4)

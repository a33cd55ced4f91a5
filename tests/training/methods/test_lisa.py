"""LISA: who is awake when, and what becomes of those who sleep."""

from functools import partial
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from infra.errors import InvalidInput
from tests.tiny_models import tiny_llama, tiny_t5
from tests.training.methods.backbones import BACKBONES, loss
from tests.training.tiny_training import EXAMPLES, OPTIONS, run, same_bits
from training.methods.catalog import get_method
from training.methods.contract import AttachContext
from training.methods.lisa import METHOD, LisaAdapted, LisaConfig
from training.options import TrainingOptions
from training.progress import OnEvent, TrainingEvent
from training.recipe import Recipe, recipe_from

BATCH = BACKBONES["llama"].batch()
BLOCKS = 6


def attach(model: nn.Module | None = None, seed: int = 0, **options: Any) -> LisaAdapted:
    return METHOD.attach(model or tiny_llama(layers=BLOCKS), LisaConfig(**options), AttachContext(seed=seed))


def options(**changed: Any) -> TrainingOptions:
    return TrainingOptions.model_validate({**OPTIONS.model_dump(), **changed})


def block_of(name: str) -> int | None:
    return int(name.split(".")[2]) if ".layers." in name else None


def awake(adapted: LisaAdapted) -> set[int]:
    """Judged by the parameters themselves: a block is awake or asleep as a whole."""
    flags: dict[int, set[bool]] = {}
    for name, parameter in adapted.model.named_parameters():
        if (block := block_of(name)) is not None:
            flags.setdefault(block, set()).add(parameter.requires_grad)
        else:
            assert parameter.requires_grad is adapted.config.embeddings_and_head
    assert all(len(found) == 1 for found in flags.values())
    return {block for block, (flag,) in flags.items() if flag}


def changed(adapted: LisaAdapted) -> set[str]:
    before = tiny_llama(layers=BLOCKS).state_dict()
    return {name for name, tensor in adapted.tensors().items() if not torch.equal(tensor, before[name])}


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Elements of Adam's two moments."""
    return sum(state[key].numel() for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))


class Loop:
    """Updates written out by hand, with the adapter's own optimiser and callback."""

    def __init__(self, adapted: LisaAdapted, rate: float = 1e-2) -> None:
        self.adapted, self.step = adapted, 0
        self.optimizer = adapted.optimizer(rate, 0.1)
        (self.callback,) = adapted.callbacks()
        self.callback.on_train_begin(None, SimpleNamespace(global_step=0), None, optimizer=self.optimizer)

    def begin(self) -> None:
        self.callback.on_step_begin(None, SimpleNamespace(global_step=self.step), None, optimizer=self.optimizer)

    def update(self) -> None:
        self.begin()
        loss(self.adapted.model, BATCH).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1


def test_with_every_block_awake_it_is_full_fine_tuning_to_the_bit(tmp_path: Path) -> None:
    chosen = options(steps=7, weight_decay=0.1)
    full = get_method("full")
    expected = full.attach(tiny_llama(layers=BLOCKS), full.config_type(), AttachContext())
    run(tmp_path / "full", chosen, expected)
    lisa, _ = run(tmp_path / "lisa", chosen, attach(layers=BLOCKS, interval=2))
    assert same_bits(lisa.tensors(), expected.tensors())


@pytest.mark.parametrize("outside", [True, False])
def test_in_one_interval_only_what_is_awake_moves_even_by_weight_decay(tmp_path: Path, outside: bool) -> None:
    adapted = attach(layers=2, interval=20, embeddings_and_head=outside)
    drawn, names = awake(adapted), {name for name, _ in adapted.model.named_parameters()}
    assert len(drawn) == 2
    run(tmp_path, options(steps=4, weight_decay=0.1), adapted)
    assert awake(adapted) == drawn
    expected = {name for name in names if block_of(name) in drawn or (outside and block_of(name) is None)}
    assert changed(adapted) == expected


def test_blocks_are_drawn_every_k_updates_whatever_the_accumulation(tmp_path: Path) -> None:
    adapted = attach(layers=1, interval=3, seed=1)
    drawn: list[set[int]] = []
    run(
        tmp_path,
        options(steps=9, batch_size=4, gradient_accumulation=2),
        adapted,
        on_event=lambda event: drawn.append(awake(adapted)),
    )
    assert drawn == [draw for draw in drawn[::3] for _ in range(3)]
    assert len({frozenset(draw) for draw in drawn}) > 1
    moved = {block_of(name) for name in changed(adapted)} - {None}
    assert moved == set.union(*drawn)


def test_moments_are_those_of_the_awake_and_grow_where_they_are_kept() -> None:
    block = sum(parameter.numel() for parameter in tiny_llama(layers=BLOCKS).model.layers[0].parameters())
    everything = sum(parameter.numel() for parameter in tiny_llama(layers=BLOCKS).parameters())
    bound = 2 * (everything - (BLOCKS - 2) * block)
    dropping, keeping = Loop(attach(layers=2, interval=2)), Loop(attach(layers=2, interval=2, keep_moments=True))
    seen: set[int] = set()
    for _ in range(8):
        dropping.update()
        keeping.update()
        seen |= awake(keeping.adapted)
        assert moments(dropping.optimizer) == bound
        assert moments(keeping.optimizer) == bound + 2 * (len(seen) - 2) * block
    assert len(seen) > 3


def test_what_wakes_again_starts_afresh_and_what_stayed_awake_goes_on() -> None:
    loop = Loop(attach(layers=2, interval=1))
    ages: dict[int, int] = {}
    for _ in range(12):
        loop.update()
        ages = {block: ages.get(block, 0) + 1 for block in awake(loop.adapted)}
        for name, parameter in loop.adapted.model.named_parameters():
            if parameter.requires_grad:
                expected = ages.get(block_of(name), loop.step) if block_of(name) is not None else loop.step
                assert loop.optimizer.state[parameter]["step"] == expected
    assert max(ages.values()) < loop.step


def test_a_gradient_does_not_outlive_the_block_that_it_belongs_to() -> None:
    loop = Loop(attach(layers=2, interval=1))
    for loop.step in range(4):
        loop.begin()
        loss(loop.adapted.model, BATCH).backward()  # and no optimiser's step
    loop.begin()
    with_gradient = {name for name, p in loop.adapted.model.named_parameters() if p.grad is not None}
    assert with_gradient <= set(loop.adapted.trainable())


def test_less_is_kept_for_the_backward_pass_than_in_full_fine_tuning() -> None:
    def kept(adapted: LisaAdapted) -> int:
        own = {parameter.untyped_storage().data_ptr() for parameter in adapted.model.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(adapted.model, BATCH)
        return sum(sizes.values())

    assert kept(attach(layers=2)) < 0.9 * kept(attach(layers=BLOCKS))


def test_every_block_is_drawn_as_often_as_any_other() -> None:
    """Distinct blocks after S draws: N(1 − (1 − γ/N)^S) on average; each block in γ/N of the draws."""
    adapted, trials, draws = attach(layers=2), 400, 4
    distinct, counts = 0, torch.zeros(BLOCKS)
    for adapted.seed in range(trials):
        found: set[str] = set()
        for adapted.interval in range(draws):
            drawn = adapted.awake()
            assert len(set(drawn)) == 2
            for name in drawn:
                counts[int(name.rpartition(".")[2])] += 1
            found |= set(drawn)
        distinct += len(found)
    assert distinct / trials == pytest.approx(BLOCKS * (1 - (1 - 2 / BLOCKS) ** draws), abs=3 * 0.8 / sqrt(trials))
    expected = trials * draws * 2 / BLOCKS
    assert ((counts - expected) ** 2 / expected).sum() < 15.1  # χ² of 5 degrees of freedom: 1 %


def test_the_draw_is_the_seeds_and_the_intervals_and_nobody_elses() -> None:
    def schedule(seed: int) -> list[list[str]]:
        adapted = attach(layers=2, seed=seed)
        return [adapted.awake() for adapted.interval in range(10)]

    first = schedule(7)
    torch.manual_seed(99)
    assert schedule(7) == first != schedule(8)


def stop_at(step: int) -> OnEvent:
    def listen(event: TrainingEvent) -> None:
        if event.step == step:
            raise RuntimeError("the power is gone")

    return listen


# Checkpoints at 4 and 8: within an interval of three, and where one of two ends.
@pytest.mark.parametrize(("interval", "crash"), [(3, 6), (3, 10), (2, 5)])
@pytest.mark.parametrize("keep_moments", [False, True])
def test_a_training_resumes_with_the_same_blocks_to_the_same_bits(
    tmp_path: Path, interval: int, crash: int, keep_moments: bool
) -> None:
    chosen = options(steps=11, checkpoint_every=4, weight_decay=0.1)

    def fresh() -> LisaAdapted:
        return attach(layers=2, interval=interval, seed=5, keep_moments=keep_moments)

    whole, expected = run(tmp_path / "whole", chosen, fresh())
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "crashed", chosen, fresh(), on_event=stop_at(crash))
    resumed, outcome = run(tmp_path / "crashed", chosen, fresh())
    assert outcome.resumed_from == crash // 4 * 4
    assert outcome.losses == expected.losses
    assert awake(resumed) == awake(whole)
    assert same_bits(resumed.tensors(), whole.tensors())


def test_the_seed_is_stored_with_the_tensors(tmp_path: Path) -> None:
    adapted = attach(layers=2, seed=11)
    adapted.save(tmp_path)
    loaded = METHOD.load(tiny_llama(layers=BLOCKS), tmp_path)
    assert awake(loaded) == awake(adapted)
    assert loaded.config == adapted.config
    assert any(awake(attach(layers=2, seed=seed)) != awake(adapted) for seed in range(5))


def test_the_update_of_a_visited_weight_has_full_rank(tmp_path: Path) -> None:
    adapted = attach(layers=1)
    (block,) = awake(adapted)
    run(tmp_path, options(steps=20, batch_size=20), adapted, examples=EXAMPLES)
    name = f"model.layers.{block}.self_attn.q_proj.weight"
    update = adapted.tensors()[name] - tiny_llama(layers=BLOCKS).state_dict()[name]
    singular = torch.linalg.svdvals(update.double())
    assert singular[-1] > 1e-5 * singular[0]


def test_a_shift_of_full_rank_is_learned_better_than_by_a_lora_of_rank_one() -> None:
    """Distilled from a model, all matrices of two of whose four blocks were moved at random; each at its best rate."""
    build = partial(tiny_llama, layers=4)
    teacher, random = build(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in (1, 2):
            for parameter in teacher.model.layers[block].parameters():
                if parameter.ndim == 2:
                    shift = torch.randn(parameter.shape, generator=random)
                    parameter += 0.5 * parameter.std() * shift

    def distance(method: str, rate: float, steps: int = 100, **chosen: Any) -> float:
        """KL divergence from the teacher, over the last ten batches."""
        adapted = get_method(method).attach(build(), get_method(method).config_type(**chosen), AttachContext())
        optimizer = adapted.optimizer(rate, 0.0) or torch.optim.AdamW(adapted.trainable().values(), weight_decay=0.0)
        draws, found = torch.Generator().manual_seed(1), []
        for step in range(steps):
            for callback in adapted.callbacks():
                callback.on_step_begin(None, SimpleNamespace(global_step=step), None, optimizer=optimizer)
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            ids = torch.randint(3, 259, (8, 8), generator=draws)
            with torch.no_grad():
                wanted = teacher(input_ids=ids).logits.log_softmax(-1)
            shown = adapted.model(input_ids=ids).logits.log_softmax(-1)
            divergence = functional.kl_div(shown, wanted, reduction="sum", log_target=True) / ids.numel()
            divergence.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(divergence.item())
        return sum(found[-10:]) / 10

    lora = min(distance("lora", rate, rank=1) for rate in (1e-2, 3e-2))
    assert distance("lisa", 2e-3, layers=2, interval=20) < 0.8 * lora


def test_a_merged_model_trains_as_a_whole() -> None:
    merged = attach().merge()
    assert all(parameter.requires_grad for parameter in merged.parameters())
    get_method("lora").attach(merged, get_method("lora").config_type(), AttachContext())  # and takes an adapter


@pytest.mark.parametrize(
    ("build", "chosen", "message"),
    [
        (lambda: tiny_llama(layers=BLOCKS), {"layers": 7}, "method.layers is 7, but LlamaForCausalLM has 6 blocks"),
        (tiny_t5, {}, r"blocks of one size; in T5ForConditionalGeneration, encoder\.block\.\d has [\d,]+ parameters"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), {}, "finds no stack of blocks in Sequential"),
    ],
    ids=["too many", "unlike blocks", "no blocks"],
)
def test_what_it_cannot_train_is_refused_and_left_alone(build: Any, chosen: dict[str, int], message: str) -> None:
    model = build()
    with pytest.raises(InvalidInput, match=message):
        attach(model, **chosen)
    assert all(parameter.requires_grad for parameter in model.parameters())
    get_method("full").attach(model, get_method("full").config_type(), AttachContext())


def test_another_method_cannot_join() -> None:
    adapted = attach()
    for other in ("full", "lora", "pissa"):
        with pytest.raises(InvalidInput, match="carries"):
            get_method(other).attach(adapted.model, get_method(other).config_type(), AttachContext(), "second")


def test_several_processes_are_refused() -> None:
    content = {"adapter": "a", "base": "path:model", "data": {"task": "navigate"}, "method": "lisa"}
    assert isinstance(recipe_from(content, "r.yaml"), Recipe)
    with pytest.raises(InvalidInput, match=r"training\.processes does not go with 'lisa'"):
        recipe_from(content, "r.yaml", {"training.processes": 2})

"""AdaLoRA's allocation against peft's own, its regulariser against the formula, and a training that resumes."""

import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator

from infra.errors import InvalidInput
from tests.tiny_models import tiny_llama
from tests.training.methods.backbones import BACKBONES, loss
from tests.training.tiny_training import OPTIONS, run, same_bits
from training.methods.adalora import METHOD, AdaLoraAdapted, Allocation
from training.methods.contract import AttachContext
from training.options import TrainingOptions

BATCH = BACKBONES["llama"].batch()
FAST = {"rank": 2, "initial_rank": 4, "warmup": 0.2, "final": 0.3, "interval": 2}


def attached(steps: int | None = 20, **options: object) -> AdaLoraAdapted:
    config = METHOD.config_type(**{**FAST, **options})
    return METHOD.attach(tiny_llama(), config, AttachContext(seed=0, total_steps=steps))


def test_the_allocation_is_peft_s_step_by_step() -> None:
    mine, theirs = attached(), attached()
    allocator = RankAllocator(theirs.model.base_model.model, theirs.peft_config, "default")
    allocation = Allocation(mine)
    optimisers = [torch.optim.AdamW(adapted.trainable().values(), lr=0.05) for adapted in (mine, theirs)]
    dropped = []
    pattern = None
    for step in range(20):
        for adapted, optimiser in zip((mine, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            loss(adapted.model, BATCH).backward()
            optimiser.step()
        allocation.step(step, optimisers[0].state)
        if step <= 14:
            _, found = allocator.update_and_allocate(theirs.model.base_model.model, step, force_mask=step == 14)
            pattern = found or pattern
        else:
            allocator.mask_using_rank_pattern(theirs.model.base_model.model, pattern)
        for name, tensor in mine.tensors().items():
            assert torch.allclose(tensor, theirs.tensors()[name], atol=1e-6), (step, name)
        dropped.append(sum(int((part["E"] == 0).sum()) for part in mine.parts))
    layers = len(mine.parts)
    assert dropped[4] == 0 < dropped[6] < dropped[-1]
    assert dropped[-6:] == [2 * layers] * 6  # from step 14 on exactly r a layer on average, and for good


def test_ranks_go_where_the_gradient_is() -> None:
    adapted = attached(final=0.0, interval=1)
    allocation, memory = Allocation(adapted), {p: {} for p in adapted.trainable().values()}
    favoured = adapted.parts[0]
    for step in range(21):
        for parameter in memory:
            is_favoured = any(parameter is mine for mine in favoured.values())
            parameter.data = torch.ones_like(parameter)
            parameter.grad = torch.full_like(parameter, (10.0 if is_favoured else 1.0) * (1 + step % 3))
        allocation.step(step, memory)
    assert (favoured["E"] != 0).all()


def test_the_regulariser_is_the_mean_distance_from_orthonormal() -> None:
    adapted = attached(orthogonality=0.3)
    distances = [
        ((rows @ rows.T - torch.eye(4)) ** 2).sum().sqrt().item()
        for name, tensor in adapted.tensors().items()
        if name.endswith(("lora_A", "lora_B"))
        for rows in [tensor if name.endswith("lora_A") else tensor.T]
    ]
    extra = adapted.extra_loss(None, {})
    assert extra.item() == pytest.approx(0.3 * sum(distances) / len(distances), rel=1e-5)
    assert attached(orthogonality=0.0).extra_loss(None, {}) is None


def test_a_training_resumes_to_the_same_bits_and_ends_within_its_budget(tmp_path) -> None:
    chosen = TrainingOptions.model_validate({**OPTIONS.model_dump(), "checkpoint_every": 4})

    def cut(event) -> None:
        if event.step == 14:
            raise RuntimeError("the power is gone")

    whole, _ = run(tmp_path / "whole", chosen, attached())
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "cut", chosen, attached(), on_event=cut)
    resumed, outcome = run(tmp_path / "cut", chosen, attached())
    assert outcome.resumed_from == 12
    assert same_bits(resumed.tensors(), whole.tensors())
    assert sum(int((part["E"] != 0).sum()) for part in whole.parts) == 2 * len(whole.parts)


def test_a_schedule_needs_to_know_its_steps() -> None:
    with pytest.raises(InvalidInput, match="how many steps"):
        attached(steps=None)
    with pytest.raises(InvalidInput, match="too few"):
        attached(steps=0)
    with pytest.raises(ValueError, match="no lower than rank"):
        METHOD.config_type(rank=8, initial_rank=4)
    with pytest.raises(ValueError, match="less than 1 together"):
        METHOD.config_type(warmup=0.5, final=0.5)

"""The contract, claim by claim, for every method on every backbone that its card names.

A new method is one line in CASES; test_every_method_of_the_catalogue_is_tried sees to it that none is forgotten.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.testing import assert_close

from infra.errors import Conflict, CorruptArtifact, InvalidInput, NotMergeable
from tests.tiny_models import tiny_tokenizer
from tests.training.methods.backbones import BACKBONES, logits, loss, train
from training.methods.borrowing import borrowed
from training.methods.catalog import CATALOG, get_method
from training.methods.contract import TENSORS_FILE, Adapted, AttachContext
from training.methods.peft_method import PeftMethod


@dataclass(frozen=True)
class Case:
    """A method with options small enough for tiny models.

    Args:
        draws: whether its start depends on the seed.
        near: how far a fresh adapter's logits may be from the base's where the card promises that they are the same;
            more than rounding for a start that is drawn very small instead of zero.
        identity: what the card says, where these options change it.
        backbones: which of the card's are tried, where these options do not go with all.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    draws: bool = True
    near: float = 1e-5
    identity: bool | Literal["nearly"] | None = None
    backbones: tuple[str, ...] | None = None


DEMONSTRATIONS = [{"input": "2+3", "output": "5"}, {"input": "4+4", "output": "8"}]

NO_HEAD = r"(?!.*(lm_head|classifier)$).*"  # a head of three classes fits no block

CASES = [
    Case("lora", {"rank": 4, "alpha": 8}),
    Case("rslora", {"rank": 4, "alpha": 8}),
    Case("dora", {"rank": 4, "dropout": 0.0}),
    Case("pissa", {"rank": 2, "alpha": 4}, draws=False),
    Case("s2ft", {"output": 0.25, "down": 0.1}),
    Case("s2ft", {"output": 0, "down": 0, "value": 0.25, "up": 0.1}, label="rows"),
    Case("s2ft", {"output": 0.25, "down": 0.1, "selection": "gradient"}, label="gradient", draws=False),
    Case("paca", {"rank": 4, "alpha": 8}),
    Case("ist", {"rank": 4, "alpha": 8, "dropout": 0.0}),
    Case("corda", {"rank": 2, "alpha": 4}, draws=False),
    Case("corda", {"rank": 2, "mode": "kpm"}, label="kpm", draws=False),
    Case("eva", {"rank": 2, "alpha": 4}, draws=False),
    Case("lora-ga", {"rank": 1, "alpha": 2}, draws=False),
    Case("lora-xs", {"rank": 3, "alpha": 6}, near=1e-3),
    Case("lora-xs", {"rank": 3, "store_factors": False}, label="small", near=1e-3),
    Case("lora-sb", {"rank": 3, "learning_rate": 0.01}, draws=False),
    Case("loldu", {"rank": 4}, draws=False),
    Case("loldu", {"rank": 4, "train_scale": True, "store_factors": True}, label="stored", draws=False),
    Case("hydra", {"parallel_rank": 2, "sequential_rank": 3}),
    Case("llm-adapters", {"bottleneck": 8, "scale": "learned"}, label="series"),
    Case("llm-adapters", {"placement": "parallel", "bottleneck": 8, "init": "mam"}, label="parallel", identity=True),
    Case("small-models-lrl", {"reduction": 4}),
    Case(
        "small-models-lrl",
        {"reduction": 4, "invertible": True},
        label="invertible",
        backbones=("llama", "gpt2", "gemma3_text", "bert"),
    ),
    Case("compacter", {"reduction": 4}),
    Case("compacter", {"reduction": 4, "attention": False, "layer_norms": False}, label="feedforward"),
    Case("vera", {"rank": 4}, draws=False),
    Case("randlora", {"rank": 8, "alpha": 8}, draws=False),
    Case("loha", {"rank": 2, "alpha": 4}),
    Case("lokr", {"rank": 2, "alpha": 4}),
    Case("hira", {"rank": 4}),
    Case("delora", {"rank": 4, "boundary": 2.0}),
    Case("gralora", {"rank": 4, "alpha": 8, "targets": NO_HEAD}),
    Case("miss", {"rank": 4}, draws=False),
    Case("c3a", {"block_size": 8, "targets": NO_HEAD}),
    Case("vb-lora", {"rank": 2, "vectors": 12, "vector_length": 8, "bank_bound": 0.2, "targets": NO_HEAD}),
    Case("fourierft", {"frequencies": 20, "scaling": 20.0}),
    Case("waveft", {"frequencies": 20, "scaling": 1.0}, draws=False),
    Case("shira", {"rank": 1}, draws=False),
    Case("oft", {"block_size": 8}, draws=False),
    Case("boft", {"block_size": 4}, draws=False),
    Case("hra", {"rank": 4}),
    Case("road", {"group_size": 8, "targets": NO_HEAD}, draws=False),
    Case("adalora", {"rank": 2, "initial_rank": 4}),
    Case("ln-tuning", draws=False),
    Case("ssf"),
    Case("ssf", {"init_std": 0.0}, label="identity", draws=False, identity=True),
    Case("ia3", draws=False),
    Case("prompt-tuning", {"virtual_tokens": 3}),
    Case("prefix-tuning", {"virtual_tokens": 3, "projection_size": 8}),
    Case("prefix-tuning", {"virtual_tokens": 3, "projection": False}, label="plain"),
    Case("scaling-sft", {"density": 0.02}),
    Case("composable-sft", {"density": 1.0}, draws=False),
    Case("cpt", {"virtual_tokens": 24, "epsilon": 20.0, "demonstrations": DEMONSTRATIONS}, draws=False),
    Case("full", draws=False),
    Case("lisa", {"layers": 1}, draws=False),
    Case("lisa", {"layers": 1, "embeddings_and_head": False}, label="blocks", draws=False),
    Case("galore", {"rank": 4}, draws=False),
    Case("natural-galore", {"rank": 4}, draws=False),
]


class Trial:
    """A case on a backbone."""

    def __init__(self, case: Case, backbone: str) -> None:
        self.method = get_method(case.method)
        self.draws = case.draws
        self.near = case.near
        self.identity = self.method.card.identity_at_init if case.identity is None else case.identity
        self.config = self.method.config_type(**case.options)
        self.card = self.method.card
        self.build: Callable[[], nn.Module] = BACKBONES[backbone].build
        self.batch = BACKBONES[backbone].batch()
        self.calibration = BACKBONES[backbone].calibration

    def attach(self, model: nn.Module | None = None, seed: int = 0, name: str = "default") -> Adapted:
        context = AttachContext(seed=seed, processor=tiny_tokenizer(), calibration=self.calibration, total_steps=10)
        return self.method.attach(model or self.build(), self.config, context, name)

    def trained(self, model: nn.Module | None = None, seed: int = 0, name: str = "default") -> Adapted:
        adapted = self.attach(model, seed, name)
        train(adapted, self.batch)
        return adapted

    def logits(self, model: nn.Module) -> Tensor:
        return logits(model, self.batch)


def _trials() -> Iterator[Any]:
    """Every case on every backbone of its card: on two by default, the second one in turn, on all in the slow run."""
    for number, case in enumerate(CASES):
        first, *others = case.backbones or get_method(case.method).card.backbones
        second = others[number % len(others)] if others else first
        for backbone in (first, *others):
            name = "-".join(filter(None, [case.method, case.label, backbone]))
            yield pytest.param(
                (case, backbone), id=name, marks=[] if backbone in (first, second) else [pytest.mark.slow]
            )


TRIALS = list(_trials())


@pytest.fixture(params=TRIALS)
def trial(request: pytest.FixtureRequest) -> Trial:
    return Trial(*request.param)


def test_every_method_of_the_catalogue_is_tried() -> None:
    assert {case.method for case in CASES} == set(CATALOG)


def test_names_agree() -> None:
    assert all(get_method(name).name == name for name in CATALOG)


def test_a_fresh_adapter_changes_nothing_exactly_where_that_is_promised(trial: Trial) -> None:
    before = trial.logits(trial.build())
    after = trial.logits(trial.attach().model)
    assert after.shape == before.shape
    difference = (after - before).abs().max()
    if trial.identity == "nearly":
        assert difference < 0.05 * before.abs().max()
    else:
        assert difference < trial.near if trial.identity else difference > 1e-3


def test_training_changes_the_outputs(trial: Trial) -> None:
    before = trial.logits(trial.build())
    assert (trial.logits(trial.trained().model) - before).abs().max() > 1e-3


def test_gradient_reaches_exactly_the_trainable_set(trial: Trial) -> None:
    adapted = trial.attach()
    loss(adapted.model, trial.batch).backward()
    reached = {name for name, parameter in adapted.model.named_parameters() if parameter.grad is not None}
    assert reached == set(adapted.trainable())
    assert reached


def test_the_trainable_count_is_the_formulas(trial: Trial) -> None:
    expected = trial.method.count(trial.build(), trial.config)
    found = sum(parameter.numel() for parameter in trial.attach().trainable().values())
    assert 0 < found <= expected if trial.card.count_is_bound else found == expected > 0


def test_training_leaves_the_base_untouched(trial: Trial) -> None:
    model = trial.build()
    held = [(tensor, tensor.detach().clone()) for tensor in [*model.parameters(), *model.buffers()]]
    adapted = trial.trained(model)
    with adapted.disabled() if trial.card.changes_base else torch.no_grad():
        assert all(torch.equal(tensor, copy) for tensor, copy in held)


def test_a_borrowed_base_is_given_back_bare(trial: Trial) -> None:
    if trial.card.changes_base:
        pytest.skip("trains the base itself")
    model = trial.build()
    before, names = trial.logits(model), [(name, type(module)) for name, module in model.named_modules()]
    with borrowed(model):
        shown = trial.logits(trial.trained(model).model)
    assert torch.equal(trial.logits(model), before)
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with borrowed(model):
        assert torch.equal(trial.logits(trial.trained(model).model), shown)


def test_disabled_is_the_bare_base(trial: Trial) -> None:
    model = trial.build()
    before = trial.logits(model)
    adapted = trial.trained(model)
    after = trial.logits(adapted.model)
    with adapted.disabled():
        assert torch.equal(trial.logits(adapted.model), before)
    assert torch.equal(trial.logits(adapted.model), after)


def test_a_stored_adapter_loads_into_a_fresh_base(trial: Trial, tmp_path: Path) -> None:
    adapted = trial.trained()
    adapted.save(tmp_path)
    loaded = trial.method.load(trial.build(), tmp_path, name="other")
    assert torch.equal(trial.logits(loaded.model), trial.logits(adapted.model))
    assert loaded.tensors().keys() == adapted.tensors().keys()
    assert all(torch.equal(tensor, loaded.tensors()[name]) for name, tensor in adapted.tensors().items())


def test_a_loaded_adapter_trains_on_as_if_it_had_never_left(trial: Trial, tmp_path: Path) -> None:
    adapted = trial.trained()
    adapted.save(tmp_path)
    loaded = trial.method.load(trial.build(), tmp_path)
    train(adapted, trial.batch, steps=1)
    train(loaded, trial.batch, steps=1)
    assert torch.equal(trial.logits(loaded.model), trial.logits(adapted.model))


def test_stock_peft_loads_the_same_directory(trial: Trial, tmp_path: Path) -> None:
    if not isinstance(trial.method, PeftMethod) and trial.method.peft_type != "LORA":
        pytest.skip("not a method of peft")
    adapted = trial.trained()
    adapted.save(tmp_path)
    stock = PeftModel.from_pretrained(trial.build(), tmp_path)
    shown = trial.logits(stock)
    expected = trial.logits(adapted.model)
    if shown.ndim == 3:  # stock peft leaves a prompt's own positions in
        shown = shown[:, -expected.shape[1] :]
    assert_close(shown, expected, atol=1e-6, rtol=1e-6)


def test_an_adapter_that_stock_peft_saved_loads(trial: Trial, tmp_path: Path) -> None:
    if not isinstance(trial.method, PeftMethod):
        pytest.skip("not a method of peft")
    adapted = trial.trained()
    adapted.model.save_pretrained(tmp_path)
    loaded = trial.method.load(trial.build(), tmp_path)
    assert_close(trial.logits(loaded.model), trial.logits(adapted.model), atol=1e-6, rtol=1e-6)


def test_merged_computes_what_unmerged_does(trial: Trial) -> None:
    adapted = trial.trained()
    if trial.card.merge == "no":
        with pytest.raises(NotMergeable, match="not a change of the base's weights"):
            adapted.merge()
        return
    before, held = trial.logits(adapted.model), _copies(adapted)
    merged = adapted.merge()
    assert type(merged) is type(trial.build())
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    added = merged.state_dict().keys() - trial.build().state_dict().keys()
    assert merged.state_dict().keys() >= trial.build().state_dict().keys()
    assert not added or (trial.card.adds_biases and all(key.endswith(".bias") for key in added))
    assert_close(trial.logits(merged), before, atol=2e-5, rtol=1e-4)
    with torch.no_grad():  # the two share nothing
        for parameter in merged.parameters():
            parameter.zero_()
    assert torch.equal(trial.logits(adapted.model), before)
    assert all(torch.equal(tensor, held[name]) for name, tensor in adapted.tensors().items())


def test_one_of_two_adapters_is_merged_alone(trial: Trial) -> None:
    if trial.card.merge == "no":
        pytest.skip("not mergeable")
    first = trial.trained(name="first")
    alone = trial.logits(first.model)
    trial.trained(first.model, seed=1, name="second")  # active, but not the one to merge
    assert_close(trial.logits(first.merge()), alone, atol=2e-5, rtol=1e-4)


def test_two_adapters_on_one_model_do_not_touch_each_other(trial: Trial) -> None:
    alone = {name: trial.logits(trial.trained(seed=seed).model) for seed, name in enumerate(("first", "second"))}
    first = trial.trained(seed=0, name="first")
    held = _copies(first)
    second = trial.trained(first.model, seed=1, name="second")
    assert all(torch.equal(tensor, held[name]) for name, tensor in first.tensors().items())
    for adapted in (first, second, first):
        adapted.activate()
        assert torch.equal(trial.logits(adapted.model), alone[adapted.name])
        loss(adapted.model, trial.batch).backward()
        reached = {name for name, parameter in adapted.model.named_parameters() if parameter.grad is not None}
        assert reached == set(adapted.trainable())
        adapted.model.zero_grad(set_to_none=True)
    first.activate()
    train(first, trial.batch, steps=1)
    second.activate()
    assert torch.equal(trial.logits(second.model), alone["second"])


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_callers_random_state(trial: Trial) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = trial.attach(seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    second, other = trial.attach(seed=7), trial.attach(seed=8)
    pairs = list(zip(first.tensors().values(), second.tensors().values(), strict=True))
    assert all(torch.equal(mine, yours) for mine, yours in pairs)
    if trial.draws:
        assert any(
            not torch.equal(mine, yours)
            for mine, yours in zip(first.tensors().values(), other.tensors().values(), strict=True)
        )


def test_tensors_carry_no_adapter_name(trial: Trial) -> None:
    adapted = trial.attach(name="anna")
    assert adapted.tensors().keys() == trial.attach().tensors().keys()
    assert not any("anna" in name for name in adapted.tensors())
    assert not any(tensor.requires_grad for tensor in adapted.tensors().values())


def test_restore_undoes_training(trial: Trial) -> None:
    adapted = trial.trained()
    held, before = _copies(adapted), trial.logits(adapted.model)
    train(adapted, trial.batch)
    assert not torch.equal(trial.logits(adapted.model), before)
    adapted.restore(held)
    assert torch.equal(trial.logits(adapted.model), before)


def test_restore_refuses_what_does_not_fit_and_changes_nothing(trial: Trial) -> None:
    adapted = trial.attach()
    before = trial.logits(adapted.model)
    other = {name: tensor + 1 for name, tensor in adapted.tensors().items()}
    last = list(other)[-1]
    for damaged, message in (
        ({name: tensor for name, tensor in other.items() if name != last}, "is missing"),
        (other | {"stranger.weight": torch.ones(2)}, r"stranger\.weight is unknown"),
        (other | {last: torch.ones(1, 1, 1, 1, 1)}, r"is \(1, 1, 1, 1, 1\), not"),
    ):
        with pytest.raises(CorruptArtifact, match=message):
            adapted.restore(damaged)
        assert torch.equal(trial.logits(adapted.model), before)


def test_a_directory_that_does_not_fit_leaves_the_model_as_it_was(trial: Trial, tmp_path: Path) -> None:
    adapted = trial.trained()
    adapted.save(tmp_path)
    whole = (tmp_path / TENSORS_FILE).read_bytes()
    tensors = load(whole)
    tensors.pop(sorted(tensors)[0])
    (tmp_path / TENSORS_FILE).write_bytes(save(tensors))
    model = trial.build()
    before, names = trial.logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(CorruptArtifact, match="do not fit"):
        trial.method.load(model, tmp_path)
    assert torch.equal(trial.logits(model), before)
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    held = trial.trained(model, name="first")
    shown = trial.logits(held.model)
    with pytest.raises(CorruptArtifact, match="do not fit"):
        trial.method.load(held.model, tmp_path, name="second")
    assert torch.equal(trial.logits(held.model), shown)
    (tmp_path / TENSORS_FILE).write_bytes(whole)
    loaded = trial.method.load(held.model, tmp_path, name="second")
    assert torch.equal(trial.logits(loaded.model), trial.logits(adapted.model))


def test_a_name_is_taken_once(trial: Trial) -> None:
    adapted = trial.attach(name="first")
    with pytest.raises(Conflict, match="'first'"):
        trial.attach(adapted.model, name="first")


def test_a_bfloat16_base_stays_bfloat16(trial: Trial) -> None:
    model = trial.build().to(torch.bfloat16)
    trial.batch = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in trial.batch.items()
    }
    adapted = trial.attach(model)
    shown = adapted.model(**trial.batch).logits
    assert shown.dtype == torch.bfloat16
    loss(adapted.model, trial.batch).backward()
    assert torch.isfinite(shown).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in adapted.trainable().values())
    frozen = [parameter for parameter in adapted.model.parameters() if not parameter.requires_grad]
    assert all(parameter.dtype == torch.bfloat16 for parameter in frozen)


def test_gradient_checkpointing_gives_the_same_gradient_or_is_refused(trial: Trial) -> None:
    plain, checkpointed = trial.attach(), trial.attach()
    plain.model.train()
    checkpointed.model.train()
    checkpointed.model.gradient_checkpointing_enable()
    if not trial.card.checkpointing:
        with pytest.raises(InvalidInput, match="gradient checkpointing"):
            loss(checkpointed.model, trial.batch)
        model = trial.build()
        model.gradient_checkpointing_enable()
        with pytest.raises(InvalidInput, match="gradient checkpointing"):
            trial.attach(model)
        return
    loss(plain.model, trial.batch).backward()
    loss(checkpointed.model, trial.batch).backward()
    for name, parameter in plain.trainable().items():
        size = parameter.grad.abs().max().clamp_min(1).item()  # rounding is of the tensor's size, not of each entry's
        assert_close(checkpointed.trainable()[name].grad, parameter.grad, atol=1e-5 * size, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_attaching_keeps_the_training_mode(trial: Trial, training: bool) -> None:
    adapted = trial.attach(trial.build().train(training))
    assert all(module.training is training for module in adapted.model.modules())


def test_options_that_do_not_exist_are_refused_and_each_one_is_described() -> None:
    for name in CATALOG:
        options = get_method(name).config_type
        with pytest.raises(ValueError, match="Extra inputs"):
            options(rnak=3)
        assert all(field.description for field in options.model_fields.values())


def _copies(adapted: Adapted) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapted.tensors().items()}

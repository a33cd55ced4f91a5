"""IST against hand-written loops of the paper's two procedures, and against the LoRA that it trains."""

import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import TrainerCallback

from infra.errors import InvalidInput
from tests.tiny_models import PAD, tiny_bert, tiny_llama
from tests.training.methods.backbones import logits
from tests.training.tiny_training import EXAMPLES, OPTIONS, copied, run, same_bits
from training.data.batching import Padding
from training.methods.catalog import get_method
from training.methods.contract import AttachContext, Batch
from training.methods.ist import IMPORTANCE, IstAdapted, Schedule, updated
from training.objectives.causal_lm import CausalLM
from training.progress import TrainingEvent

IST = get_method("ist")
BATCHES = [Padding(PAD)(EXAMPLES[start : start + 4]) for start in range(0, 20, 4)]


def attached(layers: int = 8, calibration: Any = lambda: iter(BATCHES), seed: int = 3, **options: Any) -> IstAdapted:
    config = IST.config_type(**{"rank": 2, "targets": ("q_proj", "down_proj"), **options})
    return IST.attach(tiny_llama(layers=layers), config, AttachContext(seed=seed, calibration=calibration))


def schedule(adapted: IstAdapted) -> Schedule:
    (callback,) = adapted.callbacks()
    assert isinstance(callback, Schedule)
    return callback


def awake(adapted: IstAdapted) -> set[int]:
    """The layers whose adapters ask for gradient, by the parameters' names."""
    return {int(name.split("layers.")[1].split(".")[0]) for name in adapted.trainable()}


def noisy(adapted: IstAdapted, only: int | None = None, size: float = 0.3) -> IstAdapted:
    """Give the adapters of every layer, or of one, an effect."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name and (only is None or f"layers.{only}." in name):
            parameter.data.normal_(std=size, generator=generator)
    return adapted


class Watch(TrainerCallback):
    """Notes who is awake in each step, the scores, and the tensors after it."""

    def __init__(self, adapted: IstAdapted) -> None:
        self.adapted = adapted
        self.awake: list[set[int]] = []
        self.scores: list[list[float]] = []
        self.tensors = [copied(adapted)]

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.awake.append(awake(self.adapted))
        self.scores.append(list(others["optimizer"].param_groups[0][IMPORTANCE]))
        self.tensors.append(copied(self.adapted))


def watched(adapted: IstAdapted) -> Watch:
    watch, own = Watch(adapted), adapted.callbacks()
    adapted.callbacks = lambda: [*own, watch]  # type: ignore[method-assign]
    return watch


def options(**changed: Any) -> Any:
    return OPTIONS.model_copy(update={"warmup_steps": 0, **changed})


def test_every_step_trains_exactly_so_many_layers_and_nothing_else_changes(tmp_path: Path) -> None:
    adapted = attached(active=0.4, probe_every=4)
    base = {name: p.detach().clone() for name, p in adapted.model.named_parameters() if not p.requires_grad}
    watch = watched(adapted)
    run(tmp_path, options(weight_decay=0.1), adapted)
    assert len(watch.awake) == 20 and all(len(drawn) == 3 for drawn in watch.awake)
    assert len({frozenset(drawn) for drawn in watch.awake}) > 5
    for drawn, before, after in zip(watch.awake, watch.tensors, watch.tensors[1:], strict=False):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {int(name.split("layers.")[1].split(".")[0]) for name in changed} == drawn
    assert watch.scores[0] == watch.scores[3] == [0.0] * 8
    assert watch.scores[4] == watch.scores[7] != watch.scores[0]
    assert all(torch.equal(adapted.model.get_parameter(name), tensor) for name, tensor in base.items())
    assert awake(adapted) == set(range(8))  # when it has ended


@pytest.mark.parametrize("probe_every", [3, None])
def test_a_crashed_training_resumes_to_the_same_scores_layers_and_bits(tmp_path: Path, probe_every: int | None) -> None:
    def crash(event: TrainingEvent) -> None:
        if event.step == 8:
            raise RuntimeError("the power is gone")

    whole = attached(probe_every=probe_every)
    expected = watched(whole)
    run(tmp_path / "whole", options(steps=14), whole)
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "crashed", options(steps=14), attached(probe_every=probe_every), on_event=crash)
    resumed = attached(probe_every=probe_every)
    watch = watched(resumed)
    _, outcome = run(tmp_path / "crashed", options(steps=14), resumed)
    assert outcome.resumed_from == 5
    assert watch.awake == expected.awake[5:]
    assert watch.scores == expected.scores[5:]
    assert (watch.scores[-1] != [0.0] * 8) == bool(probe_every)
    assert same_bits(resumed.tensors(), whole.tensors())


def test_the_same_adapter_trains_again_after_a_crash_with_all_its_layers(tmp_path: Path) -> None:
    def crash(event: TrainingEvent) -> None:
        raise RuntimeError("the power is gone")

    adapted = attached(active=0.1)
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "1", OPTIONS, adapted, on_event=crash)
    assert len(awake(adapted)) == 1
    watch = watched(adapted)
    run(tmp_path / "2", options(steps=20), adapted)
    assert len(set().union(*watch.awake)) > 4


def test_all_layers_active_is_the_host(tmp_path: Path) -> None:
    lora = get_method("lora")
    chosen = lora.config_type(rank=2, alpha=4, dropout=0.05, targets=("q_proj", "down_proj"))
    host = lora.attach(tiny_llama(layers=8), chosen, AttachContext(seed=3))
    mine, outcome = run(tmp_path / "ist", OPTIONS, attached(active=1.0, probe_every=3))
    _, expected = run(tmp_path / "lora", OPTIONS, host)
    assert outcome.losses == expected.losses
    assert same_bits(mine.tensors(), host.tensors())
    assert mine.adapter_config() == host.adapter_config()


# -- the probe ---------------------------------------------------------------------------------------------------------


def test_a_probe_is_the_papers_loop() -> None:
    """Losses of models whose suppressed adapters were scaled by hand, in their weights; the update in plain Python."""
    adapted = noisy(attached(layers=5, suppressed=0.4, subsets=3, suppression=0.5, score_rate=7.0))
    scores = [0.3, -0.2, 1.0, 0.0, -1.5]
    mine = schedule(adapted).probe(scores, BATCHES[1], torch.Generator().manual_seed(4))

    generator, sets = torch.Generator().manual_seed(4), []
    while len(sets) < 3:
        weights = torch.tensor([1 / (1 + math.exp(score)) for score in scores], dtype=torch.float64)
        drawn = set(torch.multinomial(weights, 2, generator=generator).tolist())
        sets += [] if drawn in sets else [drawn]
    rewards = []
    for suppressed in sets:
        other = attached(layers=5)
        other.restore(
            {
                name: tensor * (0.5 if "lora_B" in name and any(f"layers.{n}." in name for n in suppressed) else 1)
                for name, tensor in adapted.tensors().items()
            }
        )
        other.model.eval()
        with torch.no_grad():
            judged = CausalLM()(other.model, BATCHES[1])
        rewards.append(math.exp(-judged.total.item() / judged.count))
    mean = sum(rewards) / 3
    expected = list(scores)
    for reward, suppressed in zip(rewards, sets, strict=True):
        for layer in suppressed:
            p = 1 / (1 + math.exp(scores[layer]))
            expected[layer] -= 7 * (reward - mean) * p * (1 - p)
    assert mine == pytest.approx(expected, abs=1e-6)
    assert any(abs(new - old) > 1e-5 for new, old in zip(mine, scores, strict=True))


def test_the_update_by_hand() -> None:
    losses, sets = [0.0, math.log(2), math.log(4)], [frozenset({0, 1}), frozenset({0, 2}), frozenset({0, 1})]
    # rewards 1, 1/2, 1/4, mean 7/12; p(1 − p) = 1/4 at I = 0; layer 0 is in all sets, layer 3 in none
    assert updated([0.0] * 4, sets, losses, 12) == pytest.approx([0, -(5 - 4) / 4, 1 / 4, 0])
    at_one = math.e / (1 + math.e) ** 2  # p(1 − p) at I = ±1
    assert updated([0.0, 1.0, -1.0, 5.0], sets, losses, 12) == pytest.approx([0, 1 - at_one, -1 + at_one, 5])


def test_a_probe_leaves_no_trace() -> None:
    adapted = noisy(attached(dropout=0.5))
    callback = schedule(adapted)
    adapted.model.train()
    adapted.model.base_model.model.model.layers[3].eval()
    held, before = copied(adapted), _state(adapted)
    torch.manual_seed(9)
    generator = torch.get_rng_state()
    callback.probe([0.0] * 8, BATCHES[0], torch.Generator())
    assert torch.equal(torch.get_rng_state(), generator)
    assert _state(adapted) == before and same_bits(adapted.tensors(), held)

    broken: Batch = {name: tensor for name, tensor in BATCHES[0].items() if name != "labels"}  # the model has no loss
    with pytest.raises(AttributeError):
        callback.probe([0.0] * 8, broken, torch.Generator())
    assert _state(adapted) == before


def _state(adapted: IstAdapted) -> list[Any]:
    modules = list(adapted.model.named_modules())
    scales = {name: dict(module.scaling) for name, module in modules if hasattr(module, "lora_A")}
    attention = [module.scaling for name, module in modules if name.endswith("self_attn")]
    modes = {name: module.training for name, module in modules}
    assert len(scales) == 16 and len(attention) == 8
    return [scales, attention, modes, sorted(adapted.trainable())]


def test_scores_move_only_where_suppression_does_something() -> None:
    generator = torch.Generator().manual_seed(0)
    fresh = schedule(attached()).probe([0.0] * 8, BATCHES[0], generator)
    assert fresh == pytest.approx([0.0] * 8, abs=1e-6)
    unscaled = schedule(noisy(attached(suppression=1.0))).probe([0.0] * 8, BATCHES[0], generator)
    assert unscaled == pytest.approx([0.0] * 8, abs=1e-6)


def test_a_layer_that_matters_becomes_the_most_important(tmp_path: Path) -> None:
    trained, _ = run(tmp_path, options(steps=40, learning_rate=3e-2), attached(active=1.0, rank=8, probe_every=None))
    adapted = attached(rank=8)
    adapted.restore(
        {n: t if "layers.5." in n else torch.zeros_like(t) for n, t in trained.tensors().items()}
    )  # only layer 5 has an effect
    callback, scores = schedule(adapted), [0.0] * 8
    with torch.no_grad():
        gain = _mean_loss(attached(rank=8)) - _mean_loss(adapted)
    assert gain > 0.05
    for number, batch in enumerate(islice(BATCHES * 8, 30)):
        scores = callback.probe(scores, batch, torch.Generator().manual_seed(number))
    assert max(range(8), key=scores.__getitem__) == 5
    assert scores[5] > 2 * max(score for layer, score in enumerate(scores) if layer != 5)


def _mean_loss(adapted: IstAdapted) -> float:
    losses = [CausalLM()(adapted.model.eval(), batch) for batch in BATCHES]
    return sum(loss.total.item() for loss in losses) / sum(loss.count for loss in losses)


# -- the draw ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [[0.0] * 8, [3.0, -3.0, 1.0, -1.0, 0.0, 0.0, 2.0, -2.0]])
def test_layers_are_drawn_by_the_sigmoid_of_their_score(scores: list[float]) -> None:
    callback = schedule(attached(active=0.1))  # one of eight
    optimiser = torch.optim.SGD([torch.zeros(1)])
    optimiser.param_groups[0][IMPORTANCE] = scores
    counts: Counter[int] = Counter()
    draws = 2000
    for step in range(draws):
        callback.on_step_begin(None, _At(step * 10 + 1), None, optimizer=optimiser)
        (drawn,) = awake(callback.adapted)
        counts[drawn] += 1
    weights = [1 / (1 + math.exp(-score)) for score in scores]
    expected = [draws * weight / sum(weights) for weight in weights]
    chi_square = sum((counts[layer] - mean) ** 2 / mean for layer, mean in enumerate(expected))
    assert chi_square < 24.3  # the 0.1 % point of χ² with 7 degrees of freedom


class _At:
    def __init__(self, step: int) -> None:
        self.global_step = step


@pytest.mark.parametrize("layers", [2, 3])
def test_few_layers_train_too(tmp_path: Path, layers: int) -> None:
    adapted = attached(layers=layers, probe_every=2)
    watch = watched(adapted)
    run(tmp_path, options(steps=8), adapted)
    assert all(len(drawn) == 1 for drawn in watch.awake)
    assert watch.scores[-1] != [0.0] * layers


def test_gradient_accumulation_keeps_the_layers_of_a_step(tmp_path: Path) -> None:
    adapted = attached(probe_every=2)
    watch = watched(adapted)
    run(tmp_path, options(steps=6, batch_size=4, gradient_accumulation=2), adapted)
    assert len(watch.awake) == 6 and all(len(drawn) == 2 for drawn in watch.awake)
    for drawn, before, after in zip(watch.awake, watch.tensors, watch.tensors[1:], strict=False):
        changed = {int(n.split("layers.")[1].split(".")[0]) for n in before if not torch.equal(before[n], after[n])}
        assert changed == drawn


def test_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "plain", options(steps=6), attached(dropout=0.0))
    other, _ = run(tmp_path / "other", options(steps=6, gradient_checkpointing=True), attached(dropout=0.0))
    for name, tensor in plain.tensors().items():
        assert_close(other.tensors()[name], tensor, atol=1e-5, rtol=1e-4)


# -- what is stored, what is refused -----------------------------------------------------------------------------------


def test_adapters_outside_the_layers_train_in_every_step() -> None:
    context = AttachContext(calibration=list)
    adapted = IST.attach(tiny_bert(), IST.config_type(rank=2, targets=("classifier", "query")), context)
    optimiser = adapted.optimizer(0.1, 0.0)
    for step in range(1, 5):
        schedule(adapted).on_step_begin(None, _At(step), None, optimizer=optimiser)
        names = adapted.trainable()
        assert sum("classifier" in name for name in names) == 2 and sum("query" in name for name in names) == 2


def test_a_stored_adapter_is_the_hosts_and_trains_on_as_one(tmp_path: Path) -> None:
    adapted, _ = run(tmp_path / "run", options(steps=6), attached(probe_every=2))
    adapted.save(tmp_path / "stored")
    as_lora = get_method("lora").load(tiny_llama(layers=8), tmp_path / "stored")
    adapted.model.eval()
    assert torch.equal(logits(as_lora.model, _inputs()), logits(adapted.model, _inputs()))
    assert not any(IMPORTANCE in name for name in adapted.tensors())
    loaded = IST.load(tiny_llama(layers=8), tmp_path / "stored")
    assert loaded.callbacks() == [] and loaded.optimizer(0.1, 0.0) is None
    assert awake(loaded) == set(range(8))


def _inputs() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in BATCHES[0].items() if name != "labels"}


def test_the_defaults_are_the_papers() -> None:
    config = IST.config_type()
    adapted = IST.attach(tiny_llama(layers=2), config, AttachContext(calibration=lambda: BATCHES))
    stored = adapted.adapter_config()
    assert (stored["r"], stored["lora_alpha"], stored["lora_dropout"]) == (32, 64, 0.05)
    assert (config.active, config.suppressed, config.subsets, config.suppression) == (0.25, 0.5, 3, 0.25)
    assert (config.probe_every, config.score_rate) == (10, 10.0)


def test_probes_need_data_and_uniform_draws_do_not(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="needs calibration data for its probes"):
        attached(calibration=None)
    attached(calibration=None, probe_every=None)
    with pytest.raises(InvalidInput, match="there are none"):
        run(tmp_path, OPTIONS, attached(calibration=list, probe_every=1))


def test_adapters_in_no_stack_of_layers_are_refused() -> None:
    with pytest.raises(InvalidInput, match="none of its adapters lies in a stack of like layers"):
        attached(targets=("lm_head",))


def test_another_host_is_refused() -> None:
    with pytest.raises(ValueError, match="host"):
        IST.config_type(host="dora")

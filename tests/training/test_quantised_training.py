"""An adapter that is trained as it will be stored is stored without loss, and is better than one that was not."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from infra.errors import InvalidInput
from tests.training.tiny_training import EXAMPLES, HELD_OUT, OPTIONS, fresh, run
from training.compression import compress, decompress
from training.compression.quantised_training import QuantisedTraining
from training.compression.straight_through import FakeQuantised
from training.data.batching import Padding
from training.methods.contract import Adapted
from training.objectives.causal_lm import CausalLM


def mean_loss(adapted: Adapted, examples: list = EXAMPLES) -> float:
    adapted.model.eval()
    with torch.no_grad():
        loss = CausalLM()(adapted.model, Padding(0)(examples))
    return loss.total.item() / loss.count


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_was_trained_is_stored_bit_for_bit(tmp_path: Path, bits: int) -> None:
    adapted, _ = run(tmp_path, OPTIONS.model_copy(update={"adapter_bits": bits}))
    tensors = adapted.tensors()
    assert all(len(tensor.unique()) <= 2**bits for tensor in tensors.values())
    data = compress(tensors, f"codebook:bits={bits}")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in decompress(data).items())


def test_training_in_one_bit_beats_rounding_to_one_bit_afterwards(tmp_path: Path) -> None:
    longer = OPTIONS.model_copy(update={"steps": 60})
    trained, _ = run(tmp_path / "one", longer.model_copy(update={"adapter_bits": 1}))
    rounded, _ = run(tmp_path / "whole", longer)
    rounded.restore(decompress(compress(rounded.tensors(), "codebook:bits=1")))
    assert mean_loss(trained) < mean_loss(rounded)


def test_the_gradients_are_those_of_a_parametrized_layer() -> None:
    torch.manual_seed(0)
    plain, wrapped = nn.Linear(9, 5), nn.Linear(9, 5)
    wrapped.load_state_dict(plain.state_dict())
    parametrize.register_parametrization(wrapped, "weight", FakeQuantised(2))
    quantised = QuantisedTraining(dict(plain.named_parameters()), 2)
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.05) for layer in (plain, wrapped)]
    for _ in range(12):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(2):  # two batches to an update
            x = torch.randn(7, 9)
            with quantised.in_force():
                plain(x).square().mean().backward()
            wrapped(x).square().mean().backward()
        quantised.pass_gradients_through()
        torch.testing.assert_close(plain.weight.grad, wrapped.parametrizations.weight.original.grad)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(plain.weight, wrapped.parametrizations.weight.original)
    quantised.settle()
    torch.testing.assert_close(plain.weight, wrapped.weight)


def test_the_validation_loss_is_that_of_what_is_stored(tmp_path: Path) -> None:
    chosen = OPTIONS.model_copy(update={"adapter_bits": 1, "validate_every": 10})
    adapted, outcome = run(tmp_path, chosen, validation=HELD_OUT)
    assert outcome.validation_losses[-1][1] == pytest.approx(mean_loss(adapted, HELD_OUT), abs=1e-5)


def test_a_training_that_was_stopped_comes_to_the_same_bits(tmp_path: Path) -> None:
    chosen = OPTIONS.model_copy(update={"adapter_bits": 2})
    whole, _ = run(tmp_path / "whole", chosen)

    def stops(event: object) -> None:
        if event.step == 12:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", chosen, on_event=stops)
    again, outcome = run(tmp_path / "parts", chosen)
    assert outcome.resumed_from == 10
    assert all(torch.equal(tensor, whole.tensors()[name]) for name, tensor in again.tensors().items())


def test_a_method_without_matrices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="trains none"):
        run(tmp_path, OPTIONS.model_copy(update={"adapter_bits": 1}), adapted=fresh("ln-tuning"))

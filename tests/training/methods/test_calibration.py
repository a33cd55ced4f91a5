"""What calibration shows: the bare base's inputs at the tokens that count, and its gradients."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from infra.errors import InvalidInput
from tests.tiny_models import PAD, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from tests.training.methods.backbones import BACKBONES, train
from tests.training.methods.regression import Regression
from tests.training.tiny_training import EXAMPLES, copied, run, same_bits
from training.data.batching import Padding
from training.methods.calibration import draw, gradients, observe, sharing_inputs
from training.methods.catalog import get_method
from training.methods.contract import Adapted, AttachContext
from training.methods.injected import matrix
from training.methods.targets import linear_modules, select
from training.progress import TrainingEvent


def context(*batches: dict[str, Tensor]) -> AttachContext:
    return AttachContext(calibration=lambda: iter(batches))


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(seed))


def layers_of(model: nn.Module, *endings: str) -> dict[str, nn.Module]:
    found = linear_modules(model)
    return {name: found[name] for name in select(model, endings or "all-linear")}


def test_drawing_cuts_and_splits_in_order() -> None:
    first, second = ids(5, 3), ids(4, 3, seed=1)
    drawn = list(draw(context({"x": first}, {"x": second}), Regression(2, 3), "m", samples=7, rows=2))
    assert [len(batch["x"]) for batch in drawn] == [2, 2, 1, 2]
    assert torch.equal(torch.cat([batch["x"] for batch in drawn]), torch.cat([first, second])[:7])
    assert len(list(draw(context({"x": first}), Regression(2, 3), "m", samples=9))) == 1
    assert len(list(draw(context({"x": first}, {"x": second}), Regression(2, 3), "m"))) == 2


@pytest.mark.parametrize("method", ["corda", "eva", "lora-ga"])
@pytest.mark.parametrize("calibration", [None, lambda: iter(())], ids=["none given", "none drawn"])
def test_no_calibration_data_is_an_error_that_leaves_the_model(method: str, calibration: object) -> None:
    model, chosen = tiny_llama(), get_method(method)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(InvalidInput, match=f"'{method}' needs calibration data"):
        chosen.attach(model, chosen.config_type(rank=1), AttachContext(calibration=calibration))  # type: ignore[arg-type]
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def seen(model: nn.Module, layers: dict[str, nn.Module], batch: dict[str, Tensor], labelled: bool = False) -> dict:
    heard: dict[str, Tensor] = {}
    observe(model, layers, batch, lambda name, x, kept: heard.update({name: x[kept]}), labelled)
    return heard


def test_padding_and_what_has_no_label_is_left_out() -> None:
    tokens, mask = ids(2, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    garbled = batch | {"input_ids": torch.where(mask == 1, tokens, 7)}
    model = tiny_llama()
    layers = layers_of(model)
    for labelled, count in ((False, 10), (True, 6)):
        heard, other = seen(model, layers, batch, labelled), seen(model, layers, garbled, labelled)
        assert heard.keys() == layers.keys()
        assert all(len(x) == count for x in heard.values())
        assert all(torch.equal(heard[name], other[name]) for name in layers)
    first = model.model.layers[0]
    embedded = first.input_layernorm(model.model.embed_tokens(tokens))
    assert_close(seen(model, layers, batch, True)["model.layers.0.self_attn.q_proj"], embedded[labels != -100])


def test_the_two_sequences_of_an_encoder_decoder_are_told_apart_at_equal_length() -> None:
    tokens = ids(2, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])  # 9 tokens
    labels = ids(2, 6, seed=1)
    labels[1, 2:] = -100  # 8 tokens
    model = tiny_t5()
    heard = seen(model, layers_of(model), {"input_ids": tokens, "attention_mask": mask, "labels": labels})
    of_encoder = [n for n in heard if n.startswith("encoder") or n.endswith(("EncDecAttention.k", "EncDecAttention.v"))]
    assert {len(heard[name]) for name in of_encoder} == {9}
    assert {len(x) for name, x in heard.items() if name not in of_encoder} == {8}


def test_every_patch_counts_and_a_head_sees_one_row_an_image() -> None:
    model = tiny_vit()
    heard = seen(model, layers_of(model), BACKBONES["vit"].calibration()[0])
    assert len(heard.pop("classifier")) == 2 and {len(x) for x in heard.values()} == {2 * 5}


def test_layers_that_read_one_tensor_are_a_group() -> None:
    model = tiny_llama()
    groups = sharing_inputs(model, layers_of(model), BACKBONES["llama"].calibration()[0])
    shared = [[name.rpartition(".")[2] for name in members] for members in groups.values()]
    assert shared == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    model = tiny_t5()
    batch = next(draw(context(*BACKBONES["t5"].calibration()), model, "m"))
    groups = sharing_inputs(model, layers_of(model, "EncDecAttention.k"), batch)
    assert [len(members) for members in groups.values()] == [2]  # both decoder blocks read what the encoder gave


class Lazy(Regression):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.spare = nn.Linear(8, 8, bias=False)


@pytest.mark.parametrize("method", ["corda", "eva", "lora-ga"])
def test_a_layer_that_the_data_do_not_reach_is_an_error(method: str) -> None:
    batch = {"inputs": torch.randn(2, 9, 8), "labels": torch.randn(2, 9, 8)}
    chosen = get_method(method)
    with pytest.raises(InvalidInput, match=r"do not reach spare\.\n.*exclude"):
        chosen.attach(Lazy(), chosen.config_type(rank=2), context(batch))
    assert chosen.attach(Lazy(), chosen.config_type(rank=2, exclude=("spare",)), context(batch)).slots()


def dropping() -> LlamaForCausalLM:
    model = tiny_llama()
    model.config.attention_dropout = 0.5
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    return model


@pytest.mark.parametrize("method", ["corda", "eva", "lora-ga"])
def test_calibration_sees_the_bare_base_in_evaluation_and_leaves_all_as_it_was(method: str) -> None:
    batches = BACKBONES["llama"].calibration()
    chosen = get_method(method)
    options = chosen.config_type(rank=2, targets=("o_proj",))

    def attach(model: nn.Module, name: str) -> dict[str, Tensor]:
        tensors = chosen.attach(model, options, context(*batches), name).tensors()
        return {key: tensor.clone() for key, tensor in tensors.items()}

    alone = attach(dropping().eval(), "alone")
    model = dropping().train()
    model.model.norm.eval()
    kept = torch.ones_like(model.model.norm.weight)
    model.model.norm.weight.grad = kept
    model.lm_head.weight.requires_grad_(False)
    first = chosen.attach(model, options, context(*batches), "first")
    assert all(torch.equal(tensor, alone[key]) for key, tensor in first.tensors().items())
    assert model.training and not model.model.norm.training and model.config.use_cache is True
    assert model.model.norm.weight.grad is kept
    train(first, BACKBONES["llama"].batch())
    second = attach(model, "second")
    assert all(torch.equal(tensor, alone[key]) for key, tensor in second.items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_gradients_of_small_batches_add_up_to_that_of_the_whole(build: type) -> None:
    model, whole = build(), {"input_ids": ids(6, 5), "labels": ids(6, 5)}
    layers = layers_of(model)
    names = list(layers)
    inputs = [layers[name].weight for name in names]
    by_hand = torch.autograd.grad(model(**whole).loss, inputs)
    told: list[int] = []
    found = gradients(model, layers, draw(context(whole), model, "m", rows=2), told.append)
    assert told == [2, 4, 6]
    for name, gradient in zip(names, by_hand, strict=True):
        expected = gradient.T if build is tiny_gpt2 else gradient
        assert found[name].shape == matrix(layers[name]).shape
        assert_close(found[name], expected, atol=1e-7, rtol=1e-4)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_a_loss_and_a_loss_that_is_no_number_are_errors() -> None:
    model = Regression(4, 4)

    def of(batch: dict[str, Tensor]) -> Iterable[dict[str, Tensor]]:
        return draw(context(batch), model, "m")

    with pytest.raises(InvalidInput, match="Regression computes no loss"):
        gradients(model, {"layer": model.layer}, of({"inputs": torch.randn(2, 3, 4)}), print)
    huge = {"inputs": torch.full((2, 3, 4), 1e20), "labels": torch.full((2, 3, 4), 1e18)}
    with torch.no_grad():
        model.layer.weight.mul_(1e-2)
    with pytest.raises(InvalidInput, match="The gradient of layer at the calibration data is not finite"):
        gradients(model, {"layer": model.layer}, of(huge), print)
    assert model.layer.weight.requires_grad and model.layer.weight.grad is None
    llama, tokens = tiny_llama(), ids(2, 4)
    unlabelled = {"input_ids": tokens, "labels": torch.full_like(tokens, -100)}
    with pytest.raises(InvalidInput, match=r"is nan after 0 calibration samples\.\nDoes every example have a label"):
        gradients(llama, layers_of(llama), draw(context(unlabelled), llama, "m"), print)


@pytest.mark.parametrize("method", ["corda", "eva", "lora-ga"])
def test_progress_is_told_to_its_end(method: str) -> None:
    told: list[tuple[str, int, int]] = []
    chosen = get_method(method)
    batches = BACKBONES["llama"].calibration()
    listening = AttachContext(calibration=lambda: batches, progress=lambda *heard: told.append(heard))
    chosen.attach(tiny_llama(), chosen.config_type(rank=2), listening)
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert len(stages) == (1 if method == "eva" else 2)
    (_, done, total) = told[-1]
    assert done == total > 0


@pytest.mark.parametrize("method", ["pissa", "corda", "eva", "lora-ga"])
def test_a_training_that_crashed_resumes_to_the_same_bits(tmp_path: Path, method: str) -> None:
    chosen = get_method(method)
    batches = [Padding(PAD)(EXAMPLES[start : start + 8]) for start in range(0, len(EXAMPLES), 8)]

    def attached() -> Adapted:
        return chosen.attach(tiny_llama(), chosen.config_type(rank=2, alpha=2, dropout=0.1), context(*batches))

    def crash(event: TrainingEvent) -> None:
        if event.step == 8:
            raise RuntimeError("the power is gone")

    whole, _ = run(tmp_path / "whole", adapted=attached())
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path / "crashed", adapted=attached(), on_event=crash)
    resumed, outcome = run(tmp_path / "crashed", adapted=attached())
    assert outcome.resumed_from == 5
    assert same_bits(copied(whole), copied(resumed))


def test_logits_that_nobody_looks_at_are_not_computed() -> None:
    model = tiny_llama()
    batch = {"input_ids": ids(2, 6), "labels": ids(2, 6)}
    positions: list[int] = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, arguments: positions.append(arguments[0].shape[1]))
    inner = layers_of(model, "down_proj")
    heard = seen(model, inner, batch)
    with_head = seen(model, inner | {"lm_head": model.lm_head}, batch)
    hook.remove()
    assert positions == [1, 6]
    assert with_head["lm_head"].shape == (12, 32)
    assert all(torch.equal(heard[name], with_head[name]) for name in inner)

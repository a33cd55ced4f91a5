"""Adapters to other tools' formats and back, through the command line."""

import copy
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infra.settings import get_settings
from registry import AdapterRegistry
from tests.cli.conftest import Told, run_here
from tests.tiny_models import own_seed, save_tiny_llama
from tests.training.methods.backbones import BACKBONES, train
from training.adapter_files import write_adapter
from training.base_models import load_base
from training.methods.catalog import get_method
from training.methods.contract import AttachContext

IDS = torch.arange(3, 24).unsqueeze(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("exchanged"), seed=own_seed(__name__))


@pytest.fixture(scope="module")
def trained(regraft_home: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of a LoRA, a DoRA and a fully trained model, by method."""
    get_settings.cache_clear()
    loaded = load_base(f"path:{base}", cache=get_settings().base_models)
    assert run_here("base", "add", loaded.reference, "--name", "exchanged-base").code == 0
    addresses = {}
    for name in ("lora", "dora", "full"):
        method = get_method(name)
        options = {} if name == "full" else {"rank": 6, "alpha": 9}
        adapted = method.attach(copy.deepcopy(loaded.model), method.config_type(**options), AttachContext())
        train(adapted, BACKBONES["llama"].batch())
        made = tmp_path_factory.mktemp(name) / name
        write_adapter(made, adapted.save, name, loaded.identity.sha256, loaded.reference, {}, {})
        told = run_here("import", str(made), f"exchanged-{name}", "--base", "exchanged-base", "--json")
        addresses[name] = f"exchanged-{name}@{json.loads(clean(told))['number']}"
    return addresses


def clean(result: Told) -> str:
    """The output of a command that succeeded and said nothing on standard error, in one line."""
    assert (result.code, result.err) == (0, "")
    return " ".join(result.out.split())


def answers(address: str) -> torch.Tensor:
    from serving.loading import load

    with torch.no_grad():
        return load(address).model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("tool", "found"),
    [("peft", "a peft folder"), ("mlx", "an MLX adapter, 14 layers"), ("kohya", "a kohya LoRA file, 14 layers")],
)
def test_there_and_back_again(trained: dict[str, str], tmp_path: Path, tool: str, found: str) -> None:
    clean(run_here("export", trained["lora"], str(tmp_path / tool), "--to", tool))
    told = clean(run_here("import", str(tmp_path / tool), f"back-from-{tool}", "--base", "exchanged-base"))
    assert f"found {found}" in told and f"✓ back-from-{tool}@1 lora on exchanged-base" in told
    torch.testing.assert_close(answers(f"back-from-{tool}@1"), answers(trained["lora"]), atol=1e-6, rtol=1e-5)


def test_the_files_are_those_of_the_other_tools(trained: dict[str, str], tmp_path: Path) -> None:
    clean(run_here("export", trained["lora"], str(tmp_path / "mlx"), "--to", "mlx"))
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 2)
    assert (config["lora_parameters"]["rank"], config["lora_parameters"]["scale"]) == (6, 1.5)
    clean(run_here("export", trained["lora"], str(tmp_path / "kohya"), "--to", "kohya"))
    (file,) = (tmp_path / "kohya").iterdir()
    tensors = load_file(file)
    assert float(tensors["lora_te_model_layers_0_self_attn_q_proj.alpha"]) == 9
    told = run_here("import", str(file), "from-the-file", "--base", "exchanged-base", "--json")
    assert json.loads(clean(told))["found"] == "a kohya LoRA file"


def test_peft_s_old_pickles_are_converted_and_run_nothing(trained: dict[str, str], tmp_path: Path) -> None:
    old = tmp_path / "old"
    clean(run_here("export", trained["lora"], str(old)))
    (old / "regraft.json").unlink()
    tensors = load_file(old / "adapter_model.safetensors")
    (old / "adapter_model.safetensors").unlink()
    torch.save(tensors, old / "adapter_model.bin")
    told = clean(run_here("import", str(old), "from-a-pickle", "--base", "exchanged-base"))
    assert "pickled weights (adapter_model.bin)" in told
    assert torch.equal(answers("from-a-pickle@1"), answers(trained["lora"]))

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    torch.save({**tensors, "more": Malicious()}, old / "adapter_model.bin")
    refused = run_here("import", str(old), "from-malice", "--base", "exchanged-base")
    assert (refused.code, refused.out) == (5, "")
    assert f"{old / 'adapter_model.bin'} was not read: it holds more than tensors" in refused.err
    assert not (tmp_path / "canary").exists()
    assert not AdapterRegistry().has_adapter("from-malice")


def test_a_dora_is_cut_down_to_a_lora_and_says_what_that_cost(trained: dict[str, str], tmp_path: Path) -> None:
    exact = run_here("export", trained["dora"], str(tmp_path / "exact"), "--as-lora")
    assert (exact.code, exact.out) == (2, "")
    assert "is not of low rank" in exact.err and "--rank R tells what that loses" in exact.err
    assert not (tmp_path / "exact").exists()
    told = clean(run_here("export", trained["dora"], str(tmp_path / "lora"), "--rank", "6"))
    assert "of the update at rank 6; most in model.layers." in told
    assert "the same choice at" in told and "positions" in told
    measured = json.loads(clean(run_here("export", trained["dora"], str(tmp_path / "again"), "--rank", "6", "--json")))
    assert 0 < measured["loss"]["total"] < 0.5 and len(measured["loss"]["layers"]) == 14
    assert measured["difference"]["positions"] > 50
    clean(run_here("import", str(tmp_path / "lora"), "cut-down", "--base", "exchanged-base"))
    gap = float((answers("cut-down@1") - answers(trained["dora"])).abs().max())
    assert gap < 10 * measured["difference"]["largest"] + 1e-5
    full = run_here("export", trained["full"], str(tmp_path / "full"), "--rank", "6")
    assert full.code == 2 and f"{trained['full']} (full): No LoRA can say what it does to" in full.err


def test_a_merged_model_proves_itself_and_a_lora_is_extracted_from_it(trained: dict[str, str], tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    told = clean(run_here("export", trained["lora"], model, "--to", "merged", "--shard-size", "40KB"))
    assert "changed 14 of the base's tensors" in told and "weights float32" in told
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(IDS).logits
    torch.testing.assert_close(logits, answers(trained["lora"]), atol=1e-5, rtol=1e-4)

    asked = run_here("import", model, "extracted", "--base", "exchanged-base")
    assert asked.code == 2 and "Give --rank 16, or --energy 0.99" in asked.err
    told = clean(run_here("import", model, "extracted", "--base", "exchanged-base", "--rank", "6"))
    assert "found a whole model, 14 layers of rank 6 or less" in told and "lost 0.0 %" in told
    torch.testing.assert_close(answers("extracted@1"), answers(trained["lora"]), atol=1e-4, rtol=1e-3)
    told = clean(run_here("import", model, "extracted", "--base", "exchanged-base", "--energy", "0.9", "--json"))
    assert json.loads(told)["loss"]["total"] <= math.sqrt(0.1)


def test_a_whole_fine_tuned_model_says_what_no_lora_can_hold(trained: dict[str, str], tmp_path: Path) -> None:
    clean(run_here("export", trained["full"], str(tmp_path / "model"), "--merged"))
    told = clean(run_here("import", str(tmp_path / "model"), "of-full", "--base", "exchanged-base", "--rank", "4"))
    assert "left out model." in told and "no LoRA can change them" in told


def test_a_check_gives_every_failure_a_remedy_and_exit_code_7(trained: dict[str, str], tmp_path: Path) -> None:
    assert "✗" not in clean(run_here("check", trained["lora"], "--for", "vllm"))
    small = run_here("check", trained["lora"], "--for", "vllm", "--max-rank", "4")
    assert (small.code, small.err) == (7, "")
    assert f"regraft export {trained['lora']} DIR --rank 4" in " ".join(small.out.split())
    dora = run_here("check", trained["dora"], "--for", "vllm", "--json")
    assert dora.code == 7
    report = json.loads(dora.out)
    assert report["passed"] is False
    assert {line["name"] for line in report["lines"] if not line["passed"]} >= {"no DoRA"}
    clean(run_here("export", trained["dora"], str(tmp_path / "cut"), "--rank", "8"))
    for server in ("vllm", "lorax", "peft", "llama.cpp"):
        assert "✗" not in clean(run_here("check", str(tmp_path / "cut"), "--for", server))
    assert run_here("check", trained["full"], "--for", "peft").code == 7


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("export", "@", "DIR", "--to", "mlx", "--merged"), "two different things"),
        (("export", "@", "DIR", "--to", "merged", "--rank", "4"), "two different things"),
        (("export", "@", "DIR", "--dtype", "float16"), "are for a merged model"),
        (("import", "DIR", "x", "--base", "exchanged-base", "--rank", "4", "--energy", "0.9"), "two ways"),
        (
            ("import", "PEFT", "x", "--base", "exchanged-base", "--rank", "4"),
            "are for whole models; this is a peft folder",
        ),
        (("import", "PEFT", "x", "--base", "exchanged-base", "--part", "unet"), "for kohya and diffusers files"),
        (("import", "EMPTY", "x", "--base", "exchanged-base"), "holds no adapter that is known here"),
        (("import", "TEXT", "x", "--base", "exchanged-base"), "is no safetensors file"),
        (("import", "STRANGE", "x", "--base", "exchanged-base"), "holds no LoRA that is known here"),
        (("import", "SOURCE/nowhere", "x", "--base", "exchanged-base"), "is not there"),
        (("import", "CUT", "x", "--base", "exchanged-base"), "not a whole safetensors file"),
        (("import", "NAN", "x", "--base", "exchanged-base"), "with NaN or infinity|has NaN or infinity in it"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_what_cannot_be_is_told_in_one_message(
    trained: dict[str, str], tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    layer = "model.layers.0.self_attn.q_proj"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.bin").write_text("text")
    save_file({"weight": torch.ones(2)}, tmp_path / "strange.safetensors")
    factors = {f"{layer}.lora_A.weight": torch.full((1, 32), torch.nan), f"{layer}.lora_B.weight": torch.ones(32, 1)}
    save_file(factors, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "nan.safetensors").read_bytes()[:-5])
    if "PEFT" in arguments:
        clean(run_here("export", trained["lora"], str(tmp_path / "peft")))
    places = {
        "@": trained["lora"],
        "DIR": str(tmp_path / "new"),
        "PEFT": str(tmp_path / "peft"),
        "EMPTY": str(tmp_path / "empty"),
        "TEXT": str(tmp_path / "text.bin"),
        "STRANGE": str(tmp_path / "strange.safetensors"),
        "SOURCE/nowhere": str(tmp_path / "nowhere"),
        "CUT": str(tmp_path / "cut.safetensors"),
        "NAN": str(tmp_path / "nan.safetensors"),
    }
    result = run_here(*(places.get(argument, argument) for argument in arguments))
    assert result.code in (2, 3, 5) and result.out == ""
    assert re.search(told, result.err)
    assert result.err.count("✗") == 1 and result.err.count("\n") <= 2
    assert not AdapterRegistry().has_adapter("x")
    assert not (tmp_path / "new").exists()

"""What servers ask of an adapter, rule by rule."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftType
from safetensors.numpy import save_file

from infra.errors import CorruptArtifact
from registry.adapter_directory import inspect_adapter
from registry.serving_rules import PEFT_TYPES, Line, Server, Subject, examine, tied_head

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
SERVERS: tuple[Server, ...] = ("vllm", "lorax", "peft", "llama.cpp")


def lora(ranks: dict[str, int], outputs: int = 8) -> dict[str, np.ndarray]:
    tensors = {}
    for place, rank in ranks.items():
        tensors[f"base_model.model.{place}.lora_A.weight"] = np.ones((rank, 8), np.float32)
        tensors[f"base_model.model.{place}.lora_B.weight"] = np.ones((outputs, rank), np.float32)
    return tensors


@pytest.fixture
def subject(tmp_path: Path) -> Any:
    def make(
        tensors: dict[str, np.ndarray] | None = None,
        family: str | None = "llama",
        tied: bool | None = None,
        **config: Any,
    ) -> Subject:
        directory = tmp_path / "adapter"
        directory.mkdir(exist_ok=True)
        content = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **config}
        (directory / "adapter_config.json").write_text(json.dumps(content))
        save_file(lora({Q: 8, V: 8}) if tensors is None else tensors, directory / "adapter_model.safetensors")
        return Subject("counting@3", inspect_adapter(directory), family, tied)

    return make


def failed(subject: Subject, server: Server, max_rank: int | None = None) -> list[Line]:
    lines = examine(subject, server, max_rank)
    assert lines
    assert all(bool(line.remedy) is not line.passed for line in lines)
    return [line for line in lines if not line.passed]


def test_a_plain_lora_serves_everywhere(subject: Any) -> None:
    assert all(not failed(subject(), server) for server in SERVERS)


def test_the_types_that_peft_knows_are_those_of_the_peft_that_is_installed() -> None:
    assert {kind.value for kind in PeftType} == PEFT_TYPES


@pytest.mark.parametrize(
    ("rank", "given", "remedies"),
    [
        (16, None, []),
        (17, None, ["start vLLM with --max-lora-rank 32, or regraft export counting@3 DIR --rank 16"]),
        (64, 32, ["start vLLM with --max-lora-rank 64, or regraft export counting@3 DIR --rank 32"]),
        (64, 64, []),
        (600, None, ["regraft export counting@3 DIR --rank 16"]),
    ],
)
def test_vllm_s_rank_limit(subject: Any, rank: int, given: int | None, remedies: list[str]) -> None:
    lines = failed(subject(lora({Q: rank}), r=rank), "vllm", given)
    assert [line.remedy.removesuffix(", which tells what that loses") for line in lines] == remedies


@pytest.mark.parametrize(
    ("tensors", "config", "servers", "name"),
    [
        ({}, {"use_dora": True}, {"vllm", "lorax", "llama.cpp"}, "no DoRA"),
        ({}, {"modules_to_save": ["lm_head"]}, {"vllm", "lorax"}, "no whole modules"),
        ({f"base_model.model.{Q}.bias": np.ones(8, np.float32)}, {}, {"vllm", "lorax"}, "no biases"),
        ({f"base_model.model.{Q}.bias": np.ones(8, np.float32)}, {}, {"llama.cpp"}, "factors and norms only"),
        ({}, {"bias": "lora_only"}, {"vllm", "lorax"}, "no biases"),
        ({}, {"use_rslora": True}, {"llama.cpp"}, "scale"),
        ({}, {"alpha_pattern": {Q: 4}}, {"vllm", "lorax", "llama.cpp"}, "scale"),
        ({"base_model.model.model.embed_tokens.weight": np.ones((9, 8))}, {}, set(SERVERS), "no tokens added"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 9))}, {}, {"vllm"}, "linear layers only"),
        ({f"base_model.model.{Q}.x.lora_A.weight": np.ones((2, 9), np.int8)}, {}, set(SERVERS) - {"peft"}, "dtype"),
    ],
)
def test_what_a_server_would_refuse_or_ignore(
    subject: Any, tensors: dict[str, np.ndarray], config: dict[str, Any], servers: set[Server], name: str
) -> None:
    told = subject(lora({Q: 8, V: 8}) | tensors, **config)
    for server in SERVERS:
        if server in servers:
            assert name in [line.name for line in failed(told, server)]
        elif name in [line.name for line in examine(told, server)]:
            assert name not in [line.name for line in failed(told, server)]


def test_mixed_ranks_of_one_scale_pass_vllm_and_not_llama_cpp(subject: Any) -> None:
    told = subject(lora({Q: 8, V: 4}), rank_pattern={V: 4}, alpha_pattern={V: 8})
    assert not failed(told, "vllm")
    (line,) = failed(told, "llama.cpp")
    assert line.found == f"{V} would get 4 instead of 2"
    assert line.remedy.startswith("regraft export counting@3 DIR --rank 8")
    equal_alpha = subject(lora({Q: 8, V: 4}), rank_pattern={V: 4})
    assert not failed(equal_alpha, "llama.cpp")
    assert [line.name for line in failed(equal_alpha, "vllm")] == ["scale"]


@pytest.mark.parametrize(("rank", "wanted"), [(8, None), (16, None), (48, None), (4, 8), (12, 16), (40, 48)])
def test_lorax_pads_ranks_without_scaling(subject: Any, rank: int, wanted: int | None) -> None:
    lines = failed(subject(lora({Q: rank, V: rank}), r=rank), "lorax")
    assert [line.remedy for line in lines] == (
        [f"regraft export counting@3 DIR --rank {wanted}: nothing is lost"] if wanted else []
    )


def test_lorax_takes_its_modules_in_every_layer(subject: Any) -> None:
    assert [line.name for line in failed(subject(lora({V: 8})), "lorax")] == ["every layer adapted"]
    strange = lora({"model.layers.0.self_attn.c_attn": 8})
    assert [line.name for line in failed(subject(strange), "lorax")] == ["modules"]
    assert not failed(subject(strange, family="unheard-of"), "lorax")


def test_llama_cpp_takes_no_head_that_is_tied(subject: Any) -> None:
    head = lora({"lm_head": 8})
    assert [line.name for line in failed(subject(head, tied=True), "llama.cpp")] == ["the head"]
    assert not failed(subject(head, tied=False), "llama.cpp") and not failed(subject(head, tied=None), "llama.cpp")


def test_vllm_s_vocabulary_with_an_adapted_head(subject: Any) -> None:
    assert not failed(subject(lora({"lm_head": 8}, outputs=32_000)), "vllm")
    assert [line.name for line in failed(subject(lora({"lm_head": 8}, outputs=300_000)), "vllm")] == ["vocabulary"]


@pytest.mark.parametrize(
    ("kind", "server", "remedy"),
    [
        ("PACA", "peft", "--as-lora"),
        ("PACA", "vllm", "--as-lora"),
        ("VERA", "vllm", "--to merged"),
        (
            "REGRAFT_FULL",
            "vllm",
            "--to merged; or a LoRA out of that: regraft import DIR NAME --base BASE --rank 16",
        ),
        ("LN_TUNING", "llama.cpp", "regraft export counting@3 DIR --to merged; or a LoRA out of that"),
        ("PREFIX_TUNING", "lorax", "no change of weights"),
    ],
)
def test_another_kind_of_adapter_is_told_its_way_out(subject: Any, kind: str, server: Server, remedy: str) -> None:
    (line,) = failed(subject(peft_type=kind), server)
    assert kind in line.found and remedy in line.remedy


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0},
        {"lora_alpha": 1e38},
        {"lora_alpha": "16"},
        {"r": True},
        {"lora_alpha": None},
        {"alpha_pattern": {"(": 2}},
    ],
)
def test_a_config_without_sense_is_refused(subject: Any, config: dict[str, Any]) -> None:
    with pytest.raises(CorruptArtifact):
        examine(subject(**config), "vllm")


def test_whether_a_head_is_tied_is_read_off_a_local_base(tmp_path: Path) -> None:
    assert tied_head("hf:org/name") is None and tied_head(f"path:{tmp_path}") is None
    for text, told in (('{"tie_word_embeddings": true}', True), ("{}", None), ("{", None)):
        (tmp_path / "config.json").write_text(text)
        assert tied_head(f"path:{tmp_path}") is told


@pytest.mark.parametrize(
    ("config", "then"),
    [
        ({}, "then regraft export NAME DIR --rank 4"),
        ({"peft_type": "COMPRESSED"}, "then regraft export NAME DIR"),
        ({"peft_type": "PACA"}, "then regraft export NAME DIR --as-lora"),
        ({"peft_type": "CPT"}, "then regraft generate NAME"),
    ],
)
def test_a_folder_is_registered_before_it_is_exported(subject: Any, config: dict[str, Any], then: str) -> None:
    folder = replace(subject(**config), called="/some where/folder")
    (line,) = failed(folder, "vllm", 4)
    assert f"regraft import '/some where/folder' NAME --base BASE, {then}" in line.remedy

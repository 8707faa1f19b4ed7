"""Tokenizers: nothing is lost, ids agree with the Hugging Face export, fingerprints survive saving."""

import inspect
import json
import json.decoder
import pickle
import string
import textwrap
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from riverrun.train.data.bpe import SPACE, SentencePieceTokenizer, train_sentencepiece
from riverrun.train.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer

SOURCES = [Path(module.__file__).read_bytes().decode() for module in (inspect, textwrap, json, json.decoder, string)]
AWKWARD = [
    "",
    " ",
    "\n",
    "  two\tand\r\n\r\n   a tab\t\t\n\n\n",
    "trailing   ",
    "\ufeffbom, é, 漢字, 😀, e\u0301",
    f"a{SPACE}b {SPACE}{SPACE}",
    "0123456789 3.14159",
    "nul \0 and \x1b and \x7f",
    "<|endoftext|><|begin|></s><s><unk><0x0A><|pad|>",
    "a\u2028b\u00a0c\u3000d",
    "\u0149 ﬁ Å ½",  # characters that a normalisation would change
]
TEXTS = SOURCES + AWKWARD


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_sentencepiece(SOURCES[:3], tmp_path_factory.mktemp("bpe") / "t.model", 600)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A Hugging Face folder with a byte-level BPE."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(SOURCES[:2], trainer)
    folder = tmp_path_factory.mktemp("hf")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture(params=["bytes", "sentencepiece", "huggingface"])
def tokenizer(request, bpe, byte_level):
    return {"bytes": ByteTokenizer(), "sentencepiece": bpe, "huggingface": load_tokenizer(byte_level)}[request.param]


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_is_lost(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.eos_id not in ids  # also where the text spells the special token


def test_saved_folder_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    for name in ("fingerprint", "vocab_size", "eos_id", "bos_id", "pad_id"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_saved_folder_gives_transformers_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in TEXTS:
        ids = theirs(text, split_special_tokens=True)["input_ids"]  # with their default: nothing is added
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs(theirs.eos_token)["input_ids"] == [tokenizer.eos_id]  # while their prompts may spell it
    assert len(theirs) == tokenizer.vocab_size


def test_saved_folder_works_beside_a_model_config(bpe, tmp_path):
    bpe.save(tmp_path)
    for model_type in ("mamba2", "olmo_hybrid", "riverrun"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
        assert theirs(SOURCES[0])["input_ids"] == bpe.encode(SOURCES[0])


def test_pickles_for_worker_processes(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(SOURCES[1]) == tokenizer.encode(SOURCES[1])
    assert again.fingerprint == tokenizer.fingerprint


def test_fingerprints_tell_tokenizers_apart(bpe, byte_level, tmp_path):
    other = train_sentencepiece(SOURCES[:3], tmp_path / "other.model", 601)
    found = {t.fingerprint for t in (bpe, other, ByteTokenizer(), load_tokenizer(byte_level))}
    assert len(found) == 4
    definition = json.loads((byte_level / "tokenizer.json").read_text())
    definition["model"]["merges"].pop()
    changed = tmp_path / "changed"
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), eos_token="<|endoftext|>"
    ).save_pretrained(changed)
    assert load_tokenizer(changed).fingerprint not in found


def test_half_a_character_decodes_to_a_replacement(tokenizer):
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        assert "\ufffd" in tokenizer.decode(tokenizer.encode("漢")[:2])


def test_training_is_deterministic_and_learns(bpe, tmp_path):
    train_sentencepiece(SOURCES[:3], tmp_path / "again.model", 600)
    again = load_tokenizer(tmp_path / "again.model")
    assert isinstance(again, SentencePieceTokenizer)
    assert again.fingerprint == bpe.fingerprint
    assert again.vocab_size == 600
    assert len(bpe.encode(SOURCES[0])) < 0.6 * len(SOURCES[0])
    assert len(bpe.encode("        ")) == 1  # indentation is a token
    assert len(bpe.encode("1234")) == 4


@pytest.mark.parametrize(
    ("documents", "vocab_size", "message"),
    [
        ([], 500, "no text"),
        (["", "\n\n"], 500, "no text"),
        (["abc abd"], 5000, "too high"),
        ([SOURCES[0]], 100, "vocabulary of 100"),
    ],
)
def test_impossible_training_is_explained(tmp_path, documents, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_sentencepiece(documents, tmp_path / "t.model", vocab_size)
    assert not any(tmp_path.iterdir())


def test_model_files_need_their_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"named \*\.model"):
        train_sentencepiece(SOURCES[:1], tmp_path / "t.bin", 500)


def test_lossy_models_are_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    (tmp_path / "text").write_text(SOURCES[0])
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "t5"), vocab_size=500, minloglevel=2
    )
    with pytest.raises(
        ValueError, match=r"t5\.model is not a BPE, has no byte fallback, normalises text, adds a space"
    ):
        load_tokenizer(tmp_path / "t5.model")


def test_unusable_specs_are_explained(tmp_path, byte_level):
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"bad\.model is not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(ValueError, match="no sentencepiece model"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON object"):
        load_tokenizer(tmp_path / "empty")
    theirs = PreTrainedTokenizerFast.from_pretrained(byte_level)
    theirs.eos_token = None
    theirs.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path / "endless")

"""The byte data set: real text, Megatron can read it, written once and whole."""

import os
import subprocess
import sys

import numpy as np
import pytest

from helix_megatron.models import data


def test_documents_are_the_topics_of_this_python():
    from pydoc_data.topics import topics

    documents = data.documents()
    assert len(documents) == len(topics)
    assert all(document[-1] == data.EOD and (document[:-1] < 256).all() for document in documents)
    assert data.decode(documents[0][:-1]) == topics[sorted(topics)[0]]


def test_megatron_reads_what_was_written(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    count = data.write(tmp_path / "folder" / "text")
    dataset = IndexedDataset(str(tmp_path / "folder" / "text"))
    documents = data.documents()
    assert len(dataset) == len(dataset.document_indices) - 1 == len(documents)
    assert sum(dataset.sequence_lengths) == count
    for number in (0, 7, len(documents) - 1):
        np.testing.assert_array_equal(dataset[number], documents[number])
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["text.bin", "text.idx"]


def test_writing_again_changes_nothing_and_repairs_damage(tmp_path):
    data.write(tmp_path / "text")
    files = [tmp_path / "text.bin", tmp_path / "text.idx"]
    before = [path.stat().st_ino for path in files]
    whole = [path.read_bytes() for path in files]
    data.write(tmp_path / "text")
    assert [path.stat().st_ino for path in files] == before  # not even replaced by itself
    os.truncate(files[0], 100)
    files[1].unlink()
    data.write(tmp_path / "text")
    assert [path.read_bytes() for path in files] == whole


def test_an_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(IndexedDatasetBuilder, "finalize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.write(tmp_path / "text")
    assert list(tmp_path.iterdir()) == []


def test_decode():
    assert data.decode([72, 105, data.EOD, 195, 164]) == "Hi\n\nä"
    assert data.decode([195]) == "\ufffd"
    for bad in (-1, 257):
        with pytest.raises(ValueError, match=f"token {bad} is not a byte token"):
            data.decode([bad])


def test_null_tokenizer_takes_the_last_token_for_end_of_document():
    from megatron.core.tokenizers.text.libraries import NullTokenizer

    assert NullTokenizer(data.TOKENIZER_ARGS["vocab-size"]).eod == data.EOD


def test_command_line(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "helix_megatron.models.data", str(tmp_path / "text")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0
    assert "--tokenizer-type NullTokenizer --vocab-size 257" in run.stdout
    assert (tmp_path / "text.idx").exists()

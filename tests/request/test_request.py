"""What the command line and the files say together, before jsonargparse sees them."""

import pytest

from lightning_fot.errors import SettingError
from lightning_fot.request.preflight import check_settings
from lightning_fot.request.request import read_request


def retriever(*words):
    return read_request("run", ["--config", "hnsw", *words]).get("model.memory.retriever")


@pytest.mark.parametrize("words", [["--model.memory.retriever=scann"], ["--model.memory.retriever", "scann"]])
def test_a_retriever_named_alone_keeps_the_index_size_of_the_file(words):
    assert retriever()["min_index_size"] == 1024
    assert retriever(*words) == {"name": "scann", "min_index_size": 1024}
    request = read_request("run", ["--config", "hnsw", *words])
    assert any("min_index_size=1024" in note for note in request.notes)
    assert not any(word in ("scann", "--model.memory.retriever") for word in request.overrides)


def test_a_retriever_given_with_arguments_is_taken_as_it_is():
    assert retriever("--model.memory.retriever={name: hnsw, M: 4}") == {"name": "hnsw", "M": 4}


def test_an_unknown_retriever_stays_what_was_written():
    assert retriever("--model.memory.retriever=hsnw") == "hsnw"


def test_one_path_needs_no_brackets(tmp_path):
    (tmp_path / "a.txt").write_text("words " * 400)
    check_settings(read_request("run", ["--config", "smoke", f"--data.paths={tmp_path}"]))
    with pytest.raises(SettingError, match=r"data\.paths"):
        check_settings(read_request("run", ["--config", "smoke", "--data.paths=3"]))


@pytest.mark.parametrize("value", ["2020-01-01", "&a [*a]", "${model.memory.window"])
@pytest.mark.parametrize("name", ["model", "model.memory.top_k", "data.paths", "nothing"])
def test_what_yaml_reads_and_no_setting_can_be_is_named(name, value):
    with pytest.raises(SettingError, match=rf"^{name}=.*cannot be a setting"):
        read_request("run", ["--config", "smoke", f"--{name}={value}"])

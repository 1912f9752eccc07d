"""The pages do what they say: Python runs, commands are followed or understood, links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import torch

from lightning_fot.cli import VERBS, main
from lightning_fot.commands import ask, lm_eval, serve, sweep
from lightning_fot.commands.bench import bench as bench_command
from lightning_fot.request.harness import model_settings
from lightning_fot.request.preflight import check_settings
from lightning_fot.request.request import make_request, read_request
from lightning_fot.request.words import read
from lightning_fot.retrievers import PerBankRetriever, create_retriever
from lightning_fot.sweep.settings import SweepConfig
from lightning_fot.sweep.space import SearchConfig
from lightning_fot.testing import RetrieverContract
from tests.support.markdown_blocks import ROOT, blocks, section
from tests.support.memories import SETTINGS, backbone, books, text
from tests.support.patience import PATIENCE_S

PAGE = (ROOT / "docs" / "retrievers.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
OWN = section(PAGE, "A retriever of your own")


@pytest.fixture
def distribution(tmp_path):
    """What installing the plug-in of the page would leave: its modules and its entry points."""
    project = tomllib.loads(blocks(OWN, "toml")[0])["project"]
    for block in blocks(OWN, "python"):
        named = re.match(r"# (\w+\.py)\n", block)
        (tmp_path / named[1]).write_text(block, encoding="utf-8")
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, names),) = project["entry-points"].items()
    lines = "".join(f"{name} = {target}\n" for name, target in names.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    return tmp_path, list(names)


@pytest.mark.slow
def test_the_plugin_of_the_page_keeps_the_contract(distribution):
    folder, (name,) = distribution
    (test,) = folder.glob("test_*.py")
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(*words):
        command = [sys.executable, "-m", *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, cwd=folder, check=False
        )

    tested = run("pytest", "-q", "-W", "error::RuntimeWarning", str(test))
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", tested.stdout)[1]) >= 25
    listed = run("lightning_fot", "retrievers")
    assert re.search(rf"^{name} .* ready", listed.stdout, flags=re.MULTILINE), listed.stdout


def test_it_takes_at_most_thirty_lines():
    assert len(blocks(OWN, "python")[0].splitlines()) <= 30


@pytest.mark.slow
def test_python_blocks_run_one_after_the_other(capsys):
    scope = {"__name__": "page"}
    for block in blocks(PAGE, "python"):
        exec(compile(block, "docs/retrievers.md", "exec"), scope)
    assert issubclass(scope["GraphRetriever"], PerBankRetriever)
    assert issubclass(scope["TestGraph"], RetrieverContract)
    assert scope["rows"].shape == (3, 5, 32)
    retriever = create_retriever({"name": scope["GraphRetriever"], "ef_search": 9}, dim=4)
    retriever.add(torch.eye(4)[None])
    assert retriever.search(2 * torch.eye(4)[None], 1).flatten().tolist() == [0, 1, 2, 3]
    recall = [float(value) for value in re.findall(r"recall (\d\.\d+), mass", capsys.readouterr().out)]
    assert len(recall) == 3
    # What the section on transforms claims. Threads build the graph, so no two runs are alike to the second digit: on
    # the head that the page takes, the steps are .46, .87 and .95.
    assert recall[0] < recall[1] - 0.2
    assert recall[1] < recall[2] - 0.02


def test_every_public_member_is_described():
    members = {name for name in dir(PerBankRetriever) if not name.startswith("_")}
    assert [name for name in members if f"`{name}" not in PAGE and f".{name}" not in PAGE] == []


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", PAGE))
def test_links_lead_somewhere(link):
    assert (ROOT / "docs" / link.partition("#")[0]).exists()  # anchors: mkdocs build --strict


@pytest.mark.parametrize("name", ["training", "distributed"])
def test_every_command_of_the_pages_on_training_is_understood(name):
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    lines = [shlex.split(line, comments=True) for block in blocks(page, "bash") for line in block.splitlines()]
    assert len(lines) > 3
    for words in lines:
        assert words[0] == "lightning"
        assert words[1] in ("fit", "run")
        check_settings(read_request(words[1], words[2:]))


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with what the pages speak of: documents, a model, a run."""
    monkeypatch.chdir(tmp_path)
    books(tmp_path / "books", 2, words=120)
    (tmp_path / "books" / "old.txt").write_text(text(5, 120), encoding="utf-8")
    for folder in ("notes", "more"):
        books(tmp_path / folder, 1, words=50)
    (tmp_path / "book.txt").write_text(text(3, 90), encoding="utf-8")
    (tmp_path / "another.txt").write_text(text(4, 70), encoding="utf-8")
    (tmp_path / "notes.jsonl").write_text('{"text": "The harbour stays open."}\n', encoding="utf-8")
    (tmp_path / "tuned.yaml").write_text("model: {memory: {retriever: {name: hnsw, ef_search: 48}}}\n")
    (tmp_path / "path" / "to").mkdir(parents=True)
    backbone(tmp_path / "path" / "to" / "model")
    (tmp_path / "runs" / "exact").mkdir(parents=True)
    (tmp_path / "runs" / "hnsw" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "hnsw" / "checkpoints" / "last.ckpt").touch()
    config = (ROOT / "configs" / "hnsw.yaml").read_text(encoding="utf-8")
    (tmp_path / "runs" / "hnsw" / "config.yaml").write_text(config, encoding="utf-8")
    return tmp_path


def _page(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def _follow(words):
    """Does what a command line says, where that takes no more than a second; checks it as far as that goes, else."""
    verb, rest = words[0], words[1:]
    if verb == "serve" or "--url" in rest:  # the tests of serving ask real servers
        given = read(rest, {"serve": serve.VERB, "ask": ask.VERB}[verb])
        served = given.plain if verb == "serve" else given.plain[:1]
        assert all(os.path.exists(f"memories/{name}") for name in served)
    elif verb in ("ingest", "ask", "memories", "forget"):
        if verb == "ingest" and not os.path.exists("memories/shelf"):
            # The same on a model that loads at once.
            rest = [word for word in rest if word not in ("--config", "configs/hnsw.yaml")] + list(SETTINGS)
        limit = ["--max_new_tokens=2"] if verb == "ask" else []
        assert main([verb, *rest, *limit]) == 0
    elif verb in ("run", "fit"):
        if any("path/to/model" in word for word in rest):
            # It has 4 layers.
            rest = ["--model.memory.memory_layers=[-3,-1]" if "memory_layers" in word else word for word in rest]
            if not any("memory_layers" in word for word in rest):
                rest = [*rest, "--model.memory.memory_layers=[-1]"]
        check_settings(read_request(verb, rest))
    elif verb == "sweep":
        given = read(rest, sweep.VERB)
        config = SweepConfig.of(
            make_request(verb, given.options.config, given.settings, "lightning sweep").get("sweep")
        )
        assert config.builds()
        if config.search is not None:
            SearchConfig.of(config.search).check()
    elif verb == "lm-eval":
        given = read(rest, lm_eval.VERB)
        model_settings(lm_eval.described(given))
        assert given.options.tasks
    elif verb == "bench":
        assert read(rest, bench_command.VERB).options
    elif verb == "report":
        # The folders are there; what is written in them is the tests' of the report.
        folders = [word for word in rest if not word.startswith("--")]
        assert folders
        assert all(os.path.isdir(folder) for folder in folders)
    else:
        assert verb in VERBS
        others = [word for word in rest if word != "--delta"]
        assert len(others) == {"doctor": 0, "export": 2, "retrievers": 0}[verb]


NEW = [
    "quickstart",
    "concepts",
    "commands",
    "serving",
    "bring_your_model",
    "bring_your_documents",
    "cluster",
    "limits",
    "faq",
    "lm_eval",
    "tasks",
    "reproduce",
]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "quickstart")) for name in NEW]
)
def test_commands_of_a_page_do_what_it_says(name, desk):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    lines = "\n".join(blocks(_page(name), "bash")).splitlines()
    for words in filter(None, (shlex.split(line, comments=True) for line in lines)):
        if words[0] == "pip":
            assert set(re.search(r"\[(.+)\]", words[-1])[1].split(",")) <= set(extras)
        else:
            assert words[0] == "lightning"
            _follow(words[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["quickstart", "concepts", "bring_your_model", "bring_your_documents", "tasks", "ecosystem"]
)
def test_python_of_a_page_runs(name, desk, capsys):
    for block in blocks(_page(name), "python"):
        smaller = re.sub("smollm2-135m(-fot)?", "tiny-random-llama", block).replace("[17, 18, 20, 21]", "[1, 3]")
        exec(compile(smaller, f"docs/{name}.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out


def test_the_mixture_of_the_page_can_be_read(desk):
    (mixture,) = blocks(_page("bring_your_documents"), "yaml")
    (desk / "mixture.yaml").write_text(mixture, encoding="utf-8")
    words = ["--config", "smoke", "--config", "mixture.yaml", "--data.max_documents=null"]
    check_settings(read_request("run", words))


@pytest.mark.slow
def test_a_trial_for_ray_tune_is_a_run(desk):
    trial = blocks(_page("cluster"), "python")[0]
    scope = {"__name__": "page"}
    exec(compile(trial.replace('"hnsw"', '"smoke"'), "docs/cluster.md", "exec"), scope)
    found = scope["train"]({"trainer.max_steps": 1, "evaluation.passkey_samples": 0})
    assert {"none", "exact", "hnsw"} <= set(found)


@pytest.mark.slow
def test_ray_tune_runs_such_trials(desk):
    pytest.importorskip("ray.tune", exc_type=ImportError)
    trial, search = blocks(_page("cluster"), "python")
    scope = {"__name__": "page"}
    exec(compile(trial.replace('"hnsw"', '"smoke"'), "docs/cluster.md", "exec"), scope)
    search = search.replace("num_samples=8", "num_samples=1").replace("tune.choice([1, 3])", "tune.choice([1])")
    exec(compile(search, "docs/cluster.md", "exec"), scope)
    assert scope["best"].metrics["exact"] > 1


@pytest.mark.parametrize("page", [*NEW, "README", "sweeps", "distributed", "training", "architecture", "results"])
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", _page(page)):
        assert (ROOT / "docs" / link.partition("#")[0]).exists(), link


def test_every_page_is_in_the_index():
    index = _page("README")
    names = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md", "reproduce.md"}
    assert {name for name in names if f"({name})" not in index} == set()
    assert "docs/README.md" in README

"""lm-eval with a task of our own: its numbers are those of `tasks` and `text`."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from evaluation.tiny_models import EOD, log_p_of_next, model

from rwkv_jax.checkpoint import weights
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.evaluation import tasks
from rwkv_jax.evaluation.bits import Settings
from rwkv_jax.evaluation.text import encode, measure

ROOT = Path(tasks.__file__).parents[2]
TOKENIZER = ByteTokenizer()
MODULE = "rwkv_jax.evaluation.lm_eval"

LINES = [
    {"question": "What is it?", "choices": ["a cat", "the dög", "xyz"], "answer": 2},
    {"question": "Two and two is", "choices": ["four", "five or six"], "answer": 0},
    {"question": "Two and two is", "choices": ["22", "2"], "answer": 1},
    {"question": "Why?\n", "choices": ["so", "not so"], "answer": 1},
]

YAML = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
task: {task}
output_type: {kind}
{rest}
"""

CHOICES = """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_bytes}]
"""
ENDINGS = """
doc_to_text: "{{question}}"
doc_to_target: " {{choices[answer]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""
WRITING = """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: [">"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
"""
KINDS = {
    "choosing": ("multiple_choice", CHOICES),
    "ending": ("loglikelihood", ENDINGS),
    "reading": ("loglikelihood_rolling", ROLLING),
    "writing": ("generate_until", WRITING),
}


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    line = r"^lm-eval cannot be imported \([^\n]*\); pip install 'rwkv_jax\[lm-eval\]'$"
    with pytest.raises(ImportError, match=line):
        importlib.import_module(MODULE)
    with pytest.raises(SystemExit, match=line):  # printed, with exit code 1
        runpy.run_module(MODULE, run_name="__main__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tasks, their data, and a model file."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    for task, (kind, rest) in KINDS.items():
        text = YAML.format(data=data, task=task, kind=kind, rest=rest)
        (folder / f"{task}.yaml").write_text(text)
    weights.save(folder / "model.safetensors", *model("7"))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """The harness's results, and its log of each request."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from rwkv_jax.evaluation.lm_eval import RWKV

    subject = RWKV((*model("7"), TOKENIZER), batch_size=3)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        return lm_eval.simple_evaluate(
            model=subject,
            tasks=list(KINDS),
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )


pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages


def test_choosing(results, folder):
    params, cfg = model("7")
    questions = tasks.read_choices(folder / "data.jsonl")
    # lm-eval always puts a space between.
    questions[3] = tasks.Choice("Why?\n", (" so", " not so"), 1)
    expected = tasks.score_choices(params, questions, Settings(cfg, rows=3), tokenizer=TOKENIZER)
    found = results["results"]["choosing"]
    assert found["acc,none"] == expected.accuracy
    shorter = tasks.score_choices(params, questions[:3], Settings(cfg, rows=3), tokenizer=TOKENIZER)
    samples = results["samples"]["choosing"]
    assert np.mean([one["acc_bytes"] for one in samples[:3]]) == shorter.normalised


def test_ending(results):
    params, cfg = model("7")
    endings = [
        tasks.Ending(line["question"], f" {line['choices'][line['answer']]}") for line in LINES
    ]
    expected = tasks.score_endings(params, endings, Settings(cfg, rows=3), tokenizer=TOKENIZER)
    found = results["results"]["ending"]
    assert found["acc,none"] == expected.accuracy
    assert found["perplexity,none"] == pytest.approx(expected.perplexity, rel=1e-5)


def test_reading(results):
    params, cfg = model("7")
    nats, size = 0.0, 0
    for line in LINES:
        ids = TOKENIZER.encode(line["question"])
        # All but the end of the document, which lm-eval does not ask for.
        text = encode("line", [line["question"]], TOKENIZER, len(ids))
        nats += measure(params, text, Settings(cfg, rows=1)).nats
        size += len(ids)
    found = results["results"]["reading"]["bits_per_byte,none"]
    assert found == pytest.approx(nats / size / np.log(2), rel=1e-5)


def test_writing(results):
    expected = [written(line["question"], 12) for line in LINES]
    found = [sample["resps"][0][0] for sample in results["samples"]["writing"]]
    assert found == [text.partition(">")[0] for text in expected]
    assert found != expected


def written(prompt, tokens):
    """What the model would write, token by token."""
    before, ids = TOKENIZER.encode(prompt), []
    while len(ids) < tokens and EOD not in ids:
        ids.append(int(np.argmax(log_p_of_next("7", [*before, *ids, EOD])[-1])))
    return TOKENIZER.decode_bytes(ids).decode(errors="replace")


@pytest.fixture
def subject():
    pytest.importorskip("lm_eval")
    from rwkv_jax.evaluation.lm_eval import RWKV

    return RWKV((*model("7"), TOKENIZER), batch_size="auto", max_batch_size=2)


def asked(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def test_edges_of_requests(subject):
    assert subject.loglikelihood_rolling(asked(("",), ("",))) == [0, 0]
    assert subject.loglikelihood(asked(("a", ""))) == [(0, True)]
    [(alone, _)] = subject.loglikelihood(asked(("", "ab")))
    assert subject.loglikelihood_rolling(asked(("",), ("ab",))) == [0, pytest.approx(alone)]
    assert subject.generate_until([]) == subject.loglikelihood([]) == []


def test_settings_of_writing(subject):
    draws = {"do_sample": True, "max_new_tokens": 3, "top_k": 200}
    requests = asked(("one", {"max_tokens": 2}), ("two", draws), ("one", draws), ("one", draws))
    greedy, *drawn = subject.generate_until(requests)
    assert greedy == written("one", 2)
    assert drawn == subject.generate_until(requests)[1:]
    assert len({*drawn}) == 3, "equal requests draw other texts"
    with pytest.raises(UserError, match="generation setting num_beams: unknown; known settings: "):
        subject.generate_until(asked(("one", {"num_beams": 2})))


def test_the_command_line_knows_the_name(folder, results):
    arguments = ["run", "--model", "rwkv_jax", "--tasks", "choosing", "--include_path", str(folder)]
    arguments += ["--batch_size", "3", "--model_args"]
    found, missing = (
        subprocess.run(
            [sys.executable, "-m", MODULE, *arguments, f"pretrained={folder / name},dtype=float32"],
            cwd=ROOT,
            env={**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        for name in ("model.safetensors", "none.pth")
    )
    assert found.returncode == 0, found.stderr
    [accuracy] = re.findall(r"\|acc +\|↑ +\| *([\d.]+)\|", found.stdout)
    assert float(accuracy) == results["results"]["choosing"]["acc,none"]
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].startswith(f"{folder / 'none.pth'}: ")


def test_nan_and_a_batch_of_none_are_errors():
    pytest.importorskip("lm_eval")
    from rwkv_jax.evaluation.lm_eval import RWKV

    params, cfg = model("7")
    broken = params.replace(head=params.head.at[0, 0].set(np.nan))
    with pytest.raises(UserError, match="the model predicts NaN"):
        RWKV((broken, cfg, TOKENIZER)).loglikelihood_rolling([SimpleNamespace(args=("x",))])
    with pytest.raises(UserError, match="batch_size 0: 1 or more, or auto"):
        RWKV((params, cfg, TOKENIZER), batch_size=0)

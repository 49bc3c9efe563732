"""A newcomer's first hour, from three messy files to a smaller model: every command, as it is typed."""

import json
import os
import random
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.slow

ATP = [sys.executable, "-m", "atp"]
TOPICS = {
    "weather": "rain wind snow clouds storm sun fog heat frost hail".split(),
    "sport": "goal match team coach score season race player final league".split(),
}
QUICK = ["training.steps=12", "training.warmup=1", "data.length=32", "evaluation.windows=8", "evaluation.questions=8",
         "decisions.refit_windows=8", "decisions.saliency_windows=4"]  # fmt: skip


def sentence(rng, words, count=9):
    return " ".join(rng.choice(words) for _ in range(count))


def write_inputs(folder):
    rng = random.Random(0)
    words = [word for topic in TOPICS.values() for word in topic]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=sorted(alphabet))
    core.train_from_iterator([sentence(rng, [*words, *TOPICS]) for _ in range(200)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")

    texts = [json.dumps({"text": f"{number} {sentence(rng, words, 30)}"}) for number in range(160)]
    texts[7], texts[40], texts[41], texts[90] = '{"text": "cut off', '{"txt": "misspelled"}', "", '{"text": null}'
    (folder / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")

    rows = ["headline;section"]
    for number in range(160):
        topic = rng.choice(list(TOPICS))
        rows.append(f"{number} {sentence(rng, TOPICS[topic], 6)};{'' if number % 50 == 3 else topic}")
    (folder / "headlines.csv").write_text("\n".join(rows), encoding="utf-8")

    chats = []
    for number in range(160):
        topic = rng.choice(list(TOPICS))
        asked = {"role": "user", "content": f"{number} {sentence(rng, TOPICS[topic], 5)} ?"}
        chats.append({"messages": [asked, {"role": "assistant", "content": f"about {topic}"}]})
    chats[11] = {"messages": [{"role": "user", "content": "nobody answers"}]}
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")


def story(name, data, question):
    """(Words of the command, what its output must say) for one file, in the order of the README."""
    config, run = f"{name}.yaml", f"runs/{name}"
    out = f"output_dir={run}"
    yield ["init", "model", data, "--out", config], ["next: atp plan"]
    yield ["plan", config, *QUICK, out], ["Parameters", "epochs"]
    yield ["train", config, *QUICK, out], ["certificate: pass", f"report: {run}/report.html"]
    yield ["runs", "runs"], [name]
    yield ["report", run], ["report.html"]
    yield ["chat", run, "--prompt", question, "--tokens", "4"], []
    yield ["eval", run, "--suite", f"{run}/config.yaml"], ["perplexity"]
    yield ["export", run, "--to", "gguf"], ["exported: "]
    yield ["sweep", config, *QUICK, out, "--keep", "0.8,0.6"], ["results: "]


STORIES = {
    "texts": ("texts.jsonl", "rain wind"),
    "labels": ("headlines.csv", "goal match team"),
    "chats": ("chats.jsonl", "rain wind snow ?"),
}


def _watch(run, folder):
    """`atp watch` once it waits for the run, as it has said on its first line."""
    watching = subprocess.Popen(
        [*ATP, "watch", run], cwd=folder, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert "waiting" in watching.stdout.readline()
    return watching


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("name", STORIES)
def test_the_first_hour(name, desk, monkeypatch, atp):
    """With `atp watch` open beside the training."""
    monkeypatch.chdir(desk)
    for words, expected in story(name, *STORIES[name]):
        watching = _watch(f"runs/{name}", desk) if words[0] == "train" else None
        code, out, err = atp(*words)
        assert code == 0 and "Traceback" not in err, (words, out, err)
        assert all(text in out for text in expected), (words, expected, out)
        if watching is not None:
            shown, _ = watching.communicate(timeout=60)
            assert watching.returncode == 0 and "http://127.0.0.1" in shown, shown

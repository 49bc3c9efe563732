"""`atp export --to int8` and `--to nf4`: what is written, what it computes, what is refused."""

import functools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from test_gguf import VOCAB, tokens
from tiny_inputs import tiny_config
from tiny_tokenizers import byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM
from zeroed import stock_model

from atp.evaluation import model_size, packed_windows, perplexity, throughput
from atp.export import quantized
from atp.export.command import export
from atp.ground import progress, requirements
from atp.ground.errors import InputError
from atp.inputs.loading import load_data
from atp.models import ATPLlamaForCausalLM
from atp.models.stock import save_model
from atp.removal import cut_model
from atp.spaces.space import MaskSpace

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
# Largest difference of a logit, as a share of the largest logit; measured: 0.016 to 0.021 and 0.27 to 0.30.
BOUNDS = {"int8": 0.03, "nf4": 0.4}
MATRICES = 14  # of two layers
SAFETENSORS = "model.safetensors"


@pytest.fixture(scope="module", params=PACKAGES)
def scheme(request):
    pytest.importorskip(PACKAGES[request.param])
    return request.param


@pytest.fixture(scope="module", autouse=True)
def few_tokens():
    few = functools.partial(throughput, prompt_tokens=8, new_tokens=2, repeats=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "throughput", few)
        yield


def cut(*channels, dtype=torch.bfloat16, **changes):
    """A Llama of two layers that keep these numbers of MLP channels."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
        "initializer_range": 0.05, "max_position_embeddings": 512,
    }  # fmt: skip
    model = stock_model("llama", dtype=dtype, **sizes | changes)
    space = MaskSpace.from_config(model.config, "kv_group")
    mask = torch.ones(space.size, dtype=torch.bool)
    for structure in space.structures:
        if structure.name == "mlp":
            mask[structure.start + channels[structure.layer] : structure.start + structure.size] = False
    return cut_model(model, space, mask)


def save(folder, model):
    save_model(model, folder)
    byte_level().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits(model):
    return model(tokens()).logits.float()


def gap(model, other):
    return float((logits(model) - logits(other)).abs().max() / logits(other).abs().max())


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("channels", "kind"), [((128, 192), ATPLlamaForCausalLM), ((128, 128), MistralForCausalLM)])
def test_the_folder_holds_the_quantized_model(tmp_path, monkeypatch, scheme, channels, kind, dtype):
    model = cut(*channels, dtype=dtype)
    kept, read = [], quantized.read_model
    monkeypatch.setattr(quantized, "read_model", lambda *args, **more: kept.append(read(*args, **more)) or kept[-1])
    path, said = export(save(tmp_path / "mine", model), scheme, None, None)
    assert path == tmp_path / f"mine-{scheme}" and contents(tmp_path) == ["mine", path.name]
    assert f"{MATRICES} of {MATRICES} matrices are {scheme}" in said[0] and PACKAGES[scheme] in said[0]
    again = AutoModelForCausalLM.from_pretrained(path)
    assert type(again) is kind and again.dtype == dtype
    found = logits(again)
    assert torch.equal(found, logits(kept[0]))
    with torch.autocast("cpu", torch.bfloat16):  # as `atp eval` runs it where that is faster
        assert (logits(again) - found).abs().max() < 0.03 * found.abs().max()
    assert 0 < gap(again, model) < BOUNDS[scheme]
    assert AutoTokenizer.from_pretrained(path).get_vocab() == byte_level().get_vocab()
    assert json.loads((path / "config.json").read_text())["rope_theta"], "as in model/, for other tools"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, scheme):
    """Folder of a model, folder of its quantized form, and what was said."""
    folder = tmp_path_factory.mktemp("exported")
    return folder / "mine", *export(save(folder / "mine", cut(128, 192)), scheme, None, folder / "small")


def test_matrices_are_packed_and_the_rest_is_as_it_was(exported, scheme):
    source, path, said = exported
    with safe_open(source / SAFETENSORS, "pt") as before, safe_open(path / SAFETENSORS, "pt") as after:
        matrices = {name for name in before.keys() if name.endswith("_proj.weight")}
        rest = set(before.keys()) - matrices
        assert len(matrices) == MATRICES and rest < set(after.keys())
        assert all(torch.equal(before.get_tensor(name), after.get_tensor(name)) for name in rest)
        weights = sum(before.get_tensor(name).numel() for name in matrices)
        held = sum(after.get_tensor(name).nbytes for name in after.keys() if name not in rest)
    assert held / weights < {"int8": 1.1, "nf4": 0.6}[scheme]
    sizes = [f"{(folder / SAFETENSORS).stat().st_size / 1e6:.1f}" for folder in (path, source)]
    assert "weights on disk, MB: {}, before {}".format(*sizes) in said and sizes[0] < sizes[1]


def test_sizes_count_the_weights_and_their_bytes(exported):
    source, path, _ = exported
    whole, small = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, path))
    expected, found = model_size(whole), model_size(small)
    assert (found["params"], found["decoder_params"]) == (expected["params"], expected["decoder_params"])
    on_disk = (path / SAFETENSORS).stat().st_size / 1e6
    assert on_disk * 0.9 < found["megabytes"] < on_disk, "but for the file's header"


def test_a_model_without_a_card_gets_one(exported, scheme):
    card = ModelCard.load(exported[1] / "README.md")
    assert card.text.strip().startswith("# mine, quantized") and "import atp" in card.text
    assert f"14 of 14 matrices are {scheme}" in card.text and card.data.library_name == "transformers"


def test_matrices_that_the_blocks_do_not_divide_stay(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = cut(128, 100)
    path, said = export(save(tmp_path / "mine", model), "nf4", None, None)
    assert "11 of 14 matrices are nf4" in said[0]
    assert said[1].startswith("3 matrices stay bfloat16, because nf4 takes multiples of 64 inputs and 32 outputs")
    again = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(again.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    assert again.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8 and gap(again, model) < BOUNDS["nf4"]


def test_a_model_that_nf4_cannot_hold_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    source = save(tmp_path / "mine", cut(60, 100, hidden_size=48, num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(InputError, match="no matrix of .*mine can be quantized, because nf4 takes .*: use --to int8"):
        export(source, "nf4", None, None)
    assert contents(tmp_path) == ["mine"]
    pytest.importorskip("torchao")
    assert export(source, "int8", None, None)[0].is_dir()


@pytest.mark.slow
def test_equal_layers_need_nothing_of_ours(tmp_path):
    pytest.importorskip("torchao")
    path, _ = export(save(tmp_path / "mine", cut(128, 128)), "int8", None, None)
    code = (
        "import sys, torch; sys.modules['atp'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(path)!r})\n"
        "print(type(model).__name__, model(torch.arange(3, 9)[None]).logits.isfinite().all().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "MistralForCausalLM True\n", done.stderr
    assert "import atp" not in (path / "README.md").read_text()


@pytest.fixture
def run(tmp_path):
    """A run folder with the model that its config names, and the config."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    settings = tiny_config(inputs)
    folder = tmp_path / "run"
    shutil.copytree(inputs, folder / "model", ignore=shutil.ignore_patterns("*.jsonl"))
    (folder / "config.yaml").write_text(settings.dump(), encoding="utf-8")
    scores = [EvalResult("text-generation", "d", "d", "perplexity", 20.0)]
    card = ModelCardData(license="mit", base_model="someone/Small", model_name="Small", eval_results=scores)
    ModelCard(f"---\n{card.to_yaml()}\n---\n# A cut model\n\nIts story.\n").save(folder / "model" / "README.md")
    return folder, settings


def test_a_run_is_scored_before_and_after(run, scheme, capsys):
    folder, settings = run
    if scheme == "nf4":
        with pytest.raises(InputError, match="no matrix"):
            export(str(folder), scheme, None, None)
        return
    with progress.logged(as_json=False):
        path, said = export(str(folder), scheme, None, None)
    assert path == folder / "model-int8"
    told = [line[9:] for line in capsys.readouterr().out.splitlines()]
    measured = ["scoring: perplexity", "measuring speed"]
    assert told == [
        "loading", "reading the held-out data", "writing the model as it is", *measured, "quantizing", "writing",
        *measured,
    ]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(path)
    windows = packed_windows(load_data(settings, tokenizer).test, tokenizer)
    count = min(settings.evaluation.windows, len(windows.input_ids))
    expected = [
        perplexity(AutoModelForCausalLM.from_pretrained(place), windows, max_windows=count)["perplexity"]
        for place in (path, folder / "model")
    ]
    (line,) = [line for line in said if line.startswith("held-out perplexity, ") and f", {count} windows of " in line]
    assert f": {expected[0]:.2f} (" in line and f"before {expected[1]:.2f} (" in line
    assert [line.partition(":")[0] for line in said[-2:]] == ["prefill, tokens/s", "decode, tokens/s"]
    card = ModelCard.load(path / "README.md")
    assert (card.data.license, card.data.base_model, card.data.eval_results) == ("mit", "someone/Small", None)
    assert card.text.index("Its story.") < card.text.index("## Quantized weights") < card.text.index("held-out perpl")
    assert "pip install 'torchao" in card.text


def test_a_run_whose_data_are_gone_is_quantized_all_the_same(run):
    pytest.importorskip("torchao")
    folder, settings = run
    (folder.parent / "inputs" / "data.jsonl").unlink()
    path, said = export(str(folder), "int8", None, None)
    assert path.is_dir() and not any("held-out" in line for line in said)
    assert any(line.startswith("perplexity was not measured, because the data of the run cannot be") for line in said)


def test_what_is_refused_leaves_nothing(exported, tmp_path, scheme, monkeypatch):
    source, small = str(exported[0]), exported[1]
    (tmp_path / "there").touch()
    there = contents(tmp_path)

    def refused(message, *arguments):
        with pytest.raises(InputError, match=message):
            export(*arguments)
        assert contents(tmp_path) == there

    refused("there exists already: choose another --out", source, scheme, None, tmp_path / "there")
    refused("the weights of .* are quantized: give it in float32", str(small), scheme, None, tmp_path / "x")
    refused(f"--dtype f16 does not exist for {scheme}", source, scheme, "f16", tmp_path / "x")
    monkeypatch.setattr(requirements, "find", lambda name: None)
    sentence = f"^package '{PACKAGES[scheme]}' is not installed: run pip install '{PACKAGES[scheme]}>="
    refused(sentence, source, scheme, None, tmp_path / "x")

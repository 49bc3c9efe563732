"""Model cards: only what is known, read back by huggingface_hub, whatever the names hold."""

import pytest
from huggingface_hub import ModelCard, ModelCardData

from atp.config import ATPConfig
from atp.export.card import (
    adapter_card,
    add_results,
    base_card,
    baseline_card,
    license_of,
    model_card,
    quantized_card,
)
from atp.ground.places import PACKAGED_MODEL

HOSTILE = [
    "a: [b",
    "x\n---\nlicense: mit",
    "'",
    '"',
    "- x",
    "{{ 1 + 1 }}",
    "<script>",
    "#",
    "!!python/object:os.system x",
]
SUMMARY = {
    "perplexity": {"original": 20.0, "final": 27.46985},
    "tasks": ["pubmedqa"],
    "pubmedqa": {
        "original": {"accuracy": 0.4, "accuracy_interval": [0.3, 0.5]},
        "final": {"accuracy": 0.56, "accuracy_interval": [0.4, 0.7], "n": 50, "macro_f1": 0.239,
                  "macro_f1_interval": [0.2, 0.3]},
    },
    "majority": {"pubmedqa": {"label": "yes", "of": "train", "accuracy": 0.5512, "macro_f1": 0.0, "n": 50}},
    "relative_performance": None, "relative_performance_interval": None,
    "not_measurable": {"pubmedqa macro_f1": "dense_lora's 0.239 is no more"},
    "seed": 3,
    "command": "atp train my.yaml --resume",
}  # fmt: skip


def config(path="no/such", **data):
    return ATPConfig.parse({"model": {"path": str(path)}, "output_dir": "o", "data": data})


def cards(settings):
    return [
        model_card(settings, 10, 5), baseline_card(settings, "random", 10, 5), base_card(settings),
        adapter_card(settings),
    ]  # fmt: skip


def test_a_hub_model_is_named_as_the_base():
    for text in cards(config("meta-llama/Llama-2-7b-hf")):
        data = ModelCard(text).data
        assert data.base_model == "meta-llama/Llama-2-7b-hf" and data.license is None and data.language is None
    *_, adapter = cards(config())
    assert ModelCard(adapter).data.library_name == "peft"


def test_licence_and_language_are_those_of_the_source_models_card(tmp_path):
    own = ModelCardData(license="llama3.1", language=["en", "de"], base_model="a/b", tags=["x"])
    (tmp_path / "README.md").write_text(f"---\n{own.to_yaml()}\n---\n# A model\n")
    for text in cards(config(tmp_path)):
        data = ModelCard(text).data
        assert (data.license, data.language) == ("llama3.1", ["en", "de"])
        assert data.base_model is None, "a folder is no name on the Hub"
    assert license_of(config(tmp_path)) == "llama3.1" and license_of(config()) is None
    assert license_of(config(PACKAGED_MODEL)) == "apache-2.0"
    packaged = ModelCard(model_card(config(PACKAGED_MODEL), 10, 5)).data
    assert (packaged.base_model, packaged.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


@pytest.mark.parametrize(("load_in", "held"), [("4bit", "4-bit NormalFloat"), ("8bit", "8-bit integers"), (None, None)])
def test_a_base_that_was_held_in_few_bits_is_said_in_one_sentence(load_in, held):
    settings = config()
    settings.model.load_in = load_in
    lines = [line for line in model_card(settings, 10, 5).splitlines() if "were held as" in line]
    assert [held in line for line in lines] == ([] if load_in is None else [True])


@pytest.mark.parametrize("content", ["", "no metadata", "---\n: [\n---\n", "---\n- 1\n---\n", b"\xff\xfe"])
def test_a_damaged_source_card_tells_nothing(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    data = ModelCard(model_card(config(tmp_path), 10, 5)).data
    assert data.license is None and data.language is None and data.library_name == "transformers"


def test_data_sets_are_those_that_are_read(tmp_path):
    def found(**data):
        return ModelCard(model_card(config(**data), 10, 5)).data.datasets

    file = tmp_path / "med.jsonl"
    file.touch()
    assert found(recipe="health", sources={"mednli": str(file)}) == [
        "albertvillanova/meqsum", "allenai/c4", "qiaojin/PubMedQA",
    ]  # fmt: skip
    assert found(recipe="health", general_share=0, sources={"pubmedqa": "me/own#x:train", "hqs": "a/b.csv"}) == [
        "me/own"
    ]
    assert found(recipe="custom", train="owner/name:train", test="other/test") == ["other/test", "owner/name"]
    assert found(recipe="health-mini") is None


def test_results_are_added_once_and_read_back(tmp_path):
    path, settings = tmp_path / "README.md", config("a/b", recipe="health-mini")
    path.write_text(model_card(settings, 10, 5))
    before = ModelCard.load(path)
    add_results(path, settings, SUMMARY)
    once = path.read_bytes()
    add_results(path, settings, SUMMARY)
    assert path.read_bytes() == once, "a resumed run ends with the same bytes"
    card = ModelCard.load(path)
    scores = {(r.dataset_config, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert scores == {
        ("perplexity", "perplexity"): 27.4699, ("pubmedqa", "accuracy"): 0.56, ("pubmedqa", "macro_f1"): 0.239,
    }  # fmt: skip
    assert card.data.base_model == "a/b" and card.data.tags == before.data.tags
    assert card.text.startswith(before.text.rstrip()) and "| pubmedqa | accuracy | 0.56 | 0.5512 |" in card.text
    assert "| perplexity | perplexity | 27.47 |  |" in card.text and "| macro_f1 | 0.239 | 0 |" in card.text
    assert "`atp train my.yaml`" in card.text and "--resume" not in card.text


def test_relative_performance_is_given_or_said_to_be_not_measurable(tmp_path):
    path, settings = tmp_path / "README.md", config("a/b", recipe="health-mini")
    path.write_text(model_card(settings, 10, 5))
    add_results(path, settings, SUMMARY)
    said = "Relative performance, the share of the tuned dense model's task scores: "
    text = ModelCard.load(path).text
    assert f"{said}not measurable.\n" in text
    assert "Relative performance in pubmedqa macro_f1 is not measurable: dense_lora's 0.239 is no more." in text
    measured = {"relative_performance": 0.97, "relative_performance_interval": [0.9, 1.04], "not_measurable": {}}
    add_results(path, settings, SUMMARY | measured)
    text = ModelCard.load(path).text
    assert f"{said}0.970 (95 %: 0.900 to 1.040).\n" in text and "not measurable" not in text
    alone = {key: value for key, value in SUMMARY.items() if not key.startswith(("relative", "not_"))}
    add_results(path, settings, alone)
    assert "Relative performance" not in ModelCard.load(path).text, "nothing was tuned to compare with"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_in_their_place(tmp_path, name):
    settings = config(name, recipe=name)
    for text in cards(settings):
        data = ModelCard(text).data
        assert data.license is None and data.base_model is None and data.pipeline_tag == "text-generation"
    path = tmp_path / "README.md"
    path.write_text(model_card(settings, 10, 5), encoding="utf-8")
    add_results(path, settings, SUMMARY | {"command": name})
    data = ModelCard.load(path).data
    assert data.license is None and data.library_name == "transformers"
    assert {result.dataset_type for result in data.eval_results} == {" ".join(name.split())}


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\u202e", "\x9b", "\u2066"])
def test_a_card_holds_no_control_character(tmp_path, hostile):
    own = f"---\nlicense: 'a{hostile}b'\n---\n# A model\n".encode()
    (tmp_path / "README.md").write_bytes(own.replace(b"\x1b", b"").replace("\x9b".encode(), b""))  # YAML has neither
    for text in cards(config(tmp_path, recipe=hostile)):
        assert text.replace("\n", "").isprintable() and ModelCard(text).data.license
    card = tmp_path / "foreign.md"
    card.write_text(f"# Foreign {hostile}\n", encoding="utf-8")
    text = quantized_card(card, {}, [hostile], [], needs="pip", stock=True)
    assert text.replace("\n", "").isprintable() and "Foreign \\" in text

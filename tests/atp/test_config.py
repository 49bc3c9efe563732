"""The config and `atp config`: strict keys, messages that name path and remedy, overrides, presets, examples."""

import json

import pytest
import yaml
from pydantic import ValidationError

from atp.config import ATPConfig, shipped
from atp.config.presets import PRESETS
from atp.ground.errors import InputError
from atp.inputs.resolve import resolve
from atp.studies.experiments.spec import ExperimentSpec

MINIMAL = {"model": {"path": "some-model"}, "output_dir": "runs/x"}


def parse(**sections):
    return ATPConfig.parse(MINIMAL | sections)


def refused(**sections):
    with pytest.raises(InputError) as caught:
        parse(**sections)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(MINIMAL | {"decisions": {"target_keep": 0.5}}), encoding="utf-8")
    return file


# What somebody writes = what is meant.
MEANT = """decisions.target_kep=target_keep training.sarch=search evaluations=evaluation model.gguf=gguf_file
    training.learning_rate=lr lora.rank=r lora.lora_alpha=alpha training.batch=batch_size data.max_seq_length=length
    decisions.sparsity=target_keep target_keep=decisions.target_keep training.rank=lora.r"""


@pytest.mark.parametrize(("key", "nearest"), [pair.split("=") for pair in MEANT.split()])
def test_unknown_keys_name_their_path_and_the_nearest_key(key, nearest):
    with pytest.raises(InputError, match=f"^unknown config key '{key}': did you mean '{nearest}'\\?$"):
        ATPConfig.parse(MINIMAL, [f"{key}=1"])


def test_keys_that_are_unknown_missing_or_near_none_are_named():
    assert refused(lora={"rank": 8, "drop_out": 0.1}).startswith("unknown config key 'lora.rank': did you mean '")
    told = "unknown config key 'learning_rate': did you mean 'decisions.lr' or 'training.lr'?"
    assert refused(learning_rate=1) == told
    known = "the known keys are r, alpha, dropout, variant, experts"
    assert refused(lora={"zzz": 1}) == f"unknown config key 'lora.zzz': {known}"
    assert "training.steps sets the length" in refused(training={"num_train_epochs": 3})
    with pytest.raises(InputError, match="config key 'model' is missing: add it to the YAML file or as model=VALUE"):
        ATPConfig.parse({"output_dir": "x"})
    assert "config key 'model.path' is missing" in refused(model={})


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"training": {"search": "many"}}, "config key 'training.search' is 'many': input should be a valid integer"),
        ({"training": {"search": 1.5}}, "config key 'training.search' is 1.5: input should be a valid integer"),
        (
            {"decisions": {"space": "heads"}},
            "config key 'decisions.space' is 'heads': use one of disp, experts, expert_channels, ",
        ),
        ({"lora": 8}, "config key 'lora' is 8: input should be a valid dictionary"),
        (
            {"lora": {"variant": "dora+"}},
            "config key 'lora.variant' is 'dora+': input should be 'lora', 'rslora' or 'dora'",
        ),
        (
            {"lora": {"variant": "dora"}, "training": {"search": 3}},
            "lora.variant=dora has no factors that masks and the group lasso could take apart: set "
            "training.search=0, training.settle=0 and another decisions.source than learned, or take rslora",
        ),
        ({"lora": {"variant": "dora"}, "training": {"settle": 3}}, "lora.variant=dora has no factors"),
        ({"lora": {"variant": "dora"}, "decisions": {"source": "learned"}}, "lora.variant=dora has no factors"),
        (
            {"lora": {"variant": "dora"}, "model": {"path": "x", "load_in": "4bit"}},
            "lora.variant=dora is merged into floating weights before the cut, and the linears have none under "
            "model.load_in=4bit: leave out one of them",
        ),
        ({"data": {"length": 8}}, "config key 'data.length' is 8: input should be greater than or equal to 16"),
        ({"training": {"gradient_checkpointing": "maybe"}}, "config key 'training.gradient_checkpointing' is 'maybe'"),
        ({"decisions": {"multiples": {"mlp": "x"}}}, "config key 'decisions.multiples.mlp' is 'x': input should be a"),
        (
            {"decisions": {"multiples": {"mlps": 8}}},
            "config key 'decisions.multiples' is {'mlps': 8}: no structure is called 'mlps': use attention_inputs, ",
        ),
        ({"decisions": {"multiples": {"mlp": 0}}}, "config key 'decisions.multiples.mlp' is 0: input"),
        ({"decisions": {"multiples": {"mlp": -8}}}, "config key 'decisions.multiples.mlp' is -8: input"),
        ({"training": {"lr": float("inf")}}, "config key 'training.lr' is inf"),
        ({"training": {"regularizer": "l1"}}, "config key 'training.regularizer' is 'l1': input should be 'lasso' or"),
        ({"seed": -1}, "config key 'seed' is -1: input should be greater than or equal to 0"),
        ({"seed": 2**32}, "config key 'seed' is 4294967296: numbers reach 4294967295"),
        ({"seed": 2**64}, "config key 'seed' is 18446744073709551616: numbers reach 4294967295"),
        ({"data": {"seed": -1}}, "config key 'data.seed' is -1: input should be greater than or equal to 0"),
        ({"training": {"search": 10**30}}, "config key 'training.search' is 1000000000000000000000000000000: numbers"),
        ({"decisions": {"multiples": {"mlp": 10**10}}}, "config key 'decisions.multiples' is {'mlp': 10000000000}"),
        ({"data": {"train": ""}}, "config key 'data.train' is '': the text is empty: give a value, or leave the key"),
        ({"output_dir": " "}, "config key 'output_dir' is ' ': the text is empty"),
        ({"output_dir": "s3://bucket/run"}, "config key 'output_dir' is 's3://bucket/run': runs are written to file"),
        ({"output_dir": "a\0b"}, "config key 'output_dir' is 'a\\x00b': the text holds characters that no file"),
        ({"data": {"labels": ["yes", "\ud800"]}}, "config key 'data.labels' is ['yes', '\\ud800']: the text holds"),
        ({"data": {"sources": {"\udcff": "x"}}}, "config key 'data.sources' is {'\\udcff': 'x'}: the text holds"),
        ({"seed": 10**5000}, "config key 'seed' is a number of about 5001 digits: "),
        ({"training": {"open": 500}}, "config section 'training': open, search and settle take 500 steps, more than"),
        ({"decisions": {"uniform": True, "space": "disp"}}, "config section 'decisions': uniform needs space kv_group"),
        (
            {"decisions": {"blocks": True, "space": "head_dim"}},
            "config section 'decisions': blocks needs structures that are whole blocks, and those of space head_dim "
            "are not: use space kv_group or mlp",
        ),
        (
            {"decisions": {"blocks": True, "space": "experts"}},
            "config section 'decisions': blocks needs structures that",
        ),
        (
            {"decisions": {"blocks": True}, "preset": "stock"},
            "config section 'decisions': blocks removes attention or MLP of single layers, and uniform (as in preset "
            "stock) keeps all layers equal: set one of them to false",
        ),
        (
            {"decisions": {"blocks": True, "source": "learned"}},
            "config section 'decisions': blocks weighs whole blocks by their saliency, and learned decisions have none",
        ),
        (
            {"preset": "fast"},
            "config key 'preset' is 'fast': input should be 'auto', 'quick', 'standard', 'thorough', ",
        ),
    ],
)
def test_wrong_values_name_path_and_expectation(sections, expected):
    assert refused(**sections).startswith(expected)


@pytest.mark.parametrize("target", [0, 1, -0.1, 1.2, 60, float("nan")])
def test_target_lies_inside_zero_and_one(target):
    assert refused(decisions={"target_keep": target}).startswith(f"config key 'decisions.target_keep' is {target!r}: ")


def test_values_are_checked_on_assignment_too():
    config = parse()
    with pytest.raises(ValueError):
        config.decisions.target_keep = 2.0


def test_a_file_and_overrides_which_are_not_changed(path):
    config = ATPConfig.load(
        path,
        ["decisions.target_keep=0.7", "training.lr=1e-3", "data.labels=[yes, no, maybe]", "output_dir=runs/a=b",
         "decisions.multiples.mlp=64", "lora.dropout=0", "data.train=null"],
    )  # fmt: skip
    assert config.decisions.target_keep == 0.7 and config.training.lr == 1e-3 and config.lora.dropout == 0.0
    assert config.output_dir == "runs/a=b" and config.data.train is None and config.decisions.multiples == {"mlp": 64}
    assert config.data.labels == ("yes", "no", "maybe"), "yes and no are labels, not booleans"
    assert ATPConfig.load(path).decisions.target_keep == 0.5
    values = {"model": {"path": "m"}, "output_dir": "x"}
    ATPConfig.parse(values, ["model.path=n", "lora.r=4"])
    assert values == {"model": {"path": "m"}, "output_dir": "x"}


FORM = "override '{}' is not of the form key.path=value"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decisions.target_keep", FORM), ("=3", FORM), ("--flag", FORM), ("data.labels=[yes", "data.labels"),
        ("output_dir.name=3", "'output_dir' is not a section of the config"),
        ("training.serch=3", r"unknown config key 'training.serch': did you mean 'search'\?"),
    ],
)  # fmt: skip
def test_wrong_overrides_are_refused(path, override, message):
    with pytest.raises(InputError, match=message.format(override)):
        ATPConfig.load(path, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [unclosed", "is not valid YAML"),
        (b"", "is not a mapping"),
        (b"- a\n- b\n", "is not a mapping"),
        (b"just text", "is not a mapping"),
        (b"output_dir: caf\xe9\n", "is not valid YAML|not UTF-8"),
        (b"model: {path: x}\noutput_dir: y\npreset: [paper]\n", "config key 'preset' is"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        ATPConfig.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "reason"), [("absent.yaml", "does not exist"), (".", "is a folder")])
def test_missing_file_is_refused(tmp_path, name, reason):
    with pytest.raises(InputError, match=f"{reason}: give the path of a YAML file"):
        ATPConfig.load(tmp_path / name)


def test_paper_preset_holds_the_recorded_values():
    """docs/method.md sections 2 to 5."""
    config = parse(preset="paper")
    decisions, training, lora = config.decisions, config.training, config.lora
    assert (decisions.space, decisions.generator, decisions.init) == ("head_dim", "transformer", "paper")
    assert (decisions.budget, decisions.alpha, decisions.offset, decisions.temperature) == ("penalty", 5.0, 3.0, 0.4)
    assert (decisions.lr, decisions.clip, decisions.every, decisions.batch_size) == (1e-3, 3.0, 1, 20)
    assert (lora.r, lora.alpha / lora.r, lora.dropout) == (8, 1.0, 0.1)
    assert (training.lr, training.clip, training.beta, training.batch_size) == (1e-4, 1.0, 0.3, 20)
    assert 100 <= training.settle_beta <= 1000
    assert training.search == 750 and training.total == 2 * 750
    assert (training.schedule, training.warmup) == ("constant", 0)


@pytest.mark.parametrize(
    ("sections", "source"),
    [
        ({}, "running"),
        ({"training": {"open": 31}}, "tuned"),
        ({"training": {"open": 16, "gradient_accumulation": 2}}, "running"),
        ({"training": {"open": 16, "batch_size": 2}}, "running"),
        ({"training": {"open": 3, "batch_size": 10}}, "tuned"),
        ({"training": {"open": 3}, "decisions": {"saliency_windows": 3}}, "running"),
        ({"training": {"open": 0}}, "tuned"),
        ({"training": {"search": 1}}, "tuned"),
        ({"lora": {"dropout": 0.1}}, "tuned"),
        ({"decisions": {"source": "static"}}, "static"),
        ({"training": {"open": 0, "search": 4}, "decisions": {"source": "running"}}, "running"),
    ],
)
def test_decisions_come_from_lora_steps_where_watching_them_suits_the_run(sections, source):
    config = parse(**sections)
    assert config.decisions.source == sections.get("decisions", {}).get("source"), "what is saved is what was asked for"
    assert resolve(config).decisions.source == source


@pytest.mark.parametrize(("sections", "keep"), [
    ({}, None), ({"decisions": {"target_keep": 0.5}}, None), ({"decisions": {"target_decode_ms": 5.0}}, None),
    ({"decisions": {"target_params": 10**8}}, "auto"), ({"decisions": {"target_megabytes": 100}}, "auto"),
    ({"decisions": {"target_megabytes": 100}, "vocabulary": {}}, "auto"),
    ({"decisions": {"target_megabytes": 100}, "vocabulary": None}, None),
    ({"decisions": {"target_megabytes": 100}, "vocabulary": {"keep": None}}, None),
    ({"decisions": {"target_megabytes": 100}, "vocabulary": {"keep": 9}}, 9),
    ({"decisions": {"target_params": 10**8}, "training": {"sharding": "fsdp"}}, None),
])  # fmt: skip
def test_words_are_chosen_under_a_target_that_counts_them_unless_somebody_says_which(sections, keep):
    if sections.get("vocabulary", {}) is None:
        with pytest.raises(InputError, match="vocabulary"):
            parse(**sections)
        return
    found = parse(**sections)
    assert found.vocabulary.keep == keep
    assert ATPConfig.parse(found.model_dump(mode="json")) == found
    assert ATPConfig.parse(found.model_dump(mode="json"), ["vocabulary.keep=null"]).vocabulary.keep is None


def test_a_resolved_config_leaves_nothing_open_and_nobody_changes_it():
    asked = parse(training={"lr": 1e-3, "update_clipping": False}, evaluation={"every": 100})
    found = resolve(asked)
    none = {"model.gguf_file", "model.revision", "model.load_in", "training.minutes", "training.tokens",
            "training.sharding", "training.patience", "training.metrics_file", "training.tune",
            "training.full_lr", "training.embeddings_lr", "decisions.multiples", "decisions.path",
            "vocabulary.keep"}  # fmt: skip
    null = {f"{section}.{key}" for section, values in found.model_dump().items() if isinstance(values, dict)
            for key, value in values.items() if value is None}  # fmt: skip
    assert {key for key in null if not key.startswith(("data.", "decisions.target_"))} == none
    assert (found.training.open, found.training.steps) == (133, 400)
    longer = ATPConfig.parse(found.model_dump(mode="json"), ["training.steps=800"]).training
    assert longer.total == 800, "a run's resolved.yaml takes overrides as any config does"
    assert found.training.beta2 == asked.training.second_moment and found.data.seed == asked.seed
    assert found.evaluation.validation_windows == 15 and found.training.precision in ("float32", "bfloat16")
    assert resolve(found) == found and type(found).model_validate(found.model_dump(mode="json")) == found
    for section, key in ((found, "seed"), (found.training, "steps"), (found.decisions, "rounds")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_own_values_win_over_the_preset_and_a_dump_reads_back_as_the_same_config(path, tmp_path):
    config = ATPConfig.load(path, ["preset=paper", "training.search=10", "decisions.lr=0.5"])
    assert config.training.search == 10 and config.decisions.lr == 0.5 and config.decisions.target_keep == 0.5
    assert config.decisions.budget == "penalty" and config.training.batch_size == 20
    config = parse(preset="paper", data={"labels": ["yes", "no"]}, decisions={"multiples": {"mlp": 8}})
    file = tmp_path / "dumped.yaml"
    file.write_text(config.dump(), encoding="utf-8")
    assert ATPConfig.load(file) == config


def test_a_changed_config_is_refused_with_its_differences_and_a_new_key_has_its_default():
    started = parse()
    started.refuse_change_of(started.model_dump(mode="json"))
    parse(preset="quick").refuse_change_of(parse(preset="auto").model_dump(mode="json"))
    with pytest.raises(InputError, match=r"\(seed: 0 -> 1; lora\.r: 16 -> 4\): restore it or start a new run"):
        parse(seed=1, lora={"r": 4}).refuse_change_of(started.model_dump(mode="json"))
    saved = parse().model_dump(mode="json")
    del saved["training"]["regularizer"]
    parse().refuse_change_of(saved)
    with pytest.raises(InputError, match=r"\(training\.regularizer: 'lasso' -> 'l0'\)"):
        parse(training={"regularizer": "l0"}).refuse_change_of(saved)
    saved["training"]["forgotten"] = 1
    with pytest.raises(InputError, match=r"training\.forgotten: 1 -> null"):
        parse().refuse_change_of(saved)


@pytest.mark.timeout(20)
def test_messages_of_large_and_deep_values_are_short(path):
    deep = "x"
    for _ in range(40):
        deep = [deep] * 2  # 2 ** 40 items to print
    for section in ({"lora": deep}, {"lora": {"r": "9" * 10**6}}, {"x" * 10**6: 1}, {"lora": {"y" * 10**6: deep}}):
        assert len(refused(**section)) < 600
    overrides = ["x" * 10**6, "lora.r=" + "9" * 10**6, "a." * 10**5 + "b=1", "lora.r=" + "[" * 10**4, "a" * 9999 + "=1"]
    for override in overrides:
        with pytest.raises(InputError) as caught:
            ATPConfig.load(path, [override])
        assert len(str(caught.value)) < 600
    with pytest.raises(InputError) as caught:
        parse(data={"labels": ["x" * 1000] * 1000}).refuse_change_of(parse().model_dump(mode="json"))
    assert len(str(caught.value)) < 300


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The files that come with the package lie in neither the tree nor the working directory."""
    root = tmp_path / "package"
    for name in ("examples/one.yaml", "experiments/two.yaml", "experiments/base.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "examples" / "one.yaml").write_text("{model: {path: m}, output_dir: runs/one}")
    (root / "experiments" / "two.yaml").write_text("{question: why, domains: [a], arms: [{method: atp}]}")
    (root / "experiments" / "base.yaml").write_text("{model: {path: m}, seed: 7}")
    monkeypatch.setattr(shipped, "_ROOT", root)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return root


def test_an_example_is_found_by_its_path_in_the_clone_and_the_working_directory_comes_first(package, tmp_path):
    assert ATPConfig.load("examples/one.yaml").output_dir == "runs/one"
    assert ATPConfig.load("./examples/one.yaml").output_dir == "runs/one"
    with pytest.raises(InputError, match="^config file one.yaml does not exist"):
        ATPConfig.load("one.yaml")
    own = tmp_path / "work" / "experiments"
    own.mkdir()
    (own / "two.yaml").write_text("{question: my own, domains: [a], arms: [{method: atp}]}")
    spec, path = ExperimentSpec.load("two")
    assert spec.question == "my own"
    assert spec.config(path, "health-mini", []).seed == 7, "the base comes with the package"
    with pytest.raises(InputError, match=r"\(here: two\)"):
        ExperimentSpec.load("three")


@pytest.mark.parametrize("name", ["two", "experiments/two.yaml"])
def test_an_experiment_and_its_base_are_found(package, name):
    spec, path = ExperimentSpec.load(name)
    assert spec.question == "why" and path == package / "experiments" / "two.yaml"
    assert spec.config(path, "health-mini", []).seed == 7


def sections(schema):
    def walk(properties, prefix):
        for name, field in properties.items():
            section = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2])
            if section is None:
                yield prefix + name, field
            else:
                yield from walk(section["properties"], f"{prefix}{name}.")

    return dict(walk(schema["properties"], ""))


def test_the_schema_gives_every_key_with_meaning_and_range(atp):
    code, shown, _ = atp("config", "schema")
    found = sections(json.loads(shown))
    assert code == 0 and json.loads(shown)["$schema"].startswith("https://json-schema.org/")
    assert found["lora.alpha"]["exclusiveMinimum"] == 0 and found["lora.alpha"]["default"] == 32.0
    assert found["training.schedule"]["enum"] == ["constant", "linear", "cosine"]
    assert [key for key, field in found.items() if not field.get("description")] == [], "each key says what it is"


def test_show_prints_what_a_run_would_take(atp):
    words = ["examples/health-mini.yaml", "preset=paper", "training.lr=0.5"]
    code, shown, _ = atp("config", "show", *words)
    asked = ATPConfig.load(words[0], words[1:])
    assert code == 0 and yaml.safe_load(shown) == resolve(asked).model_dump(mode="json")
    assert resolve(ATPConfig.parse(yaml.safe_load(shown))) == resolve(asked), "and can be used in its place"
    code, shown, told = atp("config", "show", words[0], "training.learning_rate=1")
    assert (code, shown) == (2, "") and "did you mean 'lr'?" in told


def test_show_names_what_only_a_run_can_know_and_no_secret(atp, tmp_path):
    unknown = ("training.minutes=3", "decisions.target_decode_ms=9")
    code, shown, _ = atp("config", "show", "examples/health-mini.yaml", *unknown)
    first, rest = shown.split("\n", 1)
    assert code == 0
    assert first.endswith(": decisions.target_decode_ms, training.minutes, training.lr, training.update_clipping")
    values = yaml.safe_load(rest)
    assert values["training"]["minutes"] == 3 and values["training"]["precision"] in ("float32", "bfloat16")
    config = tmp_path / "a.yaml"
    config.write_text("model: {path: m}\noutput_dir: runs/hf_" + "a" * 30, encoding="utf-8")
    assert "runs/***" in atp("config", "show", config)[1]


def test_presets_are_shown_whole_and_without_a_command_the_help(atp):
    code, shown, _ = atp("config", "presets")
    listed = yaml.safe_load(shown)
    by_steps = "the defaults; from 400 steps on quick; from 1000 steps on standard; from 3000 steps on thorough"
    assert code == 0 and listed.pop("auto") == by_steps and listed == PRESETS
    code, _, told = atp("config")
    assert code == 2 and "schema" in told

"""Sources of the settings: precedence, origins, and everything wrong refused together."""

import os
import subprocess
import sys

import pytest

from mmm4rec_cli.errors import RunError, UsageError
from mmm4rec_cli.settings import Settings, for_run, load, resolve
from mmm4rec_cli.settings.load import _known, allowed
from mmm4rec_cli.workspace import Workspace


class Notes:
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch, tmp_path):
    for name in os.environ:
        if name.startswith("MMM4REC_") and name != "MMM4REC_TEST_DATA":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def refused(*args, **kwargs):
    with pytest.raises(UsageError) as caught:
        load(*args, **kwargs)
    assert caught.value.code == 2
    assert "\n" not in caught.value.hint
    return list(caught.value.problems)


def test_defaults_are_the_papers():
    settings = load()
    assert settings == Settings()
    assert (settings.model.hidden_size, settings.model.d_state, settings.model.max_len) == (256, 64, 20)
    assert (settings.finetune.lr, settings.pretrain.lr, settings.finetune.weight_decay) == (1e-4, 2.5e-4, 0.005)


def test_each_source_wins_over_the_next(monkeypatch, tmp_path):
    assert load().model.num_layers == 1
    assert load(domain="fhckm").model.num_layers == 2
    (tmp_path / "mmm4rec.toml").write_text("[model]\nnum_layers = 3\n")
    assert load(domain="fhckm").model.num_layers == 3
    monkeypatch.setenv("MMM4REC_MODEL__NUM_LAYERS", "4")
    assert load(domain="fhckm").model.num_layers == 4
    overrides = ["model.num_layers=5"]
    assert load(overrides=overrides, domain="fhckm").model.num_layers == 5
    resolved = resolve(overrides=overrides, domain="fhckm", options={"model.num_layers": 6})
    assert resolved.settings.model.num_layers == 6
    assert resolved.given["model.num_layers"].label == "--num-layers"
    assert load(overrides=[*overrides, "model.num_layers=7"]).model.num_layers == 7, "the last --set wins"


def test_protocol_lies_below_every_source_and_below_the_domain(monkeypatch, tmp_path):
    assert load(overrides=["protocol=published"]).finetune.mean_over_group is False
    (tmp_path / "mmm4rec.toml").write_text('protocol = "published"\n[finetune]\nmean_over_group = true\n')
    settings = load()
    assert settings.finetune.mean_over_group is True
    assert settings.model.padding_candidate is True
    monkeypatch.setitem(
        sys.modules["mmm4rec_cli.settings.presets"].DOMAINS, "toys", {"model": {"padding_candidate": False}}
    )
    assert load(domain="toys").model.padding_candidate is False


def test_config_file_is_looked_for_in_the_workspace(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "mmm4rec.toml").write_text("[runtime]\nseed = 5\n")
    assert load().runtime.seed == 2020
    assert load(workspace=Workspace(tmp_path / "w")).runtime.seed == 5
    assert load(tmp_path / "w" / "mmm4rec.toml").runtime.seed == 5


def test_workspace_variable_finds_the_config_file(tmp_path, monkeypatch):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "mmm4rec.toml").write_text("[runtime]\nseed = 6\n")
    monkeypatch.setenv("MMM4REC_WORKSPACE", "w")
    assert load().runtime.seed == 6


def test_everything_wrong_is_refused_together_with_its_source(monkeypatch, tmp_path):
    (tmp_path / "mmm4rec.toml").write_text("[finetune]\nlrr = 3\npatience = 2.5\n[extra]\na = 1\n[finetun]\n")
    monkeypatch.setenv("MMM4REC_FINETUNE__LR", "-1")
    monkeypatch.setenv("MMM4REC_FINTUNE__LR", "1")
    monkeypatch.setenv("MMM4REC_TEST_DATA", "anywhere")
    problems = refused(
        overrides=["model.fusion=dynamic", "finetune.epochs=-1", "nonsense"], options={"runtime.seed": -4}
    )
    assert problems == [
        "MMM4REC_FINTUNE__LR (environment): unknown; did you mean MMM4REC_FINETUNE__LR?",
        "--set nonsense: not of the form section.key=value",
        "finetune.lrr (mmm4rec.toml): unknown; did you mean finetune.lr?",
        "finetune.patience (mmm4rec.toml): 2.5 is not allowed; allowed: a whole number at least 1",
        "extra.a (mmm4rec.toml): unknown; there are: "
        "protocol, data, features, model, pretrain, finetune, evaluate, runtime",
        "finetun (mmm4rec.toml): unknown; did you mean finetune?",
        "finetune.lr (MMM4REC_FINETUNE__LR): '-1' is not allowed; allowed: a number above 0",
        "model.fusion (--set model.fusion): 'dynamic' is not allowed; allowed: static or shared or instance",
        "finetune.epochs (--set finetune.epochs): -1 is not allowed; allowed: a whole number at least 1",
        "runtime.seed (--seed): -4 is not allowed; allowed: a whole number at least 0 and below 4294967296",
    ]


def test_a_bad_value_is_refused_even_where_a_stronger_source_hides_it(tmp_path):
    (tmp_path / "mmm4rec.toml").write_text("[finetune]\nlr = -1\n")
    assert len(refused(overrides=["finetune.lr=0.1"])) == 1


def test_rules_between_settings_name_where_they_come_from():
    assert refused(overrides=["model.head_dim=100"]) == [
        "model (--set model.head_dim): head_dim=100 must divide expand * hidden_size = 512"
    ]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite(value):
    assert len(refused(overrides=[f"finetune.lr={value}"])) == 1


def test_a_key_without_its_section_is_offered_with_it():
    assert refused(overrides=["lr=0.1"]) == ["lr (--set lr): unknown; did you mean pretrain.lr or finetune.lr?"]


def test_a_section_is_no_setting(monkeypatch):
    monkeypatch.setenv("MMM4REC_EVALUATE", "3")
    monkeypatch.setenv("MMM4REC_EVALUATE__TIES", "half")
    (problem,) = refused()
    assert problem.startswith("evaluate (MMM4REC_EVALUATE): a section, not a setting")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("evaluate.k=10,20", "k", (10, 20)),
        ("evaluate.k= 5 , 7 ", "k", (5, 7)),
        ("evaluate.k=[1, 2]", "k", (1, 2)),
        ("evaluate.k=10", "k", (10,)),
        ("evaluate.ties=optimistic", "ties", "optimistic"),
        ('evaluate.ties="pessimistic"', "ties", "pessimistic"),
        ("evaluate={ties='optimistic'}", "ties", "optimistic"),
    ],
)
def test_set_takes_toml_literals_else_strings_and_comma_lists(override, path, value):
    assert getattr(load(overrides=[override]).evaluate, path) == value


def test_texts_that_look_like_numbers_stay_texts(monkeypatch):
    assert load(overrides=["features.encoder=007"]).features.encoder == "007"
    assert load(overrides=["features.encoder=12"]).features.encoder == "12"
    assert load(overrides=["data.columns.user_id=1e3"]).data.columns.user_id == "1e3"
    monkeypatch.setenv("MMM4REC_FEATURES__TEXT_MODEL", "12")
    assert load().features.text_model == "12"
    assert load(overrides=["features.text_model="]).features.text_model is None


def test_set_cannot_smuggle_a_second_key():
    assert refused(overrides=["finetune.lr=1\nother=2"])


def test_lists_in_the_environment_are_comma_separated(monkeypatch):
    monkeypatch.setenv("MMM4REC_EVALUATE__K", "5,10")
    monkeypatch.setenv("MMM4REC_MODEL__ITEM_BIAS", "false")
    settings = load()
    assert settings.evaluate.k == (5, 10)
    assert settings.model.item_bias is False


def test_broken_toml_names_its_line(tmp_path):
    (tmp_path / "mmm4rec.toml").write_text("[finetune]\nlr = = 3\n")
    (problem,) = refused()
    assert "mmm4rec.toml" in problem
    assert "line 2" in problem


def test_a_toml_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mmm4rec.toml").write_bytes(b"\xff\xfe\x00")
    assert "not valid TOML" in refused()[0]


def test_a_named_config_file_must_be_there():
    assert refused("absent.toml") == ["--config absent.toml: no such file"]


def test_is_set_tells_the_user_from_presets_and_defaults(monkeypatch):
    resolved = resolve(domain="fhckm")
    assert not resolved.is_set("model.num_layers")
    assert not resolved.is_set("features.encoder")
    monkeypatch.setenv("MMM4REC_FEATURES__ENCODER", "sketch")
    assert resolve().is_set("features.encoder")
    assert not resolve(options={"model.num_layers": None}).is_set("model.num_layers")


def test_saved_settings_load_to_the_same_settings():
    for protocol in ("published", "corrected"):
        settings = load(overrides=[f"protocol={protocol}", "finetune.mean_over_group=true", "evaluate.k=3,5"])
        assert Settings.model_validate(settings.model_dump(mode="json")) == settings
        assert Settings.model_validate_json(settings.model_dump_json()) == settings


def test_a_run_keeps_its_own_but_for_evaluate_and_runtime(monkeypatch, tmp_path):
    run = load(overrides=["model.hidden_size=512", "runtime.seed=1", "evaluate.k=3"]).model_dump(mode="json")
    reporter = Notes()
    settings = for_run(run, resolve(overrides=["runtime.device=cpu"]), reporter=reporter)
    assert settings.model.hidden_size == 512
    assert settings.evaluate.k == (10, 20, 50)
    assert (settings.runtime.seed, settings.runtime.device) == (2020, "cpu")
    assert reporter.lines == []


def test_an_option_that_contradicts_the_run_is_refused_with_both_values():
    run = load().model_dump(mode="json")
    invocation = resolve(overrides=["model.hidden_size=512"], options={"finetune.epochs": 3, "finetune.lr": 1e-4})
    with pytest.raises(UsageError) as caught:
        for_run(run, invocation, run="run abc")
    assert caught.value.problems == (
        "finetune.epochs (--epochs): 3, but run abc has 100",
        "model.hidden_size (--set model.hidden_size): 512, but run abc has 256",
    )


def test_a_variable_or_file_that_differs_from_the_run_is_one_note(monkeypatch, tmp_path):
    (tmp_path / "mmm4rec.toml").write_text("[finetune]\nlr = 0.5\npatience = 10\n")
    monkeypatch.setenv("MMM4REC_MODEL__TIME", "decay")
    reporter = Notes()
    settings = for_run(Settings().model_dump(mode="json"), resolve(), run="run abc", reporter=reporter)
    assert settings == Settings()
    assert reporter.lines == [
        "run abc holds: finetune.lr = 0.0001 (not 0.5 from mmm4rec.toml), "
        "model.time = 'none' (not 'decay' from MMM4REC_MODEL__TIME)"
    ]


def test_time_is_left_out_unless_a_model_is_about_it():
    assert load().model.time == load(overrides=["protocol=published"]).model.time == "none"
    for model in ("tim4rec", "tim4rec-t"):
        assert load(model=model).model.time == "observed"


def test_presets_of_a_domain_never_speak_against_a_run():
    run = load(overrides=["model.num_layers=1"]).model_dump(mode="json")
    assert for_run(run, resolve(domain="fhckm")).model.num_layers == 1


def test_named_settings_may_be_freed_from_the_run():
    run = load().model_dump(mode="json")
    settings = for_run(run, resolve(options={"finetune.epochs": 3}), free=("evaluate", "runtime", "finetune.epochs"))
    assert settings.finetune.epochs == 3


def test_settings_of_another_version_are_a_run_error():
    run = load().model_dump(mode="json")
    run["model"]["wings"] = 2
    with pytest.raises(RunError) as caught:
        for_run(run, resolve())
    assert caught.value.problems == ("settings.json of the run: model.wings: Extra inputs are not permitted",)


@pytest.mark.parametrize("path", sorted(_known()))
def test_every_setting_says_what_it_is_and_what_it_takes(path):
    assert _known()[path].description
    assert allowed(path)


def test_every_setting_can_be_set_to_its_own_default_from_each_source(monkeypatch):
    document = Settings().model_dump(mode="json")
    overrides = []
    for path in _known():
        value = document
        for key in path.split("."):
            value = value[key]
        if value is None:
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        text = text.lower() if isinstance(value, bool) else text
        overrides.append(f"{path}={text}")
        monkeypatch.setenv("MMM4REC_" + path.replace(".", "__").upper(), text)
    assert load() == Settings()
    assert load(overrides=overrides) == Settings()


def test_settings_load_neither_torch_nor_polars():
    heavy = ["torch", "polars", "transformers", "numpy"]
    code = f"import sys, mmm4rec_cli.settings as s; s.load(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

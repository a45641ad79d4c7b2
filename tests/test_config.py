from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from omegaconf import OmegaConf

from carrara.config import (
    build,
    check,
    check_settings,
    compose,
    fingerprint,
    load_yaml,
    resolve,
    save_yaml,
    sweep_overrides,
)
from carrara.config_kind import mismatch
from carrara.errors import UserError

CONF = Path(__file__).parents[1] / "conf"
FILES = {
    "train.yaml": """
        defaults: [_self_, trainer: default, size: demo, data: shapes, model: latent_unet, experiment: null]
        seed: 0
        resume: null
    """,
    "trainer/default.yaml": """
        devices: 1
        batch_size: ???
        max_steps: 10
        gradient_clip: 1.0
        compile: false
    """,
    "size/demo.yaml": "{name: demo, batch: 8, width: 16}",
    "size/base.yaml": "{name: base, batch: 64, width: 320}",
    "data/shapes.yaml": """
        # @package _global_
        defaults: [override /size: demo]
        data: {name: shapes, urls: 'shapes/*.tar', filters: {min_width: null}}
    """,
    "data/laion.yaml": """
        # @package _global_
        defaults: [override /size: base]
        data: {name: laion, urls: 'laion/*.tar', filters: {min_width: null}}
    """,
    "model/latent_unet.yaml": """
        # @package _global_
        defaults: [/diffusion/schedule: flow]
        name: latent_unet
        trainer: {batch_size: '${size.batch}'}
        autoencoder: {_target_: carrara.autoencoder.identity.Identity}
        model: {width: '${size.width}'}
    """,
    "model/pixel_unet.yaml": """
        # @package _global_
        name: pixel_unet
        trainer: {batch_size: '${size.batch}'}
    """,
    "diffusion/schedule/flow.yaml": "{_target_: carrara.diffusion.schedule.Flow}",
    "diffusion/schedule/cosine.yaml": "{_target_: carrara.diffusion.schedule.Cosine}",
    "experiment/wide.yaml": """
        # @package _global_
        defaults: [override /model: pixel_unet, override /data: laion, override /size: demo]
        seed: 7
        trainer: {max_steps: 20}
    """,
    "experiment/misspelt.yaml": """
        # @package _global_
        trainer: {max_stps: 20}
    """,
}


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip().splitlines()
        path.write_text("\n".join(line.removeprefix(" " * 8) for line in lines) + "\n")
    return tmp_path / "conf"


def test_the_resolved_config_is_plain(conf):
    composed = compose(conf, "train", [])
    assert composed.config == {
        "trainer": {"devices": 1, "batch_size": 8, "max_steps": 10, "gradient_clip": 1.0, "compile": False},
        "size": "demo",
        "data": {"name": "shapes", "urls": "shapes/*.tar", "filters": {"min_width": None}},
        "diffusion": {"schedule": {"_target_": "carrara.diffusion.schedule.Flow"}},
        "name": "latent_unet",
        "autoencoder": {"_target_": "carrara.autoencoder.identity.Identity"},
        "model": {"width": 16},
        "seed": 0,
        "resume": None,
    }
    assert composed.choices["model"] == "latent_unet"
    assert composed.choices["size"] == "demo"


def test_the_data_choose_a_size_and_the_command_line_wins(conf):
    assert compose(conf, "train", ["data=laion"]).config["model"]["width"] == 320
    assert compose(conf, "train", ["data=laion", "size=demo"]).config["model"]["width"] == 16


def test_an_experiment_is_an_ordinary_group(conf):
    config = compose(conf, "train", ["experiment=wide", "trainer.max_steps=30"]).config
    assert (config["name"], config["data"]["name"], config["size"]) == ("pixel_unet", "laion", "demo")
    assert (config["seed"], config["trainer"]["max_steps"]) == (7, 30)


MISTAKES = [
    ("modle=x", "unknown key modle; did you mean 'model'?"),
    ("trainer.devces=2", "unknown key trainer.devces; did you mean 'trainer.devices'?"),
    ("devices=2", "unknown key devices; did you mean 'trainer.devices'?"),
    ("+typo=1", "unknown key typo"),
    ("++typo=1", "unknown key typo"),
    ("~typo", "unknown key typo"),
    ("+trainer.devces=2", "unknown key trainer.devces; did you mean 'trainer.devices'?"),
    ("+experiment=wide", "experiment is known and set without the '\\+'"),
    (
        "+data.filters.min_height=3",
        "unknown key data.filters.min_height; did you mean 'data.filters.min_width'?",
    ),
    ("model=latnt_unet", "model has no option 'latnt_unet'; did you mean 'latent_unet'?"),
    ("model=gan", "model has no option 'gan'; there are latent_unet, pixel_unet"),
    ("model=null", "model has no option 'None'"),
    ("diffusion/schedule=cosin", "diffusion/schedule has no option 'cosin'; did you mean 'cosine'?"),
    ("diffusion.schedule=cosine", "choose one with diffusion/schedule=…"),
    ("diffusion/schedul=cosine", "there is no group diffusion/schedul; did you mean 'diffusion/schedule'?"),
    ("experiment=misspelt", "misspelt.yaml: unknown key trainer.max_stps; did you mean 'trainer.max_steps'?"),
    ("diffusion.schedule=null", "diffusion.schedule is a group of settings, which cannot be null"),
    ("trainer.devices=abc", "trainer.devices is a number \\(now 1\\), not 'abc'"),
    ("trainer.devices=true", "trainer.devices is a number"),
    ("trainer.compile=3", "trainer.compile is true or false \\(now false\\), not 3"),
    ("trainer.devices=0", "trainer.devices must be a whole number from 1 on, not 0"),
    ("trainer.devices=1.5", "trainer.devices must be a whole number"),
    ("trainer.devices=3", "trainer.batch_size=8 cannot be divided by trainer.devices=3 .*: pass 6 or 9"),
    ("trainer.devices=16", "trainer.batch_size=8 cannot be divided by trainer.devices=16 .*: pass 16$"),
    ("trainer.gradient_clip=-1", "trainer.gradient_clip must be a positive number, not -1"),
    ("trainer.batch_size=???", "trainer.batch_size: Missing"),
    ("seed=1,2", "seed=1,2 gives several values: add -m"),
    ("seed=[1", "'seed=\\[1' is not understood"),
    ("seed=${size.bach}", "seed: Interpolation key 'size.bach' not found"),
    ("=3", "has no key"),
    ("hydra.verbos=1", "hydra.verbos"),
    ("resume=${oc.env:HOME}", "resume: environment variables are not read"),
    ("data.urls=[a,'${oc.env:SECRET,none}']", "data.urls: environment variables are not read"),
    ("autoencoder._target_=torch.load", "_target_ 'torch.load' lies outside carrara.autoencoder"),
    ("autoencoder._target_=carrara.network.unet.UNet", "lies outside carrara.autoencoder"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_a_mistake_is_one_clear_line(conf, override, message):
    with pytest.raises(UserError, match=message) as caught:
        compose(conf, "train", [override])
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_environment_stays_out_of_configs(conf, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    (conf / "data" / "own.yaml").write_text("# @package _global_\ndata: {name: own, urls: '${oc.env:SECRET}'}\n")
    with pytest.raises(UserError, match=r"data\.urls: environment variables are not read"):
        compose(conf, "train", ["data=own"])
    disguised = OmegaConf.create({"part": "env", "data": {"urls": "${oc.${part}:SECRET}"}})
    with pytest.raises(UserError, match="SECRET") as caught:
        resolve(disguised)
    assert "hunter2" not in str(caught.value)
    assert OmegaConf.create({"x": "${oc.env:SECRET}"}).x == "hunter2"  # only while we resolve


def test_a_sweep_is_every_combination(conf):
    overrides = ["seed=1,2", "data=laion", "diffusion/schedule=cosine,flow", "resume='a,b'"]
    runs = sweep_overrides(conf, overrides)
    assert [run[0::2] for run in runs] == [
        [f"seed={seed}", f"diffusion/schedule={schedule}"] for seed in (1, 2) for schedule in ("cosine", "flow")
    ]
    assert all(run[1::2] == ["data=laion", "resume='a,b'"] for run in runs)
    assert len({fingerprint(compose(conf, "train", run).config) for run in runs}) == 4


def test_targets_in_lists_and_partials_are_checked():
    nested = {"network": {"blocks": [{"_args_": [{"_target_": "os.system", "_partial_": True}]}]}}
    with pytest.raises(UserError, match=r"os\.system"):
        check(nested)
    check({"network": {"_target_": "carrara.network.unet.UNet"}, "size": "demo"})
    with pytest.raises(UserError, match=r"carrara\.launch"):
        check({"evaluation": {"_target_": "carrara.launch.launch"}})


TRAINER = yaml.safe_load((Path(__file__).parents[1] / "conf" / "trainer" / "default.yaml").read_text())
TRAINER |= {"batch_size": 8, "max_steps": 5, "learning_rate": 1e-3}


@pytest.mark.parametrize("key", [key for key, value in TRAINER.items() if type(value) in (int, float)])
def test_every_number_of_the_trainer_has_its_range(key):
    for wrong in (-1, True, "3", float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"trainer.{key} must be a"):
            check({"trainer": {**TRAINER, key: wrong}})


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("keep_checkpoints", 1.5, "a whole number from 1 on, not 1.5"),
        ("keep_checkpoints", 0, "a whole number from 1 on"),
        ("keep_every", 0, "a whole number from 1 on"),
        ("log_steps", 0, "a whole number from 1 on"),
        ("log_steps", None, "a whole number from 1 on, not None"),
        ("max_skipped_steps", 0, "a whole number from 1 on"),
        ("max_restarts", 0.5, "a whole number from 0 on"),
        ("ema_decay", 2, "a number from 0 to 1, not 2"),
        ("timeout_s", 0, "a positive number"),
        ("learning_rate", None, "a positive number"),
    ],
)
def test_a_number_out_of_its_range_is_told(key, wrong, message):
    with pytest.raises(UserError, match=f"trainer.{key} must be {message}"):
        check({"trainer": {**TRAINER, key: wrong}})
    null = dict.fromkeys(("epoch_samples", "keep_every", "gradient_clip"))
    check({"trainer": {**TRAINER, "keep_best": 0, "max_restarts": 0, "ema_decay": 0, **null}})


def test_build_gives_our_objects():
    node = {"_target_": "carrara.network.tokenizer.Tokenizer", "vocab_size": 300}
    assert build(node, max_length=8).max_length == 8
    assert build({**node, "_partial_": True})(max_length=9).max_length == 9


def test_build_passes_objects_as_they_are():
    class Uncopyable:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    given = Uncopyable()
    node = {"_target_": "carrara.network.tokenizer.Tokenizer", "vocab_size": 300}
    assert build(node, max_length=given).max_length is given


@pytest.mark.parametrize(
    "target",
    ["carrara.component.os.system", "carrara.data.decode.io.BytesIO", "carrara.data.loader.torch.load"],
)
def test_build_refuses_what_others_wrote(target):
    with pytest.raises(UserError, match="will not be built"):
        build({"_target_": target})


def test_build_says_what_a_constructor_says():
    node = {
        "_target_": "carrara.autoencoder.kl.KL",
        "latent_channels": 4,
        "downsampling": 8,
        "channels": [8, 8],
    }
    with pytest.raises(UserError, match=r"autoencoder\.downsampling=8"):
        build({**node, "num_blocks": 1, "patch": 1, "kl_weight": 0.0})


@pytest.mark.parametrize("nested", [False, True])
def test_build_names_a_setting_that_is_not_said(nested):
    node = {"_target_": "carrara.corruption.noise.Gaussian", "sigma": 0.1}
    whole = {"_target_": "carrara.diffusion.schedule_table.ZeroTerminalSNR", "table": node} if nested else node
    with pytest.raises(UserError, match=r"noise\.Gaussian needs the setting seed"):
        build(whole)
    assert build(node, seed=0).sigma == 0.1 and build({"_target_": node["_target_"], "seed": 0}, 0.1).sigma == 0.1
    assert callable(build({**node, "_partial_": True}))


@pytest.mark.parametrize("nested", [False, True])
def test_build_names_a_setting_that_a_class_does_not_have(nested):
    node = {"_target_": "carrara.diffusion.schedule_table.Linear", "beta_strt": 1e-4, "beta_end": 0.02, "num_steps": 9}
    whole = {"_target_": "carrara.diffusion.schedule_table.ZeroTerminalSNR", "table": node} if nested else node
    with pytest.raises(UserError, match=r"Linear has no setting beta_strt; did you mean 'beta_start'\?"):
        build(whole)


UNET = {
    "_target_": "carrara.network.unet.UNet", "in_channels": 4, "resolution": 8, "channels": [8, 8],
    "attention": [False, True], "num_blocks": 1, "depth": 1, "heads": 2, "context_width": 8, "expansion": 2,
    "qk_norm": True, "learned_positions": False, "pooled_width": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("channels", 96, "channels of .*UNet must be a list, not 96"),
        ("channels", None, "must be a list, not null"),
        ("heads", "two", 'heads of .*UNet must be a whole number or a list, not "two"'),
        ("depth", 1.5, "depth of .*UNet must be a whole number, not 1.5"),
        ("qk_norm", 1, "must be true or false, not 1"),
        ("expansion", None, "expansion of .*UNet must be a whole number, not null"),
    ],
)
def test_build_names_a_setting_of_another_kind(key, wrong, message):
    build({**UNET, "heads": [2, 2]})
    with pytest.raises(UserError, match=message):
        build({**UNET, key: wrong})


def test_a_run_s_settings_are_named_by_their_keys():
    run: dict[str, Any] = {"name": "latent_unet", "network": dict(UNET), "callback": {"score": dict(UNET)}}
    check_settings(run)
    run["callback"]["score"]["heads"] = None
    with pytest.raises(UserError, match=r"^callback\.score\.heads must be a whole number or a list, not null$"):
        check_settings(run)
    run["network"]["patch"] = 2
    with pytest.raises(UserError, match=r"network\.patch: .*UNet has no such setting; model=latent_unet goes with"):
        check_settings(run)


def test_kinds_follow_the_annotations():
    def reader(
        number: float, either: str | Sequence[str], choice: Literal["a", "b"] | None, node: Mapping[str, float],
        made: Callable[[], int], anything: Any,
    ) -> None: ...  # fmt: skip

    good: dict[str, list[Any]] = {
        "number": [1, 2.5],
        "either": ["a", ["a"]],
        "choice": ["a", None],
        "node": [{}],
        "made": [{}, 3],
    }
    for key, values in {**good, "anything": [None], "unknown": [1]}.items():
        assert [mismatch(reader, key, value) for value in values] == [None] * len(values)
    assert mismatch(reader, "number", True) == "a number"
    assert mismatch(reader, "either", None) == "a word or a list"
    assert mismatch(reader, "choice", 1) == mismatch(reader, "choice", "c") == "a or b or null"
    assert mismatch(reader, "node", [1]) == "a group of settings"


@pytest.mark.parametrize("wrong", [None, -1, 1.5, [1, 2], True])
def test_a_run_has_one_seed(wrong):
    with pytest.raises(UserError, match="seed must be a whole number from 0 on"):
        check({"model": {}, "seed": wrong})


def test_a_list_is_left_to_a_constructor_alone():
    composed = compose(CONF, "train", ["size=demo", "model=pixel_unet", "network.heads=[2,4]"])
    assert composed.config["network"]["heads"] == [2, 4]
    with pytest.raises(UserError, match=r"trainer\.log_steps is a number \(now 50\), not \[1\]"):
        compose(CONF, "train", ["size=demo", "trainer.log_steps=[1]"])


def test_a_group_that_a_model_does_not_have_is_named():
    for override, group in (("conditioner=clip", "conditioner"), ("diffusion/schedule=flow", "diffusion/schedule")):
        with pytest.raises(UserError, match=f"there is no {group} to choose here: leave {group}=… out"):
            compose(CONF, "train", ["model=dalle", override])


def test_a_fingerprint_is_of_the_content():
    one = {"a": 1, "b": {"c": 2.0, "d": [1, "é"]}}
    assert fingerprint(one) == fingerprint({"b": {"d": [1.0, "é"], "c": 2}, "a": 1})
    assert len(fingerprint(one)) == 12
    assert fingerprint(one) != fingerprint({"a": 1, "b": {"c": 2.0, "d": ["é", 1]}})
    assert fingerprint({"a": None}) != fingerprint({})


def test_yaml_comes_back_as_it_was(tmp_path):
    content = {
        "b": 1e-5,
        "a": [1, None, True, "3", "1e-4", "yes", "ein größerer Kreis: {a}"],
        "c": {"d": "${x}"},
    }
    save_yaml(tmp_path / "config.yaml", content)
    assert load_yaml(tmp_path / "config.yaml") == content
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text())) == ["b", "a", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_yaml_outlives_a_power_cut(tmp_path, monkeypatch):
    """Its contents, before it has its name."""
    synced = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append((tmp_path / "config.yaml").exists()))
    save_yaml(tmp_path / "config.yaml", {"a": 1})
    assert synced == [False]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(UserError, match=r"config\.yaml is not readable YAML"):
        load_yaml(tmp_path / "config.yaml")

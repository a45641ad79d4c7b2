from pathlib import Path

import pytest
import torch

from carrara.architecture import check_fit, check_trained, meta_modules, optimizer_bytes
from carrara.config import build, compose
from carrara.errors import UserError
from carrara.network.caption_mean import CaptionMean
from tests import tiny

CONF = Path(__file__).parents[1] / "conf"


def test_parameters_are_those_of_the_built_parts():
    config = compose(CONF, "train", ["size=demo"]).config
    modules, model = meta_modules(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    real = {name: build(config[name]) for name in ("network", "conditioner", "autoencoder", "evaluator")}
    real["other"] = CaptionMean(real["autoencoder"].latent_channels, real["conditioner"].width)
    assert modules.keys() == real.keys()
    for name, module in modules.items():
        assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in real[name].parameters())
        trained = name in ("network", "conditioner", "other")
        assert all(p.requires_grad == trained for p in module.parameters())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_optimizers_state_is_as_large_as_planned(optimizer):
    overrides = ["model=evaluator", "size=demo", f"model/optimizer={optimizer}"]
    config = compose(CONF, "train", overrides).config
    _, model = meta_modules(config)
    real = build(config["model"], evaluator=build(config["evaluator"]))
    stepped = real.configure_optimizers()["optimizer"]
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepped.step()
    states = [value for state in stepped.state.values() for value in state.values()]
    assert optimizer_bytes(model) == sum(v.numel() * v.element_size() for v in states if isinstance(v, torch.Tensor))


@pytest.mark.parametrize(
    "model",
    [
        "latent_unet",
        "latent_dit",
        "pixel_unet",
        "pixel_dit",
        "dalle",
        "latent_flow",
        "pixel_flow",
        "prior",
        "autoregressive_prior",
        "dalle2",
        "autoencoder",
        "evaluator",
        "classifier",
        "language_model",
        "restoration",
        "gan",
        "vae",
    ],
)
@pytest.mark.parametrize("size", ["demo", "small", "base"])
def test_every_models_network_fits_what_it_is_given(model, size):
    config = compose(CONF, "train", [f"model={model}", f"size={size}"]).config
    check_fit(config, meta_modules(config)[0])


@pytest.mark.parametrize("autoencoder", ["vq", "gumbel"])
@pytest.mark.parametrize("size", ["demo", "small", "base"])
def test_diffusion_fits_the_latents_of_discrete_auto_encoders(autoencoder, size):
    config = compose(CONF, "train", ["model=latent_unet", f"autoencoder={autoencoder}", f"size={size}"]).config
    modules, _ = meta_modules(config)
    check_fit(config, modules)
    own = compose(CONF, "train", ["model=autoencoder", f"autoencoder={autoencoder}", f"size={size}"]).config
    assert own["autoencoder"] == config["autoencoder"]
    assert meta_modules(own)[0].keys() == modules.keys() & {"autoencoder"} | ({"other"} if size == "base" else set())


@pytest.mark.parametrize("objective", ["masked", "causal"])
@pytest.mark.parametrize("size", ["demo", "small", "base"])
def test_a_language_model_that_is_not_trained_yet_is_planned_with(objective, size):
    chosen = ["conditioner=language_model", f"language_model={objective}", f"size={size}"]
    config = compose(CONF, "train", ["model=pixel_unet", *chosen]).config
    modules, _ = meta_modules(config)
    check_fit(config, modules)
    assert not any(True for _ in modules["conditioner"].parameters())
    assert all(not p.requires_grad and p.device.type == "meta" for p in modules["language_model"].parameters())
    assert config["network"]["context_width"] == config["language_model"]["width"]


def test_a_layer_that_a_language_model_will_not_have_is_refused_before_it_is_trained():
    chosen = ["conditioner=language_model", "conditioner.layer=4", "size=demo"]
    with pytest.raises(UserError, match=r"conditioner\.layer=4, but this language model has 3 blocks"):
        meta_modules(compose(CONF, "train", chosen).config)


def test_a_conditioner_without_its_language_model_is_refused():
    config = compose(CONF, "train", ["conditioner=language_model", "part.language_model=null", "size=demo"]).config
    with pytest.raises(UserError, match=r"part\.language_model=null, but the conditioner reads it"):
        meta_modules(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=pixel_unet", "autoencoder=kl"], "autoencoder: model=pixel_unet takes none that has to be trained"),
        (["model=pixel_flow", "autoencoder=vq"], "autoencoder: model=pixel_flow takes none"),
        (["model=latent_unet", "part.autoencoder=null"], r"part\.autoencoder=null: model=latent_unet needs a trained"),
        (["model=dalle", "part.autoencoder=null"], r"part\.autoencoder=null: model=dalle needs"),
        (["model=gan", "part.autoencoder=null"], r"part\.autoencoder=null: model=gan needs"),
        (["model=prior", "part.clip=null"], r"part\.clip=null: model=prior needs"),
        (["model=dalle2", "part.clip=null"], r"part\.clip=null: model=dalle2 needs"),
    ],
)
def test_what_is_not_trained_along_has_been_trained(overrides, message):
    """Random weights that nothing keeps would be others at every start."""
    config = compose(CONF, "train", [*overrides, "size=demo"]).config
    with pytest.raises(UserError, match=message):
        check_trained(config, meta_modules(config)[0])


@pytest.mark.parametrize("model", ["autoencoder", "latent_unet", "pixel_unet", "gan", "vae", "imagen", "dalle2"])
def test_what_is_trained_along_or_named_needs_no_more(model):
    config = compose(CONF, "train", [f"model={model}", "size=demo"]).config
    check_trained(config, meta_modules(config)[0])


@pytest.mark.parametrize("model", ["gan", "latent_unet", "latent_flow"])
@pytest.mark.parametrize("autoencoder", ["identity", "shrunken"])
def test_pixels_need_no_trained_auto_encoder(model, autoencoder):
    config = compose(CONF, "train", [f"model={model}", f"autoencoder={autoencoder}", "size=demo"]).config
    assert config["part"]["autoencoder"] is None
    modules, _ = meta_modules(config)
    check_trained(config, modules)
    check_fit(config, modules)


@pytest.mark.parametrize("model", ["latent_unet", "dalle2", "imagen", "small_pictures"])
def test_a_network_that_is_chosen_is_taken_whole(model):
    network = compose(CONF, "train", [f"model={model}", "network=stable_diffusion_1", "size=demo"]).config["network"]
    assert network["channels"] == [320, 640, 1280, 1280] and network["heads"] == 8 and not network["qk_norm"]


@pytest.mark.parametrize("model", ["latent_unet", "latent_dit", "latent_flow", "gan", "dalle2"])
def test_an_auto_encoder_that_is_chosen_brings_its_weights(model):
    config = compose(CONF, "train", [f"model={model}", "autoencoder=pretrained", "size=demo"]).config
    assert config["part"]["autoencoder"] == "stabilityai/sd-vae-ft-mse"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=super_resolution", "model.factor=3"], r"model\.factor=3 does not divide data\.resolution=32"),
        (["model=dalle2", "model.embedding_dropout=2"], r"model\.embedding_dropout=2 must lie between 0 and 1"),
        (["model=imagen", "autoencoder=kl"], "pictures are enlarged as they are, not as latents"),
        (
            ["model=dalle2", "network=stable_diffusion_1"],
            r"pass network\.pooled_width=128, not 0",
        ),
        (["model=dalle2", "conditioner=text"], "the decoder reads no captions: take conditioner=image_embedding"),
    ],
)
def test_a_system_of_parts_that_it_cannot_use_is_refused(overrides, message):
    config = compose(CONF, "train", [*overrides, "size=demo"]).config
    with pytest.raises(UserError, match=message):
        check_fit(config, meta_modules(config)[0])


@pytest.mark.parametrize("key", ["in_channels=5", "resolution=4", "context_width=77", "pooled_width=7"])
def test_a_network_that_does_not_fit_is_refused(key):
    config = compose(CONF, "train", [f"network.{key}", "size=demo"]).config
    with pytest.raises(UserError, match=r"does not fit latents of \(4, 8, 8\) and captions of width 128"):
        check_fit(config, meta_modules(config)[0])


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        (tiny.unet(), r"UNet\.forward\(\) missing .* 'time' and 'conditioning'"),
        (torch.nn.Conv2d(4, 3, 1), "channel"),
        (torch.nn.Conv2d(3, 4, 1), r"it answers with \(4, 32, 32\)"),
    ],
)
def test_a_restoration_that_does_not_fit_pictures_is_refused(network, problem):
    sizes = ["data.bucket_aspect=2", "data.bucket_multiple=16"]
    config = compose(CONF, "train", ["model=restoration", *sizes]).config
    with pytest.raises(UserError, match=rf"does not restore pictures of \(3, \d+, \d+\) \(.*{problem}"):
        check_fit(config, {"network": network.to("meta")})
    check_fit(config, meta_modules(config)[0])


def test_a_network_with_other_inputs_predicts_no_noise():
    config = compose(CONF, "train", ["model=pixel_unet"]).config
    modules = meta_modules(config)[0] | {"network": tiny.drunet().to("meta")}
    with pytest.raises(UserError, match=r"does not fit .*forward\(\) takes 2 positional arguments"):
        check_fit(config, modules)


@pytest.mark.parametrize("key", ["patch=3", "in_channels=5", "context_width=77", "pooled_width=7"])
def test_a_transformer_that_does_not_fit_is_refused(key):
    config = compose(CONF, "train", ["model=latent_dit", f"network.{key}", "size=demo"]).config
    with pytest.raises(UserError, match=r"does not fit latents of \(4, 8, 8\) and captions of width 128"):
        check_fit(config, meta_modules(config)[0])


@pytest.mark.parametrize("model", ["autoencoder", "latent_unet", "gan", "latent_flow", "dalle", "dalle2"])
def test_pictures_that_do_not_become_latents_are_refused(model):
    config = compose(CONF, "train", [f"model={model}", "data.resolution=30", "size=demo"]).config
    with pytest.raises(UserError, match=r"data\.resolution=30: such pictures do not become latents, for .*=4"):
        check_fit(config, meta_modules(config)[0])


@pytest.mark.parametrize("model", ["latent_unet", "autoencoder"])
def test_buckets_that_do_not_become_latents_are_refused(model):
    overrides = [f"model={model}", "data.bucket_aspect=2.0", "data.bucket_multiple=6", "size=demo"]
    config = compose(CONF, "train", overrides).config
    with pytest.raises(UserError, match=r"data\.bucket_multiple=6: such pictures do not become latents, for .*=4"):
        check_fit(config, meta_modules(config)[0])


@pytest.mark.parametrize("key", ["patch=3", "in_channels=5", "context_width=77", "pooled_width=7"])
def test_a_flow_that_does_not_fit_is_refused(key):
    config = compose(CONF, "train", ["model=latent_flow", f"network.{key}", "size=demo"]).config
    with pytest.raises(UserError, match=r"does not fit latents of \(4, 8, 8\) and captions of width 128"):
        check_fit(config, meta_modules(config)[0])


@pytest.mark.parametrize(("model", "shape"), [("gan", "4, 8, 8"), ("vae", "3, 32, 32")])
@pytest.mark.parametrize(
    "key", ["pyramid.in_channels=5", "pyramid.resolution=16", "pyramid.context_width=77", "pooled_width=7"]
)
def test_a_generator_that_does_not_fit_is_refused(model, shape, key):
    config = compose(CONF, "train", [f"model={model}", f"network.{key}", "size=demo"]).config
    with pytest.raises(UserError, match=rf"does not fit latents of \({shape}\) and captions of width 128"):
        check_fit(config, meta_modules(config)[0])


def test_a_generator_makes_square_pictures():
    config = compose(CONF, "train", ["model=gan", "data.bucket_aspect=2.0", "size=demo"]).config
    with pytest.raises(UserError, match=r"data\.bucket_aspect: model=gan makes square pictures"):
        check_fit(config, meta_modules(config)[0])

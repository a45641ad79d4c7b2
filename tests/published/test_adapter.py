import pytest
import torch
from diffusers import StableDiffusionPipeline

from carrara.network.lora import add_lora, merged
from carrara.published.adapter import write_adapter
from carrara.published.export import export_pipeline
from tests.published.test_export import CAPTIONS, CONFIG, parts

__all__ = ["parts"]


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "out"]])
def test_the_adapter_on_the_base_is_the_merged_network(parts, tmp_path, targets):
    network, conditioner, autoencoder = parts
    export_pipeline(tmp_path / "base", CONFIG, network, conditioner, autoencoder)
    network = merged(network)  # a copy
    add_lora(network, rank=3, alpha=12, targets=targets)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    write_adapter(tmp_path / "adapter", network, CONFIG["network"])
    export_pipeline(tmp_path / "merged", CONFIG, merged(network), conditioner, autoencoder)

    base, whole = (StableDiffusionPipeline.from_pretrained(tmp_path / name) for name in ("base", "merged"))
    noise = torch.randn(2, 4, 8, 8)

    def pictures(pipeline: StableDiffusionPipeline) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(CAPTIONS, num_inference_steps=3, latents=noise, output_type="pt").images

    without = pictures(base)
    base.load_lora_weights(tmp_path / "adapter")
    assert (pictures(base) - pictures(whole)).abs().max() < 1e-3
    assert (without - pictures(whole)).abs().max() > 0.05

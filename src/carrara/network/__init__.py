"""Networks: plain `torch.nn.Module`s that know nothing of diffusion, data or training."""

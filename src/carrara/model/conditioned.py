"""A network and what tells it the captions: trained, saved and exported together."""

from torch import nn


class Conditioned(nn.Module):
    """Network and conditioner of a model that makes pictures.

    Args:
        network: is called with the conditioner's answer.
        conditioner: captions -> Conditioning.
    """

    network: nn.Module
    conditioner: nn.Module

    def __init__(self, network: nn.Module, conditioner: nn.Module):
        super().__init__()
        self.network = network
        self.conditioner = conditioner

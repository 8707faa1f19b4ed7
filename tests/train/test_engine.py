"""What the engine and its devices refuse. How it trains is in tests/distributed/test_train.py."""

import pytest
import torch
from torch import nn

from riverrun.train import distributed
from riverrun.train.config import EngineConfig, OptimizerConfig, TrainConfig
from riverrun.train.engine import Engine


@pytest.mark.parametrize("stage", [2, 3])
def test_muon_needs_stage_one(stage):
    ranks = distributed.Ranks(0, 1, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"needs engine\.zero_stage=1"):
        Engine(nn.Linear(2, 2), OptimizerConfig(name="muon"), TrainConfig(), EngineConfig(zero_stage=stage), ranks, 1)


def test_cuda_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.resolve_device("auto", 0) == torch.device("cpu")
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        distributed.resolve_device("cuda", 0)


def test_more_local_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.resolve_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="--nproc-per-node 2"):
        distributed.resolve_device("cuda", 2)

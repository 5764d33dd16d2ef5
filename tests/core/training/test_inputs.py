"""What a pass hands to the networks: the contexts with their empty prompts, and SDXL's vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zeroconv.controlnet_core.data.dataset import Batches, Dataset, in_unit
from zeroconv.controlnet_core.networks.layers import timestep_embedding
from zeroconv.controlnet_core.training import inputs
from zeroconv.controlnet_core.training.distributed import ALONE

from .tiny import dataset, quick


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset(tmp_path_factory.mktemp("data"))


def test_contexts_choose_per_example(data: Dataset):
    batch = data.read([0, 1, 2])
    found, pooled = inputs.text_embeddings(batch, torch.tensor([True, False, True]), data.empty_prompt)
    assert pooled is None
    assert torch.equal(found[0], data.empty_prompt[0])
    assert torch.equal(found[1], batch.context[1])
    assert not torch.equal(found[2], batch.context[2])


def test_vectors_of_sdxl():
    """Pooled text, then 6 numbers of 256 sinusoids each, as generative-models concatenates them."""
    sizes = torch.tensor([[1024, 768, 0, 16, 512, 512], [1, 2, 3, 4, 5, 6]], dtype=torch.int32)
    pooled = torch.arange(6.0).reshape(2, 3)
    found = inputs.sdxl_vector(pooled, sizes)
    assert found is not None
    assert found.shape == (2, 3 + 6 * 256)
    assert torch.equal(found[:, :3], pooled)
    assert torch.equal(found[1, 3 + 256 : 3 + 512], timestep_embedding(torch.tensor([2.0]), 256)[0])
    assert inputs.sdxl_vector(None, None) is None


def test_hints_travel_as_bytes(data: Dataset):
    batch = data.read([0, 1])
    passes = inputs.Passes(data, Batches(data, range(5), 2, 0), quick(), ALONE, 1000)
    assert batch.hint_bytes.dtype == passes[0].hint_bytes.dtype == torch.uint8
    assert torch.equal(batch.hints, batch.hint_bytes.float() / 255)


def in_numpy() -> tuple[torch.Tensor, torch.Tensor]:
    """All bytes, and what they are in [0,1] by numpy's division."""
    numbers = np.arange(256, dtype=np.uint8)
    return torch.from_numpy(numbers), torch.from_numpy(numbers.astype(np.float32) / np.float32(255))


def test_bytes_in_the_unit_interval():
    numbers, expected = in_numpy()
    found = in_unit(numbers)
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32
    assert (found[0], found[51], found[255]) == (0, torch.tensor(0.2), 1)


@pytest.mark.gpu
def test_bytes_in_the_unit_interval_on_cuda():
    numbers, expected = in_numpy()
    assert torch.equal(in_unit(numbers.cuda()).cpu(), expected)

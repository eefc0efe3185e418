"""Trajectories on the CPU until their loss is taken. Both ends are a CPU here: who moves what, and when."""

import pytest
import torch

from am_diffusers.matching import MatchingBatch
from am_diffusers.methods.parts.rows import Rows
from am_diffusers.methods.parts.surroundings import Sizes
from methods_around import adjoint_matching as make
from methods_around import collect, total_loss


@pytest.fixture
def moves(monkeypatch):
    """What was copied: ("cpu" or "device", samples or rows), in order."""
    seen = []
    to_cpu, to = Rows.to_cpu, MatchingBatch.to

    def seen_to_cpu(self):
        seen.append(("cpu", len(self.latents)))
        return to_cpu(self)

    def seen_to(self, device):
        seen.append((str(device), len(self)))
        return to(self, device)

    monkeypatch.setattr(Rows, "to_cpu", seen_to_cpu)
    monkeypatch.setattr(MatchingBatch, "to", seen_to)
    return seen


def test_chunks_go_to_the_cpu_and_micro_batches_come_back(moves):
    method = make(sizes=Sizes(rollout=4, offload=True), mask_quantile=None)
    collected = collect(method)
    assert moves == [("cpu", 4), ("cpu", 2)]
    moves.clear()
    method.latents = type(method.latents)((2,), torch.device("cpu", 0), torch.float64)
    method.loss(collected.examples.split(5)[0])
    assert moves == [("cpu:0", 5)]


def test_losses_are_those_of_a_run_without(moves):
    kept = total_loss(method := make(), collect(method), 5)
    assert [where for where, _ in moves] == ["cpu"] * len(moves), "only the loss moves its rows"
    offloaded = make(sizes=Sizes(rollout=4, offload=True))
    assert total_loss(offloaded, collect(offloaded), 5) == pytest.approx(kept, rel=1e-12)


def test_a_micro_batch_arrives_whole_on_the_device():
    batch = collect(make()).examples
    arrived = batch.split(5)[1].to("meta")
    assert {getattr(arrived, n).device.type for n in ("latents", "sigmas", "target", "weight")} == {"meta"}
    assert (arrived.samples.device.type, len(arrived)) == ("cpu", 5)


def test_micro_batches_share_the_memory_of_the_rows():
    batch = collect(make()).examples
    parts = batch.split(5)
    assert torch.equal(torch.cat([part.latents for part in parts]), batch.latents)
    assert torch.equal(torch.cat([part.samples for part in parts]), batch.samples)
    assert parts[1].latents.data_ptr() == batch.latents[5:].data_ptr()

"""The buffer of trajectories: what is drawn, over ranks and restarts, and the law that training reaches."""

import resource
from pathlib import Path

import pytest
import torch

from am_diffusers.methods.parts.kept import PartShare
from am_diffusers.methods.parts.replay import DiskTensors, Replay
from am_diffusers.methods.parts.rows import Rows, Swept
from am_diffusers.methods.parts.surroundings import Sizes
from am_diffusers.noise import LatentSpec, generators_for
from am_diffusers.training.state_files import load_state, save_state
from am_diffusers.transitions import memoryless_local_linear, uniform_sigmas
from am_diffusers.velocity import Conditioning
from live_bytes import LiveBytes
from method_training import end_moments, linear_policy, train
from methods_around import adjoint_matching as make
from methods_around import collect, make_method, total_loss
from oracles import THREE_MODES, CountingField, gaussian
from ranks import Ranks


def encode(prompts):
    return Conditioning(tuple(prompts))


def buffered(generations=3, refresh=2, folder=None, **given):
    """Keep some collections of 6 samples, in memory or in a folder."""
    flags = {"buffer_size": 6 * generations, "buffer_refresh": refresh, "sizes": Sizes(batch=6)}
    where = {} if folder is None else {"buffer_storage": "disk", "folder": folder}
    return make_method("buffered_adjoint_matching", **(flags | where | given))


def filled(iterations=7, **changes):
    method = buffered(**changes)
    for iteration in range(iterations):
        collect(method, iteration=iteration)
    return method


def assert_same_examples(got, expected):
    for name in ("latents", "sigmas", "target", "weight"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert [got.cond.prompts[i] for i in got.samples] == [expected.cond.prompts[i] for i in expected.samples]


# ------------------------------------------------------------------------------------------- what is drawn


def test_a_buffer_of_one_collection_that_is_always_new_is_adjoint_matching():
    on_policy, method = make(mask_quantile=0.7, loss_steps=4), buffered(1, 1, mask_quantile=0.7, loss_steps=4)
    for iteration in range(3):
        ours, theirs = (collect(each, iteration=iteration) for each in (method, on_policy))
        assert_same_examples(ours.examples, theirs.examples)
        assert {n: v for n, v in ours.metrics.items() if not n.startswith("buffer/")} == theirs.metrics
        assert torch.equal(ours.rewards, theirs.rewards)


def test_rollouts_come_every_few_iterations_and_their_metrics_with_them():
    base = CountingField(THREE_MODES.field())
    method, seen = buffered(refresh=3, base=base), []
    for iteration in range(7):
        before = len(base.vjps)
        collected = collect(method, iteration=iteration)
        seen.append(len(base.vjps) > before)
        assert ("reward" in collected.metrics) == seen[-1] == bool(len(collected.rewards))
        assert "masked" in collected.metrics
    assert seen == [True, False, False] * 2 + [True]


def test_ages_are_those_of_the_drawn_rows():
    method = buffered(generations=2, refresh=3)
    ages = [collect(method, num=50, iteration=i).metrics for i in range(7)]
    assert [metrics["buffer/age_max"] for metrics in ages] == [0, 1, 2, 3, 4, 5, 3]
    assert [metrics["buffer/samples"] for metrics in ages] == [50] * 3 + [100] * 4
    # 350 rows, from 0 and 3 iterations ago with equal chances: 4 standard errors are .32.
    assert ages[3]["buffer/age_mean"] == pytest.approx(1.5, abs=0.32)


def numbered_rows(generation, samples, steps):
    """Rows whose latent says where they come from: generation, sample, step."""
    places = torch.cartesian_prod(torch.arange(samples), torch.arange(steps)).view(samples, steps, 2)
    latents = torch.cat([torch.full((samples, steps, 1), generation), places], 2).double()
    ones = torch.ones(samples, steps, dtype=torch.float64)
    return Rows(latents, -latents, ones, ones, ones)


def test_each_stored_row_is_drawn_as_often_as_any_other_and_each_place_once():
    """4000 draws of (2 samples, 3 steps) from 4 generations: 1000 each, 4 standard errors are 110."""
    replay = Replay(4)
    for generation in range(6):
        replay.push(numbered_rows(generation, 2, 3), [f"{generation} {b}" for b in range(2)], generation)
    counts = torch.zeros(6, 2, 3)
    for draw in range(4000):
        drawn = replay.draw(generators_for(0, draw, range(2)))
        latents = drawn.rows.latents.long()
        assert torch.equal(latents[..., 1:], numbered_rows(0, 2, 3).latents[..., 1:].long())
        assert torch.equal(drawn.rows.target, -drawn.rows.latents)
        assert torch.equal(latents[..., 0], drawn.iterations)
        assert drawn.prompts == [f"{g} {b}" for g, b, _ in latents.flatten(0, 1).tolist()]
        counts.index_put_(tuple(latents.flatten(0, 1).T), torch.tensor(1.0), accumulate=True)
    assert not counts[:2].any()
    assert (counts[2:] - 1000).abs().max() < 110


def test_rows_keep_their_prompts_and_only_those_that_are_drawn_are_encoded():
    encoded = []

    def noted(prompts):
        encoded.append(tuple(prompts))
        return encode(prompts)

    method = buffered(generations=2, refresh=1, mask_quantile=None, encode=noted)
    for iteration in range(2):
        cond = Conditioning(tuple(f"iteration {iteration} sample {b}" for b in range(6)))
        examples = method.collect(cond, generators_for(0, iteration, range(6)), None).examples
    assert len(encoded[1]) == len(set(encoded[1])) <= 12
    stored = torch.stack([state["rows"]["latents"] for state in method.replay.state()])
    for x, sample in zip(examples.latents, examples.samples.tolist(), strict=True):
        ((iteration, b, _),) = (stored == x).all(-1).nonzero().tolist()
        assert examples.cond.prompts[sample] == f"iteration {iteration} sample {b}"


def test_masked_rows_stay_masked_and_leave_loss_and_denominator():
    method = filled(mask_quantile=0.6)
    collected = collect(method, iteration=7)
    rows = method.replay.draw(generators_for(0, 7, range(6))).rows
    assert 0.2 < collected.metrics["masked"] < 0.6
    assert len(collected.examples) == rows.keep.sum()
    velocity = method.inner.policy(rows.latents.flatten(0, 1), rows.sigmas.flatten(), None)
    residuals = rows.weight.flatten() * (velocity - rows.target.flatten(0, 1)).square().sum(1)
    expected = residuals[rows.keep.flatten() == 1].mean().item()
    assert total_loss(method, collected) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------ ranks and restarts


def states_of(methods, folder):
    """The local states as a checkpoint gives them back."""
    for rank, method in enumerate(methods):
        save_state(folder, f"local-{rank}", method.local_state_dict())
    return [load_state(folder, f"local-{rank}") for rank in range(len(methods))]


@pytest.mark.parametrize("storage", ["cpu", "disk"])
def test_a_restored_buffer_goes_on_bit_by_bit(tmp_path, storage):
    folder = None if storage == "cpu" else tmp_path
    method, again = filled(folder=folder), buffered(folder=folder)
    again.load_state_dict(method.state_dict())
    again.load_local_state_dicts(states_of([method], tmp_path), PartShare())
    for iteration in range(7, 12):
        ours, theirs = (collect(each, iteration=iteration) for each in (again, method))
        assert_same_examples(ours.examples, theirs.examples)
        assert ours.metrics == theirs.metrics
    assert again.state_dict() == method.state_dict()


def test_what_is_on_the_disk_is_what_is_in_memory_and_no_file_is_left(tmp_path):
    ours = collect(filled(folder=tmp_path), iteration=7)
    assert_same_examples(ours.examples, collect(filled(), iteration=7).examples)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    (tmp_path / ".tensors-abc").write_bytes(b"0")
    (tmp_path / "metrics.jsonl").write_text("")
    DiskTensors(tmp_path).clean()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("room", [1000, 39900])
def test_a_full_disk_is_explained_and_leaves_no_file(tmp_path, room):
    """Of 40000 bytes, early on and in the last few."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"no room for the buffer .*lower --buffer_size"):
            DiskTensors(tmp_path)(torch.ones(100, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_any_number_of_ranks_goes_on_with_the_same_rows(tmp_path, before, after):
    def run(rank, ranks, gather, method=None, iterations=range(5)):
        share, own = 12 // ranks, method or buffered(mask_quantile=0.6, gather=gather)
        collected = [collect(own, num=share, iteration=i, first=rank * share) for i in iterations]
        return own, [total_loss(own, each) for each in collected], collected[-1].metrics

    methods = [own for own, _, _ in Ranks(before).run(lambda rank, gather: run(rank, before, gather))]
    states, common = states_of(methods, tmp_path), methods[0].state_dict()

    def go_on(rank, gather):
        method = buffered(mask_quantile=0.6, gather=gather)
        method.load_state_dict(common)
        share = PartShare(rank, after, before)
        method.load_local_state_dicts([states[part] for part in share.needed], share)
        return run(rank, after, gather, method, range(5, 8))

    _, whole, metrics = run(0, 1, gather=lambda values: values, iterations=range(8))
    results = Ranks(after).run(go_on)
    assert torch.tensor([r[1] for r in results]).sum(0).tolist() == pytest.approx(whole[5:], rel=1e-6)
    for _, _, rank_metrics in results:
        assert rank_metrics == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("where", ["memory", "absolute", "relative"])
def test_a_roll_back_restores_the_buffer_without_copies(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    folder = {"memory": None, "absolute": tmp_path, "relative": Path(".")}[where]
    method = filled(folder=folder)
    before, roll_back = method.local_state_dict()["generations"], method.snapshot()
    expected = [collect(method, iteration=i) for i in (7, 8, 9)]
    roll_back(None)
    after = method.local_state_dict()["generations"]
    assert [g["rows"]["latents"].data_ptr() for g in after] == [
        g["rows"]["latents"].data_ptr() for g in before
    ]
    again = [collect(method, iteration=i) for i in (7, 8, 9)]
    for ours, theirs in zip(again, expected, strict=True):
        assert_same_examples(ours.examples, theirs.examples)


def test_a_buffer_of_other_samples_is_refused_with_the_remedy():
    method = filled()
    with pytest.raises(ValueError, match=r"holds rows \(6, 7, 2\).*makes \(4, 7, 2\): put back the settings"):
        collect(method, num=4, iteration=7)
    with pytest.raises(ValueError, match="6 samples saved by 1 processes can't be shared by 4"):
        method.load_local_state_dicts([method.local_state_dict()], PartShare(0, 4, 1))
    with pytest.raises(ValueError, match="full adjoints depend on the policy"):
        buffered(adjoint="full")
    for wrong, rule in (("buffer_size", "at least 1"), ("buffer_refresh", "from 1 to 1000")):
        with pytest.raises(ValueError, match=f"--{wrong} must be {rule}, got 0"):
            buffered(**{wrong: 0})
    for size in (3, 15):
        with pytest.raises(
            ValueError, match=f"--buffer_size must be a multiple of train_batch_size, 6.*{size}"
        ):
            buffered(buffer_size=size)


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_the_bytes_announced_are_the_most_that_is_held(tmp_path, storage):
    """Identity: measured over iterations of a full buffer, as the trainer makes them, with all rows kept."""
    samples, steps, spec = 6, 7, LatentSpec((500,), dtype=torch.float64)
    method = buffered(3, 2, tmp_path if storage == "disk" else None, mask_quantile=None)

    def swept(cond, generators, shared):
        generator, shape = generators[0], (samples, steps)
        latents, target = (
            torch.randn((*shape, *spec.shape), generator=generator, dtype=spec.dtype) for _ in range(2)
        )
        ones = torch.ones(shape, dtype=spec.dtype)
        return Swept(Rows(latents, target, ones, ones, ones), ones[:, 0], {}, ())

    method.inner.sweep = swept
    with LiveBytes(samples * steps * spec.shape[0] * 8) as measured:
        for iteration in range(9):
            roll_back = method.snapshot()
            collected = collect(method, iteration=iteration)
            assert len(collected.examples) == samples * steps
            del collected, roll_back
    found, kept = method.kept_bytes(steps, spec), measured.live
    if storage == "memory":
        assert measured.peak == {"memory": found.peak, "files": 0}
        assert kept == {"memory": found.stored, "files": 0}
    else:
        assert measured.peak == {"memory": found.drawn, "files": found.stored + found.falling_out}
        assert kept == {"memory": 0, "files": found.stored}


# -------------------------------------------------------------------------------------------------- law


def test_the_law_reached_is_that_of_adjoint_matching():
    """N(.3, .5) with a quadratic reward: mean and std within 2 % of the tilted law's and of on-policy's.

    Exact moments of the tuned chains, as in test_adjoint_matching_training; seed 0, 64 samples, 100
    iterations, of which the buffered run rolls out 25, with 256 samples stored.
    """
    law, table = gaussian(0.3, 0.5), memoryless_local_linear(uniform_sigmas(80))
    moments = {}
    buffer = {"buffer_size": 256, "buffer_refresh": 4, "sizes": Sizes(batch=64)}
    for name, own in (("adjoint_matching", {}), ("buffered_adjoint_matching", buffer)):
        policy, weights = linear_policy(law, table)
        method = make_method(
            name,
            policy,
            law.field(),
            reward=lambda x, prompts: -0.5 * (x[:, 0] - 1) ** 2,
            latents=LatentSpec((1,), dtype=torch.float64),
            num_inference_steps=80,
            mask_quantile=None,
            **own,
        )
        train(method, [weights], num_samples=64, iterations=100, lr=0.05)
        moments[name] = end_moments(table, policy, law.field())
    assert moments["buffered_adjoint_matching"] == pytest.approx((0.65, 0.5), rel=0.02)
    assert moments["buffered_adjoint_matching"] == pytest.approx(moments["adjoint_matching"], rel=0.02)

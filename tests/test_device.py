"""Seeds, batches and progress: one seed one result, and nothing global left changed."""

import numpy as np
import pytest
import torch
from saliency_sanity.device import batches, best_device, generator, local_seed, progress, seed_of
from saliency_sanity.inference import evaluating
from torch import nn


def test_best_device_is_one_that_can_be_used():
    assert torch.ones(2, device=best_device()).sum() == 2


def test_a_generator_gives_one_sequence_a_seed_and_leaves_the_global_state():
    state = torch.get_rng_state()
    a, b, c = (torch.rand(5, generator=generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())


def test_a_seed_may_be_any_integer():
    a, b = (torch.rand(5, generator=generator(seed)) for seed in (3, np.int64(3)))
    assert torch.equal(a, b)


@pytest.mark.parametrize("seed", ["0", 1.0, None, torch.tensor(1.0)])
def test_a_seed_that_is_no_int_raises(seed):
    with pytest.raises(TypeError, match="seed must be an int"):
        generator(seed)
    with pytest.raises(TypeError, match="seed must be an int"), local_seed(seed):
        pass


def test_local_seed_draws_what_the_global_generator_would_and_puts_its_state_back():
    torch.manual_seed(7)
    expected = torch.rand(4)
    state = torch.get_rng_state()
    with local_seed(7):
        assert torch.equal(torch.rand(4), expected)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_local_seed_puts_the_state_back_after_an_exception(error):
    state = torch.get_rng_state()
    with pytest.raises(error), local_seed(0):
        torch.rand(3)
        raise error
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("count", "size"), [(10, 3), (10, 5), (10, 10), (10, 99), (1, 1), (0, 4)])
def test_batches_cover_the_range_once_and_in_order(count, size):
    parts = list(batches(count, size))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    assert all(part.stop - part.start == size for part in parts[:-1])


@pytest.mark.parametrize("size", [0, -2, 2.5, "2", True])
def test_an_empty_batch_size_raises_at_once(size):
    with pytest.raises(ValueError, match="at least 1"):
        batches(5, size)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_evaluating_switches_every_module_and_puts_each_back(error):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)).train()
    model[2].eval()  # frozen statistics in a network that trains
    before = [module.training for module in model.modules()]
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            if error:
                raise error
    except RuntimeError:
        pass
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("show", [True, False])
def test_progress_writes_only_where_shown(show, capsys):
    with progress(3, show=show) as bar:
        bar.set_postfix_str("step 1")
        bar.update(3)
    out, err = capsys.readouterr()
    assert out == "" and ("step 1" in err) == show


def test_a_seed_is_made_of_names_and_numbers():
    parts = ((0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a"), (0, "a", "1"))
    made = [seed_of(*names) for names in parts]
    assert len(set(made)) == len(made) and all(0 <= seed < 2**62 for seed in made)
    assert seed_of(np.int64(0), "a", torch.tensor(1)) == made[0] == 1842041808939661185


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_has_64_bits(seed):
    for draw in (generator, seed_of):
        with pytest.raises(ValueError, match="64 bits"):
            draw(seed)

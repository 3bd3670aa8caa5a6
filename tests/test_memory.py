"""What a method keeps in memory does not grow with samples, steps, images or classes: measured in a fresh process."""

import json
import os
import subprocess
import sys

import pytest

# What is freed goes back at once, so that the peak is what was kept, not how the heap was cut up.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "500000", "MALLOC_TRIM_THRESHOLD_": "500000"}
# All small runs come first: what a large run then adds to the process's peak is its own growth.
PROGRAM = """
import json
import torch
from torch import nn
from saliency_sanity.saliency import METHODS

torch.set_num_threads(1)
torch.manual_seed(0)


def network(classes=4):
    layers = nn.Conv2d(3, 4, 7, stride=4), nn.ReLU(), nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Linear(64, classes)
    return nn.Sequential(*layers).eval()


def photographs(count):
    return torch.rand(count, 3, 224, 224), torch.zeros(count, dtype=torch.int64)


def peak():
    "MB; ru_maxrss alone would begin with what the process had that started this one."
    with open("/proc/self/status") as status:
        [kilobytes] = [line.split()[1] for line in status if line.startswith("VmHWM")]
    return int(kilobytes) / 1024


def growth(small, large):
    "MB by which each run of `large` is above all of `small`, and all of `large` before it."
    for run in small.values():
        run()
    found = {}
    for name, run in large.items():
        before = peak()
        run()
        found[name] = peak() - before
    print(json.dumps(found))


segments = (torch.arange(224) // 56)[:, None] * 4 + torch.arange(224) // 56  # 16 of them
"""


@pytest.fixture
def growth():
    """`growth(code)`: MB by name, of a program that ends by calling `growth(small, large)`."""
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")

    def run(code: str) -> dict[str, float]:
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM + code]
        ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **AT_ONCE})
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    return run


def test_the_measure_sees_what_is_kept(growth):
    kept = growth("""
x, y = photographs(1)
make = lambda count: lambda: torch.cat([x + i for i in range(count)]).sum()
growth({"kept": make(25)}, {"kept": make(200), "not kept": lambda: [(x + i).sum() for i in range(200)]})
""")
    assert kept["kept"] > 90 and kept["not kept"] < 5


def test_memory_grows_with_neither_samples_nor_steps(growth):
    found = growth("""
from inspect import signature
model, (x, y) = network(), photographs(1)
given = {"references": x.flip(3), "segments": segments}
counts = {"samples": 30, "steps": 30}

def run(name, times):
    known = signature(METHODS[name]).parameters
    options = {option: value for option, value in given.items() if option in known}
    options |= {option: times * count for option, count in counts.items() if option in known}
    if {"samples", "steps"} <= known.keys():
        options["samples"] = 2 * times
    if "segments" in known:
        options["samples"] *= 3
    return lambda: METHODS[name](model, x, y, **options)

counted = [name for name in METHODS if counts.keys() & signature(METHODS[name]).parameters.keys()]
growth({name: run(name, 1) for name in counted}, {name: run(name, 4) for name in counted})
""")
    assert len(found) >= 8 and {"integrated_gradients", "vargrad", "lime"} <= found.keys()
    assert max(found.values()) < 60, found


def test_memory_grows_with_the_images_no_more_than_their_maps_do(growth):
    """32 photographs more: maps of 19 MB, which exist twice while they are put together, and images of 19 MB."""
    found = growth("""
model = network()
run = lambda name, count, **options: lambda: METHODS[name](model, *photographs(count), **options)
names = {
    "gradient": {},
    "smoothgrad": {"samples": 2},
    "integrated_gradients": {"steps": 2},
    "sobel": {},
    "occlusion": {"window": 112},
    "lime": {"segments": segments, "samples": 60},
}
growth(*({name: run(name, count, **options) for name, options in names.items()} for count in (32, 64)))
""")
    assert max(found.values()) < 3 * 19.3 + 15, found


def test_memory_does_not_grow_with_the_classes(growth):
    found = growth("""
x, y = photographs(2)
names = {
    "gradient": {},
    "integrated_gradients": {"steps": 20},
    "vargrad": {"samples": 20},
    "gradcam": {},
    "occlusion": {"window": 64},
    "lime": {"segments": segments, "samples": 60},
}
run = lambda name, classes, **options: lambda: METHODS[name](network(classes), x, y, **options)
growth(*({name: run(name, classes, **options) for name, options in names.items()} for classes in (10, 1000)))
""")
    assert max(found.values()) < 15, found

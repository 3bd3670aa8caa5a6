"""The playground's engine without a page, run by Node: its numbers are torch's and scipy's."""

import base64
import json
import subprocess

import numpy as np
import playground as served
import pytest
import torch
from address import files
from saliency_sanity import saliency
from saliency_sanity.book import models
from scipy import stats
from skimage.morphology import skeletonize

[ENGINE] = [path for path in files() if path.name == "engine.js"]
LAYERS = ["logits", "fc1", "conv2", "conv1"]
UNSEEN = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0))
SEVEN = [[[8, 6], [18, 6], [12, 20]], [[10, 13], [16, 12]]]
PROGRAM = """
const engine = new Function(`${require("fs").readFileSync(process.argv[1], "utf8")}; return engine;`)();
const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify((%s)(given)));
"""


@pytest.fixture(scope="module")
def run(node):
    """Call a function of JavaScript, which sees the engine, with an argument; both ways go through JSON."""

    def call(function: str, argument):
        command = [node, "--eval", PROGRAM % function, str(ENGINE)]
        ran = subprocess.run(command, input=json.dumps(argument), capture_output=True, encoding="utf-8")
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    return call


def assert_close(found, expected):
    """Equal to 1e-4 of the largest |expected|."""
    expected = expected.detach().double().flatten()
    assert (torch.tensor(found).double().flatten() - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("seed", [0, 1])
def test_passes_and_maps_of_the_digits_network_are_those_of_torch(run, seed):
    model = models.load("cnn_digits", seed=seed)
    numbers = torch.cat([tensor.flatten() for tensor in model.state_dict().values()]).half().numpy()
    found = run(
        """({ weights, pixels }) => {
            const net = engine.network(engine.halves(weights));
            const image = Float32Array.from(pixels);
            const pass = engine.forward(net, image);
            const maps = engine.maps(net, image, pass, 7);
            for (const name in maps) maps[name] = [...maps[name]];
            return { logits: [...pass.logits], probabilities: engine.softmax(pass.logits), maps,
                     seen: engine.argmax(pass.logits) };
        }""",
        {"weights": base64.b64encode(numbers.tobytes()).decode(), "pixels": UNSEEN.flatten().tolist()},
    )
    logits = model(UNSEEN[None])
    assert_close(found["logits"], logits)
    assert_close(found["probabilities"], logits.softmax(1))
    assert found["seen"] == logits.argmax()
    for method in served.METHODS:
        assert_close(found["maps"][method], saliency.METHODS[method](model, UNSEEN[None], torch.tensor([7])))


def test_half_precision_is_read_bit_by_bit(run):
    numbers = np.array([0, -0.0, 1, -1.5, 65504, 6.1e-5, 6e-8, -6e-8, 0.1], np.float16)
    found = run("(text) => [...engine.halves(text)]", base64.b64encode(numbers.tobytes()).decode())
    assert found == numbers.astype(float).tolist()


def test_rank_correlation_is_that_of_scipy(run):
    rng = np.random.default_rng(0)
    smooth, tied = rng.normal(size=784), rng.integers(-2, 3, 784).astype(float)
    tied[:300] = 0
    for a, b in [(smooth, tied), (tied, tied[::-1]), (smooth, -smooth), (smooth, np.ones(784))]:
        found = run(
            "(maps) => engine.correlation(...maps.map((map) => engine.unitRanks(Float32Array.from(map))))",
            [a.tolist(), b.tolist()],
        )
        if np.ptp(b) == 0:
            assert found is None  # NaN, as JSON has it
        else:
            expected = stats.spearmanr(a.astype(np.float32), b.astype(np.float32)).statistic
            assert found == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("layer", LAYERS)
def test_random_layers_are_drawn_as_pytorch_draws_them(run, layer):
    def draw(seed):
        function = "([name, seed]) => (({ weight, bias }) => [[...weight], [...bias]])(engine.randomLayer(name, seed))"
        return map(np.array, run(function, [layer, seed]))

    weight, bias = draw(1)
    own = getattr(models.cnn(), layer)
    assert weight.size == own.weight.numel() and bias.size == own.bias.numel()
    bound = 1 / own.weight[0].numel() ** 0.5  # of kaiming_uniform_ with a = sqrt(5), and of the bias
    assert own.weight.abs().max() <= bound and np.abs(weight).max() <= bound and np.abs(bias).max() <= bound
    assert stats.kstest(weight, "uniform", (-bound, 2 * bound)).pvalue > 0.001
    again, _ = draw(1)
    other, _ = draw(2)
    assert np.array_equal(weight, again)
    assert abs(np.corrcoef(weight, other)[0, 1]) < 4 / weight.size**0.5


def drawn(run, strokes, width=2.8):
    found = run("([strokes, width]) => [...engine.normalise(strokes, width)]", [strokes, width])
    return np.array(found).reshape(28, 28)


def test_drawings_are_made_like_the_training_data(run):
    picture = drawn(run, SEVEN)
    ink = picture > 0.2
    assert 19 <= max(np.ptp(np.nonzero(ink)[axis]) + 1 for axis in (0, 1)) <= 21
    rows, columns = np.indices(picture.shape)
    centre = [(places * picture).sum() / picture.sum() + 0.5 for places in (rows, columns)]
    assert np.abs(np.array(centre) - 14).max() < 0.1
    assert picture.sum() / skeletonize(picture > 0.5).sum() == pytest.approx(2.8, rel=0.15)
    assert picture.min() == 0 and picture.max() == 1
    moved = [[[2 + 0.6 * x, 5 + 0.6 * y] for x, y in stroke] for stroke in SEVEN]
    assert drawn(run, moved) == pytest.approx(picture, abs=1e-5)
    assert not drawn(run, []).any()
    assert 4 < drawn(run, [[[3, 3]]]).sum() < 8  # a tap is a dot of the pen's width

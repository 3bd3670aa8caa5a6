"""What is asked of images, targets and models, at every door: a table of what is refused, and one of what is not."""

import random
from collections import OrderedDict, namedtuple
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from networks import images, targets
from PIL import Image
from saliency_sanity import check_model, followups, randomization, sanity
from saliency_sanity.device import local_seed
from saliency_sanity.inference import predict
from saliency_sanity.saliency import METHODS, passes
from saliency_sanity.wrapper import Wrapped
from torch import nn
from torch.nn import functional as F

SHAPE, CLASSES = (3, 6, 6), 3


def pictures(count=2, **options):
    return images(count, SHAPE, **options)


def classes(count=2):
    return targets(count, CLASSES)


class Net(nn.Module):
    """A convolution and a linear layer; `body`, `middle` and `end` change images, features and logits."""

    def __init__(self, end=None, *, middle=None, body=None, count=CLASSES):
        super().__init__()
        with local_seed(0):
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, count)
        with torch.no_grad():
            self.fc.weight.mul_(4)
        self.body, self.middle, self.end = body, middle, end

    def forward(self, x):
        x = self.conv(x if self.body is None else self.body(x)).relu()
        x = x if self.middle is None else self.middle(x)
        logits = self.fc(x.mean((2, 3)))
        return logits if self.end is None else self.end(logits)


def good():
    return Net()


ONE = {"methods": ["gradient"], "metrics": ["spearman"]}
DOORS = {
    "gradient": METHODS["gradient"],
    "gradcam": METHODS["gradcam"],
    "occlusion": lambda m, x, y: METHODS["occlusion"](m, x, y, window=3),
    "parameter_randomization": lambda m, x, y: sanity.parameter_randomization(
        m, x, y, **ONE, seeds=[0], show_progress=False
    ),
    "twin": lambda m, x, y: sanity.parameter_randomization(
        good(), x, y, **ONE, seeds=[0], twins=[m], show_progress=False
    ),
    "data_randomization": lambda m, x, y: sanity.data_randomization(
        [good(), good()], [good(), m], x, y, **ONE, show_progress=False
    ),
    "random_logit": lambda m, x, y: followups.random_logit(m, x, y, **ONE, seeds=[0]),
    "complexity_rise": lambda m, x, y: followups.complexity_rise(m, x, y, methods=["gradient"], seeds=[0]),
    "predict": lambda m, x, y: predict(m, x),
    "plan": lambda m, x, y: randomization.plan(m, example=x),
}
EXPLAINING = [door for door in DOORS if door not in ("predict", "plan")]
NO_GRADIENT = [door for door in EXPLAINING if door != "occlusion"]
TORCHS_OWN = (
    "mat1 and mat2",
    "expected scalar type",
    "has no attribute",
    "not subscriptable",
    "should be the same",
    "must match the size",
    "Expected all tensors",
)


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def state(model):
    """All of a model that a check must leave, versions of its tensors included."""
    if not isinstance(model, nn.Module):
        return None
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not nn.parameter.is_lazy(t)]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "tensors": [id(tensor) for tensor in tensors],
        "values": [None if t.is_meta else repr(t.detach().float().tolist()) for t in tensors],
        "versions": [None if t.is_inference() else t._version for t in tensors],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [[*getattr(module, kind)] for module in model.modules() for kind in kinds],
        "attributes": [
            {key: len(value) if isinstance(value, (list, dict)) else id(value) for key, value in vars(module).items()}
            for module in model.modules()
        ],
    }


def assert_refused(call, model, says):
    before, drawn = state(model), random_states()
    with pytest.raises(ValueError, match=says) as refused:
        call()
    text = str(refused.value)
    assert "cannot run on images" in text or not any(own in text for own in TORCHS_OWN), text
    assert state(model) == before and random_states() == drawn


# ---------------------------------------------------------------- models that are refused


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor


Pair = namedtuple("Pair", "scores hidden")


class Grown(OrderedDict):
    """As the outputs of transformers are: keys that are attributes too."""

    __getattr__ = OrderedDict.__getitem__


class Pupil(Net):
    """Goes on learning as it answers."""

    def __init__(self, learn):
        super().__init__()
        self.learn = learn

    def forward(self, x):
        with torch.no_grad():
            self.learn(self.conv.weight)
        return super().forward(x)


class Spoken(Net):
    """Takes something besides the images."""

    def forward(self, x, words):
        return super().forward(x) + words


class Named(Net):
    def forward(self, *, pixel_values):
        return super().forward(pixel_values)


def no_gradients_from_now_on(z):
    torch.set_grad_enabled(False)
    return z


def two_or_more(x):
    assert len(x) > 1
    return x


class Averaging(Net):
    """Compares each image with the mean of all that it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sum", torch.zeros(3, 6, 6))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.sum += x.detach().sum(0)
        self.count += len(x)
        return super().forward(x - self.sum / self.count)


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x + 0.3 * self.draw()


def every_seventh():
    """Draws in every pass, and uses it in one of seven."""
    passes = iter(range(1, 99))
    return lambda: torch.rand(1) * (next(passes) % 7 == 0)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values * 2


def without_gradient(x):
    with torch.no_grad():
        return x * 2


def in_inference_mode(x):
    with torch.inference_mode():
        return x * 2


def made_in_inference_mode():
    with torch.inference_mode():
        return good()


def batch_norm(layer):
    return Net(middle=layer)


def quantised():
    return torch.ao.quantization.quantize_dynamic(good().eval(), {nn.Linear}, dtype=torch.qint8)


def lazy():
    model = good()
    model.fc = nn.LazyLinear(CLASSES)
    return model


def compiled_in_place():
    model = good()
    model.compile(backend="eager")
    return model


def compiled_part():
    model = good()
    model.conv = torch.compile(model.conv, backend="eager")
    return model


def scripted_part():
    model = good()
    model.conv = torch.jit.script(model.conv)
    return model


def half_a_layer():
    model = good()
    model.spare = nn.Linear(2, 2).half()
    return model


def with_weight(value):
    model = good()
    with torch.no_grad():
        model.fc.bias[1] = value
    return model


def softmax_by_hand(logits):
    raised = logits.exp()
    return raised / raised.sum(1, keepdim=True)


def map_of_logits():
    return nn.Sequential(nn.Conv2d(3, CLASSES, 3, padding=1))


# What a model is: seen before it runs.
KINDS = {
    "a function": (lambda: lambda x: x.mean((2, 3)), "must be a torch.nn.Module, got function"),
    "no model": (lambda: None, "must be a torch.nn.Module, got NoneType"),
    "weights only": (lambda: good().state_dict(), "must be a torch.nn.Module, got OrderedDict"),
    "a class": (lambda: Net, "must be a torch.nn.Module, got type"),
    "compiled": (lambda: torch.compile(good(), backend="eager"), "is compiled.*_orig_mod"),
    "a compiled part": (compiled_part, "its part 'conv' is compiled.*_orig_mod"),
    "compiled in place": (compiled_in_place, "is compiled.*deepcopy"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 6), nn.Flatten())), "TorchScript.*made from"),
    "traced": (lambda: torch.jit.trace(good().eval(), pictures()), "TorchScript.*made from"),
    "a scripted part": (scripted_part, "its part 'conv' is TorchScript"),
    "quantised": (quantised, "its part 'fc' is quantised.*floating-point model"),
    "lazy": (lazy, "'fc.weight' has no shape yet: run the model once"),
    "on meta": (lambda: good().to("meta"), "'conv.weight' is on the device 'meta'.*load the weights"),
    "half precision": (lambda: good().half(), r"torch.float16.*model.float\(\)"),
    "bfloat16": (lambda: good().bfloat16(), r"torch.bfloat16.*model.float\(\)"),
    "float8": (lambda: good().to(torch.float8_e4m3fn), r"torch.float8_e4m3fn.*model.float\(\)"),
    "a part in half precision": (half_a_layer, r"'spare.weight' is torch.float16.*model.float\(\)"),
    "made in inference mode": (made_in_inference_mode, r"torch.inference_mode.*copy.deepcopy"),
}
# What a model returns.
OUTPUTS = {
    "a tuple": (lambda z: (z, z), r"logits of shape \([12], classes\), got tuple of 2.*Wrapped\(model, output=0\)"),
    "a list": (lambda z: [z], "logits.*got list of 1.*output=0"),
    "a loss before the logits": (lambda z: (z.sum(), z), "got tuple of 2.*output=1"),
    "features before the logits, by name": (
        lambda z: {"features": z[..., None, None], "scores": z},
        "got dict with.*output='scores'",
    ),
    "boxes": (lambda z: [{"scores": row} for row in z], "got list of [12].*output=function"),
    "words": (lambda z: ["a cat"] * len(z), "got list of [12].*output=function"),
    "an empty tuple": (lambda z: (), "logits.*got tuple of 0"),
    "a dict": (lambda z: {"aux": z, "logits": z}, "logits.*got dict with 'logits', 'aux'.*output='logits'"),
    "a dict of other things": (lambda z: {"loss": 1.0}, "logits.*got dict.*output=function"),
    "a data class": (lambda z: Answer(z, z), "logits.*got Answer with 'logits', 'hidden'.*output='logits'"),
    "a named tuple": (lambda z: Pair(z, z), "logits.*got Pair with 'scores', 'hidden'.*output='scores'"),
    "a model's output": (lambda z: Grown(logits=z), "logits.*got Grown with 'logits'.*output='logits'"),
    "nothing": (lambda z: None, "logits.*got NoneType"),
    "a number": (lambda z: z.sum().item(), "logits.*got float"),
    "an array": (lambda z: z.detach().numpy(), "logits.*got ndarray"),
    "one number an image": (
        lambda z: z[:, 0],
        r"logits.*got \([12],\), one number an image.*Wrapped\(model\).*target 0",
    ),
    "one number": (lambda z: z.sum(), r"logits.*got \(\)"),
    "three axes": (lambda z: z[..., None], r"logits.*got \([12], 3, 1\).*output=function"),
    "four axes": (lambda z: z[..., None, None], r"logits.*got \([12], 3, 1, 1\).*region=mask"),
    "images summed up": (lambda z: z.sum(0, keepdim=True), r"logits.*got \(1, 3\): one row an image"),
    "axes mixed up": (lambda z: z.mT, r"logits.*got \(3, [12]\): one row an image"),
    "no class": (lambda z: z[:, :0], r"logits.*got \([12], 0\): there is no class"),
    "the argmax": (lambda z: z.argmax(1, keepdim=True), "logits.*got torch.int64: only real logits"),
    "yes or no": (lambda z: z > 0, "logits.*got torch.bool: only real logits"),
    "complex": (lambda z: torch.complex(z, z), "logits.*got torch.complex64: only real logits"),
}
# How a model runs, and what its logits are.
RUNS = {
    "half precision logits": (lambda: Net(lambda z: z.half()), r"logits are torch.float16.*\.float\(\)"),
    "bfloat16 logits": (lambda: Net(lambda z: z.bfloat16()), r"logits are torch.bfloat16.*autocast"),
    "NaN": (lambda: Net(lambda z: z / 0 * 0), "logits of these images have NaN or infinite"),
    "NaN in a weight": (lambda: with_weight(torch.nan), "logits of these images have NaN or infinite"),
    "infinity in a weight": (lambda: with_weight(-torch.inf), "logits of these images have NaN or infinite"),
    "it raises": (lambda: Net(lambda z: 1 / 0), r"cannot run on images of shape \([12], 3, 6, 6\).*division by zero"),
    "it asserts": (lambda: Net(body=lambda x: x[:, :, :, 7:].amax(3)), "cannot run on images of shape"),
    "other channels": (lambda: Net(body=lambda x: x[:, :2]), r"cannot run on images of shape \([12], 3, 6, 6\)"),
    "another size": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(99, 3)), "cannot run on images"),
    "double weights": (lambda: good().double(), r"images are torch.float32.*weights torch.float64.*images.to\("),
    "dropout": (lambda: Net(middle=lambda x: F.dropout(x, training=True)), "two passes of the same images differ"),
    "rare noise": (lambda: Net(Noisy(every_seventh())), "two passes.*differ"),
    "dropout of channels": (lambda: Net(middle=lambda x: F.dropout2d(x, training=True)), "two passes.*differ"),
    "noise": (lambda: Net(Noisy(lambda: torch.randn(CLASSES))), "two passes.*draws random numbers in eval mode"),
    "noise of numpy": (lambda: Net(Noisy(np.random.random)), "two passes.*draws random numbers"),
    "noise of Python": (lambda: Net(Noisy(random.random)), "two passes.*draws random numbers"),
    "its own noise": (lambda: Net(Noisy(iter(range(1, 99)).__next__)), "two passes.*differ"),
    "batch norm without statistics": (
        lambda: batch_norm(nn.BatchNorm2d(4, track_running_stats=False)),
        "when another image is beside it.*batch norm without running statistics",
    ),
    "functional batch norm": (
        lambda: Net(middle=lambda x: F.batch_norm(x, None, None, training=True)),
        "when another image is beside it",
    ),
    "normed over the batch": (lambda: Net(lambda z: (z - z.mean(0)) / 0.1), "when another image is beside it"),
    "largest of the batch": (lambda: Net(body=lambda x: x / x.amax()), "when another image is beside it"),
    "a contrast of a thousandth": (lambda: Net(lambda z: z - 0.01 * z.mean(0)), "when another image is beside it"),
    "a mean of all it has seen": (Averaging, "two passes|when another image is beside it"),
    "two images or more": (lambda: Net(body=two_or_more), "runs on two images and not on one"),
    "it learns": (lambda: Pupil(lambda w: w.mul_(1.01)), "writes into its parameter 'conv.weight'"),
    "it learns a row": (lambda: Pupil(lambda w: w[0].add_(1)), "writes into its parameter 'conv.weight'"),
    "it learns by the back door": (lambda: Pupil(lambda w: w.data.add_(1)), "writes into its parameter 'conv.weight'"),
    "it learns by an index": (lambda: Pupil(lambda w: w.__setitem__(0, 1.0)), "writes into its parameter"),
    "further inputs": (Spoken, r"does not take images alone.*'words'.*Wrapped\(model, inputs="),
    "inputs by name": (Named, "does not take images alone"),
    "it leaves gradients off": (lambda: Net(no_gradients_from_now_on), "leaves gradients switched off"),
    "softmax over the batch": (lambda: Net(lambda z: 9 * z.softmax(0)), "when another image is beside it"),
    "softmax": (lambda: Net(nn.Softmax(1)), r"ends in a softmax.*drop_softmax=True.*keep_probabilities=True"),
    "saturated softmax": (lambda: Net(lambda z: (1e5 * z).softmax(1)), "ends in a softmax"),
    "softmax by hand": (lambda: Net(softmax_by_hand), "ends in a softmax"),
    "softmax of one class": (lambda: Net(nn.Softmax(1), count=1), "ends in a softmax"),
    "softmax reshaped": (lambda: Net(lambda z: z.softmax(1)[..., None].flatten(1)), "ends in a softmax"),
    "mean of two softmaxes": (lambda: Net(lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2), "ends in a softmax"),
    "clamped softmax": (lambda: Net(lambda z: z.softmax(1).clamp(1e-6)), "ends in a softmax"),
    "percent": (lambda: Net(lambda z: 100 * z.softmax(1)), "ends in a softmax"),
    "softmaxes of two heads": (lambda: Net(lambda z: torch.cat((z.softmax(1), (2 * z).softmax(1)), 1)), "a softmax"),
    "softmax of parts": (lambda: Net(middle=nn.Softmax(1), end=lambda z: z.softmax(1)[:, [2, 0]]), "ends in a softmax"),
    "one of two probabilities": (lambda: Net(lambda z: z.softmax(1)[:, 1:2]), "ends in a softmax"),
    "difference of probabilities": (lambda: Net(lambda z: z.softmax(1)[:, :2] - z.softmax(1)[:, 1:]), "in a softmax"),
    "softmax of normed features": (
        lambda: Net(lambda z: softmax_by_hand(F.layer_norm(z, (CLASSES,)))),
        "ends in a softmax",
    ),
    "sigmoids of two heads": (
        lambda: Net(lambda z: torch.stack([part.sigmoid() for part in F.normalize(z).unbind(1)], 1)),
        "ends in a sigmoid",
    ),
    "softmax in bfloat16": (lambda: Net(lambda z: z.bfloat16().softmax(1).float()), "ends in a softmax"),
    "a region of probabilities": (
        lambda: Wrapped(nn.Sequential(*map_of_logits(), nn.Softmax(1)), region=torch.ones(6, 6) > 0, reduce="mean"),
        "ends in a softmax.*drop_softmax=True",
    ),
    "probabilities with their signs turned": (lambda: Wrapped(Net(nn.Sigmoid()), negate=[0, 2]), "ends in a sigmoid"),
    "log-softmax": (lambda: Net(nn.LogSoftmax(1)), "ends in a log-softmax.*drop_softmax=True"),
    "log-softmax by hand": (lambda: Net(lambda z: z - z.logsumexp(1, keepdim=True)), "ends in a log-softmax"),
    "log of softmax": (lambda: Net(lambda z: z.softmax(1).log()), "ends in a log-softmax"),
    "sigmoid": (lambda: Net(nn.Sigmoid()), "ends in a sigmoid.*drop_softmax=True"),
    "sigmoid of one": (lambda: Net(nn.Sigmoid(), count=1), "ends in a sigmoid"),
    "sigmoid by hand": (lambda: Net(lambda z: 1 / (1 + (-z).exp())), "ends in a sigmoid"),
    "hard sigmoid": (lambda: Net(nn.Hardsigmoid()), "ends in a sigmoid"),
    "log-sigmoid": (lambda: Net(nn.LogSigmoid()), "ends in a log-sigmoid"),
}
# Where no gradient comes back; methods that only ask the model may be right there.
CUT = {
    "under no_grad": (
        lambda: Net(middle=without_gradient),
        "no gradient reaches it.*no_grad.*explain the model by occ",
    ),
    "under inference_mode": (lambda: Net(middle=in_inference_mode), "no gradient reaches it"),
    "all under no_grad": (lambda: Net(without_gradient), "no gradient reaches it"),
    "detached images": (lambda: Net(body=lambda x: x.detach()), "no gradient reaches it"),
    "through numpy": (lambda: Net(middle=lambda x: torch.from_numpy(x.detach().numpy() * 2)), "no gradient reaches it"),
    "detached beside what is flat": (lambda: Net(lambda z: z.detach() + 0 * z), "no gradient reaches it"),
    "bytes": (lambda: Net(body=lambda x: (99 * x).to(torch.int8) / 99), "no gradient reaches it.*steps"),
    "no backward pass": (lambda: Net(NoBackward.apply), "cannot be differentiated.*occlusion"),
}
MODELS = {name: (build, says, [*EXPLAINING, "plan"]) for name, (build, says) in KINDS.items()}
MODELS |= {name: ((lambda end=end: Net(end)), says, list(DOORS)) for name, (end, says) in OUTPUTS.items()}
MAPS = {"a map of logits": (map_of_logits, r"logits.*got \([12], 3, 6, 6\).*region=mask", list(DOORS))}
MODELS |= MAPS
MODELS |= {name: (build, says, EXPLAINING) for name, (build, says) in RUNS.items()}
MODELS |= {name: (build, says, NO_GRADIENT) for name, (build, says) in CUT.items()}


def in_turn(tables, doors_of):
    """(door, name): every door with the first of each table, every other name at one of its doors in turn."""
    cases = [(door, next(iter(table))) for table in tables for door in doors_of(next(iter(table)))]
    names = [name for table in tables for name in list(table)[1:]]
    return cases + [(doors_of(name)[place % len(doors_of(name))], name) for place, name in enumerate(names)]


@pytest.mark.parametrize(("door", "name"), in_turn([KINDS, OUTPUTS, RUNS, CUT, MAPS], lambda name: MODELS[name][2]))
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_refused_at_every_door(door, name):
    build, says, _ = MODELS[name]
    model = build()
    assert_refused(lambda: DOORS[door](model, pictures(), classes()), model, says)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_one_image_is_enough_to_see_it(name):
    build, says, _ = MODELS[name]
    model = build()
    assert_refused(lambda: check_model(model, pictures(1)), model, says)


@pytest.mark.parametrize("name", CUT)
def test_a_model_without_a_gradient_is_explained_by_occlusion(name):
    """Against the model itself with one square hidden."""
    model, x, y = CUT[name][0](), pictures(), classes()
    found = METHODS["occlusion"](model, x, y, window=6, stride=6)
    with torch.no_grad():
        fall = (model(x) - model(torch.zeros_like(x))).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(found, fall[:, None, None, None].expand_as(x))


# ---------------------------------------------------------------- images and targets that are refused


def with_pixel(value):
    x = pictures()
    x[1, 2, 3, 4] = value
    return x


BAD_IMAGES = {
    "no batch": (lambda: pictures()[0], r"\(N, C, H, W\).*image\[None\] makes a batch of one"),
    "no channels": (lambda: pictures()[:, 0], r"float tensor \(N, C, H, W\), got torch.float32 \(2, 6, 6\)"),
    "five axes": (lambda: pictures()[None], r"float tensor \(N, C, H, W\)"),
    "a vector": (lambda: pictures().flatten(), r"float tensor \(N, C, H, W\)"),
    "a number": (lambda: 0.5, "images must be a float tensor.*got.*float"),
    "nothing": (lambda: None, "images must be a float tensor.*got.*NoneType"),
    "an array": (lambda: pictures().numpy(), "images must be a float tensor.*got.*ndarray.*from_numpy"),
    "a list": (lambda: pictures().tolist(), "images must be a float tensor.*got.*list"),
    "a list of tensors": (lambda: list(pictures()), r"images must be a float tensor.*got.*list.*torch.stack\(images\)"),
    "a picture": (lambda: Image.new("RGB", (6, 6)), r"images must be a float tensor.*got Image.*to_tensor\(image\)"),
    "channels last": (lambda: pictures().permute(0, 2, 3, 1), r"channels last.*permute\(0, 3, 1, 2\)"),
    "channels last, not square": (
        lambda: pictures().permute(0, 2, 3, 1)[:, :5],
        r"channels last.*permute\(0, 3, 1, 2\)",
    ),
    "bytes": (lambda: pictures().byte(), r"images must be a float tensor.*torch.uint8.*images.float\(\).*255"),
    "integers": (lambda: pictures().long(), "images must be a float tensor.*torch.int64"),
    "booleans": (lambda: pictures() > 0, "images must be a float tensor.*torch.bool"),
    "complex": (lambda: pictures() * 1j, "images must be a float tensor.*torch.complex64"),
    "half precision": (lambda: pictures().half(), r"images are torch.float16.*images.float\(\)"),
    "bfloat16": (lambda: pictures().bfloat16(), r"images are torch.bfloat16.*images.float\(\)"),
    "float8": (lambda: pictures().to(torch.float8_e5m2), r"images are torch.float8_e5m2.*images.float\(\)"),
    "on meta": (lambda: pictures().to("meta"), "images are on the device 'meta' and have no values"),
    "sparse": (lambda: pictures().to_sparse(), "images are stored as torch.sparse_coo: pass a dense tensor"),
    "no images": (lambda: pictures()[:0], "images must not be empty"),
    "no pixels": (lambda: pictures()[..., :0], "images must not be empty"),
    "no colours": (lambda: pictures()[:, :0], "images must not be empty"),
    "NaN": (lambda: with_pixel(torch.nan), "images have NaN or infinite values"),
    "infinity": (lambda: with_pixel(-torch.inf), "images have NaN or infinite values"),
    "another type than the weights": (
        lambda: pictures().double(),
        r"images are torch.float64.*images.to\(torch.float32\)",
    ),
    "another number of channels": (
        lambda: pictures()[:, :2],
        r"cannot run on images of shape \([12], 2, 6, 6\).*channels",
    ),
    "too small": (lambda: pictures()[..., :2, :2], r"cannot run on images of shape \([12], 3, 2, 2\).*size"),
}
BAD_TARGETS = {
    "nothing": (lambda: None, r"targets must be int64 class indices of shape \(2,\), got NoneType"),
    "a number": (lambda: 1, r"targets must be int64 class indices of shape \(2,\), got int"),
    "a list": (lambda: [0, 1], r"targets must be int64.*got list.*as_tensor\(targets\)"),
    "an array": (lambda: classes().numpy(), "targets must be int64.*got ndarray"),
    "floats": (lambda: classes().float(), "targets must be int64.*got torch.float32"),
    "int32": (lambda: classes().int(), r"targets must be int64.*got torch.int32.*targets.long\(\)"),
    "booleans": (lambda: classes() > 0, "targets must be int64.*got torch.bool"),
    "one-hot": (lambda: F.one_hot(classes(), CLASSES), r"targets must be int64.*got torch.int64 \(2, 3\).*argmax"),
    "two axes": (lambda: classes()[:, None], r"shape \(2,\), got torch.int64 \(2, 1\)"),
    "no axis": (lambda: torch.tensor(1), r"shape \(2,\), got torch.int64 \(\)"),
    "too few": (lambda: classes(1), r"shape \(2,\), got torch.int64 \(1,\)"),
    "too many": (lambda: classes(3), r"shape \(2,\), got torch.int64 \(3,\)"),
    "negative": (lambda: torch.tensor([0, -1]), "targets must not be negative, got -1"),
    "too large": (lambda: torch.tensor([0, 3]), "target 3 is not one of the model's 3 classes"),
    "on meta": (lambda: classes().to("meta"), "targets are on the device 'meta'"),
}
SEEN_BY_PREDICT = {
    "a number": "must be a tensor.*got float",
    "nothing": "must be a tensor.*got NoneType",
    "an array": "must be a tensor.*got ndarray",
    "a list": "must be a tensor.*got list",
    "no images": r"one image or more, got shape \(0, 3, 6, 6\)",
    "another type than the weights": r"images.to\(torch.float32\)",
    "integers": r"images are torch.int64.*images.to\(torch.float32\)",
    "bytes": r"images are torch.uint8.*images.to\(torch.float32\)",
    "half precision": r"images are torch.float16.*images.to\(torch.float32\)",
    "on meta": "images are on 'meta'.*'cpu'",
    "another number of channels": "cannot run on images of shape",
    "too small": "cannot run on images of shape",
}


@pytest.mark.parametrize(("door", "name"), in_turn([BAD_IMAGES], lambda name: [*EXPLAINING, "check_model"]))
def test_bad_images_are_refused_at_every_door(door, name):
    build, says = BAD_IMAGES[name]
    model, x = good().train(), build()
    call = {**DOORS, "check_model": lambda m, x, y: check_model(m, x)}[door]
    assert_refused(lambda: call(model, x, classes(len(x) if isinstance(x, torch.Tensor) else 2)), model, says)


@pytest.mark.parametrize(("door", "name"), in_turn([BAD_TARGETS], lambda name: EXPLAINING))
def test_bad_targets_are_refused_at_every_door(door, name):
    build, says = BAD_TARGETS[name]
    model = good().train()
    assert_refused(lambda: DOORS[door](model, pictures(), build()), model, says)


@pytest.mark.parametrize("name", ["a function", "no model", "traced", "a scripted part", "it learns"])
def test_predict_refuses_what_it_could_not_leave_as_it_was(name):
    build, says, _ = MODELS[name]
    model = build()
    assert_refused(lambda: predict(model, pictures()), model, says)


@pytest.mark.parametrize("build", [compiled_in_place, lambda: torch.compile(good(), backend="eager"), quantised])
@pytest.mark.filterwarnings("ignore")
def test_predict_asks_models_that_cannot_be_explained(build):
    model = build()
    torch.testing.assert_close(predict(model, pictures()), predict(good(), pictures()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("build", [Noisy(random.random), Noisy(np.random.random)], ids=["python", "numpy"])
def test_predict_leaves_the_random_states(build):
    drawn = random_states()
    predict(Net(build), pictures())
    assert random_states() == drawn


@pytest.mark.parametrize("name", SEEN_BY_PREDICT)
@pytest.mark.filterwarnings("ignore")
def test_predict_says_what_is_wrong_with_images(name):
    model = good().train()
    assert_refused(lambda: predict(model, BAD_IMAGES[name][0]()), model, SEEN_BY_PREDICT[name])


# ---------------------------------------------------------------- models that are not refused


class Counting(Net):
    """Counts its passes in every way, and remembers what it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.times, self.seen, self.kept, self.last = 0, [], {}, None

    def forward(self, x):
        self.passes += 1
        self.replaced = self.replaced + 1
        self.times += 1
        self.seen.append(x)
        self.kept[self.times] = x
        self.last = super().forward(x)
        return self.last


class Cancelling(nn.Module):
    """Its logits are differences of equal sums, and so nothing but rounding, which depends on the size of a batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 6 * 6, 2))
        self.order = torch.randperm(3 * 6 * 6)

    def forward(self, x):
        x = x.flatten(1)
        return x @ self.weight - x[:, self.order] @ self.weight[self.order]


class Drawing(Net):
    """Draws from all random states and uses nothing of it."""

    def forward(self, x):
        torch.rand(1), np.random.random(), random.random()
        return super().forward(x)


def untrained(model):
    nn.init.zeros_(model.fc.weight)
    return model


def with_bias(bias, model=None):
    model = good() if model is None else model
    with torch.no_grad():
        model.fc.bias.copy_(torch.tensor(bias))
    return model


def sealed(model):
    """Hooks, a gradient and frozen weights of its owner's."""
    model.conv.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    model.conv.register_forward_hook(lambda module, inputs, output: None)
    model.register_full_backward_hook(lambda module, before, after: None)
    return model


def normed(norm):
    model = good()
    model.conv = norm(model.conv)
    return model


def scaled(factor):
    model = good()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


GOOD = {
    "plain": good,
    "logits that cancel out": Cancelling,
    "in train mode": lambda: Net(middle=nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5))).train(),
    "dropout that sleeps": lambda: Net(middle=nn.Dropout(0.9)),
    "with hooks": lambda: sealed(good()),
    "data parallel": lambda: nn.DataParallel(good()),
    "weight norm": lambda: normed(nn.utils.parametrizations.weight_norm),
    "old weight norm": lambda: normed(nn.utils.weight_norm),
    "spectral norm": lambda: normed(nn.utils.parametrizations.spectral_norm),
    "old spectral norm": lambda: normed(nn.utils.spectral_norm),
    "it counts": Counting,
    "it draws": Drawing,
    "one class": lambda: Net(count=1),
    "many classes": lambda: Net(count=200),
    "a head of zeros": lambda: untrained(good()),
    "a head of zeros and bias 1": lambda: with_bias([1.0, 1.0, 1.0], untrained(good())),
    "a head of zeros that adds up to 1": lambda: with_bias([0.2, 0.5, 0.3], untrained(good())),
    "small logits that add up to 1": lambda: Net(lambda z: 1e-5 * z + torch.tensor([0.2, 0.5, 0.3]).to(z)),
    "logits round 5 that add up to 15": lambda: Net(lambda z: 5 + F.layer_norm(z, (CLASSES,))),
    "shares of a gate": lambda: Net(lambda z: z * z.softmax(1)),
    "it learns nothing": lambda: Pupil(lambda w: w + 1),
    "a head of zeros within [0, 1]": lambda: with_bias([0.2, 0.5, 0.7], untrained(good())),
    "one class without a weight": lambda: with_bias([0.5], untrained(Net(count=1))),
    "logits after ReLU": lambda: Net(nn.ReLU()),
    "small logits": lambda: Net(lambda z: 1e-3 * z),
    "small positive logits": lambda: with_bias([0.5, 0.4, 0.3], Net(lambda z: 0.5 + 1e-3 * z)),
    "within (0, 1) whatever the scale": lambda: Net(lambda z: 0.3 + 0.1 * F.normalize(z, dim=1)),
    "cosines": lambda: Net(lambda z: F.normalize(z, dim=1)),
    "tanh": lambda: Net(nn.Tanh()),
    "logits that add up to 0": lambda: Net(lambda z: z - z.mean(1, keepdim=True)),
    "a gate at the end": lambda: Net(lambda z: z * z.sigmoid()),
    "attention inside": lambda: Net(middle=lambda x: x * x.flatten(2).softmax(2).view_as(x) * 99),
    "large logits": lambda: Net(lambda z: 1e4 + 1e4 * z),
    "weights of 1e-4": lambda: scaled(1e-4),
    "weights of 1e4": lambda: scaled(1e4),
    "logits less the largest": lambda: Net(lambda z: z - z.amax(1, keepdim=True)),
    "rounded first": lambda: Net(body=lambda x: (x * 16).round() / 16 + x),
    "written in place": lambda: Net(body=lambda x: x.mul_(2)),
    "its own cast": lambda: Net(body=lambda x: x.double().float()),
    "frozen batch norm": lambda: Net(middle=nn.BatchNorm2d(4).eval()),
    "group norm": lambda: Net(middle=nn.GroupNorm(2, 4)),
    "instance norm": lambda: Net(middle=nn.InstanceNorm2d(4)),
    "probabilities on purpose": lambda: Wrapped(Net(nn.Softmax(1)), keep_probabilities=True),
    "probabilities in a part": lambda: nn.Sequential(Wrapped(Net(nn.Sigmoid()), keep_probabilities=True)),
}


def by_hand(model, x, y):
    """The gradient of the target logits, of a copy in eval mode."""
    leaf = x.clone().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        chosen = deepcopy(model).eval()(leaf.clone()).gather(1, y[:, None])
        return torch.autograd.grad(chosen.sum(), leaf)[0]


CONTEXTS = [torch.enable_grad, torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize(("context", "name"), in_turn([GOOD], lambda name: CONTEXTS))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_good_model_passes_and_is_left_as_it_was(name, context, device):
    model, x = GOOD[name]().to(device), pictures().to(device)
    y = torch.zeros(2, dtype=torch.int64, device=device)
    before, drawn = state(model), random_states()
    with context():
        check_model(model, x)
        check_model(model, x[:1])
    assert state(model) == before and random_states() == drawn and torch.equal(x, pictures().to(device))
    if name in ("old weight norm", "old spectral norm"):
        return  # cannot be copied, nor their gradient be taken by hand without a trace
    expected = by_hand(model, x, y)
    with context():
        found = METHODS["gradient"](model, x, y)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 255.0, 1e6])
@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_any_range_pass(scale, shift, dtype):
    model, x = good().to(dtype), (pictures(dtype=dtype) + shift) * scale
    check_model(model, x)
    check_model(model, x[:1].flip(3))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_images_of_one_colour_pass(value):
    check_model(good(), torch.full((2, *SHAPE), value))
    with pytest.raises(ValueError, match="another image is beside it"):
        check_model(Net(lambda z: z - z.mean(0)), torch.full((2, *SHAPE), value))


def test_an_image_in_the_batch_may_be_the_larger_one():
    """What only the second image changes, and what only the first does."""
    x = torch.cat((pictures(1), 9 * pictures(1, seed=3)))
    for pair in (x, x.flip(0)):
        with pytest.raises(ValueError, match="another image is beside it"):
            check_model(Net(body=lambda x: x / x.amax()), pair)


def test_the_check_takes_three_passes_of_four_images():
    model, sizes = good(), []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    check_model(model, pictures(9))
    assert sum(sizes) == 4 and len(sizes) == 3


def test_a_method_checks_once_and_puts_back_what_the_model_counts():
    model, x, y = Counting(), pictures(3), classes(3)
    METHODS["smoothgrad_integrated_gradients"](model, x, y, samples=2, steps=2)
    assert model.passes == model.replaced == 0
    assert model.times == 0 and model.seen == [] and model.kept == {} and model.last is None
    drawing, drawn = Drawing(), random_states()
    METHODS["occlusion"](drawing, x, y, window=3)
    assert random_states() == drawn


def test_after_an_error_everything_is_as_it_was():
    class Stops(Counting):
        def forward(self, x):
            random.random()
            answer = super().forward(x)
            if self.times == 2:
                raise KeyboardInterrupt
            return answer

    model = Stops().train()
    before, drawn = state(model), random_states()
    with pytest.raises(KeyboardInterrupt):
        check_model(model, pictures())
    assert state(model) == before and random_states() == drawn


def test_inside_checked_nobody_asks_again():
    model, x, y = Net(nn.Softmax(1)), pictures(), classes()
    with passes.checked():
        found = METHODS["gradient"](model, x, y)
    torch.testing.assert_close(found, by_hand(model, x, y))


# ---------------------------------------------------------------- zeros that are believed


TRUE_ZEROS = {
    "a dead layer": lambda: Net(lambda z: (z - 99).relu()),
    "dead, but not far off": lambda: Net(body=lambda x: (x - 9).relu()),
    "rounded": lambda: Net(body=lambda x: (x * 255).round()),
    "rounded coarsely": lambda: Net(body=lambda x: x.round()),
    "floor": lambda: Net(body=lambda x: (x * 8).floor()),
    "rounded logits": lambda: Net(lambda z: z.round()),
    "signs": lambda: Net(body=lambda x: x.sign()),
    "times zero": lambda: Net(body=lambda x: x * 0),
    "saturated": lambda: Net(lambda z: (1e4 * (z - 99)).tanh()),
    "constant": lambda: Net(lambda z: z.detach() * 0 + torch.arange(3.0)),
    "top of a plateau": lambda: Net(body=lambda x: x.clamp(-0.01, 0.01).sign()),
}


ZEROS_OF = [(m, s) for m in ("gradient", "input_x_gradient", "integrated_gradients") for s in (1.0, 255.0)]


@pytest.mark.parametrize(("door", "name"), in_turn([TRUE_ZEROS], lambda name: ZEROS_OF))
def test_where_nothing_moves_or_only_in_steps_a_map_is_zero(door, name):
    method, scale = door
    model = TRUE_ZEROS[name]()
    body = model.body
    model.body = (lambda x: x / scale) if body is None else (lambda x: body(x / scale))
    assert not METHODS[method](model, scale * pictures(), classes()).any()


class Call(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x).sum((2, 3))


@pytest.mark.parametrize("call", [torch.abs, torch.relu, F.relu6])
def test_at_a_kink_a_zero_is_torchs(call):
    assert not METHODS["gradient"](Call(call), torch.zeros(1, 3, 2, 2), torch.tensor([1])).any()


CUTS = {"detach": lambda z: z.detach(), "data": lambda z: z.data, "no_grad": without_gradient}


@pytest.mark.parametrize("scale", [1e-4, 1.0, 255.0])
@pytest.mark.parametrize(
    ("method", "cut"), in_turn([CUTS], lambda cut: ["gradient", "smoothgrad", "integrated_gradients"])
)
def test_a_zero_where_the_logit_follows_the_image_is_refused(method, scale, cut):
    """In one image of three, which the check of the model did not see."""

    class Blind(Net):
        def forward(self, x):
            z = super().forward(x / scale)
            return torch.where(x[:, 0, 0, :1] > -99 * scale, z, CUTS[cut](z))

    model, x = Blind(), pictures(3)
    x[2, 0, 0, 0] = -200
    with pytest.raises(ValueError, match="no gradient reaches it"):
        METHODS[method](model, scale * x, classes(3))
    assert METHODS[method](model, scale * x[:2], classes()).flatten(1).any(1).all()


# ---------------------------------------------------------------- what else is handed in


RUNNER = {
    "seeds twice": ({"seeds": [1, 1]}, "each once"),
    "no metrics": ({"metrics": None}, "metrics must be names or functions"),
    "a number of methods": ({"methods": 3}, "methods must be names or functions"),
    "half a place": ({"indices": [0.5, 1]}, "indices must be whole numbers, the places"),
    "places in words": ({"indices": "ab"}, "indices must be whole numbers, the places"),
    "a list of schemes": ({"scheme": []}, "unknown scheme"),
    "a word for an example": ({"example": "images"}, "example must be a batch"),
    "an empty example": ({"example": torch.zeros(0, *SHAPE)}, "example must be a batch"),
    "another example": ({"example": torch.zeros(2)}, "cannot run on the example"),
    "a metric that adds up": ({"metrics": [lambda a, b: torch.zeros(1)]}, "must return a tensor of 2 numbers"),
    "a method without maps": ({"methods": [lambda m, x, y: None]}, "must return maps"),
    "a method of one map": ({"methods": [lambda m, x, y: x[:1]]}, "must return maps"),
    "a method of whole numbers": ({"methods": [lambda m, x, y: x.long()]}, "maps of floats"),
}


@pytest.mark.parametrize("name", RUNNER)
def test_the_runner_says_what_is_wrong_with_its_arguments(name):
    options, says = RUNNER[name]
    model, given = good(), {"methods": ["sobel"], "metrics": ["spearman"], "seeds": [0], **options}
    call = lambda: sanity.parameter_randomization(model, pictures(), classes(), show_progress=False, **given)  # noqa: E731
    assert_refused(call, model, says)

"""Guided Backprop and DeconvNet against captum, on networks rewritten for it where need be, and by hand."""

import captum.attr
import pytest
import torch
import torchvision
from networks import CLASSES, cnn, images, linear, lively, targets, weekly_but, with_relu_modules
from saliency_sanity.device import local_seed
from saliency_sanity.saliency import passes
from saliency_sanity.saliency.backprop_rules import deconvnet, guided_backprop
from saliency_sanity.saliency.gradients import gradient
from torch import nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

RULES = {guided_backprop: captum.attr.GuidedBackprop, deconvnet: captum.attr.Deconvolution}
pytestmark = pytest.mark.filterwarnings("ignore:Setting backward hooks", "ignore:Input Tensor 0 did not")
rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


def captums(rule, model, x, y):
    return RULES[rule](model.eval()).attribute(x.clone(), y).detach()


def assert_same(ours, theirs):
    """Equal but for rounding, which deep networks spread over many sizes."""
    scale = theirs.abs().amax((1, 2, 3), keepdim=True)
    assert scale.min() > 0
    torch.testing.assert_close(ours / scale, theirs / scale, atol=2e-4, rtol=0)


def clearly_differ(a, b):
    return ((a - b).abs().amax((1, 2, 3)) > 0.05 * b.abs().amax((1, 2, 3))).all()


# ---------------------------------------------------------------- networks of torchvision


def vgg11():
    return nn.Sequential(make_layers(cfgs["A"], batch_norm=False), nn.Flatten(), nn.Linear(512, CLASSES))


def of_torchvision(name, **options):
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


WITH_MODULES = {
    "vgg11": (vgg11, 32),
    "resnet18": (of_torchvision("resnet18"), 64),
    "squeezenet1_1": (of_torchvision("squeezenet1_1"), 64),
}
WITH_FUNCTIONS = {  # or with ReLU6
    "inception_v3": (of_torchvision("inception_v3", init_weights=False), 75),
    "googlenet": (of_torchvision("googlenet", init_weights=False), 64),
    "densenet121": (of_torchvision("densenet121"), 64),
    "mobilenet_v2": (of_torchvision("mobilenet_v2"), 64),
}


def built(build, side):
    with local_seed(0):
        model = lively(build())
    x = images(2, (3, side, side))
    return model.eval(), x, model(x).argmax(1)


@rule
@pytest.mark.parametrize("name", weekly_but("resnet18", of=WITH_MODULES))
def test_captum_is_met_on_networks_of_relu_modules(rule, name):
    model, x, y = built(*WITH_MODULES[name])
    ours = rule(model, x, y)
    assert_same(ours, captums(rule, model, x, y))
    assert clearly_differ(ours, gradient(model, x, y))


@pytest.fixture(scope="module", params=weekly_but("googlenet", of=WITH_FUNCTIONS))
def functional(request):
    return request.param, *built(*WITH_FUNCTIONS[request.param])


@rule
def test_relu_as_a_function_and_relu6_get_the_rule_too(rule, functional):
    name, model, x, y = functional
    rewritten = with_relu_modules(model)
    torch.testing.assert_close(rewritten(x), model(x))
    ours = rule(model, x, y)
    assert_same(ours, captums(rule, rewritten, x, y))
    assert clearly_differ(ours, gradient(model, x, y))


@rule
def test_captum_misses_them_without_a_word(rule, functional):
    """It returns the plain gradient under another name; in densenet121 only the last ReLU is a function."""
    name, model, x, y = functional
    theirs = captums(rule, model, x, y)
    if name == "densenet121":
        assert clearly_differ(theirs, rule(model, x, y))
    else:
        assert torch.equal(theirs, gradient(model, x, y))


# ---------------------------------------------------------------- one network, written in many ways


class Written(nn.Module):
    """conv - ReLU - conv - ReLU - ReLU again - linear, with the ReLU written in one of many ways."""

    def __init__(self, relu, cap=float("inf")):
        super().__init__()
        with local_seed(3):
            self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, bias=True), nn.Conv2d(6, 8, 3, bias=True)
            self.fc = nn.Linear(8 * 64, CLASSES)
            lively(self, 3)
        self.relu, self.cap = relu, cap

    def forward(self, x):
        a = self.relu(self.conv1(x))
        b = self.relu(self.conv2(a))
        return self.fc(self.relu(b - 0.2).flatten(1))

    def by_hand(self, rule, x, y):
        """The backward pass of both methods, step by step, without autograd's ReLU."""
        with torch.no_grad():
            u = self.conv1(x)
            v = self.conv2(u.clamp(0, self.cap))
            w = v.clamp(0, self.cap) - 0.2

            def back(signal, at):
                signal = signal.clamp(min=0)
                return signal * ((at > 0) & (at < self.cap)) if rule is guided_backprop else signal

            signal = back(self.fc.weight[y].view_as(w), w)
            signal = back(signal, v)
            signal = back(F.conv_transpose2d(signal, self.conv2.weight), u)
            return F.conv_transpose2d(signal, self.conv1.weight)


def statement(function):
    """A ReLU written as a statement: the tensor itself is used on."""

    def relu(x):
        function(x)
        return x

    return relu


class Shared(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.act = nn.ReLU(**options)

    def forward(self, x):
        return self.act(x)


RELUS = {
    "one module, used thrice": nn.ReLU(),
    "one module, in place": nn.ReLU(inplace=True),
    "nested module": Shared(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu in place, by place": lambda x: F.relu(x, True),
    "F.relu by name": lambda x: F.relu(input=x),
    "F.relu in place, by name": lambda x: F.relu(input=x, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "F.relu_": F.relu_,
    "x.relu()": lambda x: x.relu(),
    "x.relu_()": lambda x: x.relu_(),
    "statement torch.relu_(x)": statement(torch.relu_),
    "statement x.relu_()": statement(lambda x: x.relu_()),
    "statement F.relu(x, inplace=True)": statement(lambda x: F.relu(x, inplace=True)),
    "statement nn.ReLU(inplace=True)(x)": statement(nn.ReLU(inplace=True)),
    "in place on a view": lambda x: F.relu(x.view(x.shape), inplace=True),
    "checkpointed": lambda x: torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=False),
}
CAPPED = {
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "statement nn.ReLU6 in place": statement(nn.ReLU6(inplace=True)),
    "F.relu6": F.relu6,
    "F.relu6 in place": lambda x: F.relu6(x, inplace=True),
    "F.relu6 by name": lambda x: F.relu6(input=x),
    "F.hardtanh": lambda x: F.hardtanh(x, 0, 6),
    "F.hardtanh by name": lambda x: F.hardtanh(x, min_val=0.0, max_val=6.0),
    "F.hardtanh in place": lambda x: F.hardtanh(x, 0.0, 6.0, True),
    "nn.Hardtanh": nn.Hardtanh(0, 6),
}
WAYS = [(way, float("inf")) for way in RELUS] + [(way, 6.0) for way in CAPPED]


@rule
@pytest.mark.parametrize(("way", "cap"), WAYS)
def test_every_way_to_write_a_relu_gives_the_map_worked_out_by_hand(rule, way, cap):
    model, x, y = Written((RELUS | CAPPED)[way], cap).double(), 6 * images(dtype=torch.float64), targets()
    assert cap > 6 or model.conv1(x).max() > 6  # the cap is reached
    torch.testing.assert_close(rule(model, x, y), model.by_hand(rule, x, y))
    assert clearly_differ(rule(model, x, y), gradient(model, x, y))


@rule
def test_the_forward_pass_is_unchanged(rule):
    """The logits under the rule are the model's own."""
    seen = []
    model = Written(F.relu6, 6.0)
    model.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    x, y = 6 * images(), targets()
    with passes.checked():
        rule(model, x, y)
    assert torch.equal(seen[0], model(x))


@rule
@pytest.mark.parametrize("value", [0.0, 6.0])
def test_at_a_kink_a_unit_is_closed_as_in_torch(rule, value):
    model = nn.Sequential(nn.ReLU6(), nn.Flatten())
    x, y = torch.full((1, 1, 1, 1), value), torch.zeros(1, dtype=torch.int64)
    assert rule(model, x, y).item() == (0 if rule is guided_backprop else 1) and gradient(model, x, y).item() == 0


@rule
@pytest.mark.parametrize("name", ["linear", "pooled", "gated"])
def test_a_model_without_a_relu_would_have_its_gradient_and_is_refused(rule, name):
    models = {
        "linear": linear,
        "pooled": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, CLASSES)),
        "gated": lambda: Written(lambda x: x * x.mean((2, 3) if x.ndim == 4 else 1, keepdim=True).sigmoid()),
    }
    with pytest.raises(ValueError, match="calls no ReLU or ReLU6.*the gradient under another name"):
        rule(models[name](), images(), targets())


@rule
def test_a_relu_that_the_logits_do_not_depend_on_does_not_count(rule):
    class Beside(nn.Module):
        def forward(self, x):
            F.relu(x)
            return x.mean((2, 3))

    with pytest.raises(ValueError, match="calls no ReLU"):
        rule(Beside(), images(), targets(classes=3))


def test_deconvnet_does_not_look_at_the_image_without_pooling():
    """Without switches or gates the signal that flows back is the same for every image."""
    model = Written(F.relu)
    maps = deconvnet(model, images(3), torch.full((3,), 2))
    torch.testing.assert_close(maps[0], maps[1])
    torch.testing.assert_close(maps[0], maps[2])


@rule
def test_a_positive_network_keeps_the_whole_gradient(rule):
    """Where no signal is negative and all units are active, both rules change nothing."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, CLASSES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    x, y = images().abs() + 0.1, targets()
    torch.testing.assert_close(rule(model, x, y), gradient(model, x, y))


@rule
def test_the_rule_ends_with_the_call(rule):
    model, x, y = cnn(), images(), targets()
    before = gradient(model, x, y)
    rule(model, x, y)
    assert torch.equal(gradient(model, x, y), before)
    assert type(F.relu(x.requires_grad_()).grad_fn).__name__ == "ReluBackward0"


# ---------------------------------------------------------------- refusals


class HandMadeReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, above):
        return above * (ctx.saved_tensors[0] > 0)


OTHERS = {
    "GELU": nn.GELU(),
    "SiLU": nn.SiLU(),
    "SiLU in place": nn.SiLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU(),
    "LeakyReLU in place": nn.LeakyReLU(inplace=True),
    "PReLU": nn.PReLU(),
    "RReLU": nn.RReLU(),
    "ELU": nn.ELU(),
    "SELU": nn.SELU(),
    "CELU": nn.CELU(),
    "Mish": nn.Mish(),
    "Softplus": nn.Softplus(),
    "Hardswish": nn.Hardswish(),
    "Hardtanh": nn.Hardtanh(),
    "Threshold at zero": nn.Threshold(0, 0),
    "Threshold": nn.Threshold(0.1, 0.2),
    "clamp(min=0)": lambda x: x.clamp(min=0),
    "clamp(0)": lambda x: torch.clamp(x, 0.0),
    "clamp(0, 6)": lambda x: x.clamp(0, 6),
    "clamp_(min=0)": lambda x: x.clamp_(min=0),
    "clamp_min(0)": lambda x: x.clamp_min(0),
    "clip": lambda x: torch.clip(x, min=0),
    "clamp at a tensor": lambda x: x.clamp(min=torch.zeros(x.shape[1:])),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "max": lambda x: torch.max(x, torch.zeros(())),
    "ReLU behind torch's back": torch.ops.aten.relu,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "Tanh": nn.Tanh(),
    "a function of one's own": HandMadeReLU.apply,
    "Sigmoid": nn.Sigmoid(),
    "Hardsigmoid": nn.Hardsigmoid(),
    "Softsign": nn.Softsign(),
    "Tanhshrink": nn.Tanhshrink(),
    "LogSigmoid": nn.LogSigmoid(),
    # activations written out
    "swish": lambda x: x * torch.sigmoid(x),
    "swish turned round": lambda x: torch.sigmoid(1.7 * x).view(x.shape) * x,
    "swish as a fraction": lambda x: x / (1 + torch.exp(-x)),
    "swish in place": lambda x: x.clone().mul_(x.sigmoid()),
    "swish, its gate held": lambda x: torch.addcmul(torch.zeros_like(x), x, x.sigmoid()),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu by tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))),
    "mish": lambda x: x * torch.log(1 + x.exp()).tanh(),
    "softplus": lambda x: torch.log(1 + torch.exp(x)),
    "softplus by log1p": lambda x: torch.log1p(torch.exp(x)),
    "softplus by logaddexp": lambda x: torch.logaddexp(x, torch.zeros(())),
    "softplus under a gate": lambda x: torch.log(1 + torch.exp(x)) * x.mean(1, keepdim=True).sigmoid(),
    "softplus below a gate's layer": lambda x: x * gate(torch.log(1 + torch.exp(x))),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "hardswish of ReLU6": lambda x: x * F.relu6(x + 3) / 6,
    "squared ReLU": lambda x: F.relu(x) ** 2,
    "ReLU times itself": lambda x: F.relu(x) * F.relu(x),
    "square": torch.square,
    "sine": torch.sin,
    "snake": lambda x: x + torch.sin(x) ** 2,
    "bump": lambda x: torch.exp(-(x**2)),
    "absolute value": lambda x: (x + x.abs()) / 2,
    "root": lambda x: (x + (x * x + 1e-6).sqrt()) / 2,
    "mask": lambda x: x * (x > 0),
    "mask of floats": lambda x: (x > 0).float() * x,
    "mask of the values cut off": lambda x: x * x.detach().gt(0).to(x.dtype),
    "mask without gradients": lambda x: F.relu(x) + x * torch.no_grad()(F.relu)(-x).sign(),
    "mask in place": lambda x: x.clone().mul_(torch.ge(x, 0)),
    "mask by its opposite": lambda x: x - x * (x <= 0),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "where, cut off": lambda x: torch.where(x.detach() > 0, x, 0.1 * x),
    "written where negative": lambda x: written(x, x < 0),
    "sign": lambda x: x * (x.sign() + 1) / 2,
    "heaviside": lambda x: x * torch.heaviside(x.detach(), torch.zeros(())),
    "mask, rounded": lambda x: x * torch.round(torch.sigmoid(50 * x.detach())),
    "mask, rounded up": lambda x: x * torch.tanh(x.detach()).ceil(),
    "mask of whole numbers": lambda x: x * torch.bucketize(x.detach(), torch.zeros(1)),
    "mask of whole numbers, as floats": lambda x: x * torch.bucketize(x.detach(), torch.zeros(1)).to(x.dtype),
    "swish, its gate cut off": lambda x: x * torch.sigmoid(x.detach()),
    "swish, its gate without gradients": lambda x: x * torch.no_grad()(torch.sigmoid)(2 * x),
    "swish, its gate behind a batch norm": lambda x: x * torch.sigmoid(normed(x)),
    "minimum": lambda x: x - torch.minimum(x, torch.zeros(())),
    "clamp from above": lambda x: x - x.clamp(max=0),
    "part in place": lambda x: (x := x.clone(), x[:, 1:].sigmoid_())[0],
}


def normed(x):
    return F.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]))


def gate(x):
    """A weight for each image, of a layer of all its values."""
    size = x[0].numel()
    return torch.sigmoid(x.flatten(1) @ torch.ones(size, 1) / size).view(-1, *[1] * (x.ndim - 1))


def written(x, where):
    x = x.clone()
    x[where] = 0
    return x


@rule
@pytest.mark.parametrize("name", OTHERS)
def test_an_activation_without_a_rule_raises(rule, name):
    with pytest.raises(ValueError, match="is not a call of ReLU or ReLU6"):
        rule(Written(OTHERS[name]), images(), targets())


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(400, 5)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = torch.relu(x * 2 + x.sigmoid() - 0.3) * x
        return self.fc(x.flatten(1))


@rule
@pytest.mark.parametrize(
    "compiled",
    [
        torch.jit.script,
        lambda model: torch.jit.trace(model.eval(), images(1)),
        lambda model: torch.compile(model, backend="aot_eager"),
    ],
    ids=["script", "trace", "compile"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_compiled_model_raises_however_often_it_ran(rule, compiled):
    """After a few runs TorchScript fuses its graph, and no ReLU is seen in it."""
    model, x = compiled(Gated()), images()
    for _ in range(4):
        with pytest.raises(ValueError, match="whose steps cannot be seen|is compiled"):
            rule(model, x, targets())
        with passes.checked(), pytest.raises(ValueError, match="is not a call of ReLU or ReLU6"):
            rule(model, x, targets())
        model(x.clone().requires_grad_()).sum().backward()


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.LazyLinear(1)

    def forward(self, x):
        y = x.mean((2, 3), keepdim=True)
        return x + x * torch.sigmoid(self.fc(F.relu(y.flatten(1)))).view(-1, 1, 1, 1).expand_as(x)


def shifted(x):
    out = torch.zeros_like(x)
    out[:, 1:] = x[:, :-1]
    out[:, :1].add_(x[:, -1:])
    return out


def by_variance(x):
    centred = x - x.mean((1, 2, 3), keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean((1, 2, 3), keepdim=True) + 1e-5)


def attention(x):
    tokens = x.flatten(2).mT
    return tokens + F.scaled_dot_product_attention(tokens, tokens, tokens)


KNOWN = {
    "norm of vectors": F.normalize,
    "local response": lambda x: F.local_response_norm(x, 3),
    "group norm": lambda x: F.group_norm(x, 1),
    "instance norm": lambda x: F.instance_norm(x).amax((2, 3), keepdim=True),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "norm by hand": by_variance,
    "norm by the deviation": lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5),
    "gate of the means": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "gate by hand": lambda x: x / (1 + torch.exp(-x.mean((2, 3), keepdim=True))),
    "hard gate of ReLU6": lambda x: x * (F.relu6(x.mean((2, 3), keepdim=True) + 3) / 6),
    "squeeze and excite, twice": nn.Sequential(Squeezed(), Squeezed()),
    "attention over channels": lambda x: x * x.softmax(1),
    "attention": attention,
    "attention of products": lambda x: (x.flatten(2).mT @ x.flatten(2) / 9).softmax(-1) @ x.flatten(2).mT,
    "gated halves": lambda x: F.glu(torch.cat((x, x.roll(1, 1)), 1), 1),
    "largest values": lambda x: x.topk(3, 1).values,
    "maxout": lambda x: x.unflatten(1, (2, -1)).amax(1),
    "largest place": lambda x: F.adaptive_max_pool2d(x, 4),
    "a shift": shifted,
    "a fixed mask": lambda x: (
        torch.where(torch.arange(x.shape[-1]) % 2 == 0, x, 0) * (torch.arange(x.shape[2]) > 2)[:, None]
    ),
    "ones of its shape": lambda x: x * torch.ones_like(x),
    "dropped out": lambda x: F.dropout(x, training=False),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
}


class Around(nn.Module):
    """conv - ReLU - `step` - mean - linear."""

    def __init__(self, step):
        super().__init__()
        with local_seed(1):
            self.conv = nn.Conv2d(3, 6, 3)
            self.head = nn.LazyLinear(CLASSES)
        self.step = step

    def forward(self, x):
        x = self.step(F.relu(self.conv(x)))
        return self.head(x.flatten(2).mean(2) if x.ndim == 4 else x.mean(1))


@rule
@pytest.mark.parametrize("name", KNOWN)
def test_through_what_is_no_activation_the_plain_gradient_flows(rule, name):
    """Norms, gates, attention and choices: the map is that of the rule at the one ReLU below, written as a hook."""
    model, x, y = Around(KNOWN[name]).double().eval(), images(dtype=torch.float64), targets()
    with local_seed(2):
        model(x)
    assert not torch.allclose(rule(model, x, y), gradient(model, x, y))
    seen = []
    handle = model.conv.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model(x)
    handle.remove()
    (values,) = seen
    if name in ("squeeze and excite, twice", "hard gate of ReLU6"):
        return  # there are ReLUs above
    relu = values.clamp(min=0).requires_grad_()
    logits = model.head((lambda z: z.flatten(2).mean(2) if z.ndim == 4 else z.mean(1))(model.step(relu)))
    (signal,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), relu)
    signal = signal.clamp(min=0) * ((values > 0) if rule is guided_backprop else 1)
    torch.testing.assert_close(rule(model, x, y), F.conv_transpose2d(signal, model.conv.weight))


WITH_GATES = {
    "mobilenet_v3_small": nn.Hardswish,  # in whose place a ReLU is put: its gates are the subject
    "efficientnet_b0": nn.SiLU,
    "resnet18": None,
    "shufflenet_v2_x0_5": None,
    "mnasnet0_5": None,
    "regnet_y_400mf": None,
    "densenet121": None,
}


@rule
@pytest.mark.parametrize("name", weekly_but("regnet_y_400mf", "shufflenet_v2_x0_5", of=WITH_GATES))
def test_families_of_networks_are_not_refused(rule, name):
    model, x, y = built(of_torchvision(name), 64)
    other = WITH_GATES[name]
    if other is not None:
        with pytest.raises(ValueError, match="is not a call of ReLU"):
            rule(model, x, y)
        for module in list(model.modules()):
            for child, found in module.named_children():
                if isinstance(found, other):
                    setattr(module, child, nn.ReLU())
    assert clearly_differ(rule(model, x, y), gradient(model, x, y))

"""Random networks: modules with written-out source code, made of what real models are made of.

Every network runs, is finite, and has batch norms whose statistics fit what they see. Its source
is kept (`network.source`), so a failing one is its own minimal reproducer, together with its seed.
"""

import copy
import itertools
import linecache
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

_serial = itertools.count()


class BatchNormAct2d(nn.BatchNorm2d):
    """A batch norm that also activates, as timm's: it cannot simply become an identity."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class ScaledConv2d(nn.Conv2d):
    """A convolution that doubles its output: its weight does not say all it does."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def doubled(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook that changes what the module returned."""
    return output * 2


def noted(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook that keeps something of what the module returned, on the module."""
    module.seen = (
        output.detach().double().clone()
    )  # not its sum, where rounding is all that is left


def shifted(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    """Forward pre-hook that changes what the module is given."""
    return args[0] + 0.25


@dataclass
class Network:
    """A random network, the inputs it takes, and how it was written."""

    model: nn.Module
    shape: tuple[int, ...]  # of one example, without the batch
    source: str
    methods: tuple[str, ...]  # public methods besides forward, each taking the same input
    rough: bool  # computes partly in bfloat16
    dtype: torch.dtype = torch.float32

    def inputs(self, seed: int, batch: int = 2, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return random examples: seeds differ in scale and offset too, to flip data branches."""
        generator = torch.Generator().manual_seed(seed)
        scale, offset = ((1.0, 0.0), (1.0, 1.5), (0.7, -1.5))[seed % 3]
        noise = torch.randn(batch, *(shape or self.shape), generator=generator)
        return (noise * scale + offset).to(self.dtype)

    def in_float64(self) -> "Network":
        """Return a copy that computes in float64 throughout: what differs there is wrong."""
        model = copy.deepcopy(self.model).double()
        for module in model.modules():
            if hasattr(module, "low"):
                module.low = module.high = torch.float64
        return replace(self, model=model, rough=False, dtype=torch.float64)

    def shapes(self) -> list[tuple[int, ...]]:
        """Return other example shapes that the network runs on without an error."""
        channels, *sizes = self.shape
        others = [(channels, *(size + more for size in sizes)) for more in (-2, 4)]
        return [shape for shape in others if sizes and self._runs(shape)]

    def _runs(self, shape: tuple[int, ...]) -> bool:
        try:
            with torch.no_grad():
                self.model(self.inputs(0, 2, shape))
        except (RuntimeError, ValueError, IndexError):
            return False
        return True


@dataclass
class _Draft:
    """A network being written: each line is run as soon as it is written."""

    random: Random
    seed: int
    model: nn.Module
    lines: list[str] = field(default_factory=list)
    methods: dict[str, list[str]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    names: int = 0
    rough: bool = False
    held: list[str] = field(default_factory=list)  # values that must be returned too

    def name(self, stem: str) -> str:
        self.names += 1
        return f"{stem}{self.names}"

    def add(self, stem: str, module: nn.Module) -> str:
        name = self.name(stem)
        setattr(self.model, name, module.eval())
        return name

    def write(self, *lines: str) -> None:
        """Append `lines` (one block), having run them on the values so far."""
        scope = {"self": self.model, "F": F, "torch": torch, "input": self.values["input"]}
        space = {**scope, **self.values}
        exec("\n".join(lines), space)  # the names written above, nothing from outside
        self.lines.extend(lines)
        self.values.update({k: v for k, v in space.items() if k[0] == "x" and k[1:].isdigit()})

    def let(self, expression: str) -> str:
        """Append `x<n> = expression`, return the new name."""
        name = self.name("x")
        self.write(f"{name} = {expression}")
        return name

    def pick(self, *options: object) -> object:
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability


def network(random: Random, seed: int = 0, steps: int | None = None) -> Network:
    """Return a random network; equal draws of `random` and equal `seed` give an equal network."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return _network(random, seed, steps or random.randint(2, 9))


def _network(random: Random, seed: int, steps: int) -> Network:
    draft = _Draft(random, seed, nn.Module())
    dims = random.choice((0, 1, 1, 2, 2, 2, 2, 3))
    channels = random.choice((4, 6, 8))
    shape = (channels, *((12, 10, 8)[i] if dims < 3 else 6 for i in range(dims)))
    draft.values["input"] = torch.randn(2, *shape)
    current = draft.let("input + 0" if random.random() < 0.3 else "input")
    for _ in range(steps):
        current = _step(draft, current, _STEPS)
        if draft.values[current].abs().max() > 100:
            current = draft.let(f"{current} * 0.01")
    result = current
    if draft.held:
        result = "(" + ", ".join([current, *draft.held]) + ")"
    return _finish(draft, shape, result)


def _finish(draft: _Draft, shape: tuple[int, ...], result: str) -> Network:
    """Return the draft as an instance of a class whose source can be read."""
    source = _give_class(draft, "RandomNetwork", result)
    model = draft.model
    for module in model.modules():
        module.__dict__.pop("kept", None)
    blocks = [m.source for m in model.modules() if m is not model and hasattr(m, "source")]
    modules = "\n".join(f"#   {line}" for line in repr(model).splitlines())
    training = [name for name, module in model.named_modules() if name and module.training]
    model.training = False
    header = f"# seed {draft.seed}; in training mode: {training}\n{modules}\n"
    return Network(
        model, shape, "\n".join([header, *blocks, source]), tuple(draft.methods), draft.rough
    )


def _give_class(draft: _Draft, name: str, result: str) -> str:
    """Make the draft's module an instance of a class made of its lines; return the source."""
    text = [f"class {name}(torch.nn.Module):"]
    if hasattr(draft.model, "low"):
        text += ["    low, high = torch.bfloat16, torch.float32", ""]
    text += ["    def forward(self, input):"]
    text += [f"        {line}" for line in draft.lines]
    text += [f"        return {result}"]
    for method, lines in draft.methods.items():
        text += ["", f"    def {method}(self, input):", *(f"        {line}" for line in lines)]
    source = "\n".join(text) + "\n"
    filename = f"<random network {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    space: dict[str, type[nn.Module]] = {"torch": torch, "F": F, "__name__": __name__}
    exec(compile(source, filename, "exec"), space)
    draft.model.__class__ = space[name]
    return source


# ── layers, each made to fit the value it is applied to ──────────────────────────────────────────


def _dims(value: Tensor) -> int:
    return value.ndim - 2


def _conv(draft: _Draft, value: Tensor, outputs: int | None = None) -> nn.Module:
    dims, inputs = _dims(value), value.shape[1]
    outputs = outputs or int(draft.pick(4, 6, 8, inputs))
    groups = int(draft.pick(1, 1, 1, 2, inputs))
    if inputs % groups or outputs % groups:
        groups = 1
    transposed = draft.chance(0.2)
    kernel = int(draft.pick(1, 3, 3))
    options: dict[str, object] = {
        "groups": groups,
        "bias": draft.chance(0.5),
        "stride": int(draft.pick(1, 1, 2)) if value.shape[-1] > 4 else 1,
        "padding": kernel // 2,
        "dtype": value.dtype,
    }
    if transposed:
        return getattr(nn, f"ConvTranspose{dims}d")(inputs, outputs, kernel, **options)
    options["padding_mode"] = draft.pick("zeros", "zeros", "zeros", "circular")
    if dims == 2 and draft.chance(0.05):
        return ScaledConv2d(inputs, outputs, kernel, **options)
    return getattr(nn, f"Conv{dims}d")(inputs, outputs, kernel, **options)


def _producer(draft: _Draft, current: str) -> str:
    """Append a convolution or linear, as a module or a functional call; return its output."""
    value = draft.values[current]
    if (
        _dims(value) in (1, 2, 3)
        and value.ndim <= 5
        and not (value.ndim == 3 and draft.chance(0.3))
    ):
        layer = _conv(draft, value)
    else:
        layer = nn.Linear(
            value.shape[-1],
            int(draft.pick(4, 6, value.shape[1])),
            bias=draft.chance(0.6),
            dtype=value.dtype,
        )
    if draft.chance(0.08):
        wrap = draft.pick(parametrizations.weight_norm, parametrizations.spectral_norm)
        if value.dtype == torch.float32:
            layer = wrap(layer.train()).eval()
    name = draft.add("linear" if isinstance(layer, nn.Linear) else "conv", layer)
    if draft.chance(0.08):
        layer.register_forward_hook(draft.pick(doubled, noted))
    if draft.chance(0.04):
        layer.register_forward_pre_hook(shifted)
    if isinstance(layer, nn.Linear) and draft.chance(0.15):
        return draft.let(f"F.linear({current}, self.{name}.weight, self.{name}.bias)")
    plain = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and layer.padding_mode == "zeros"
    if plain and draft.chance(0.15):
        dims = _dims(value)
        return draft.let(
            f"F.conv{dims}d({current}, self.{name}.weight, self.{name}.bias, "
            f"{layer.stride}, {layer.padding}, {layer.dilation}, {layer.groups})"
        )
    return draft.let(f"self.{name}({current})")


def _batch_norm(draft: _Draft, value: Tensor) -> nn.Module:
    """Return a batch norm whose statistics are roughly those of `value`."""
    dims = _dims(value)
    kind = nn.BatchNorm1d if dims < 2 else getattr(nn, f"BatchNorm{dims}d")
    if dims == 2 and draft.chance(0.08):
        kind = BatchNormAct2d
    if draft.chance(0.03):
        kind = nn.SyncBatchNorm
    channels = value.shape[1]
    norm = kind(
        channels,
        eps=float(draft.pick(1e-5, 1e-3)),
        affine=draft.chance(0.85),
        track_running_stats=draft.chance(0.93),
    )
    if norm.affine:
        norm.weight.copy_(torch.randn(channels).sign() * (0.5 + torch.rand(channels)))
        norm.bias.copy_(0.5 * torch.randn(channels))
    if norm.track_running_stats:
        axes = [axis for axis in range(value.ndim) if axis != 1]
        mean, var = value.float().mean(axes), value.float().var(axes)
        norm.running_mean.copy_(mean + 0.2 * torch.randn(channels))
        norm.running_var.copy_(var.clamp(min=0.05) * (0.5 + torch.rand(channels)))
    if value.dtype != torch.float32 and draft.chance(0.5):
        norm.to(value.dtype)
    return norm


def _norm(draft: _Draft, current: str) -> str:
    """Append a normalisation, mostly a batch norm; return its output."""
    value = draft.values[current]
    if value.ndim > 5 or value.ndim < 2 or (value.ndim == 3 and value.shape[1] > 64):
        return current
    if draft.chance(0.12):
        if draft.chance(0.5):
            norm: nn.Module = nn.GroupNorm(1, value.shape[1], dtype=value.dtype)
        else:
            norm = nn.LayerNorm(value.shape[-1], dtype=value.dtype)
        return draft.let(f"self.{draft.add('norm', norm)}({current})")
    norm = _batch_norm(draft, value)
    name = draft.add("bn", norm)
    functional = norm.track_running_stats and type(norm) is not nn.SyncBatchNorm
    if functional and draft.chance(0.1):
        return draft.let(
            f"F.batch_norm({current}, self.{name}.running_mean, self.{name}.running_var, "
            f"self.{name}.weight, self.{name}.bias, False, 0.1, self.{name}.eps)"
        )
    if draft.chance(0.05):
        norm.register_forward_hook(draft.pick(doubled, noted))
    if draft.chance(0.04):
        norm.register_forward_pre_hook(shifted)
    if type(norm) is not nn.SyncBatchNorm and draft.chance(0.04):
        norm.train()
    return draft.let(f"self.{name}({current})")


# ── steps ────────────────────────────────────────────────────────────────────────────────────────


def _conv_norm(draft: _Draft, current: str) -> str:
    return _norm(draft, _producer(draft, current))


def _conv_neutral_norm(draft: _Draft, current: str) -> str:
    between = draft.pick(
        "Dropout", "Identity", "flatten", "contiguous", "swap", "relu", "roundtrip"
    )
    y = _producer(draft, current)
    value = draft.values[y]
    if between in ("Dropout", "Identity"):
        y = draft.let(f"self.{draft.add('neutral', getattr(nn, str(between))())}({y})")
    elif between == "flatten" and value.ndim == 3:
        y = draft.let(f"{y}.flatten(0, 1)")
    elif between == "flatten" and value.ndim > 3:
        y = draft.let(f"{y}.flatten(2)")
    elif between == "contiguous":
        y = draft.let(f"{y}.contiguous()")
    elif between == "swap" and value.ndim == 3:
        y = draft.let(f"{y}.transpose(1, 2)")
    elif between == "relu":
        y = draft.let(f"F.relu({y})")
    elif between == "roundtrip":
        y = draft.let(f"{y}.unsqueeze(0).squeeze(0)")
    return _norm(draft, y)


def _sequential(draft: _Draft, current: str) -> str:
    """Append an nn.Sequential of conv, norm, activation: adjacent by structure."""
    value = draft.values[current]
    if _dims(value) not in (1, 2, 3):
        return _conv_norm(draft, current)
    conv = _conv(draft, value)
    norm = _batch_norm(draft, conv(value))
    name = draft.add("block", nn.Sequential(conv, norm, nn.ReLU(inplace=draft.chance(0.5))))
    return draft.let(f"self.{name}({current})")


def _activation(draft: _Draft, current: str) -> str:
    expression = draft.pick(
        "F.relu({})",
        "torch.sigmoid({})",
        "F.silu({})",
        "F.hardtanh({}, 0.0, 6.0)",
        "{}.tanh()",
        "F.gelu({})",
        "{}.clamp(-3, 3)",
        "F.leaky_relu({}, 0.1)",
    )
    if draft.chance(0.2):
        return draft.let(f"self.{draft.add('relu', nn.ReLU())}({current})")
    return draft.let(str(expression).format(current))


def _in_place(draft: _Draft, current: str) -> str:
    fresh = draft.let(f"{current} * 1.5")
    if draft.chance(0.7):  # written in place between a producer and its norm, or after it
        fresh = _producer(draft, fresh)
    line = draft.pick(
        "{0} += 0.5",
        "{0}.mul_(0.75)",
        "F.relu({0}, inplace=True)",
        "{0}[:, 0] = 0.25",
        "{0}.clamp_(-2.0, 2.0)",
        "{0}.view(-1)[0] = 1.0",
        "{0}.detach().add_(0.5)",
    )
    if not draft.values[fresh].is_contiguous():
        line = "{0} += 0.5"
    draft.write(str(line).format(fresh))
    return _norm(draft, fresh)


def _second_user(draft: _Draft, current: str) -> str:
    """Append conv → norm where something else reads the conv's output too."""
    y = _producer(draft, current)
    extra = str(
        draft.pick("{}", "{}.mean()", "{}.view(-1)[:1]", "{}.detach()", "{}.flatten(1)", "{}[:1]")
    )
    if not draft.values[y].is_contiguous():
        extra = "{}.mean()"
    before = draft.chance(0.5)
    if before:
        view = draft.let(extra.format(y))
    z = _norm(draft, y)
    if not before:
        view = draft.let(extra.format(y))
    if draft.chance(0.4):
        draft.held.append(view)
        return z
    return draft.let(f"{z} + {view}.mean()")


def _residual(draft: _Draft, current: str) -> str:
    value = draft.values[current]
    if _dims(value) not in (1, 2, 3):
        return draft.let(f"{_activation(draft, current)} + {current}")
    conv = getattr(nn, f"Conv{_dims(value)}d")(
        value.shape[1], value.shape[1], 3, padding=1, bias=draft.chance(0.5), dtype=value.dtype
    )
    y = _norm(draft, draft.let(f"self.{draft.add('conv', conv)}({current})"))
    if draft.chance(0.3):
        draft.write(f"{y} += {current}")
        return y
    return draft.let(
        str(draft.pick("{0} + {1}", "torch.add({1}, {0})", "{0} * {1}.sigmoid()")).format(
            y, current
        )
    )


def _cat(draft: _Draft, current: str) -> str:
    other = _activation(draft, current)
    y = draft.let(f"torch.cat([{current}, {other}], 1)")
    return _norm(draft, y) if draft.chance(0.4) else y


def _split(draft: _Draft, current: str) -> str:
    y = _producer(draft, current) if draft.chance(0.5) else current
    if draft.values[y].shape[1] % 2:
        return y
    left, right = draft.name("x"), draft.name("x")
    draft.write(f"{left}, {right} = {y}.chunk(2, 1)")
    if draft.chance(0.5):
        left = _norm(draft, left)
    return draft.let(f"{left} * torch.sigmoid({right})" if draft.chance(0.5) else left)


def _shared(draft: _Draft, current: str) -> str:
    """Append two calls of one conv, or of one norm, or two convs tied to one weight."""
    value = draft.values[current]
    if _dims(value) not in (1, 2, 3):
        layer: nn.Module = nn.Linear(value.shape[-1], value.shape[-1], dtype=value.dtype)
        twin: nn.Module = nn.Linear(value.shape[-1], value.shape[-1], dtype=value.dtype)
    else:
        kind = getattr(nn, f"Conv{_dims(value)}d")
        layer, twin = (
            kind(value.shape[1], value.shape[1], 3, padding=1, dtype=value.dtype) for _ in "12"
        )
    first, second = draft.add("conv", layer), draft.add("conv", twin)
    what = draft.pick(
        "conv twice", "norm twice", "tied", "alias", "used as value", "tied transposed"
    )
    y = draft.let(f"self.{first}({current})")
    if what == "conv twice":
        y = _norm(draft, y)
        return draft.let(f"{y} + self.{first}({y})")
    if what == "norm twice":
        name = draft.add("bn", _batch_norm(draft, draft.values[y]))
        y = draft.let(f"self.{name}({y})")
        y = draft.let(f"self.{second}({y})")
        return draft.let(f"self.{name}({y})")
    if what == "tied":
        twin.weight = layer.weight
    elif what == "tied transposed":
        twin.weight = nn.Parameter(layer.weight.data.transpose(0, 1))  # same storage
    elif what == "alias":
        setattr(draft.model, second, layer)
    y = _norm(draft, y)
    y = draft.let(f"self.{second}({y})")
    if what == "used as value":
        return draft.let(f"{y} + self.{first}.weight.mean()")
    return _norm(draft, y)


def _branch(draft: _Draft, current: str) -> str:
    """Append a norm that runs for some shapes or some values only."""
    y = _producer(draft, current)
    value = draft.values[y]
    if value.ndim > 5:
        return y
    name = draft.add("bn", _batch_norm(draft, value))
    z = draft.name("x")
    condition = draft.pick(
        f"{y}.shape[-1] <= {value.shape[-1]}",
        f"{y}.shape[0] == 2",
        f"{current}.mean() < 0.3",
        f"bool(({y} > 0).any())",
        f"{current}.sum().item() < 0.5",
        "self.training",
        f"{y}.size(-1) % 2 == 0",
        "input.abs().max() < 3",
        f"len({y}) > 1",
    )
    other = draft.pick(y, f"self.{name}({y}) * 2", f"F.relu({y})")
    draft.write(f"if {condition}:", f"    {z} = self.{name}({y})", "else:", f"    {z} = {other}")
    return z


def _method(draft: _Draft, current: str) -> str:
    """Append conv → norm, and a public method that returns the conv's output."""
    y = _producer(draft, current)
    name = draft.name("features_")
    if draft.chance(0.5):
        draft.methods[name] = [*draft.lines, f"return {y}"]
    z = _norm(draft, y)
    draft.methods.setdefault(name, [*draft.lines, f"return {z} * 2"])
    return z


def _attribute(draft: _Draft, current: str) -> str:
    """Append conv → norm where the conv's output stays on the model."""
    y = _producer(draft, current)
    draft.write(f"self.kept = {y}")
    return _norm(draft, y)


def _shared_buffer(draft: _Draft, current: str) -> str:
    """Append conv → norm whose statistics another norm, or the model, reads too."""
    y = _producer(draft, current)
    z = _norm(draft, y)
    norms = [n for n, m in draft.model.named_children() if isinstance(m, nn.BatchNorm2d)]
    if not norms or getattr(draft.model, norms[-1]).running_mean is None:
        return z
    if draft.chance(0.5):
        return draft.let(f"{z} + self.{norms[-1]}.running_mean.mean()")
    return draft.let(f"{z} * self.{norms[-1]}.running_var.sum().sqrt() * 0.1")


def _late_reader(draft: _Draft, current: str) -> str:
    """Append conv → norm, and a use of the conv, or of its weight, for some inputs only."""
    y = _producer(draft, current)
    layer = next(reversed(dict(draft.model.named_children())))
    weighted = getattr(getattr(draft.model, layer), "weight", None) is not None
    z = _norm(draft, y)
    name = draft.name("x")
    use = f"self.{layer}({current}).mean()"
    if weighted and draft.chance(0.5):
        use = f"self.{layer}.weight.sum() * 0.1"
    condition = draft.pick(f"{current}.shape[0] == 3", f"{current}.mean() > 0.3", "len(input) > 2")
    draft.write(f"{name} = {z} + {use} if {condition} else {z}")
    return name


def _held(draft: _Draft, current: str) -> str:
    """Append conv → norm, where a plain list holds the conv, and a method takes it from there."""
    y = _producer(draft, current)
    layer = next(reversed(dict(draft.model.named_children())))
    attribute, method = draft.name("held_"), draft.name("features_")
    setattr(draft.model, attribute, [getattr(draft.model, layer)])
    called = [layer in line for line in draft.lines]  # (an inner one may have the same name)
    before = (
        draft.lines[: len(called) - 1 - called[::-1].index(True)] if any(called) else draft.lines
    )
    draft.methods[method] = [*before, f"return self.{attribute}[0]({current})"]
    return _norm(draft, y)


def _pool(draft: _Draft, current: str) -> str:
    value = draft.values[current]
    dims = _dims(value)
    if dims not in (1, 2, 3) or value.shape[-1] < 4:
        return current
    return draft.let(
        str(
            draft.pick(
                f"F.max_pool{dims}d({current}, 2)",
                f"F.avg_pool{dims}d({current}, 2)",
                f"F.interpolate({current}, scale_factor=2.0)"
                if value.numel() < 4000
                else f"F.max_pool{dims}d({current}, 2)",
            )
        )
    )


def _sequence(draft: _Draft, current: str) -> str:
    """Append a step between feature maps, sequences and vectors."""
    value = draft.values[current]
    if value.ndim == 2:
        return draft.let(f"{current}.unsqueeze(-1)") if draft.chance(0.3) else current
    return draft.let(
        str(
            draft.pick(
                f"{current}.flatten(2).transpose(1, 2)",
                f"{current}.flatten(2).mean(-1)",
                f"{current}.movedim(1, -1).contiguous().movedim(-1, 1)",
            )
        )
    )


def _mixed_dtype(draft: _Draft, current: str) -> str:
    if draft.values[current].dtype != torch.float32:
        return current
    draft.rough = True
    draft.model.low, draft.model.high = torch.bfloat16, torch.float32
    y = draft.let(f"{current}.to(self.low)")
    y = _producer(draft, y)
    if draft.chance(0.5):
        y = draft.let(f"{y}.to(self.high)")
    y = _norm(draft, y)
    return draft.let(f"{y}.to(self.high)")


def _nested(draft: _Draft, current: str) -> str:
    """Append a block with a class of its own, called once, twice, or past its own forward."""
    inner = _Draft(draft.random, draft.seed, nn.Module())
    inner.values["input"] = draft.values[current]
    y = inner.let("input")
    for _ in range(draft.random.randint(1, 3)):
        y = _step(inner, y, _SIMPLE_STEPS)
    source = _give_class(inner, f"Block{draft.names}", y)
    inner.model.source = source
    inner.model.training = False
    name = draft.name("block")
    setattr(draft.model, name, inner.model)
    draft.rough |= inner.rough
    layers = [n for n, m in inner.model.named_children() if n.startswith(("conv", "linear", "bn"))]
    uses = ["self.{0}({1})"] * 6 + ["self.{0}.forward({1})", "self.{0}(self.{0}({1}))"]
    uses += [f"self.{{0}}.{method}({{1}})" for method in inner.methods]
    if layers:
        layer = draft.random.choice(layers)
        uses.append(f"self.{{0}}({{1}}) + self.{{0}}.{layer}({{1}}).mean()")
        if getattr(inner.model, layer).weight is not None:
            uses.append(f"self.{{0}}({{1}}) + self.{{0}}.{layer}.weight.sum() * 0.1")
        if getattr(inner.model, layer).bias is not None:
            uses.append(f"self.{{0}}({{1}}) + getattr(self.{{0}}, {layer!r}).bias.sum() * 0.1")
    y = draft.let(draft.random.choice(uses).format(name, current))
    if layers and draft.chance(0.15):
        z, layer = draft.name("x"), draft.random.choice(layers)
        use = f"self.{name}.{layer}({current}).mean()"
        draft.write(f"{z} = {y} + {use} if {current}.shape[0] == 3 else {y}")
        y = z
    if inner.methods and draft.chance(0.5):
        method = draft.name("features_")
        call = f"return self.{name}.{next(iter(inner.methods))}({current})"
        draft.methods[method] = [*draft.lines, call]
    return y


def _by_index(draft: _Draft, current: str) -> str:
    """Append conv, norm, activation held in a list or Sequential and called one by one."""
    value = draft.values[current]
    if _dims(value) not in (1, 2, 3):
        return _conv_norm(draft, current)
    conv = _conv(draft, value)
    layers = [conv, _batch_norm(draft, conv(value)), nn.ReLU()]
    kind = draft.pick(nn.ModuleList, nn.Sequential)
    name = draft.add("layers", kind(layers))
    if draft.chance(0.5):
        y = draft.let(current)
        draft.write(f"for layer in self.{name}:", f"    {y} = layer({y})")
        return y
    y = draft.let(f"self.{name}[0]({current})")
    if draft.chance(0.2):
        return draft.let(f"self.{name}[1]({y}) + {y}.mean()")
    y = draft.let(f"self.{name}[1]({y})")
    return draft.let(f"self.{name}[-1]({y})")


_Step = Callable[[_Draft, str], str]
_SIMPLE_STEPS: tuple[tuple[int, _Step], ...] = (
    (14, _conv_norm),
    (6, _conv_neutral_norm),
    (5, _sequential),
    (6, _activation),
    (4, _in_place),
    (4, _second_user),
    (5, _residual),
    (3, _cat),
    (3, _split),
    (4, _shared),
    (4, _branch),
    (2, _method),
    (1, _attribute),
    (1, _shared_buffer),
    (2, _late_reader),
    (1, _held),
    (3, _pool),
    (2, _sequence),
    (1, _mixed_dtype),
    (3, _by_index),
)
_STEPS = (*_SIMPLE_STEPS, (8, _nested))


def _step(draft: _Draft, current: str, choices: tuple[tuple[int, _Step], ...]) -> str:
    weights, steps = zip(*choices, strict=True)
    step = draft.random.choices(steps, weights)[0]
    state = SimpleNamespace(
        lines=list(draft.lines), values=dict(draft.values), held=list(draft.held)
    )
    methods = dict(draft.methods)
    try:
        return step(draft, current)
    except (RuntimeError, ValueError, IndexError, TypeError):
        # This layer does not fit this value (a window larger than it, one value per channel …).
        draft.lines, draft.values, draft.held = state.lines, state.values, state.held
        draft.methods = methods
        return current

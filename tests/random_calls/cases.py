"""A random call of batch normalization, as plain values that can be printed and run again."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

FLOATS = ("float32", "float64", "bfloat16", "float16")

# (activation and parameter, with a residual, in place), so ordered that what is compiled first is used most.
FORMS: tuple[tuple[tuple[str, float] | None, bool, bool], ...] = (
    (None, False, False), (None, False, False), (("relu", 0.0), True, False), (("relu", 0.0), False, False),
    (("silu", 0.0), True, False), (None, True, False), (None, False, True), (("leaky_relu", 0.25), False, True),
    (("gelu", 0.0), False, False), (("leaky_relu", 0.25), True, False), (("elu", 1.5), False, False),
    (("hardswish", 0.0), False, False), (("relu6", 0.0), True, False), (("elu", 0.5), False, True),
    (("gelu_tanh", 0.0), False, False), (("silu", 0.0), False, False), (("hardswish", 0.0), True, False),
    (("leaky_relu", 0.25), False, False), (("elu", 1.0), True, False), (("gelu", 0.0), True, False),
    (("relu6", 0.0), False, False), (("gelu_tanh", 0.0), True, False),
)  # fmt: skip
FEW_FORMS = 3  # of them, where compiling must not take long
FORM_EVERY = 400  # cases: so often another form joins

LAYOUTS = ("channels_last", "gaps", "batch_last", "sliced_channels", "sliced_batch", "odd", "odd_channels_last")
GRADS = (
    *LAYOUTS, "contiguous", "scalar", "per_sample", "per_channel", "over_space", "over_last", "over_batch",
    "over_channels", "reversed", "neg", "wider", "narrower",
)  # fmt: skip
HOOKS = ("clone", "relayout", "numpy", "neg", "gaps", "double", "bfloat16")
BETWEEN = (
    "x_inplace", "weight_inplace", "bias_inplace", "residual_inplace", "y_inplace", "weight_double", "weight_half",
    "weight_short", "weight_strided", "bias_double", "layer_half", "layer_double", "moved",
)  # fmt: skip
TRANSFORMS = (
    "double", "double", "batched", "vmap", "vmap_weight", "jvp", "jacrev", "vjp", "dual", "dual_grad", "hessian",
    "vmap_grads",
)  # fmt: skip
BAD = (
    "weight_size", "bias_size", "running_mean_size", "running_var_size", "weight_dtype", "bias_dtype", "weight_rank",
    "weight_device", "running_mean_device", "x_int", "x_complex", "x_rank", "x_channels", "x_sparse", "one_value",
    "eps_zero", "eps_negative", "momentum", "momentum_none", "statistics_missing", "one_statistic", "residual_size",
    "residual_dtype", "residual_device", "mask_size", "mask_dtype", "mask_negative", "mask_nan", "mask_grad",
    "activation_name", "activation_type", "policy_type", "state_size", "state_missing", "inplace_leaf", "inplace_relu",
    "inplace_expanded", "inplace_weight", "renorm_statistics", "ghost_rest",
)  # fmt: skip
MASKS = ("all", "some", "few", "nothing", "sample", "first", "weights", "small_weights", "broadcast", "broadcast_batch")
POLICIES = (
    "Batch()", "Ghost(1)", "Ghost(2)", "Ghost(3)", "Ghost(4)", "Ghost(100)", "Renorm(schedule=None)",
    "Renorm(1.5, 0.5, Warmup(0, 2, 2))", "Accumulated(1)", "Accumulated(2)", "Accumulated(2, over=Ghost(2))", "Sync()",
    "Renorm(schedule=None, over=Sync())", "Accumulated(2, over=Sync())",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call, or several in a row with the same parameters and buffers; `run.run` says what is wrong with it."""

    seed: int
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    neg: bool = False  # the input has the negative bit set
    scale: float = 1.0  # of the channels' deviations
    ratio: float = 1.0  # of their means and deviations
    special: str = ""  # a constant channel; nan or inf somewhere in the first channel
    training: bool = True
    kernel: str = ""  # asked for by name
    call: str = "function"
    weight: str = "plain"
    bias: str = "plain"
    buffers: str = "plain"
    counted: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    activation: tuple[str, float] | None = None
    residual: str = ""  # its layout
    inplace: bool = False
    mask: str = ""
    mask_dtype: str = "bool"
    policy: str = ""
    grad: str = "same"  # the layout of what comes back
    wanted: str = "xwbr"  # which gradients
    batches: int = 1
    hooks: str = ""
    between: str = ""  # what changes between the forward and the backward
    transform: str = ""
    bad: str = ""  # which argument does not fit
    threads: int = 1
    division: str = "usual"  # how the work is cut
    memory: str = ""  # which guard

    def __str__(self) -> str:
        """A line of Python that makes the same case."""
        given = ((f, getattr(self, f.name)) for f in fields(self))
        return f"Case({', '.join(f'{f.name}={value!r}' for f, value in given if value != f.default)})"

    def snippet(self) -> str:
        """What to paste into Python, started beside `tests`, to run it again."""
        return f"from tests.random_calls import Case, run; print(run({self}))"

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def values(self) -> int:
        """Of a channel."""
        n = self.shape[0]
        for size in self.shape[2:]:
            n *= size
        return n


def draw(seed: int, index: int, few: bool = False) -> Case:
    """The index-th case of a seed; `few` keeps to few compiled forms."""
    rng = random.Random(f"{seed}/{index}")
    known = FEW_FORMS if few else min(len(FORMS), FEW_FORMS + index // FORM_EVERY)
    activation, has_residual, inplace = FORMS[rng.randrange(known)]
    dtype = rng.choices(FLOATS, (12, 1, 1, 1) if few else (10, 4, 4, 1))[0]
    kind = rng.choices(("plain", "hooks", "between", "transform", "bad"), (56, 14, 12, 12, 6))[0]
    training = rng.random() < 0.8
    shape = _shape(rng, small=kind == "transform", rare=index % 17 == 0)
    case: dict[str, object] = {
        "seed": rng.randrange(10**6),
        "shape": shape,
        "dtype": dtype,
        "layout": rng.choices(("contiguous", *LAYOUTS), (8, 4, *(1,) * (len(LAYOUTS) - 1)))[0],
        "neg": rng.random() < 0.04,
        "training": training,
        "call": "layer" if kind not in ("transform",) and len(shape) <= 5 and rng.random() < 0.5 else "function",
        "weight": rng.choices(("plain", "none", "strided", "neg", "wide"), (12, 2, 1, 1, 2))[0],
        "bias": rng.choices(("plain", "none", "strided", "neg", "wide"), (12, 2, 1, 1, 2))[0],
        "buffers": rng.choices(("plain", "none", "strided", "double", "odd"), (12, 3, 1, 1, 1))[0],
        "counted": rng.random() < 0.9,
        "momentum": rng.choice((0.1, 0.1, 0.0, 1.0, None)),
        "eps": rng.choice((1e-5, 1e-5, 1e-3, 1.0, 1e-10)),
        "activation": activation,
        "residual": rng.choice(("same", "same", "contiguous", *LAYOUTS, "neg", "expanded")) if has_residual else "",
        "inplace": inplace,
        "grad": rng.choice(("same", "same", "same", "contiguous", *GRADS)),
        "wanted": rng.choice(("xwbr", "xwbr", "xwbr", "x", "wb", "w", "b", "xr", "r", "xb")),
        "threads": rng.choice((1, 2, 3)),
        "division": rng.choices(("usual", "fine", "streamed"), (3, 2, 1))[0],
        "memory": rng.choices(("bands", "fence_after", "fence_before", ""), (3, 2, 2, 1))[0],
    }
    if rng.random() < 0.3:
        case["mask"] = rng.choice(MASKS)
        case["mask_dtype"] = rng.choice(("bool", "bool", "float32", "float64"))
    if training and rng.random() < 0.35:
        case["policy"] = rng.choice(POLICIES)
        case["batches"] = rng.choice((1, 2, 3))
    if kind == "plain" and dtype in ("float32", "float64") and not inplace:
        case["scale"] = rng.choices((1.0, 1e-3, 1e3, 1e-14), (12, 2, 2, 1))[0]
        case["ratio"] = rng.choices((1.0, 30.0, 1e4, 1e6), (12, 4, 2, 1))[0]
        if case["scale"] == 1e-14:
            case["eps"] = 1e-30
    if kind == "plain" and rng.random() < 0.06:
        case["special"] = rng.choice(("constant", "constant", "nan", "inf"))
    if kind != "plain":
        case[kind] = rng.choice({"hooks": HOOKS, "between": BETWEEN, "transform": TRANSFORMS, "bad": BAD}[kind])
    if kind == "bad":
        return Case(case["seed"], _shape(rng, True, False), dtype, training=training, buffers="plain", bad=case["bad"])  # type: ignore[arg-type]
    if not training and dtype != "float16" and not case["neg"] and kind != "transform" and rng.random() < 0.6:
        case["kernel"] = "numba"
    made = Case(**case)  # type: ignore[arg-type]
    return _consistent(_cheap(made) if few else made)


def _cheap(case: Case) -> Case:
    """The case without what only it would compile."""
    plain = case.dtype != "float32" or not case.training or case.transform or "Sync" in case.policy
    if plain:
        case = replace(case, activation=None, residual="", inplace=False)
    if case.dtype != "float32" or case.activation is not None or "Sync" in case.policy:
        case = replace(case, mask="")
    return case


def _shape(rng: random.Random, small: bool, rare: bool) -> tuple[int, ...]:
    if small:
        return rng.choice(((3, 2), (5, 3), (2, 3, 4), (2, 2, 2, 3), (3, 2, 2, 1, 2), (2, 9, 7)))
    batch = rng.choice((1, 2, 2, 3, 5, 8, 9))
    channels = rng.choice((1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 33, *((511, 512, 513) if rare else ())))
    space = rng.choice((
        (), (), (1,), (7,), (31,), (32,), (33,), (67,), (1, 1), (2, 2), (3, 3), (4, 8), (7, 7), (9, 11), (16, 16),
        (2, 3, 5), (3, 3, 3), (1, 6, 8), (2, 3, 1, 2),
    ))  # fmt: skip
    if rng.random() < 0.02:
        return (0, channels, *space) if rng.random() < 0.7 or not space else (batch, channels, *space[:-1], 0)
    if not space:
        batch = rng.choice((batch, 17, 65, 131))
    if rare:  # beyond what is done in one go, or around the length of a part
        return rng.choice((
            (2, 3, 104, 106), (1, 1, 16383), (1, 1, 16385), (2, 2, 16384), (3, 5, 120, 125), (130, 513), (5, 9, 70, 71),
            (1, 2, 32769), (257, 256), (8, 512, 4, 5), (batch, channels, *space),
        ))  # fmt: skip
    return (batch, channels, *space)


def _consistent(case: Case) -> Case:
    """The case without what its parts do not allow together; what is left may be refused only as torch would."""
    case = _transformed(case) if case.transform else _called(case)
    if not case.training and case.buffers == "none":
        case = replace(case, buffers="plain")
    if case.inplace:
        flat = case.activation is not None and case.activation[0] == "elu" and case.dtype in ("bfloat16", "float16")
        case = replace(case, residual="", activation=None if flat else case.activation)
    if case.values == 0 or len(case.shape) > 5:
        case = replace(case, kernel="", special="", between="", call="function")
    if case.dtype in ("float32", "float64"):
        case = replace(case, **{name: "plain" for name in ("weight", "bias") if getattr(case, name) == "wide"})
    if case.special:
        case = replace(case, mask="", policy="")
        if case.special != "constant" and case.activation is not None and case.activation[0] != "relu":
            case = replace(case, activation=None)
    return _countable(case)


def _transformed(case: Case) -> Case:
    """A function of x, weight and bias, small and tame."""
    mask = "" if case.mask in ("nothing", "weights", "small_weights") else case.mask
    own = case.transform in ("double", "batched", "dual_grad", "vmap_grads")  # those in which loops may run
    return replace(
        case, buffers="none" if case.training else "plain", batches=1, grad="same", wanted="xwb", neg=False,
        inplace=False, residual="", kernel="", threads=1, mask=mask, mask_dtype="bool",
        policy=case.policy if case.policy.startswith("Ghost") else "", memory=case.memory if own else "",
    )  # fmt: skip


def _called(case: Case) -> Case:
    if "Sync" in case.policy:
        case = replace(case, between="", hooks="", inplace=False)
    if case.policy.startswith(("Renorm", "Accumulated")) and case.buffers == "none":
        case = replace(case, buffers="plain")
    by_loops = case.dtype != "float16" and not case.neg and len(case.shape) <= 5
    by_loops = by_loops and (case.training or case.kernel == "numba")
    if not by_loops and not case.between.endswith("inplace"):
        case = replace(case, between="")  # torch's kernels read outside of tensors that have become smaller
    if case.between.startswith(("layer", "moved")):
        case = replace(case, call="layer")
    return replace(case, batches=1) if case.between else case  # the next call is another story


def _countable(case: Case) -> Case:
    """Whether batches are counted, and how they are averaged."""
    if case.transform:
        return replace(case, counted=False, momentum=0.1)
    if case.call == "layer":
        missing = case.buffers == "none" and case.momentum is None
        return replace(case, counted=case.buffers != "none", momentum=0.1 if missing else case.momentum)
    needed = case.momentum is None or case.policy.startswith("Renorm")
    return replace(case, counted=case.counted or needed)

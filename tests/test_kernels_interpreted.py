"""Every Triton kernel, forward and backward, against its plain PyTorch twin in float64; then in the
networks.

Natively on a GPU, else by Triton's interpreter, which conftest.py chooses. torch.empty gives NaN:
what a kernel forgets to write shows.
"""

import importlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

import kernels.reference as twin
from kernels import choose

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Hopper's tf32 truncates: gradients are up to 8.5e-3 off.
TOLERANCE = {torch.float32: 2e-7, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
torch.backends.cudnn.allow_tf32 = False  # the twins' own convolutions round to it by default
fir_module = importlib.import_module("kernels.fir")
modconv_module = importlib.import_module("kernels.modconv")
backward_module = importlib.import_module("kernels.mostatt_backward")
mostatt_module = importlib.import_module("kernels.mostatt")  # `kernels.mostatt` itself is the op


if not GPU:
    # The interpreter's loop counters are Python's, and meet the constants of a Shape from the left.
    tl.constexpr.__rmod__ = lambda constant, number: number % constant.value
    tl.constexpr.__rfloordiv__ = lambda constant, number: number // constant.value
    # The interpreter puts itself into triton.language at every launch, and again for every call of
    # a helper, which takes half of the time: once for each module of helpers is enough.
    patched = set()

    def call(helper, *args, **options):
        if helper.fn.__module__ not in patched:
            patched.add(helper.fn.__module__)
            interpreter._patch_lang(helper.fn)
        return helper.rewrite()(*args, **options)

    interpreter.InterpretedFunction.__call__ = call

    # By NumPy, products would round as its BLAS does for this processor: up to 3.6e-7.
    def dot(_, a, b, d, *options):
        exact = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(exact.astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    monkeypatch.setattr(choose, "mode", "triton")
    monkeypatch.setattr(choose, "devices", {"cuda", "cpu"})
    monkeypatch.setattr(modconv_module, "tma_anywhere", not GPU)


@pytest.fixture(autouse=True)
def poisoned_buffers():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, seed, dtype):
    """A leaf in float64 whose values `dtype` holds exactly."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).double().to(DEVICE)


def close(out, ref, tolerance, what):
    assert out.shape == ref.shape, f"{what}: shape {tuple(out.shape)}, not {tuple(ref.shape)}"
    error = ((out.double() - ref).norm() / ref.norm().clamp_min(1e-30)).item()
    print(f"  {what}: {error:.1e}")
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance}"


def compare(op, reference, inputs, dtype, outputs, layouts=None):
    """Outputs and gradients of op in `dtype` against reference in float64, for random
    cotangents.
    """
    exact = [None if x is None else x.clone().requires_grad_() for x in inputs]
    tested = [None if x is None else x.to(dtype).clone() for x in inputs]
    for i, layout in (layouts or {}).items():
        tested[i] = layout(tested[i])
    tested = [None if x is None else x.detach().requires_grad_() for x in tested]
    refs, outs = reference(*exact), op(*tested)
    refs, outs = ([x] if torch.is_tensor(x) else list(x) for x in (refs, outs))
    for name, out, ref in zip(outputs, outs, refs):
        close(out, ref, TOLERANCE[dtype], name)
    cotangents = [
        randn(*ref.shape, seed=100 + i, dtype=dtype) / ref.numel() ** 0.5
        for i, ref in enumerate(refs)
    ]
    wanted = [i for i, x in enumerate(exact) if x is not None]
    grads = torch.autograd.grad(refs, [exact[i] for i in wanted], cotangents)
    cotangents = [c.to(out.dtype) for c, out in zip(cotangents, outs)]
    tested_grads = torch.autograd.grad(outs, [tested[i] for i in wanted], cotangents)
    for i, grad, ref in zip(wanted, tested_grads, grads):
        assert grad.dtype == dtype
        close(grad, ref, TOLERANCE[dtype], f"gradient {i}")


def channels_last(x):
    """[.., C, H, W] in memory order [.., H, W, C]."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


MOSTATT = [  # B, T, O, I, k, K, R, and how the styles come
    (1, 1, 5, 7, 3, 1, 1, "content_first"),
    (2, 3, 6, 5, 3, 8, 1, "content_first"),
    (2, 3, 6, 5, 3, 8, 1, "motion_first"),
    (2, 3, 6, 5, 3, 8, 1, "weight_per_clip"),
    (1, 4, 9, 3, 3, 6, 3, "motion_first"),
    (2, 1, 4, 11, 3, 10, 10, "content_first"),
    (2, 1, 4, 11, 3, 10, 10, "weight_per_clip"),
    (2, 2, 7, 9, 1, 16, 3, "motion_first"),
    (2, 1, 35, 37, 1, 8, 1, "content_first"),
    (1, 1, 33, 34, 1, 1, 2, "motion_first"),
    (1, 1, 33, 34, 3, 1, 2, "weight_per_clip"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, T, O, I, k, K, R, order", MOSTATT, ids=str)
def test_mostatt(B, T, O, I, k, K, R, order, dtype):
    """As training calls it, the weights raw and one content style per clip; and as sampling does,
    styles inside.
    """
    weight = randn(B if order == "weight_per_clip" else 1, O, I, k, k, seed=1, dtype=dtype)
    style = randn(B * T, K, R, I + 2 * k, seed=2, dtype=dtype)
    content_style = None if order == "weight_per_clip" else randn(B, I, seed=3, dtype=dtype)
    first = order == "content_first"
    layout = torch.Tensor.contiguous if B == 1 else channels_last
    compare(
        lambda *args: mostatt_module.mostatt(*args, content_first=first),
        lambda *args: twin.mostatt_demod(*args, content_first=first),
        [weight, style, content_style],
        dtype,
        ["weight", "score", "demod"],
        {0: layout},
    )
    out = mostatt_module.mostatt(weight.to(dtype), style.to(dtype))[0]
    assert out.movedim(2, -1).is_contiguous()


def test_mostatt_adds_frames_up_in_groups(monkeypatch):
    """The gradient of the weights where a GPU has too few programs, and each takes a part of the
    frames.
    """
    monkeypatch.setattr(backward_module, "frames_of_a_program", lambda frames, programs: 2)
    weight, style = (
        randn(*size, seed=1, dtype=torch.float32) for size in ((2, 5, 7, 3, 3), (8, 3, 1, 13))
    )
    compare(
        mostatt_module.mostatt,
        twin.mostatt_demod,
        [weight, style],
        torch.float32,
        ["weight", "score", "demod"],
    )


def test_mostatt_in_the_dtypes_of_training():
    """Weights in float32, styles and W' in bfloat16 or float32, as autocast has them."""
    style_dtype = torch.bfloat16 if GPU else torch.float32  # bfloat16 is garbage in the interpreter
    weight, s = (
        randn(*size, seed=1, dtype=torch.float32).float() for size in ((1, 9, 7, 3, 3), (2, 7))
    )
    style = randn(6, 8, 1, 13, seed=2, dtype=style_dtype).to(style_dtype)
    outs = mostatt_module.mostatt(weight, style, s, style_dtype, content_first=True)
    refs = twin.mostatt_demod(weight.double(), style.double(), s.double(), content_first=True)
    for name, out, ref in zip(("weight", "score", "demod"), outs, refs):
        close(out, ref, TOLERANCE[style_dtype], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, C, H, layout, up, clamp",
    [
        (2, 3, 5, channels_last, 1, None),
        (2, 3, 5, channels_last, 2, 1.0),
        (1, 70, 9, torch.Tensor.contiguous, 1, 1.0),
        (1, 70, 5, torch.Tensor.contiguous, 2, None),
        (1, 5, 17, channels_last, 1, None),
        (1, 5, 17, channels_last, 2, None),
    ],
)
def test_epilogue(N, C, H, layout, up, clamp, dtype):
    x = randn(N, C, H, H + 2, seed=1, dtype=dtype)
    demod = (randn(N, C, seed=2, dtype=dtype).abs() + 0.25).to(dtype).double()
    bias = randn(C, seed=3, dtype=dtype)
    compare(
        lambda *a: fir_module.epilogue_op(*a, up, clamp),
        lambda *a: twin.epilogue(*a, up=up, clamp=clamp),
        [x, demod, bias],
        dtype,
        ["y"],
        {0: layout},
    )


FIR = {
    "plain pad 1": (4.0, 1, 1),
    "plain pad 2": (1.0, 1, 2),
    "plain pad 0": (1.0, 1, 0),
    "stride 2": (1.0, 2, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gain, stride, padding", FIR.values(), ids=FIR.keys())
@pytest.mark.parametrize("N, C, H, W", [(2, 3, 4, 6)])
def test_fir(N, C, H, W, gain, stride, padding, transposed, dtype):
    def twice(op):
        def of(
            x,
        ):  # y, and a function of y's gradient: compare's gradient is then a second derivative
            y = op(x, gain, stride, padding, transposed)
            (grad,) = torch.autograd.grad((y * y * y).sum(), x, create_graph=True)
            return y, grad

        return of

    x = randn(N, C, H, W, seed=1, dtype=dtype)
    compare(
        twice(fir_module.fir_op),
        twice(twin._Fir.apply),
        [x],
        dtype,
        ["y", "gradient"],
        {0: channels_last},
    )


def every_candidate(op, inputs, ref, tolerance):
    """Triton's at the tolerance of all kernels; the libraries' convolutions sum in an order of
    their own.
    """
    for name, run in op.candidates.items():
        close(run(*inputs), ref, tolerance if name.startswith("Triton") else 10 * tolerance, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, O, I, H, k, up, layout",
    [
        (2, 5, 7, 4, 3, 1, torch.Tensor.contiguous),
        (2, 5, 7, 4, 3, 2, torch.Tensor.contiguous),
        (2, 5, 7, 4, 3, 2, channels_last),
        (1, 35, 33, 7, 3, 1, channels_last),
        (1, 35, 33, 6, 3, 2, torch.Tensor.contiguous),
        (3, 3, 17, 5, 1, 1, torch.Tensor.contiguous),
        (3, 3, 17, 5, 1, 2, channels_last),
    ],
)
def test_modconv(N, O, I, H, k, layout, up, dtype):
    x, weight = (
        randn(N, I, H, H + 1, seed=1, dtype=dtype),
        randn(N, O, I, k, k, seed=2, dtype=dtype),
    )
    compare(
        lambda *a: modconv_module.conv2d(*a, up=up),
        lambda *a: twin.conv2d_per_frame(*a, up=up),
        [x, weight],
        dtype,
        ["y"],
        {0: layout, 1: layout},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("N, O, I, H, k", [(2, 5, 8, 4, 3), (1, 35, 40, 6, 3), (3, 3, 16, 5, 1)])
def test_modconv_by_every_candidate(N, O, I, H, k, up, dtype):
    x, weight = (
        randn(N, I, H, H + 1, seed=1, dtype=dtype),
        randn(N, O, I, k, k, seed=2, dtype=dtype),
    )
    ref = twin.conv2d_per_frame(x, weight, up)
    inputs = x.to(dtype), weight.to(dtype), "up" if up == 2 else "same"
    every_candidate(modconv_module.CONV, inputs, ref, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("N, O, I, H, k", [(2, 5, 8, 4, 3), (1, 35, 40, 6, 3)])
def test_modconv_with_its_epilogue(N, O, I, H, k, clamp, dtype):
    x, weight = (
        randn(N, I, H, H + 1, seed=1, dtype=dtype),
        randn(N, O, I, k, k, seed=2, dtype=dtype),
    )
    # As in the network, where it divides by about the norm of a kernel.
    demod = (randn(N, O, seed=3, dtype=dtype).abs() + 0.25) / (I * k * k) ** 0.5
    demod, bias = demod.to(dtype).double(), randn(O, seed=4, dtype=dtype)

    def plain(*args):
        return twin.conv2d_epilogue(*args, clamp=clamp)

    compare(
        lambda x, weight, *epilogue: modconv_module.conv2d(x, weight, 1, *epilogue, clamp),
        plain,
        [x, weight, demod, bias],
        dtype,
        ["y"],
    )
    x, weight, demod, bias = (v.to(dtype) for v in (x, weight, demod, bias))
    ref = plain(*(v.double() for v in (x, weight, demod, bias)))
    inputs = x, weight, "same", demod, bias, clamp
    every_candidate(modconv_module.CONV, inputs, ref, TOLERANCE[dtype])


OPS = [
    mostatt_module.MOSTATT,
    backward_module.BACKWARD,
    fir_module.EPILOGUE,
    fir_module.EPILOGUE_BACKWARD,
    modconv_module.CONV,
    modconv_module.GRAD_WEIGHT,
]


MODEL = dict(
    resolution=32,
    channel_base=128,
    channel_max=8,
    z_dim=8,
    w_dim=8,
    motion_noise_dim=8,
    motion_code_dim=16,
    num_frequencies=8,
    motion_vector_dim=4,
    motion_styles=2,
    motion_resolutions=(4, 8),
)
RELEASE = dict(
    modulation_order="motion_first",
    prenorm_resolutions=(4, 8),
    motion_demod_only_resolutions=(4,),
    rank=2,
)


@pytest.mark.parametrize(
    "compiled, variant, t",
    [(True, {}, [[0, 2.5]]), (False, RELEASE, [[7], [8.5]])],
    ids=["compiled", "eager"],
)
def test_generator(compiled, variant, t, monkeypatch):
    """Frames, scores and every parameter's gradient, with the kernels in their places: eagerly, or
    in one graph.
    """
    from mostgan.config import ModelConfig
    from mostgan.model import Generator

    torch.manual_seed(0)
    generator = Generator(ModelConfig(**MODEL | variant)).to(DEVICE)
    z, noise = (
        randn(*shape, seed=1, dtype=torch.float32) for shape in ((len(t), 8), (len(t), 24, 8))
    )
    t = torch.tensor(t, dtype=torch.float64, device=DEVICE)

    def of(x, dtype, function):
        generator.to(dtype)
        frames, scores = function(z.to(dtype), t, noise.to(dtype), None, None, 1.0, True)
        outputs = [frames, *scores]
        total = sum(
            (out * randn(*out.shape, seed=2 + i, dtype=dtype).to(dtype)).sum()
            for i, out in enumerate(outputs)
        )
        return outputs, torch.autograd.grad(total, list(generator.parameters()), allow_unused=True)

    outputs, grads = of(z, torch.float64, generator)
    ours = torch.compile(generator, fullgraph=True, backend="aot_eager") if compiled else generator
    for op in OPS:
        for name, run in op.candidates.items():
            monkeypatch.setitem(op.candidates, name, Mock(side_effect=run))
    our_outputs, our_grads = of(z, torch.float32, ours)
    for op in OPS:
        ran = [name for name, run in op.candidates.items() if run.called]
        assert ran and all(name.startswith("Triton") for name in ran), (op.name, ran)
    for i, (out, ref) in enumerate(zip(our_outputs, outputs)):
        close(out, ref, 1e-5, f"output {i}")
    for (name, _), grad, ref in zip(generator.named_parameters(), our_grads, grads):
        if ref is not None:
            close(grad, ref, 1e-4, name)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(monkeypatch, kernels):
    """What a compiler is told of an op agrees with what its launcher, or its twin, makes."""
    from torch._subclasses import FakeTensorMode

    monkeypatch.setattr(choose, "mode", kernels)

    def t(*shape):
        return torch.randn(shape, device=DEVICE)

    score, demod, x, y = t(2, 5, 3), t(2, 5), t(2, 7, 5, 6), t(2, 5, 11, 13)
    weight, style, content_style = t(1, 5, 7, 3, 3), t(2, 3, 1, 13), t(2, 7)
    of_frames, peak = channels_last(t(2, 5, 7, 3, 3)), t(2, 1).abs()
    saved = (score, demod, peak)
    ops = torch.ops.mostgan
    calls = [
        (ops.mostatt, weight, style, content_style, torch.bfloat16, True, True),
        (ops.mostatt, weight, style, None, torch.float32, False, False),
        (
            ops.mostatt_backward,
            of_frames,
            score,
            demod,
            weight,
            style,
            content_style,
            *saved,
            torch.float32,
            True,
        ),
        (
            ops.mostatt_backward,
            t(0),
            score,
            demod,
            weight,
            style,
            None,
            *saved,
            torch.float32,
            False,
        ),
        (ops.conv2d_per_frame, x, of_frames, "same", t(2, 5), t(5), None),
        (ops.fir, x, 1.0, 1, 2, False),
        (ops.fir, x, 1.0, 1, 2, True),
        (ops.fir, t(2, 3, 4, 6), 1.0, 2, 1, False),
        (ops.fir, x, 4.0, 2, 1, True),
        (ops.epilogue, x, t(2, 7), t(7), 2, None),
        (ops.epilogue_backward, x, x, t(2, 7), t(7), 2, 1.0),
        *((ops.conv2d_per_frame, x, of_frames, mode, None, None, None) for mode in ("same", "up")),
        (ops.conv2d_per_frame, y, of_frames, "down", None, None, None),
        (ops.conv2d_per_frame, t(2, 5, 5, 6), of_frames, "flipped", None, None, None),
        (ops.conv2d_per_frame_grad_weight, y, x, 3, "up"),
    ]
    for op, *args in calls:
        real = op(*args)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = op(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in args))
        for r, f in zip(*([o] if torch.is_tensor(o) else o for o in (real, fake))):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), (
                f"{op}: {r.stride()} {f.stride()}"
            )

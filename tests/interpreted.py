"""Every Triton kernel, forward and backward, against its plain PyTorch twin in float64; then in the networks.

Not collected by itself: test_kernels.py runs it in a process of its own, natively on a GPU, else with
TRITON_INTERPRET=1 (Triton reads the variable when it is imported). torch.empty gives NaN: what a kernel forgets to
write shows.
"""

import importlib
from unittest.mock import Mock

import pytest
import torch

import kernels
import kernels.reference as twin

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
torch.backends.cudnn.allow_tf32 = False  # the twins' own convolutions round to it by default
fir_module = importlib.import_module("kernels.fir")
modconv_module = importlib.import_module("kernels.modconv")
mostatt_module = importlib.import_module("kernels.mostatt")  # `kernels.mostatt` itself is the op


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
    """Outputs and gradients of op in `dtype` against reference in float64, for random cotangents."""
    exact = [None if x is None else x.clone().requires_grad_() for x in inputs]
    tested = [None if x is None else x.to(dtype).clone() for x in inputs]
    for i, layout in (layouts or {}).items():
        tested[i] = layout(tested[i])
    tested = [None if x is None else x.detach().requires_grad_() for x in tested]
    refs, outs = reference(*exact), op(*tested)
    refs, outs = ([x] if torch.is_tensor(x) else list(x) for x in (refs, outs))
    for name, out, ref in zip(outputs, outs, refs):
        close(out, ref, TOLERANCE[dtype], name)
    cotangents = [randn(*ref.shape, seed=100 + i, dtype=dtype) / ref.numel() ** 0.5 for i, ref in enumerate(refs)]
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


MOSTATT = [  # B, T, O, I, k, K, R
    (1, 1, 5, 7, 3, 1, 1), (2, 3, 6, 5, 3, 8, 1), (1, 4, 9, 3, 3, 6, 3), (2, 1, 4, 11, 3, 10, 10),
    (2, 2, 7, 9, 1, 16, 3), (2, 1, 35, 37, 1, 8, 1), (1, 2, 33, 34, 3, 1, 2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order, layout", [("content_first", torch.Tensor.contiguous), ("content_first", channels_last),
                                           ("motion_first", channels_last)])  # fmt: skip
@pytest.mark.parametrize("B, T, O, I, k, K, R", MOSTATT, ids=lambda v: str(v))
def test_mostatt(B, T, O, I, k, K, R, order, layout, dtype):
    clips = B if order == "content_first" else 1
    content = randn(clips, O, I, k, k, seed=1, dtype=dtype)
    style = randn(B * T, K, R, I + 2 * k, seed=2, dtype=dtype)
    clip_style = None if order == "content_first" else randn(B, I, seed=3, dtype=dtype)
    compare(mostatt_module.mostatt, twin.mostatt_demod, [content, style, clip_style], dtype,
            ["weight", "score", "demod"], {0: layout})  # fmt: skip
    out = mostatt_module.mostatt(content.to(dtype), style.to(dtype))[0]
    assert out.movedim(2, -1).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("up, clamp", [(1, None), (2, None), (2, 1.0)])
@pytest.mark.parametrize("N, C, H, layout", [(2, 3, 5, channels_last), (1, 70, 9, torch.Tensor.contiguous),
                                             (2, 5, 19, channels_last)])  # fmt: skip
def test_epilogue(N, C, H, layout, up, clamp, dtype):
    x = randn(N, C, H, H + 2, seed=1, dtype=dtype)
    demod = (randn(N, C, seed=2, dtype=dtype).abs() + 0.25).to(dtype).double()
    bias = randn(C, seed=3, dtype=dtype)
    compare(lambda *a: fir_module.epilogue(*a, up=up, clamp=clamp), lambda *a: twin.epilogue(*a, up=up, clamp=clamp),
            [x, demod, bias], dtype, ["y"], {0: layout})  # fmt: skip


FIR = {"plain pad 1": (4.0, 1, 1), "plain pad 2": (1.0, 1, 2), "plain pad 0": (1.0, 1, 0), "stride 2": (1.0, 2, 1)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gain, stride, padding", FIR.values(), ids=FIR.keys())
@pytest.mark.parametrize("N, C, H, W", [(2, 3, 6, 8), (1, 5, 4, 18)])
def test_fir(N, C, H, W, gain, stride, padding, transposed, dtype):
    def twice(op):
        def of(x):  # y, and a function of y's gradient: compare's gradient is then a second derivative
            y = op(x, gain, stride, padding, transposed)
            (grad,) = torch.autograd.grad((y * y * y).sum(), x, create_graph=True)
            return y, grad

        return of

    x = randn(N, C, H, W, seed=1, dtype=dtype)
    compare(twice(fir_module.fir_op), twice(twin._Fir.apply), [x], dtype, ["y", "gradient"], {0: channels_last})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("N, O, I, H, k", [(2, 5, 7, 4, 3), (1, 35, 33, 7, 3), (3, 3, 17, 5, 1)])
def test_modconv(N, O, I, H, k, layout, up, dtype):
    x, weight = randn(N, I, H, H + 1, seed=1, dtype=dtype), randn(N, O, I, k, k, seed=2, dtype=dtype)
    compare(lambda *a: modconv_module.conv2d_per_frame(*a, up=up), lambda *a: twin.conv2d_per_frame(*a, up=up),
            [x, weight], dtype, ["y"], {0: layout, 1: layout})  # fmt: skip


LAUNCHERS = [(mostatt_module, "forward"), (fir_module, "epilogue_launch"), (fir_module, "epilogue_backward_launch"),
             (modconv_module, "conv_launch"), (modconv_module, "grad_weight_launch")]  # fmt: skip


MODEL = dict(
    resolution=32, channel_base=128, channel_max=8, z_dim=8, w_dim=8, motion_noise_dim=8, motion_code_dim=16,
    num_frequencies=8, motion_vector_dim=4, motion_styles=3, motion_resolutions=(8, 16),
)  # fmt: skip
RELEASE = dict(
    modulation_order="motion_first", prenorm_resolutions=(8, 16), motion_demod_only_resolutions=(16,), rank=2,
)  # fmt: skip


@pytest.mark.parametrize("compiled, variant, t", [(True, {}, [[0, 2.5]]), (False, RELEASE, [[7], [8.5]])],
                         ids=["compiled", "eager"])  # fmt: skip
def test_generator(compiled, variant, t, monkeypatch):
    """Frames, scores and every parameter's gradient, with the kernels in their places: eagerly, or in one graph."""
    from mostgan.config import ModelConfig
    from mostgan.model import Generator

    torch.manual_seed(0)
    generator = Generator(ModelConfig(**MODEL | variant)).to(DEVICE)
    z, noise = (randn(*shape, seed=1, dtype=torch.float32) for shape in ((len(t), 8), (len(t), 24, 8)))
    t = torch.tensor(t, dtype=torch.float64, device=DEVICE)

    def of(x, dtype, function):
        generator.to(dtype)
        frames, scores = function(z.to(dtype), t, noise.to(dtype), None, None, 1.0, True)
        outputs = [frames, *scores]
        total = sum((out * randn(*out.shape, seed=2 + i, dtype=dtype).to(dtype)).sum() for i, out in enumerate(outputs))
        return outputs, torch.autograd.grad(total, list(generator.parameters()), allow_unused=True)

    outputs, grads = of(z, torch.float64, generator)
    monkeypatch.setattr(kernels, "_by_triton", lambda x: x.dtype == torch.float32)
    ours = torch.compile(generator, fullgraph=True, backend="aot_eager") if compiled else generator
    launchers = [Mock(side_effect=getattr(module, name)) for module, name in LAUNCHERS]
    for (module, name), launcher in zip(LAUNCHERS, launchers):
        monkeypatch.setattr(module, name, launcher)
    our_outputs, our_grads = of(z, torch.float32, ours)
    assert all(launcher.called for launcher in launchers)
    for i, (out, ref) in enumerate(zip(our_outputs, outputs)):
        close(out, ref, 1e-5, f"output {i}")
    for (name, _), grad, ref in zip(generator.named_parameters(), our_grads, grads):
        if ref is not None:
            close(grad, ref, 1e-4, name)


def check_fakes():
    """Every op on fake tensors and on real ones: same shapes, dtypes and strides."""
    from torch._subclasses import FakeTensorMode

    def t(*shape):
        return torch.randn(shape, device=DEVICE)

    score, demod, x, y = t(4, 5, 6), t(4, 5), t(2, 7, 5, 6), t(2, 5, 11, 13)
    content, style, clip_style = t(2, 5, 7, 3, 3), t(4, 6, 3, 13), t(2, 7)
    weight, peak = channels_last(t(4, 5, 7, 3, 3)), t(4, 1).abs()
    ops = torch.ops.mostgan
    calls = [
        (ops.mostatt, content, style, clip_style, torch.bfloat16, True),
        (ops.mostatt, content, style, None, torch.float32, False),
        (ops.mostatt_backward, weight, score, demod, content, style, clip_style, score, demod, peak, torch.float32),
        (ops.mostatt_backward, t(0), score, demod, content, style, None, score, demod, peak, torch.float32),
        (ops.fir, x, 1.0, 1, 2, False), (ops.fir, x, 1.0, 1, 2, True), (ops.fir, t(2, 3, 4, 6), 1.0, 2, 1, False),
        (ops.fir, x, 4.0, 2, 1, True), (ops.epilogue, x, t(2, 7), t(7), 2, None),
        (ops.epilogue_backward, x, x, t(2, 7), t(7), 2, 1.0), (ops.conv2d_per_frame, x, weight[:2], 1),
        (ops.conv2d_per_frame, x, weight[:2], 2), (ops.conv2d_per_frame_grad_x, y, weight[:2], 2),
        (ops.conv2d_per_frame_grad_weight, y, x, 3, 2),
    ]  # fmt: skip
    for op, *args in calls:
        real = op(*args)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = op(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in args))
        for r, f in zip(*([o] if torch.is_tensor(o) else o for o in (real, fake))):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), f"{op}: {r.stride()} {f.stride()}"


if __name__ == "__main__":
    check_fakes()

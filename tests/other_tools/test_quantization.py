"""Quantization: torch.ao knows classes by exact type, so ``revert`` comes first; exported programs need nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, about its older quantization
    import torch.ao.quantization as quantization
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range will be deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*must run observer before calling.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*QConfigMapping.*:UserWarning"),
]

ENGINE = next((name for name in ("fbgemm", "x86", "qnnpack") if name in torch.backends.quantized.supported_engines), "")


def sequence() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


def converted(model: nn.Module) -> nn.Module:
    batchnorm.convert(model)
    return model


def fused(model: nn.Module) -> nn.Module:
    return batchnorm.fuse(model, image()).model


def image() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


MAKE = pytest.mark.parametrize("make", [converted, fused])
LAYERS = [["0", "1", "2"]]
MODES = {"fuse_modules": (quantization.fuse_modules, False), "fuse_modules_qat": (quantization.fuse_modules_qat, True)}


@MAKE
@pytest.mark.parametrize(("fuser", "training"), MODES.values(), ids=MODES)
def test_aos_fusers_refuse_until_revert(make: Callable[[nn.Module], nn.Module], fuser: Any, training: bool) -> None:
    model = make(sequence()).train(training)
    with pytest.raises(AssertionError, match=r"did not find fuser method for: .*batchnorm\.layers\.BatchNorm2d"):
        fuser(model, LAYERS)
    batchnorm.revert(model)
    expected = sequence().double().train(training)(image().double())
    torch.testing.assert_close(fuser(model, LAYERS)(image()).double(), expected, rtol=1e-4, atol=1e-5)


def quantized(model: nn.Module, way: str) -> tuple[Tensor, nn.Module]:
    if way == "prepare_fx":
        prepared = prepare_fx(model.eval(), quantization.get_default_qconfig_mapping(ENGINE), (image(),))
    else:
        prepared = prepare_qat_fx(model.train(), quantization.get_default_qat_qconfig_mapping(ENGINE), (image(),))
    prepared(image())
    made = convert_fx(prepared.eval())
    return made(image()), made


def test_prepare_fx_leaves_our_layers_as_they_are_and_quantizes_them_after_revert() -> None:
    """Right either way; but a layer that is not folded is computed in float between two quantized convolutions."""
    expected = sequence().double().eval()(image().double())
    for make in (converted, fused):
        found, made = quantized(make(sequence()), "prepare_fx")
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
        assert any(type(m) is batchnorm.BatchNorm2d for m in made.modules())


@MAKE
@pytest.mark.parametrize("way", ["prepare_fx", "prepare_qat_fx"])
def test_after_revert_fx_gives_what_it_gives_of_torchs(make: Callable[[nn.Module], nn.Module], way: str) -> None:
    expected, _ = quantized(sequence(), way)
    model = make(sequence())
    batchnorm.revert(model)
    found, made = quantized(model, way)
    assert torch.equal(found, expected)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())


@MAKE
def test_eager_quantization_refuses_until_revert(make: Callable[[nn.Module], nn.Module]) -> None:
    def done(model: nn.Module) -> Tensor:
        wrapped = quantization.QuantWrapper(model.eval())
        wrapped.qconfig = quantization.get_default_qconfig(ENGINE)
        quantization.prepare(wrapped, inplace=True)
        wrapped(image())
        result: Tensor = quantization.convert(wrapped)(image())
        return result

    with pytest.raises(NotImplementedError, match=r"not implemented for 'quint8': convert the input to"):
        done(make(sequence()))
    model = make(sequence())
    batchnorm.revert(model)
    assert torch.equal(done(model), done(sequence()))


@MAKE
def test_dynamic_quantization_of_other_layers_is_not_disturbed(make: Callable[[nn.Module], nn.Module]) -> None:
    batchnorm.freeze(model := nn.Sequential(make(sequence()), nn.Flatten(), nn.Linear(144, 3)))
    expected = copy.deepcopy(model)(image())
    made = quantization.quantize_dynamic(model, {nn.Linear})
    assert (made(image()) - expected).abs().max() < 0.05 * expected.abs().max()
    assert type(made[2]) is not nn.Linear


# --- exported programs ---


def operators(model: nn.Module) -> list[str]:
    return [str(node.target) for node in exported(model).graph.nodes if node.op == "call_function"]


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, (image(),)).module()


@MAKE
def test_an_exported_program_in_evaluation_is_torchs(make: Callable[[nn.Module], nn.Module]) -> None:
    assert operators(make(sequence()).eval()) == operators(sequence().eval())


def test_an_exported_program_in_training_normalizes_with_other_buffers_than_its_own() -> None:
    """Which quantization-aware training of exported programs refuses: it wants the running statistics there."""

    def statistics(model: nn.Module) -> set[str]:
        nodes = [n for n in exported(model.train()).graph.nodes if "batch_norm" in str(n.target)]
        return {argument.op for argument in nodes[0].args[3:5]}

    assert statistics(sequence()) == {"get_attr"}
    assert statistics(converted(sequence())) == {"call_function"}
    model = fused(sequence())
    batchnorm.revert(model)
    assert statistics(model) == {"get_attr"}


@MAKE
@pytest.mark.parametrize("aware", [False, True], ids=["after training", "aware training"])
@pytest.mark.filterwarnings("ignore")  # torchao's and torch's own
def test_torchao(make: Callable[[nn.Module], nn.Module], aware: bool) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install --no-deps torchao")
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    def done(model: nn.Module) -> Tensor:
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=aware))
        prepared = (prepare_qat_pt2e if aware else prepare_pt2e)(exported(model.train(aware)), quantizer)
        prepared(image())
        result: Tensor = convert_pt2e(move_exported_model_to_eval(prepared) if aware else prepared)(image())
        return result

    model = make(sequence())
    if aware:
        with pytest.raises(ValueError, match="Expected get_attr node"):
            done(model)
        batchnorm.revert(model)
    assert torch.equal(done(model), done(sequence()))

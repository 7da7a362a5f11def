import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fdl.errors import UserError
from fdl.modules.checkpoints import read_weights

WEIGHTS = {"head.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.ones(2)}


def equal(found) -> bool:
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], value) for name, value in WEIGHTS.items())


def test_safetensors_are_read(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    assert equal(read_weights(tmp_path / "w.safetensors"))
    assert equal(read_weights(str(tmp_path / "w.safetensors")))


def test_arrays_are_read_and_text_among_them_is_left_out(tmp_path):
    arrays = {name: value.numpy() for name, value in WEIGHTS.items()}
    np.savez(tmp_path / "w.npz", note="a text", **arrays)
    assert equal(read_weights(tmp_path / "w.npz"))


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"w.npz cannot be read: .*allow_pickle=False"):
        read_weights(tmp_path / "w.npz")


@pytest.mark.parametrize(
    "stored",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, "epoch": 3, "optimizer": {"lr": 0.1}},
        {"model": WEIGHTS, "model_ema": dict(WEIGHTS)},
        {"state_dict": {f"module.{name}": value for name, value in WEIGHTS.items()}},
        {f"_orig_mod.backbone.{name}": value for name, value in WEIGHTS.items()},
        {**WEIGHTS, "version": 2},
    ],
)
def test_weights_of_torch_are_found_where_training_scripts_put_them(tmp_path, stored):
    torch.save(stored, tmp_path / "w.pth")
    assert equal(read_weights(tmp_path / "w.pth"))


def test_averaged_weights_go_first(tmp_path):
    zeros = {name: torch.zeros_like(value) for name, value in WEIGHTS.items()}
    torch.save({"state_dict": zeros, "state_dict_ema": WEIGHTS}, tmp_path / "w.pt")
    assert equal(read_weights(tmp_path / "w.pt"))


class Harmful:
    ran = False

    def __reduce__(self):
        return (setattr, (Harmful, "ran", True))


def test_code_in_a_file_is_never_run(tmp_path):
    torch.save({"state_dict": WEIGHTS, "trap": Harmful()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w.pth is damaged or holds objects other than tensors"):
        read_weights(tmp_path / "w.pth")
    assert not Harmful.ran


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pth", None, "no such file: .*missing.pth"),
        ("w.onnx", b"x", r"w.onnx must end in .safetensors, .npz, .bin, .ckpt, .pt, .pth, .tar"),
        ("w.safetensors", b"not at all", "w.safetensors cannot be read"),
        ("w.pth", b"not at all", "w.pth is damaged or holds objects other than tensors"),
        ("w.pth", b"", "w.pth cannot be read"),
        ("w.npz", b"not at all", "w.npz cannot be read"),
        ("w.npz", b"PK\x03\x04", "w.npz cannot be read"),
        ("missing.npz", None, "no such file: .*missing.npz"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / name)


def test_a_truncated_file_is_named(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"w.pth"):
        read_weights(tmp_path / "w.pth")


def test_a_file_without_named_tensors_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no named tensors"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.pt"])
def test_weights_that_are_not_finite_are_refused_by_file_and_tensor(tmp_path, name, value):
    weights = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    weights["head.weight"][1, 2] = value
    path = tmp_path / name
    if name.endswith("npz"):
        np.savez(path, **{name: tensor.numpy() for name, tensor in weights.items()})
    else:
        save_file(weights, path) if name.endswith("safetensors") else torch.save(weights, path)
    with pytest.raises(UserError, match=rf"{name}: 1 of 6 numbers in head\.weight are not finite"):
        read_weights(path)

"""Real weights on real photographs: frozen teachers of CIFAR-10, and a new head for Tiny ImageNet."""

import pytest

from tests.real.data import FOLDER, adam, federation, real

pytestmark = real


def test_frozen_resnets_teach_a_small_student_in_one_round(tmp_path):
    """Two sites hold published ResNet-20s; their answers to 1,500 unlabelled images teach. Chance is 0.1."""
    resnet = {"depth": 20, "checkpoint": str(FOLDER / "weights/cifar10_resnet20_akamaster.npz"), "tuning": "frozen"}
    data = {
        "path": str(FOLDER / "cifar10_lossless_7k.npz"),
        "normalize": True,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "proxy": 1500,
        "validation": 100,
    }
    loop = federation(
        tmp_path,
        method={"target": "federated_distillation", "args": {"feedback": "none"}},
        data={"target": "arrays", "args": data},
        federation={"clients": 2},
        specialists=[{"target": "cifar_resnet", "args": resnet}],
        student={"target": "cnn", "args": {"channels": [16, 32]}},
        server_distil=adam(150),
        channel={"upload": [{"target": "quantize", "args": {"bits": 8}}, "deflate"]},
    )
    loop.run()
    metrics = loop.history[-1]["metrics"]
    assert metrics["specialists/test/accuracy"] > 0.91
    assert metrics["student/test/accuracy"] > 0.25


@pytest.mark.slow
def test_a_new_head_on_a_real_backbone_tells_a_hundred_classes_apart(tmp_path):
    """MobileNetV1-0.25, trained on ImageNet at 128 pixels; here 32, enlarged. Chance is 0.01."""
    path = FOLDER / "weights/mobilenet_v1_0.25_128_imagenet_dequant.npz"
    loop = federation(
        tmp_path,
        method="centralized",
        data={
            "target": "arrays",
            "args": {"path": str(FOLDER / "tinyimagenet100a_32.npz"), "limit": 3000, "validation": 100},
        },
        federation={"clients": 2},
        student={"target": "layer_graph", "args": {"checkpoint": str(path), "tuning": "head"}},
        local_training=adam(120),
    )
    assert loop.server.num_classes == 100 and len(loop.server.test) == 5000
    loop.run()
    assert loop.history[-1]["metrics"]["student/test/accuracy"] > 0.04

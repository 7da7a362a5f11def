import numpy as np
import pytest
import torch

from fdl.datamodules.digits import Digits
from fdl.datamodules.partition import ByGroup
from fdl.datamodules.rotated_digits import RotatedDigits
from fdl.errors import UserError


def loaded(module):
    module.setup()
    return module


def test_every_image_is_turned_by_its_own_angle():
    plain = Digits().load()
    turned = RotatedDigits(angles=[0, 90, 180]).load()
    before, labels = plain.train.batch(torch.arange(len(plain.train)))
    after, same = turned.train.batch(torch.arange(len(plain.train)))
    assert torch.equal(labels, same)
    assert set(np.unique(turned.groups)) == {"0°", "90°", "180°"}
    assert np.unique(turned.groups, return_counts=True)[1].tolist() == [599, 599, 599]
    for name, quarter in (("0°", 0), ("90°", 1), ("180°", 2)):
        own = turned.groups == name
        torch.testing.assert_close(after[own], torch.rot90(before[own], quarter, (2, 3)), atol=1e-5, rtol=0)


def test_each_client_gets_one_angle_and_public_sets_have_all():
    data = loaded(RotatedDigits(seed=3))
    parts = data.partition(ByGroup(), 4, seed=0)
    assert [len(np.unique(data.groups[part])) for part in parts] == [1, 1, 1, 1]
    assert data.input_shape == (1, 8, 8) and len(data.proxy) == 400
    again = loaded(RotatedDigits(seed=3))
    assert data.fingerprint() == again.fingerprint() != loaded(RotatedDigits(seed=4)).fingerprint()


def test_no_angle_is_a_mistake():
    with pytest.raises(UserError, match="at least one angle"):
        RotatedDigits(angles=[])

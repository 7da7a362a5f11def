"""Every data module feeds a plain Lightning Trainer."""

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image
from torch import nn

from fdl.datamodules.arrays import Arrays
from fdl.datamodules.digits import Digits
from fdl.datamodules.image_folder import ImageFolder


class Classifier(LightningModule):
    def __init__(self, shape, classes):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), classes))
        self.seen = {"fit": [], "validate": [], "test": [], "predict": []}

    def step(self, batch, stage):
        x, y = batch
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        self.seen[stage].append(y)
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch, _):
        return self.step(batch, "fit")

    def validation_step(self, batch, _):
        self.step(batch, "validate")

    def test_step(self, batch, _):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())
        self.step(batch, "test")

    def predict_step(self, batch, _):
        assert batch[1] is None
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def trainer(epochs=1):
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def arrays(folder):
    x = np.random.default_rng(0).integers(0, 256, (50, 6, 6), dtype=np.uint8)
    np.savez(folder / "data.npz", x_train=x, y_train=np.arange(50) % 2)
    return Arrays(str(folder / "data.npz"), test=10, validation=8, proxy=12, augment="crop_flip")


def images(folder):
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(15):
            Image.fromarray(np.full((9, 9, 3), 8 * i, np.uint8)).save(folder / name / f"{i}.png")
    return ImageFolder(str(folder), size=6, test=6, validation=4, proxy=6, batch_size=8)


@pytest.mark.parametrize("make", [lambda _: Digits(), arrays, images], ids=["digits", "arrays", "image_folder"])
def test_fit_validate_test_and_predict(make, tmp_path):
    data = make(tmp_path)
    data.prepare_data()
    data.setup()
    model = Classifier(data.input_shape, data.num_classes)
    run = trainer()
    run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)
    answers = run.predict(model, datamodule=data)
    for stage, samples in (("fit", data.train), ("validate", data.validation), ("test", data.test)):
        labels = torch.cat(model.seen[stage])
        assert torch.equal(labels.sort().values, samples.labels.sort().values)
    assert not torch.equal(torch.cat(model.seen["fit"]), data.train.labels)  # shuffled
    assert torch.equal(torch.cat(model.seen["test"]), data.test.labels)
    assert torch.cat(answers).shape == (len(data.proxy), data.num_classes)


def test_digits_are_learnt():
    torch.manual_seed(0)
    data = Digits(validation=0)
    model, run = Classifier((1, 8, 8), 10), trainer(epochs=5)
    run.fit(model, datamodule=data)
    assert run.test(model, datamodule=data, verbose=False)[0]["accuracy"] > 0.85

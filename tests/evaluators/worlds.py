"""A server with public data and no federation around it."""

from fdl.engine.runtime import Runtime
from fdl.participants import Server
from fdl.recipe import Fit


def server(
    test,
    validation=None,
    task="classification",
    model_kwargs=None,
    classes=None,
    batch_size=512,
    seed=0,
    precision="32-true",
):
    return Server(
        validation=test.subset([]) if validation is None else validation,
        test=test,
        classes=classes,
        runtime=Runtime(accelerator="cpu", batch_size=batch_size, precision=precision),
        seed=seed,
        local_training=Fit(),
        server_distil=Fit(),
        client_distil=Fit(),
        proxy=None,
        num_classes=len(classes or ()),
        task=task,
        model_kwargs=model_kwargs,
    )

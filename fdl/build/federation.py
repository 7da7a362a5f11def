"""Construction of a federation from a checked recipe."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fdl.adversaries.coalition import Adversaries, assign_adversaries, form_group
from fdl.attacks.callback import AuditCallback
from fdl.build.channel import make_channel
from fdl.build.data import _apply_arrivals, _fingerprint, _hold_out, _pooled_rows
from fdl.build.fit_checks import check_fits
from fdl.build.models import _architectures, _encoder, _model, assign_specialists
from fdl.build.privacy import make_dp_trainer, make_executor, make_policy, privacy_callbacks, read_noise_seed
from fdl.callbacks.base import Callback, CallbackList
from fdl.callbacks.profile import Profile
from fdl.engine.distributed.devices import NO_SUCH_DEVICES
from fdl.engine.runtime import Runtime
from fdl.errors import UserError
from fdl.loop import FederatedLoop
from fdl.metrics.tasks import TASKS
from fdl.participants import Client, Server
from fdl.recipe.config import Recipe
from fdl.recipe.cross_checks import PROXY
from fdl.recipe.learning_rates import local_fits
from fdl.registry.instantiate import instantiate
from fdl.registry.kinds import KINDS
from fdl.registry.plugins import short_names
from fdl.registry.targets import find
from fdl.state.client_store import CLIENTS, DiskStore
from fdl.utils.paths import expanded
from fdl.utils.threads import pinned

if TYPE_CHECKING:
    from fdl.attacks.base import Attack
    from fdl.datamodules.base import FederatedDataModule
    from fdl.evaluators.base import Evaluator
    from fdl.methods.base import Method

log = logging.getLogger("fdl")


def build_federation(recipe: Recipe, folder: str | Path, launch: bool = True) -> FederatedLoop:
    """Build a federation from a recipe: data, participants, channel, method, callbacks.

    Args:
        recipe: the checked recipe, from `fdl.load_recipe`.
        folder: the run's folder; nothing is written yet.
        launch: start distributed processes. If False, the loop can be inspected but not run.

    Raises:
        UserError: parts do not fit together; the message names their keys.
    """
    with pinned(recipe.fabric.threads):
        return _build(recipe, expanded(folder), launch)


def _build(recipe: Recipe, folder: Path, launch: bool) -> FederatedLoop:
    method: Method = instantiate(recipe.method, "method", "method")
    data: FederatedDataModule = instantiate(recipe.data, "datamodule", "data")
    data.set_default_seed(recipe.seed)
    data.prepare_data()
    data.setup()
    _check_task(recipe, method, data)
    probes, attacks = _probes(recipe, data), _attacks(recipe, data)
    _check_requirements(recipe, method, data)
    shares, names = _partition(recipe, data)

    runtime = _runtime(recipe, launch)
    specialists = _architectures(recipe, data, runtime)
    entries = assign_specialists(recipe) if "specialists" in method.requires else None
    architectures = ["student"] * len(shares) if entries is None else [specialists[entry] for entry in entries]
    common = _common(recipe, data, runtime)
    incoming, test_stages = _apply_arrivals(common["arrival"], data)
    dp_sgd = make_dp_trainer(recipe, common["privacy"])
    store = DiskStore(folder / CLIENTS) if recipe.federation.client_state == "disk" else None
    clients: list[Client] = []
    trained: list[np.ndarray] = []
    for id, (share, fit) in enumerate(zip(shares, local_fits(recipe, entries))):
        train, calibration = _hold_out(share, recipe, id, method)
        trained.append(train)
        own = {"id": id, "name": names[id], "architecture": architectures[id], "local_training": fit}
        samples = {"train": incoming(train), "calibration": incoming(calibration)}
        clients.append(Client(dp_sgd=dp_sgd, store=store, **common | own | samples))
    server = Server(
        validation=data.validation,
        test=data.test,
        student=_model("student", "init", method, recipe, runtime),
        teacher=_model("teacher", "teacher", method, recipe, runtime),
        pooled=incoming(_pooled_rows(trained, data)) if "pooled" in method.requires else None,
        classes=data.classes,
        test_stages=test_stages,
        **common,
    )
    channel = make_channel(recipe)
    for probe in probes:
        probe.prepare(server)
    callbacks = _callbacks(recipe, attacks, leader=runtime.ranks.leader)
    if dp_sgd is not None:
        dp_sgd.check(clients)
    left_out = check_fits(recipe, method, clients, server)
    for client, reason in left_out.items() if runtime.ranks.leader else ():
        log.warning("client %d is left out: %s", client, reason)
    return FederatedLoop(
        recipe=recipe,
        folder=folder,
        method=method,
        server=server,
        clients=clients,
        channel=channel,
        executor=make_executor(recipe, dp_sgd),
        callbacks=callbacks,
        probes=probes,
        adversaries=_adversaries(recipe, method, clients),
        store=store,
        left_out=left_out,
        fingerprint=_fingerprint(data, shares, runtime, {client.architecture for client in clients}, server),
    )


def _check_task(recipe: Recipe, method: Method, data: FederatedDataModule) -> None:
    """Check that the method and the evaluation support the task of the data.

    Raises:
        UserError: they do not.
    """
    if method.tasks and data.task not in method.tasks:
        raise UserError(
            f"method: {recipe.method.target} is for {' and '.join(method.tasks)} data, and {recipe.data.target} is for "
            f"{data.task}; methods for it: {', '.join(_methods_for(data.task))}"
        )
    TASKS[data.task].select(recipe.evaluation.metrics)
    if recipe.evaluation.evaluators and "student" not in method.requires:
        raise UserError(f"evaluation.evaluators: method {recipe.method.target} has no student that could be asked")


def _check_requirements(recipe: Recipe, method: Method, data: FederatedDataModule) -> None:
    """Check that the recipe and its data have what the method requires.

    Raises:
        UserError: something is missing.
    """
    if "proxy" in method.requires and len(data.proxy) == 0:
        raise UserError(f"data.args.proxy: is empty, and method {recipe.method.target} needs a proxy set: {PROXY}")
    if "public" in method.requires and len(data.public) == 0:
        raise UserError(
            f"data.args.public: the server has no labelled samples, and method {recipe.method.target} trains on some; "
            "set it to how many to hold out"
        )
    if "specialists" in method.requires and not recipe.specialists:
        raise UserError(f"specialists: missing: method {recipe.method.target} needs them with these arguments")


def _partition(recipe: Recipe, data: FederatedDataModule) -> tuple[list[np.ndarray], list[str]]:
    """Partition the training samples over the clients.

    Returns:
        Each client's rows, and the clients' names.

    Raises:
        UserError: the data cannot be partitioned in this way.
    """
    partitioner = instantiate(recipe.partition, "partitioner", "partition")
    try:
        shares = data.partition(partitioner, recipe.federation.clients, recipe.seed)
        return shares, partitioner.names(shares, data.groups)
    except UserError as error:
        raise UserError(f"partition: {error}") from error


def _common(recipe: Recipe, data: FederatedDataModule, runtime: Runtime) -> dict[str, Any]:
    """Collect the constructor arguments that the server and all clients share."""
    return {
        "runtime": runtime,
        "seed": recipe.seed,
        "local_training": recipe.local_training,
        "server_distil": recipe.server_distil,
        "client_distil": recipe.client_distil or recipe.server_distil,
        "proxy": data.proxy,
        "public": data.public,
        "num_classes": data.num_classes,
        "task": data.task,
        "model_kwargs": data.model_kwargs,
        "encoder": _encoder(recipe, data, runtime),
        "arrival": None if recipe.arrival is None else instantiate(recipe.arrival, "arrival", "arrival"),
        "privacy": make_policy(recipe),
        "noise_seed": read_noise_seed(recipe),
    }


def _callbacks(recipe: Recipe, attacks: Sequence[Attack], leader: bool) -> CallbackList:
    """Construct the run's callbacks; with several processes, only the leading one writes and displays."""
    callbacks: list[Callback] = [AuditCallback(attacks)] if attacks else []
    if leader:
        callbacks += [instantiate(c, "callback", f"callbacks.{i}") for i, c in enumerate(recipe.callbacks)]
        callbacks += [Profile()] if recipe.profile else []
    return CallbackList([*callbacks, *privacy_callbacks(recipe)])


def _methods_for(task: str) -> list[str]:
    """List the built-in methods for data of a task."""
    found = {name: find(name, KINDS["method"]).definition for name in short_names(KINDS["method"])}
    tasks = {name: (own and own.constant("tasks")) or (task,) for name, own in sorted(found.items())}  # none: for any
    return [name for name, own in tasks.items() if task in own]


def _runtime(recipe: Recipe, launch: bool) -> Runtime:
    """Set up the devices that the recipe requests.

    Raises:
        UserError: this machine does not have them.
    """
    try:
        own = {**vars(recipe.fabric), **vars(recipe.inference)}
        del own["threads"]  # set by `pinned`
        return Runtime(**own, batch_size=recipe.evaluation.batch_size, launch=launch)
    except NO_SUCH_DEVICES as error:
        settings = ", ".join(f"{key}={value}" for key, value in vars(recipe.fabric).items() if value is not None)
        raise UserError(f"fabric: {error} ({settings})") from error


def _probes(recipe: Recipe, data: FederatedDataModule) -> list[Evaluator]:
    """Construct the evaluators of the student.

    Raises:
        UserError: an evaluator does not support the task of the data.
    """
    probes = []
    for i, component in enumerate(recipe.evaluation.evaluators):
        probe: Evaluator = instantiate(component, "evaluator", f"evaluation.evaluators.{i}")
        if data.task not in probe.tasks:
            known = ", ".join(probe.tasks)
            raise UserError(f"evaluation.evaluators.{i}: {probe.name} is for {known} data; these are for {data.task}")
        if probe.label in {other.label for other in probes}:
            raise UserError(
                f"evaluation.evaluators.{i}: there is a probe {probe.label!r} already; give one another label"
            )
        probes.append(probe)
    return probes


def _attacks(recipe: Recipe, data: FederatedDataModule) -> list[Attack]:
    """Construct the attacks on the finished run.

    Raises:
        UserError: an attack does not support the task of the data.
    """
    attacks = []
    for i, component in enumerate(recipe.evaluation.attacks):
        key = f"evaluation.attacks.{i}"
        attack: Attack = instantiate(component, "attack", key)
        if data.task not in attack.tasks:
            known = " and ".join(attack.tasks)
            raise UserError(f"{key}: {attack.name} is for {known} data; these are for {data.task}")
        if attack.label in {other.label for other in attacks}:
            raise UserError(f"{key}: there is an attack {attack.label!r} already; give one another label")
        attacks.append(attack)
    return attacks


def _adversaries(recipe: Recipe, method: Method, clients: Sequence[Client]) -> Adversaries:
    """Choose the malicious clients and set up their behaviour.

    Raises:
        UserError: an adversary does not fit the method or the data.
    """
    groups = []
    for i, ids in enumerate(assign_adversaries(recipe.adversaries, len(clients), recipe.seed)):
        key, entry = f"adversaries.{i}", recipe.adversaries[i]
        adversary = instantiate(entry, "adversary", key)
        try:
            groups.append(form_group(adversary, entry.start, [clients[id] for id in ids], method))
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    return Adversaries(groups)

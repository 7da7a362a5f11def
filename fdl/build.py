"""From a checked recipe to a federation ready to run."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fdl.adversaries.coalition import Adversaries, chosen, recruit
from fdl.callbacks.profile import Profile
from fdl.catalog import KINDS, find, short_names
from fdl.comm import authentication
from fdl.comm.authentication import Authentication
from fdl.comm.bandwidth import Bandwidth
from fdl.comm.channel import Channel
from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger
from fdl.datamodules.arrivals import Incoming
from fdl.devices import NO_SUCH_DEVICES
from fdl.errors import UserError
from fdl.executor import EXECUTORS
from fdl.faults.base import Schedule
from fdl.faults.channel import FaultyChannel
from fdl.fits import check_fits
from fdl.inference import each
from fdl.knowledge.encoder import Frozen
from fdl.knowledge.pair_confidence import Images
from fdl.learning_rates import local_fits
from fdl.loop import FederatedLoop
from fdl.modules.foreign import conforming
from fdl.modules.shards import to_host
from fdl.participants import Client, Server
from fdl.privacy.settings import noise_seed, policy, trainer
from fdl.privacy.settings import watching as watching_privacy
from fdl.recipe import Component, Recipe, instantiate
from fdl.rules import PROXY
from fdl.runtime import Runtime
from fdl.seeding import numpy_stream, stream_seed
from fdl.store import CLIENTS, DiskStore
from fdl.tasks import TASKS
from fdl.threads import pinned

if TYPE_CHECKING:
    from lightning import LightningModule

    from fdl.attacks.base import Attack
    from fdl.datamodules.arrivals import Arrival
    from fdl.datamodules.base import FederatedDataModule
    from fdl.datamodules.samples import Samples
    from fdl.evaluators.base import Evaluator
    from fdl.knowledge.encoder import Encoder
    from fdl.methods.base import Method

log = logging.getLogger("fdl")


CALIBRATION = 0.1
"""Share of a client's data that is held out where the method looks at it and the recipe does not say how much."""


def build(recipe: Recipe, folder: str | Path, launch: bool = True) -> FederatedLoop:
    """Build everything a recipe names: data, participants, channel, method, callbacks.

    Args:
        recipe: checked, as `fdl.recipe.load` gives it.
        folder: the run's folder; nothing is written yet.
        launch: join the other processes that the recipe asks for; without it the loop is for looking at.

    Raises:
        UserError: when parts do not fit together, naming their keys.
    """
    with pinned(recipe.fabric.threads):
        return _built(recipe, Path(folder), launch)


def _built(recipe: Recipe, folder: Path, launch: bool) -> FederatedLoop:
    method: Method = instantiate(recipe.method, "method", "method")
    data: FederatedDataModule = instantiate(recipe.data, "datamodule", "data")
    data.set_default_seed(recipe.seed)
    data.prepare_data()
    data.setup()
    if method.tasks and data.task not in method.tasks:
        raise UserError(
            f"method: {recipe.method.target} is for {' and '.join(method.tasks)} data, and {recipe.data.target} is for "
            f"{data.task}; methods for it: {', '.join(_methods_for(data.task))}"
        )
    TASKS[data.task].asked(recipe.evaluation.metrics)
    if recipe.evaluation.probes and "student" not in method.requires:
        raise UserError(f"evaluation.probes: method {recipe.method.target} has no student that could be asked")
    probes = _probes(recipe, data)
    attacks = _attacks(recipe, data)
    if "proxy" in method.requires and len(data.proxy) == 0:
        raise UserError(f"data.args.proxy: is empty, and method {recipe.method.target} needs a proxy set: {PROXY}")
    if "public" in method.requires and len(data.public) == 0:
        raise UserError(
            f"data.args.public: the server has no labelled samples, and method {recipe.method.target} trains on some; "
            "set it to how many to hold out"
        )
    if "specialists" in method.requires and not recipe.specialists:
        raise UserError(f"specialists: missing: method {recipe.method.target} needs them with these arguments")
    partitioner = instantiate(recipe.partition, "partitioner", "partition")
    try:
        shares = data.partition(partitioner, recipe.federation.clients, recipe.seed)
        names = partitioner.names(shares, data.groups)
    except UserError as error:
        raise UserError(f"partition: {error}") from error

    runtime = _runtime(recipe, launch)
    specialists = _architectures(recipe, data, runtime)
    entries = assign(recipe) if "specialists" in method.requires else None
    architectures = ["student"] * len(shares) if entries is None else [specialists[entry] for entry in entries]
    common: dict[str, Any] = {
        "runtime": runtime,
        "seed": recipe.seed,
        "local": recipe.local,
        "distil": recipe.distil,
        "digest": recipe.digest or recipe.distil,
        "proxy": data.proxy,
        "public": data.public,
        "num_classes": data.num_classes,
        "task": data.task,
        "provides": data.provides,
        "encoder": _encoder(recipe, data, runtime),
        "arrival": None if recipe.arrival is None else instantiate(recipe.arrival, "arrival", "arrival"),
        "privacy": policy(recipe),
        "noise_seed": noise_seed(recipe),
    }
    incoming, test_stages = _arriving(common["arrival"], data)
    dp_sgd, clients, fits = trainer(recipe, common["privacy"]), [], local_fits(recipe, entries)
    trained: list[np.ndarray] = []
    store = DiskStore(folder / CLIENTS) if recipe.federation.state == "disk" else None
    for id, share in enumerate(shares):
        train, calibration = _hold_out(share, recipe, id, method)
        trained.append(train)
        clients.append(
            Client(
                id=id,
                architecture=architectures[id],
                train=incoming(train),
                calibration=incoming(calibration),
                dp_sgd=dp_sgd,
                store=store,
                name=names[id],
                **common | {"local": fits[id]},
            )
        )
    server = Server(
        validation=data.validation,
        test=data.test,
        student=_model("student", "init", method, recipe, runtime),
        teacher=_model("teacher", "teacher", method, recipe, runtime),
        pooled=incoming(_together(trained, data)) if "pooled" in method.requires else None,
        classes=data.classes,
        test_stages=test_stages,
        **common,
    )
    settings: dict[str, Any] = {
        "upload": _codec(recipe.channel.upload, "channel.upload"),
        "download": _codec(recipe.channel.download, "channel.download"),
        "ledger": Ledger(),
        "seed": recipe.seed,
        "limit": recipe.channel.limit,
        "bandwidth": Bandwidth(recipe.channel.bandwidth, recipe.channel.clients),
        "authentication": _authentication(recipe),
        "deadline": recipe.federation.deadline or math.inf,
    }
    faults = [instantiate(fault, "fault", f"faults.{i}") for i, fault in enumerate(recipe.faults)]
    channel = FaultyChannel(schedule=Schedule(faults, recipe.seed), **settings) if faults else Channel(**settings)
    for probe in probes:
        probe.prepare(server)
    # only one process writes and shows things
    watching = recipe.callbacks if runtime.ranks.leader else ()
    callbacks = [instantiate(c, "callback", f"callbacks.{i}") for i, c in enumerate(watching)]
    if recipe.profile and runtime.ranks.leader:
        callbacks.append(Profile())
    callbacks += watching_privacy(recipe)
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
        executor=EXECUTORS[recipe.executor]() if dp_sgd is None else dp_sgd.executor(recipe.executor),
        callbacks=callbacks,
        probes=probes,
        attacks=attacks,
        adversaries=_adversaries(recipe, method, clients),
        store=store,
        left_out=left_out,
        fingerprint=_fingerprint(data, shares, runtime, {client.architecture for client in clients}, server),
    )


def _methods_for(task: str) -> list[str]:
    """The built-in methods for data of a task."""
    found = {name: find(name, KINDS["method"]).definition for name in short_names(KINDS["method"])}
    tasks = {name: (own and own.constant("tasks")) or (task,) for name, own in sorted(found.items())}  # none: for any
    return [name for name, own in tasks.items() if task in own]


def _runtime(recipe: Recipe, launch: bool) -> Runtime:
    """The devices that the recipe asks for.

    Raises:
        UserError: when this machine does not have them.
    """
    try:
        own = {**vars(recipe.fabric), **vars(recipe.inference)}
        del own["threads"]  # which go by `pinned`
        return Runtime(**own, batch_size=recipe.evaluation.batch_size, launch=launch)
    except NO_SUCH_DEVICES as error:
        settings = ", ".join(f"{key}={value}" for key, value in vars(recipe.fabric).items() if value is not None)
        raise UserError(f"fabric: {error} ({settings})") from error


def _architectures(recipe: Recipe, data: FederatedDataModule, runtime: Runtime) -> list[str]:
    """Register a factory for every architecture of the recipe; returns the specialists' keys in order."""
    for part, component in (("student", recipe.student), ("teacher", recipe.teacher)):
        if component is not None:
            runtime.factories[part] = _factory(component, part, data)
    keys: list[str] = []
    known = [(component.target, component.args) for component in recipe.specialists]
    for i, component in enumerate(recipe.specialists):
        if known[i] in known[:i]:  # the same architecture: one template serves both
            keys.append(keys[known.index(known[i])])
            continue
        model = component.args.get("model")  # timm's and torchvision's names say more; what follows a dot is a tag
        name = model.partition(".")[0] if isinstance(model, str) else component.target.rpartition(".")[2]
        key = f"{name}-{i}" if name in {"student", "teacher", *keys} else name
        runtime.factories[key] = _factory(component, f"specialists.{i}", data)
        keys.append(key)
    return keys


def assign(recipe: Recipe) -> list[int]:
    """Which of the recipe's specialists each client has.

    Clients that an entry of ``specialists`` names have that one. The others get those entries that name nobody, in
    turn, or drawn by weight from a stream that depends on the seed and the client alone.

    Args:
        recipe: the specialists and how they are assigned.

    Returns:
        The place of an entry of ``specialists`` for every client, by id.
    """
    named = {client: i for i, entry in enumerate(recipe.specialists) for client in entry.clients or ()}
    free = [i for i, entry in enumerate(recipe.specialists) if entry.clients is None]
    weights = np.array([recipe.specialists[i].weight for i in free])

    def entry(client: int) -> int:
        if client in named:
            return named[client]
        if recipe.federation.assignment == "in_turn":
            return free[client % len(free)]
        return free[numpy_stream(recipe.seed, "assignment", 0, client).choice(len(free), p=weights / weights.sum())]

    return [int(entry(client)) for client in range(recipe.federation.clients)]


def _model(part: str, purpose: str, method: Method, recipe: Recipe, runtime: Runtime) -> LightningModule | None:
    """The server's student or teacher, where the method needs one."""
    return runtime.create(part, stream_seed(recipe.seed, purpose)) if part in method.requires else None


def _factory(component: Component, key: str, data: FederatedDataModule) -> Callable[[], LightningModule]:
    """What builds one architecture for these data.

    Raises:
        UserError: when the recipe gives it another number of classes than the data have.
    """
    provides = data.provides
    given = component.args.get("num_classes", data.num_classes)
    if given != data.num_classes:
        raise UserError(f"{key}.args.num_classes: {given}, but the data have {data.num_classes} classes")
    found = find(component.target, KINDS["module"])
    parameters = found.signature.parameters if found.signature is not None else {}
    for name in KINDS["module"].supplied:
        if name in parameters and parameters[name].required and name not in {*provides, *component.args}:
            raise UserError(f"{key}: {component.target} is no model for {data.task} data: those have no {name}")

    def example() -> Any:
        return each(data.train.batch(torch.zeros(2, dtype=torch.int64))[0], torch.zeros_like)

    return lambda: conforming(instantiate(component, "module", key, **provides), key, example)


def _probes(recipe: Recipe, data: FederatedDataModule) -> list[Evaluator]:
    """The further questions to the student.

    Raises:
        UserError: one is not for this kind of data.
    """
    probes = []
    for i, component in enumerate(recipe.evaluation.probes):
        probe: Evaluator = instantiate(component, "evaluator", f"evaluation.probes.{i}")
        if data.task not in probe.tasks:
            known = ", ".join(probe.tasks)
            raise UserError(f"evaluation.probes.{i}: {probe.name} is for {known} data; these are for {data.task}")
        if probe.label in {other.label for other in probes}:
            raise UserError(f"evaluation.probes.{i}: there is a probe {probe.label!r} already; give one another label")
        probes.append(probe)
    return probes


def _attacks(recipe: Recipe, data: FederatedDataModule) -> list[Attack]:
    """The attacks that are tried on the finished run.

    Raises:
        UserError: one is not for this kind of data.
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


def _encoder(recipe: Recipe, data: FederatedDataModule, runtime: Runtime) -> Encoder | None:
    """The frozen public encoder, fitted on public data where it has to be."""
    if recipe.encoder is None:
        return None
    encoder = instantiate(recipe.encoder, "encoder", "encoder", **data.provides)
    if isinstance(encoder, Frozen):
        encoder.module = runtime.place(encoder.module)
    # of pairs, the images: they are what a public encoder knows
    encoder.fit(Images(data.proxy) if data.task == "image_text" else data.proxy)
    return encoder


def _hold_out(share: np.ndarray, recipe: Recipe, client: int, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Split a client's indices into what it trains on and what it calibrates with; at least one to train on."""
    shuffled = numpy_stream(recipe.seed, "calibration", 0, client).permutation(share)
    part = recipe.federation.calibration
    if part is None:  # what nobody looks at is better trained on
        part = CALIBRATION if method.needs_calibration else 0.0
    held_out = min(round(part * len(share)), len(share) - 1)
    return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])


def _together(rows: Sequence[np.ndarray], data: FederatedDataModule) -> np.ndarray | None:
    """What all clients train on, so that who has it in one place has no sample more; None where that is everything."""
    union = np.sort(np.concatenate(rows))
    return None if len(union) == len(data.train) else union


def _arriving(
    arrival: Arrival | None, data: FederatedDataModule
) -> tuple[Callable[[np.ndarray | None], Samples | Incoming], np.ndarray | None]:
    """What makes a participant's samples of its rows (None: all), and each test sample's stage where that is known.

    Raises:
        UserError: when the schedule does not suit the data.
    """
    if arrival is None:
        return lambda rows: data.train if rows is None else data.train.subset(rows), None

    def stages(samples: Samples, groups: np.ndarray | None) -> np.ndarray:
        labels = None if samples.labels is None else samples.labels.numpy()
        return arrival.assign(labels, groups, data.num_classes)

    try:
        assigned = stages(data.train, data.groups)
    except UserError as error:
        raise UserError(f"arrival: {error}") from error
    known = data.test_groups is not None if arrival.by_domain else data.test.labels is not None
    test_stages = stages(data.test, data.test_groups) if known else None
    everything = np.arange(len(assigned))

    def incoming(rows: np.ndarray | None) -> Incoming:
        rows = everything if rows is None else rows
        return Incoming(data.train.subset(rows), assigned[rows], arrival)

    return incoming, test_stages


def _authentication(recipe: Recipe) -> Authentication | None:
    """What makes and checks the messages' tags."""
    path, clients = recipe.channel.keys, range(recipe.federation.clients)
    if not recipe.channel.authenticate and path is None:
        return None
    try:
        key = authentication.simulated(recipe.seed) if path is None else authentication.read(path, clients)
    except UserError as error:
        raise UserError(f"channel.keys: {error}") from error
    return Authentication(key, f"{recipe.name}/{recipe.seed}")


def _adversaries(recipe: Recipe, method: Method, clients: Sequence[Client]) -> Adversaries:
    """The clients that are dishonest.

    Raises:
        UserError: they cannot be, with this method and these data.
    """
    coalitions = []
    for i, ids in enumerate(chosen(recipe.adversaries, len(clients), recipe.seed)):
        key, entry = f"adversaries.{i}", recipe.adversaries[i]
        adversary = instantiate(entry, "adversary", key)
        try:
            coalitions.append(recruit(adversary, entry.start, [clients[id] for id in ids], method))
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    return Adversaries(coalitions)


def _codec(stages: list[Component], key: str) -> Codec:
    return Codec([instantiate(stage, "codec", f"{key}.{i}") for i, stage in enumerate(stages)])


def _fingerprint(
    data: FederatedDataModule, shares: list[np.ndarray], runtime: Runtime, architectures: set[str], server: Server
) -> str:
    """Of the data, of who holds which, and of the frozen weights, which no checkpoint has."""
    digest = hashlib.blake2b(data.fingerprint().encode(), digest_size=16)
    own = [runtime.template(key) for key in sorted(architectures)]
    for module in (server.student, server.teacher, *own):
        names = getattr(module, "frozen", ())
        tensors = module.state_dict() if names else {}
        for name in sorted(names):
            whole = to_host(tensors[name]).contiguous()
            digest.update(name.encode() + whole.view(-1).view(torch.uint8).numpy().tobytes())
    for share in shares:
        digest.update(np.ascontiguousarray(share, dtype="<i8").tobytes() + b"/")
    return digest.hexdigest()

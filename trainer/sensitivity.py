"""How much each layer of a hybrid gains where another mixer takes its place.

Two students of one teacher, each with one mixer in all layers, differ layer by layer in how well
they follow it. The sensitivity of a layer is by how much KL(teacher || base) falls where the base
student's layer is exchanged for the other student's (Zebra-Llama, arXiv 2505.17272).
"""

import copy
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.convert.selection import select_layers
from models.hybrid import HybridLM
from parallel.mesh import Mesh
from trainer.batch import Batch
from trainer.build import build_model, build_ops
from trainer.checkpoint.weights import WeightSource, open_weights
from trainer.construct import call
from trainer.data import StreamedData, build_data
from trainer.distillation import divergence
from trainer.errors import ConfigError, naming
from trainer.layerwise import check_layers
from trainer.load import tokenizer_of
from trainer.run_folder import write_whole
from trainer.settings import Numerics, Parallelism, Settings, Setup
from trainer.teacher import Teacher, allocate, check_words, load_frozen

log = logging.getLogger(__name__)


def measure(
    *,
    teacher: str,
    base: str,
    other: str,
    count: int,
    target: str,
    rows: int,
    data: Mapping[str, Any],
    trainer: Mapping[str, Any],
    ops: Mapping[str, Any],
) -> list[int]:
    """-> the layers of the base student that `count` of the other's are to replace; leaves
    sensitivities and choice in the file `target`, as JSON.

    The keywords are the keys of conf/select_layers.yaml. What the file holds of the same models and
    rows is not measured again. In memory are the teacher, and after it the base student with one
    layer of the other. Raises ConfigError.
    """
    if rows < 1:
        raise ConfigError(f"rows={rows}: allowed: 1 or more")
    setup, batches = _prepare(teacher, rows, data, trainer, ops)
    with naming("base", base):
        shape = Donor(Path(base), setup).model
    with naming("teacher", teacher):
        check_words(Path(teacher), shape.embed.num_embeddings, setup.tokenizer)
    with naming("other", other):
        donor = Donor(Path(other), setup)
        check_layers(shape, donor.model)
    depth = len(shape.layers)
    if not 1 <= count <= depth:
        raise ConfigError(f"count={count}: allowed: 1 to {depth}, the layers of the models")
    identity = _identity({"teacher": teacher, "base": base, "other": other}, batches, setup)
    record = Record(Path(target), identity)
    if len(record.kl) <= depth:
        guide = _guide(Path(teacher), batches, setup)
        student = load_frozen(Path(base), setup=setup)
        _measure(record, student, donor, guide, batches, setup)
    start, *changed = record.kl
    sensitivities = [start - kl for kl in changed]
    layers = select_layers(sensitivities, count)
    record.write(sensitivities=sensitivities, count=count, layers=layers)
    return layers


class Donor:
    """A model of which one layer at a time is in memory."""

    def __init__(self, path: Path, setup: Setup) -> None:
        self._source, self._setup = open_weights(path), setup
        config = self._source.config
        self.model = build_model(config["model"], config["mixer"], vocab_size=1, ops=setup.ops)

    @torch.no_grad()
    def layer(self, i: int) -> nn.Module:
        layer = allocate(copy.deepcopy(self.model.layers[i]), self._setup)
        for name, tensor in layer.state_dict().items():
            tensor.copy_(self._source.get(f"layers.{i}.{name}"))
        return layer.eval()


class Guide(NamedTuple):
    """What the teacher says of the batches."""

    hidden: list[Tensor]  # of each, on the host
    head: Tensor


class Record:
    """The file of results, whole after every layer.

    kl: nats a token of the base student, then of each layer exchanged, as far as they are known.
    Raises ConfigError for a file of other models or rows.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path, self._identity = path, dict(identity)
        self.kl: list[float] = []
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            known = {key: found[key] for key in identity}
            self.kl = found["kl"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"target={path}: no results of layers; allowed: a new file"
            ) from error
        for key, value in self._identity.items():
            if known[key] != value:
                raise ConfigError(
                    f"target={path}: holds results of a different {key}=; allowed: a new file"
                )

    def add(self, kl: float) -> None:
        self.kl.append(kl)
        self.write()

    def write(self, **choice: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        facts = {**self._identity, "kl": self.kl, **choice}
        write_whole(self._path, json.dumps(facts, indent=2) + "\n")


def _prepare(
    teacher: str,
    rows: int,
    data: Mapping[str, Any],
    trainer: Mapping[str, Any],
    ops: Mapping[str, Any],
) -> tuple[Setup, list[Batch]]:
    """-> what models are loaded for, and held-out rows."""
    settings: Settings = call(Settings, trainer, "trainer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numerics = Numerics.choose(settings.precision, device)
    tokenizer = data["tokenizer"] or tokenizer_of("teacher", teacher)
    documents = call(build_data, {**data, "tokenizer": tokenizer}, "data")
    if isinstance(documents, StreamedData):
        raise ConfigError("data.streaming=true: held-out rows come of a store; allowed: false")
    setup = Setup(
        settings=settings,
        numerics=numerics,
        parallelism=Parallelism(cp=1, timeout_minutes=1),
        mesh=Mesh(device=device),
        ops=build_ops(ops, device, numerics.products),
        tokenizer=documents.tokenizer,
    )
    size = settings.micro_batch_size
    held_out = documents.eval_batches(micro_batch_size=size, rank=0, ranks=1, split="eval")
    batches = [batch.to(device) for batch in islice(held_out, -(-rows // size))]
    if not batches:
        raise ConfigError("data.eval_fraction: no document is held out; allowed: a larger share")
    return setup, batches


def _identity(models: Mapping[str, str], batches: Sequence[Batch], setup: Setup) -> dict[str, str]:
    """What makes two measurements the same one."""
    rows = hashlib.sha256()
    for batch in batches:
        rows.update(batch.tokens.cpu().numpy().tobytes() + batch.labels.cpu().numpy().tobytes())
    digests = {key: _digest(open_weights(Path(folder))) for key, folder in models.items()}
    return {**digests, "rows": rows.hexdigest()[:16], "precision": setup.numerics.precision}


def _digest(source: WeightSource) -> str:
    content = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    for name in sorted(source.shapes):
        content.update(source.get(name).contiguous().view(torch.uint8).numpy().data)
    return content.hexdigest()[:16]


def _guide(path: Path, batches: Sequence[Batch], setup: Setup) -> Guide:
    teacher = Teacher(load_frozen(path, setup=setup), autocast=setup.numerics.autocast)
    products = setup.numerics.products
    hidden = [teacher.hidden(batch).to("cpu", products) for batch in batches]
    return Guide(hidden, teacher.model.head_weight.to(products))


@torch.no_grad()
def _measure(
    record: Record,
    student: HybridLM,
    donor: Donor,
    guide: Guide,
    batches: Sequence[Batch],
    setup: Setup,
) -> None:
    """Goes down the layers of the student; what lies above one is the same for all exchanges below
    it, and is computed once."""
    device, autocast = setup.mesh.device.type, setup.numerics.autocast
    layers = [*student.layers]
    with torch.autocast(device, autocast, enabled=autocast is not None):
        streams = [student.embed(batch.tokens).cpu() for batch in batches]
        if not record.kl:
            record.add(_kl(student, layers, streams, guide, batches, setup))
        for i, layer in enumerate(layers):
            if i + 1 == len(record.kl):
                changed = [donor.layer(i), *layers[i + 1 :]]
                record.add(_kl(student, changed, streams, guide, batches, setup))
                log.info("layer %d: KL %.4f, of the base %.4f", i, record.kl[-1], record.kl[0])
            streams = [
                layer((stream.to(batch.tokens.device),), batch.info)[0].cpu()
                for stream, batch in zip(streams, batches, strict=True)
            ]


def _kl(
    student: HybridLM,
    layers: Sequence[nn.Module],
    streams: Sequence[Tensor],
    guide: Guide,
    batches: Sequence[Batch],
    setup: Setup,
) -> float:
    """Nats a token, of the student whose last layers these are, behind these streams."""
    total = 0.0
    for batch, x, hidden in zip(batches, streams, guide.hidden, strict=True):
        stream = (x.to(batch.tokens.device),)
        for layer in layers:
            stream = layer(stream, batch.info)
        total += float(
            divergence(
                student.norm(student.residual(stream)).flatten(0, 1),
                student.head_weight,
                hidden.to(batch.tokens.device).flatten(0, 1),
                guide.head,
                batch.labels.flatten(),
                tile=setup.settings.loss_tile,
                matmul=setup.numerics.products,
            )
        )
    return total / sum(batch.valid_labels for batch in batches)

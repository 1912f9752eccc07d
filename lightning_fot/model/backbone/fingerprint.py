"""What makes two models the same to a memory: everything that its pairs were computed from, digested whole.

Digesting takes seconds for a large model, so it is done when pairs are made that may be kept, and again only where
something tells that the weights are not what they were: which tensors there are, where they lie, how often they were
written to, a few of their numbers, and which adapters are at work.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import is_
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_fot.errors import SettingError
from lightning_fot.model.backbone.layers import decoder_of
from lightning_fot.model.backbone.watch import Watch, few_numbers, numbers_of, own_part

if TYPE_CHECKING:
    from lightning_fot.model.backbone.attachment import Attachment

# How ``weights`` was digested. Memories of version 0.1 do not say, and have a sample of the weights: see `sampled`.
WEIGHTS_FORMAT = 2
_CHUNK = 1 << 24  # bytes digested in one thread at a time
_WORKING = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")  # of a layer of peft
_SAMPLED = 1024  # of version 0.1
_CONFIG = "config."
# What of a model's configuration changes no pair: names of tokens, the head, training, sizes that weights tell, what
# is said elsewhere here, and how outputs are given. Whatever else a model class may have counts.
_NO_PAIRS = re.compile(
    r"_.*|.*(token_ids?|dropout|pdrop|loss_coef|jitter_noise)|(output|return|initializer|router_z|rope|num_labels|use_flash).*"
    r"|final_logit_softcapping|logit_scale|logits_scaling|vocab_size.*|max_position_embeddings|num_hidden_layers|layerdrop"
    r"|tie_word_embeddings|use_cache|pretraining_tp|chunk_size_feed_forward|is_decoder|is_encoder_decoder|architectures"
    r"|dtype|torch_dtype|transformers_version|model_type|tokenizer_class|problem_type|prefix|.*implementation"
)

Fingerprint = dict[str, Any]


@dataclass(frozen=True)
class _Marks:
    """What tells cheaply whether the weights are those of another moment.

    Args:
        tensors: Of each tensor where it lies, how often it was written to, and what it is.
        notes: What is no tensor: adapters at work, and how strongly.
        numbers: A few of each tensor, one after the other: what is written by way of ``.data`` counts no version.
    """

    tensors: dict[str, tuple[Any, ...]]
    notes: tuple[str, ...]
    numbers: Tensor

    def same(self, other: _Marks) -> bool:
        """Whether nothing tells that they differ."""
        return self.tensors == other.tensors and self.notes == other.notes and torch.equal(self.numbers, other.numbers)


class Maker:
    """What made the pairs of a memory: the weights and settings of an attached model at one moment.

    Called, it gives what a memory must share with the model that reads it, JSON-able.

    Args:
        identity: Of the attached model.
        marks: Of its weights at that moment.
        settings: The fingerprint without its digest.
    """

    def __init__(self, identity: Identity, marks: _Marks, settings: Fingerprint) -> None:
        self.identity = identity
        self._marks = marks
        self._settings = settings
        self._digest: str | None = None

    def __call__(self) -> Fingerprint:
        """The fingerprint.

        Raises:
            SettingError: The weights were changed before they were digested: see :meth:`digest`.
        """
        self.digest()
        return {**self._settings, "weights": self._digest, "weights_format": WEIGHTS_FORMAT}

    def digest(self) -> None:
        """Digests the weights, unless that was done: afterwards they may change. For pairs that may be kept."""
        if self._digest is None:
            self._digest = self.identity.digest(self._marks)

    def refuse_changed(self) -> None:
        """Refuses pairs that other weights may have made, or adapters that are at work only now.

        Raises:
            SettingError: The weights are not what they were.
        """
        if not self.identity.bears(self._marks):
            raise SettingError(
                "memory",
                "pairs of this text",
                "the model's weights or adapters have changed while it was read",
                "Forget what was read of it, and read it again with one set of weights.",
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # Elsewhere there is no such model: what it was called remains.
        return _Made, (self(),)


class _Made:
    """A maker of which only the fingerprint is left."""

    def __init__(self, made: Fingerprint) -> None:
        self._made = made

    def __call__(self) -> Fingerprint:
        return dict(self._made)


class Identity:
    """What an attached model is to its memories, as its weights change.

    Args:
        attached: The model.
    """

    def __init__(self, attached: Attachment) -> None:
        self.attached = attached
        self._lock = RLock()
        self._known: dict[str, tuple[tuple[Any, ...], Tensor, bytes]] = {}
        self._newest: tuple[_Marks, Fingerprint, Maker] | None = None
        self._watch: Watch | None = None
        self._watched: _Marks | None = None

    def now(self) -> Maker:
        """Who makes pairs now: the same as before unless something tells that weights or settings have changed."""
        settings = self._settings()
        with self._lock:
            marks = self._marks()
            if self._newest is None or not (self._newest[0].same(marks) and self._newest[1] == settings):
                self._newest = marks, settings, Maker(self, marks, settings)
            return self._newest[2]

    def bears(self, marks: _Marks) -> bool:
        """Whether the weights bear these marks now.

        Weights that FSDP shares out lie elsewhere at each window, gathered or not: their marks tell nothing.
        """
        if isinstance(self.attached.model, FSDPModule):
            return True
        with self._lock:
            return self._marks().same(marks)

    def _marks(self) -> _Marks:
        if self._watched is None or self._watch is None or not self._watch.same():
            # Before the look: what changes in between is told next time.
            self._watch = _watch(self.attached)
            self._watched = self._look()[1]
        return self._watched

    def rest(self) -> None:
        """Keeps no weights in memory that the model has let go."""
        self._watch = None

    def _look(self) -> tuple[dict[str, Tensor], _Marks]:
        tensors = dict(_tensors(self.attached))
        marks = {name: _mark(tensor) for name, tensor in tensors.items()}
        return tensors, _Marks(marks, tuple(_notes(self.attached)), numbers_of(list(tensors.values())))

    def digest(self, wanted: _Marks) -> str:
        """Digest of all weights, which bear these marks; that of a tensor which nothing has written to is known.

        Raises:
            SettingError: They do not any more.
        """
        with self._lock:
            tensors, marks = self._look()
            if not marks.same(wanted):
                raise SettingError(
                    "memory",
                    "pairs of a call",
                    "the model's weights or adapters have changed since they were made",
                    "Read the text again; ingest keeps what it reads whatever changes later.",
                )
            sizes = [few_numbers(tensor).numel() for tensor in tensors.values()]
            numbers = dict(zip(tensors, torch.split(marks.numbers, sizes), strict=True))
            new = [
                name
                for name in tensors
                if name not in self._known
                or self._known[name][0] != marks.tensors[name]
                or not torch.equal(self._known[name][1], numbers[name])
            ]
            for name, digest in zip(new, _digests([tensors[name] for name in new]), strict=True):
                self._known[name] = marks.tensors[name], numbers[name].clone(), digest
            whole = hashlib.sha256("\n".join(marks.notes).encode())
            for name, tensor in sorted(tensors.items()):
                whole.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + self._known[name][2])
            return whole.hexdigest()

    def like(self, written: Any) -> Fingerprint:
        """The fingerprint to compare with one on a disk, digested as that one was.

        All is digested again: what is read from a disk is trusted with nothing less.
        """
        with self._lock:
            self._known, self._newest, self._watch = {}, None, None
        made = self.now()()
        if isinstance(written, dict) and "weights_format" not in written:
            del made["weights_format"]
            made["weights"] = sampled(self.attached)
        if isinstance(written, dict):
            # Versions of transformers differ in what they keep, and earlier memories say nothing of it.
            named = {name: value for name, value in written.items() if name.startswith(_CONFIG)}
            own = {name: value for name, value in made.items() if not name.startswith(_CONFIG)}
            made = {**own, **{name: made.get(name, value) for name, value in named.items()}}
        return made

    def _settings(self) -> Fingerprint:
        attached = self.attached
        config = attached.model.config.get_text_config()
        far = attached.config.far_place
        return {
            # Memories at the queries' own distances do not say so, as none did before there was another.
            **({} if far is None else {"distance": far}),
            **_computing(config, attached),
            "model_type": str(config.model_type),
            "memory_layers": list(attached.memory_layers),
            "kv_heads": [attached.facts[index].kv_heads for index in attached.memory_layers],
            "head_dim": [attached.facts[index].head_dim for index in attached.memory_layers],
            "positions": attached.config.positions,
            "score_factor": attached.score_factor,
            "dtype": attached.config.dtype or str(attached.model.dtype).removeprefix("torch."),
            "rotary": json.loads(json.dumps(getattr(config, "rope_parameters", None), default=str, sort_keys=True)),
        }


def _tensors(attached: Attachment) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers up to the top memory layer, input embeddings and gates, by name."""
    if not attached.memory_layers:
        return
    decoder = decoder_of(attached.model)
    above, inactive = _above(attached, decoder), _inactive(decoder)
    for prefix, module in decoder.named_modules():
        if prefix and (prefix in above or any(prefix.startswith(f"{layer}.") for layer in above)):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or _follows(module, name):
                continue
            full = f"{prefix}.{name}" if prefix else name
            if not any(full == adapter or full.startswith(f"{adapter}.") for adapter in inactive):
                # An adapter puts the layer that it serves into one of its own.
                yield from _held(full.replace(".base_layer.", "."), tensor)
    embeddings: Any = attached.model.get_input_embeddings()
    if not any(module is embeddings for module in decoder.modules()):
        yield from ((f"input.{name}", tensor) for name, tensor in embeddings.named_parameters())
    yield from ((f"gate.{index}", gate) for index, gate in attached.gates.items() if index < attached.memory_layers[-1])


def _held(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that it is made of: quantised weights hold numbers and scales apart."""
    wrapped: bool = is_traceable_wrapper_subclass(tensor)
    if wrapped and not isinstance(tensor, DTensor):
        parts, _ = tensor.__tensor_flatten__()
        for part in parts:
            yield from _held(f"{name}.{part}", getattr(tensor, part))
        return
    yield name, tensor
    # Of bitsandbytes: 4 bits keep their scales in a state, which may be quantised itself; 8 bits beside the numbers.
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        name = f"{name}.state"
        for part in ("absmax", "offset"):
            scale = getattr(state, part, None)
            if isinstance(scale, Tensor):
                yield f"{name}.{part}", scale
        state = getattr(state, "state2", None)
    scales = getattr(tensor, "SCB", None)
    if isinstance(scales, Tensor):
        yield f"{name}.scales", scales


def _computing(config: Any, attached: Attachment) -> Fingerprint:
    """What a configuration says of how layers compute, such as the epsilon of norms: no weight tells it."""
    found: Fingerprint = {}
    for name, value in vars(config).items():
        if _NO_PAIRS.fullmatch(name) or not isinstance(value, (bool, int, float, str, list)):
            continue
        if isinstance(value, list):
            if not all(isinstance(one, (bool, int, float, str)) for one in value):
                continue
            if len(value) == attached.num_layers:
                # Of each layer: those above the memory do not count.
                value = value[: max(attached.memory_layers, default=-1) + 1]
        found[f"{_CONFIG}{name}"] = copy.copy(value)
    return found


def _follows(module: nn.Module, name: str) -> bool:
    """Frequencies that follow the length of a text are no weights; their formula is among the settings."""
    return name.endswith("inv_freq") and getattr(module, "rope_type", None) in ("dynamic", "longrope")


def _watch(attached: Attachment) -> Watch:
    """What tells in little time whether `_tensors` and `_notes` would give the same again."""
    decoder, embeddings = decoder_of(attached.model), attached.model.get_input_embeddings()
    known = list(decoder.modules())
    if embeddings not in known:
        known += embeddings.modules()
    working = [module for _, module in (*_adapted(decoder), *_wrapped(decoder))]
    gates = list(attached.gates.values())

    def more() -> Any:
        return (
            decoder_of(attached.model) is decoder and attached.model.get_input_embeddings() is embeddings,
            len(gates) == len(attached.gates) and all(map(is_, gates, attached.gates.values())),
            [str([getattr(layer, name, None) for name in _WORKING]) for layer in working],
        )

    return Watch(known, (tensor for _, tensor in _tensors(attached)), _follows, more)


def _above(attached: Attachment, decoder: nn.Module) -> list[str]:
    """Names of the layers above the top memory layer: nothing of them gets into pairs."""
    numbers = {id(layer): index for index, layer in attached.attentions.items()}
    paths = {numbers[id(part)]: name.split(".") for name, part in decoder.named_modules() if id(part) in numbers}
    if len(paths) < 2:
        return []
    depth = next((place for place, parts in enumerate(zip(*paths.values(), strict=False)) if len(set(parts)) > 1), 0)
    return [".".join(path[: depth + 1]) for index, path in paths.items() if index > attached.memory_layers[-1]]


def _adapted(decoder: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with adapters of peft, by name."""
    kind = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if kind is not None:
        yield from ((name, module) for name, module in decoder.named_modules() if isinstance(module, kind))


def _wrapped(decoder: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers of which peft trains a copy, by name."""
    kind = getattr(sys.modules.get("peft.utils.other"), "AuxiliaryTrainingWrapper", None)
    if kind is not None:
        yield from ((name, module) for name, module in decoder.named_modules() if isinstance(module, kind))


def _at_work(layer: Any) -> list[str]:
    """Adapters that a layer adds to its output: merged ones are in its weights."""
    return (
        [] if layer.disable_adapters else [name for name in layer.active_adapters if name not in layer.merged_adapters]
    )


def _inactive(decoder: nn.Module) -> list[str]:
    """Names of what belongs to adapters that are not at work."""
    found = []
    for prefix, layer in _adapted(decoder):
        working = _at_work(layer)
        for kind in layer.adapter_layer_names:
            names = getattr(layer, kind, {})
            found += [f"{prefix}.{kind}.{name}" for name in names if name not in working]
    return found


def _notes(attached: Attachment) -> Iterator[str]:
    decoder = decoder_of(attached.model)
    for prefix, layer in _adapted(decoder):
        scaling = getattr(layer, "scaling", {})
        for name in _at_work(layer):
            if any(name in getattr(layer, kind, {}) for kind in layer.adapter_layer_names):
                yield f"{prefix} {name} {scaling.get(name) if isinstance(scaling, dict) else scaling}"
    for prefix, module in _wrapped(decoder):
        yield f"{prefix} {module.disable_adapters} {module.active_adapters}"


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    # Tensors made in inference mode count no versions.
    version = None if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tuple(tensor.shape), tensor.dtype


def _digests(tensors: list[Tensor]) -> list[bytes]:
    """SHA-256 of each tensor's bytes, in pieces that several threads take."""

    def pieces(tensor: Tensor) -> list[Any]:
        flat = own_part(tensor.detach()).reshape(-1).cpu().contiguous().view(torch.uint8).numpy()
        return [flat[start : start + _CHUNK] for start in range(0, max(1, len(flat)), _CHUNK)]

    def digest(piece: Any) -> bytes:
        return hashlib.sha256(piece).digest()

    found = []
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        # Lazily: what comes from another device is in memory one tensor at a time.
        for tensor in tensors:
            found.append(hashlib.sha256(b"".join(pool.map(digest, pieces(tensor)))).digest())
    return found


def sampled(attached: Attachment) -> str:
    """The digest of version 0.1: attention weights of memory layers whole, a thousand numbers of the others below."""
    digest = hashlib.sha256()
    top = max(attached.memory_layers, default=-1)
    for index in attached.memory_layers:
        for name, parameter in sorted(attached.attentions[index].named_parameters()):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for name, parameter in attached.model.named_parameters():
        layer = re.search(r"\blayers\.(\d+)\.", name)
        if layer is not None and int(layer.group(1)) <= top:
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu()
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()

"""The adapters of a model: each is loaded by name into a slot, which it keeps until no request uses it any more."""

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jfa_models.checkpoints.changes import changes_of
from jfa_models.checkpoints.peft import Adapter, check_fit
from jfa_models.model.config import DecoderConfig
from jfa_models.model.lora import NO_ADAPTER, Adapters, Change
from jfa_models.model.partition import WHOLE, Partition

# Modules that have room for every adapter's low-rank parts if max_adapters is set, so that the first adapter that
# changes one of them compiles nothing.
_ROOM = tuple(f"attention.{name}" for name in "qkvo") + tuple(f"mlp.{name}" for name in ("gate", "up", "down"))

_SLOT_AXIS = {"a": -3, "b": -3}  # of the fields of Change; of others it is the first

Changes = Mapping[str, Change]  # of one slot, in NumPy
Names = str | Sequence[str | None] | None  # one adapter for all rows or prompts, or one for each


@dataclasses.dataclass(eq=False)
class Loaded:
    """An adapter in a slot.

    Attributes:
      number: unique, also among adapters that were loaded under the same name: a part of the key of cached prefixes.
      users: requests that use it; until there are none its slot is not given to another.
      alone: arrays with only this adapter, made when a step first has no other.
    """

    name: str
    number: int
    slot: int
    adapter: Adapter
    changes: Changes
    users: int = 0
    is_unloaded: bool = False
    alone: Adapters | None = None


class AdapterBank:
    """The loaded adapters of one model. Any thread may call its methods.

    Attributes:
      on_device: the arrays of all adapters; None: none is loaded.
    """

    def __init__(
        self,
        config: DecoderConfig,
        shapes: Mapping[str, tuple[int, ...]],
        weight_of: Callable[[str], Float[np.ndarray, "..."]],
        *,
        dtype: DTypeLike,
        max_adapters: int | None,
        max_rank: int | None,
        partition: Partition = WHOLE,
    ):
        """max_adapters, max_rank: see from_pretrained."""
        for name, value in (("max_adapters", max_adapters), ("max_rank", max_rank)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer >= 1, or None for no limit, got {value!r}")
        if (max_adapters is None) != (max_rank is None):
            raise ValueError(
                f"max_adapters and max_rank reserve memory together: give both or neither, got {max_adapters} "
                f"and {max_rank}"
            )
        self._config, self._shapes, self._weight_of, self._dtype = config, shapes, weight_of, dtype
        self._max_adapters, self._max_rank = max_adapters, max_rank
        self._partition = partition
        self._slots: list[Loaded | None] = [None] * (max_adapters or 0)
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self.on_device: Adapters | None = None
        if max_adapters is not None:
            self.on_device = self._built([], max_adapters)
            for arrays in (self.on_device, _one_slot(self.on_device)):  # compiles how a slot is filled
                self._placed(arrays, {}, 0)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters that new requests can use."""
        return tuple(one.name for one in self._slots if one is not None and not one.is_unloaded)

    @property
    def first(self) -> str | None:
        """The first of the names; None: there are none."""
        return next(iter(self.names), None)

    @property
    def limits(self) -> dict[str, int | None]:
        """max_adapters and max_rank."""
        return {"max_adapters": self._max_adapters, "max_rank": self._max_rank}

    def find(self, name: str | None) -> Loaded | None:
        """The adapter of this name; None for no name.

        Raises:
          ValueError: there is none of this name.
        """
        if name is None:
            return None
        for one in self._slots:
            if one is not None and one.name == name and not one.is_unloaded:
                return one
        names = ", ".join(map(repr, self.names)) or "none is"
        raise ValueError(f"there is no adapter {name!r}; loaded: {names} (load_adapter loads one)")

    def load(self, name: str, adapter: Adapter, scale: float) -> None:
        """Puts an adapter into a free slot.

        Raises:
          ValueError: the name is taken, the adapter does not fit the model, or there is no room for it.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of an adapter must be a string that is not empty, got {name!r}")
        check_fit(adapter, self._config, self._shapes)
        adapter = scaled(adapter, scale)
        changes = changes_of(adapter, self._config, self._shapes, self._weight_of)
        _check_finite(name, changes, self._dtype)
        with self._lock:
            if name in self.names:
                raise ValueError(f"an adapter {name!r} is loaded already: unload it first, or use another name")
            rank = max((x.a.shape[-2] for x in changes.values() if x.a is not None), default=0)
            if self._max_rank is not None and rank > self._max_rank:
                raise ValueError(f"adapter {name!r} has rank {rank}, more than max_rank={self._max_rank}")
            free = [slot for slot, one in enumerate(self._slots) if one is None]
            if not free and self._max_adapters is not None:
                raise ValueError(
                    f"all {self._max_adapters} slots are in use ({', '.join(one.name for one in self._slots if one)}): "
                    "unload an adapter, or raise max_adapters"
                )
            slot = free[0] if free else len(self._slots)
            one = Loaded(name, next(self._numbers), slot, adapter, changes)
            # its weights before its name: another thread may launch a step at any time
            if self.on_device is not None and self._has_room(self.on_device, one):
                self.on_device = self._placed(self.on_device, changes, slot)
            else:
                loaded = [*(one for one in self._slots if one is not None), one]
                self.on_device = self._built(loaded, max(len(self._slots), slot + 1))
                for each in loaded:
                    each.alone = None  # its arrays lack the new fields
            self._slots[slot : slot + 1] = [one]

    def unload(self, name: str) -> None:
        """Removes an adapter: at once for new requests, and for those that use it when they end."""
        with self._lock:
            one = self.find(name)
            assert one is not None
            one.is_unloaded = True
            self._free(one)

    @contextlib.contextmanager
    def using(self, loaded: Sequence[Loaded | None]) -> Iterator[None]:
        """Keeps the slots of adapters inside of a `with` statement."""
        with contextlib.ExitStack() as held:
            for one in loaded:
                self.hold(one)
                held.callback(self.release, one)
            yield

    def hold(self, one: Loaded | None) -> None:
        """Counts a request that uses an adapter.

        Raises:
          ValueError: it was unloaded in the meantime.
        """
        if one is not None:
            with self._lock:
                if one.is_unloaded:
                    raise ValueError(f"adapter {one.name!r} was unloaded")
                one.users += 1

    def release(self, one: Loaded | None) -> None:
        """The end of a request for which hold was called."""
        if one is not None:
            with self._lock:
                one.users -= 1
                self._free(one)

    def _free(self, one: Loaded) -> None:
        if one.is_unloaded and not one.users and self._slots[one.slot] is one:
            self._slots[one.slot] = None
            loaded = [one for one in self._slots if one is not None]
            if not loaded and self._max_adapters is None:
                self._slots.clear()
                self.on_device = None
            elif any(change.whole is not None for change in one.changes.values()):
                self.on_device = self._built(loaded, len(self._slots))

    def for_rows(
        self, loaded: Sequence[Loaded | None], size: int, *, whole: bool = False
    ) -> tuple[Int[np.ndarray, " size"] | None, Adapters | None]:
        """The slot of each row of a step of `size` rows, and the arrays to which the slots belong.

        Without adapters both are None; if all rows that have one have the same, the arrays have no others.

        Args:
          loaded: the adapters of the first rows.
          whole: always the arrays of all adapters.
        """
        used = {one for one in loaded if one is not None}
        arrays = self.on_device
        if not used or arrays is None:
            return None, None
        slots = np.full(size, NO_ADAPTER, np.int32)
        slots[: len(loaded)] = [NO_ADAPTER if one is None else one.slot for one in loaded]
        if whole or len(used) > 1 or arrays.num_slots == 1:
            return slots, arrays
        return np.where(slots == NO_ADAPTER, slots, 0), self._alone(used.pop())

    def variants(self) -> list[Adapters | None]:
        """Arrays of each structure that for_rows returns, to compile the steps with."""
        if self.on_device is None:
            return [None]
        if self.on_device.num_slots == 1:
            return [None, self.on_device]
        return [None, self.on_device, self._placed(_one_slot(self.on_device), {}, 0)]

    def _alone(self, one: Loaded) -> Adapters:
        """Arrays of one slot with the same fields as those of all, so that all adapters run the same program."""
        with self._lock:
            assert self.on_device is not None
            if one.alone is None:
                one.alone = self._placed(_one_slot(self.on_device, one.slot), one.changes, 0)
            return one.alone

    @staticmethod
    def _has_room(arrays: Adapters, one: Loaded) -> bool:
        """Whether an adapter fits the arrays on the device as they are."""
        if arrays.num_slots <= one.slot:
            return False
        for name, change in one.changes.items():
            room = arrays.changes.get(name, Change())
            if change.whole is not None or any(getattr(room, x) is None for x in _given(change)):
                return False
            if change.a is not None and room.a is not None and change.a.shape[-2] > room.a.shape[-2]:
                return False
        return True

    def _built(self, loaded: Sequence[Loaded], num_slots: int) -> Adapters:
        """New arrays with room for these adapters, and filled with them."""
        names = list(dict.fromkeys(name for one in loaded for name in one.changes))
        if self._max_adapters is not None:
            room = [name.removesuffix(".weight") for name in self._shapes if name.endswith(".weight")]
            room = [name for name in room if name.endswith(_ROOM) and len(self._shapes[f"{name}.weight"]) == 2]
            names = list(dict.fromkeys(names + room))
        arrays = Adapters({name: self._empty(name, loaded, num_slots) for name in names}, num_slots)
        arrays = self._partition.put(arrays, self._partition.of_adapters(arrays))
        for one in loaded:
            arrays = self._placed(arrays, one.changes, one.slot)
        return arrays

    def _placed(self, arrays: Adapters, changes: Changes, slot: int) -> Adapters:
        """With a slot filled."""
        parts = {name: _padded(changes.get(name), room) for name, room in arrays.changes.items()}
        filled = _with_slot(arrays, parts, np.int32(slot))
        return self._partition.put(filled, self._partition.of_adapters(filled))

    def _empty(self, name: str, loaded: Sequence[Loaded], num_slots: int) -> Change:
        """Room for a module's changes by all slots."""
        found = [(one.slot, change) for one in loaded if (change := one.changes.get(name)) is not None]
        fields: dict[str, Any] = {}
        for _, change in found:
            for field in _given(change) - {"a", "b", "whole"}:
                fields[field] = jnp.zeros((num_slots, getattr(change, field).shape[-1]), jnp.float32)
        rank = max((change.a.shape[-2] for _, change in found if change.a is not None), default=0)
        rank = max(rank, self._max_rank or 0)
        if rank:
            own = "lm_head.weight" if "lm_head.weight" in self._shapes else "embed.weight"
            *experts, out, columns = self._shapes[own if name == "lm_head" else f"{name}.weight"]
            fields["a"] = jnp.zeros((*experts, num_slots, rank, columns), self._dtype)
            fields["b"] = jnp.zeros((*experts, num_slots, rank, out), self._dtype)
        if whole := [(slot, change.whole) for slot, change in found if change.whole is not None]:
            fields["whole"] = jnp.asarray(np.concatenate([x for _, x in whole]), self._dtype)
            fields["whole_slot"] = jnp.asarray([slot for slot, _ in whole], jnp.int32)
        return Change(**fields)


def names_of(names: Names, num_prompts: int) -> list[str | None]:
    """The adapter of each prompt.

    Raises:
      ValueError: there are not as many as prompts.
    """
    if names is None or isinstance(names, str):
        return [names] * num_prompts
    if not isinstance(names, Sequence):
        raise ValueError(f"adapter must be one name, or one per prompt, got {names!r}")
    if len(names) != num_prompts:
        raise ValueError(f"adapter must be one name, or one per prompt, got {len(names)} for {num_prompts} prompts")
    return list(names)


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """The adapter with another lora_alpha: its low-rank parts multiplied by scale.

    Raises:
      ValueError: the scale is not a number, or the adapter changes weights in other ways too.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not np.isfinite(scale):
        raise ValueError(f"scale must be a number, got {scale!r}")
    if scale == 1:
        return adapter
    others = {kind for kinds in adapter.tensors.values() for kind in kinds} & {"weight", "bias", "rows"}
    if others:
        raise ValueError(
            f"scale={scale} needs an adapter of low-rank parts only, but this one also replaces whole parameters "
            f"({', '.join(sorted(others))}): use scale=1"
        )
    config = adapter.config
    alphas = {name: alpha * scale for name, alpha in config.alpha_pattern.items()}
    config = dataclasses.replace(config, lora_alpha=config.lora_alpha * scale, alpha_pattern=alphas)
    return dataclasses.replace(adapter, config=config)


def _check_finite(name: str, changes: Changes, dtype: DTypeLike) -> None:
    """Raises ValueError for NaN and infinities, which would reach the rows of other adapters: 0 * NaN is not 0."""
    most = float(jnp.finfo(dtype).max)
    for module, change in changes.items():
        for field in sorted(_given(change)):
            if not np.abs(getattr(change, field)).max(initial=0.0) <= most:
                raise ValueError(
                    f"adapter {name!r} changes {module} ({field}) by numbers that are not finite in "
                    f"{jnp.dtype(dtype).name}"
                )


def _given(change: Change) -> set[str]:
    names = {field.name for field in dataclasses.fields(change) if getattr(change, field.name) is not None}
    return names - {"whole_slot"}


def _padded(change: Change | None, room: Change) -> Change:
    """One slot's part in the shapes of the arrays that it is put into."""

    def part(name: str, like: Array | None) -> Any:
        if like is None or name in ("whole", "whole_slot"):
            return None
        axis = _SLOT_AXIS.get(name, 0)
        shape = list(like.shape)
        shape[axis] = 1
        out, given = np.zeros(shape, np.float32), None if change is None else getattr(change, name)
        if given is not None:
            out[tuple(map(slice, given.shape))] = given
        return out

    return Change(**{field.name: part(field.name, getattr(room, field.name)) for field in dataclasses.fields(Change)})


def _one_slot(arrays: Adapters, slot: int | None = None) -> Adapters:
    """Empty arrays with one slot and the fields of others; whole weights are those of the given slot."""

    def narrow(change: Change) -> Change:
        fields: dict[str, Any] = {}
        for name in _given(change) - {"whole"}:
            shape = list(getattr(change, name).shape)
            shape[_SLOT_AXIS.get(name, 0)] = 1
            fields[name] = jnp.zeros(shape, getattr(change, name).dtype)
        if change.whole is not None and change.whole_slot is not None:
            own = [i for i, x in enumerate(change.whole_slot.tolist()) if x == slot]
            fields |= {"whole": change.whole[own[0]][None], "whole_slot": jnp.zeros(1, jnp.int32)} if own else {}
        return Change(**fields)

    return Adapters({name: narrow(change) for name, change in arrays.changes.items()}, 1)


@jax.jit
def _with_slot(adapters: Adapters, parts: Changes, slot: Int[Array, ""]) -> Adapters:
    def put(name: str, whole: Array | None, part: Array | None) -> Array | None:
        if whole is None or part is None:
            return whole
        axis = _SLOT_AXIS.get(name, 0) % whole.ndim
        return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), slot, axis)

    changes = {}
    for name, change in adapters.changes.items():
        part = parts[name]
        fields = [field.name for field in dataclasses.fields(Change)]
        changes[name] = Change(**{field: put(field, getattr(change, field), getattr(part, field)) for field in fields})
    return Adapters(changes, adapters.num_slots)
